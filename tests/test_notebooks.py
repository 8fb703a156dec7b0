"""The form of every notebook, read from the files alone. `test_notebooks_run.py` executes them."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from dkto.runs.notebooks import declared_parameters, parameters_cell

FOLDER = Path(__file__).parent.parent / "notebooks"
LESSONS = sorted([*FOLDER.glob("*.ipynb"), *FOLDER.glob("experiments/*.ipynb")])
SOLUTIONS = sorted(FOLDER.rglob("solutions/*.ipynb"))
NOTEBOOKS = sorted(path for path in FOLDER.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)

LONGEST_CELL = 25
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~-])/(?:home|root|Users|tmp|mnt|opt|srv|usr|var|work|data)/|\b[A-Z]:\\")

every_notebook = pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda path: str(path.relative_to(FOLDER).with_suffix(""))
)
every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def names_read(source):
    """Names that a cell reads; lines for the shell or with magics are no Python and are skipped."""
    python = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))
    nodes = ast.walk(ast.parse(python))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def test_there_are_notebooks():
    assert NOTEBOOKS, "notebooks/ is empty: the checks below would pass without checking anything"


@every_notebook
def test_kernel_is_python3(path):
    assert read(path).metadata.kernelspec.name == "python3"


@every_notebook
def test_cells_are_clean(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor >= 5) == (4, True), "cell ids need format 4.5"
    identifiers = [cell.id for cell in notebook.cells]
    assert len(set(identifiers)) == len(identifiers)
    for cell in code_cells(notebook):
        assert not cell.outputs, f"stored outputs in cell {cell.id}: make format strips them"
        assert cell.execution_count is None
        assert cell.source.strip(), f"cell {cell.id} is empty"


@every_notebook
def test_cells_are_short(path):
    for cell in code_cells(read(path)):
        source = re.sub(r"^(from|import) [^(\n]*(\([^)]*\))?\n?", "", cell.source, flags=re.M)
        assert len(source.splitlines()) <= LONGEST_CELL, f"cell {cell.id} has more than {LONGEST_CELL} lines"


@every_notebook
def test_no_absolute_path(path):
    for cell in read(path).cells:
        assert not ABSOLUTE_PATH.search(cell.source), f"cell {cell.id} names a place on one machine"


@every_notebook
def test_parameters_are_annotated_literals_with_a_comment(path):
    """One parameters cell, one literal a line (`declared_parameters` refuses anything else), each with its meaning."""
    declared = declared_parameters(path)
    assert {"seed", "output_dir"} <= set(declared)
    assert not Path(declared["output_dir"].default).is_absolute()
    lines = [line for line in parameters_cell(read(path), path.name).source.splitlines() if line.strip()]
    assert len(lines) == len(declared), "one parameter a line, and nothing else"
    for parameter in declared.values():
        assert len(parameter.comment) >= 3, f"{parameter.name} needs a comment: meaning and unit"


@every_notebook
def test_every_parameter_is_used_below(path):
    cells = code_cells(read(path))
    here = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    used = set().union(*(names_read(cell.source) for cell in cells[here + 1 :]))
    assert not set(declared_parameters(path)) - used, "a parameter that nothing reads"


@every_notebook
def test_only_imports_stand_before_the_parameters(path):
    """What is computed there could not follow a parameter."""
    for cell in code_cells(read(path)):
        if "parameters" in cell.metadata.get("tags", []):
            return
        names = {target.id for node in ast.walk(ast.parse(cell.source)) for target in getattr(node, "targets", [])}
        assert not names, f"{names} set before the parameters"


@every_notebook
def test_results_are_handed_over(path):
    assert "write_metrics" in set().union(*(names_read(cell.source) for cell in code_cells(read(path))))


@every_lesson
def test_first_cell_says_what_when_and_how_long(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    title = first.source.splitlines()[0]
    assert title.startswith("# "), "the first line is the title"
    assert title.endswith("?"), "the title is a question"
    for part in (r"You will be able to", r"\bPaper\b", r"Before this|Prerequisites", r"Runtime"):
        assert re.search(part, first.source), f"the first cell lacks {part}"
    assert re.search(r"\d+ (second|minute|hour)s?", first.source), "the runtime is a measured number"


@every_lesson
def test_last_part_sums_up_and_sets_exercises(path):
    cells = read(path).cells
    last_code = max(i for i, cell in enumerate(cells) if cell.cell_type == "code")
    ending = "\n".join(cell.source for cell in cells[last_code + 1 :])
    assert "## What we saw" in ending
    assert "## Exercises" in ending
    exercises = re.findall(r"^\d+\. ", ending.split("## Exercises")[1], flags=re.MULTILINE)
    assert 2 <= len(exercises) <= 4


@every_lesson
def test_every_lesson_has_solutions(path):
    assert (path.parent / "solutions" / path.name).is_file()


def test_every_solution_belongs_to_a_lesson():
    assert {path.name for path in SOLUTIONS} <= {path.name for path in LESSONS}
