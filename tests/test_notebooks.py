"""The form of every notebook, read from the files alone. `test_notebooks_run.py` executes them."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from glossary import TERMS, anchor, first_uses

from dkto.runs.notebooks import declared_parameters, parameters_cell
from dkto.workshop.keep_lessons import is_current

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
    start = max(i for i, cell in enumerate(cells) if cell.cell_type == "markdown" and "## What we saw" in cell.source)
    ending = "\n".join(cell.source for cell in cells[start:] if cell.cell_type == "markdown")
    said = ending.split("## What we saw")[1].split("## Exercises")[0]
    filled = [cell for cell in cells[start:] if cell.cell_type == "code"]
    assert all("findings(" in cell.source for cell in filled), "after the findings no code stands but theirs"
    assert filled or not re.search(r"\d(\.\d| %)", said), "a number that was seen is filled from the run by `findings`"
    exercises = re.findall(r"^\d+\. ", ending.split("## Exercises")[1], flags=re.MULTILINE)
    assert 2 <= len(exercises) <= 4


@every_lesson
def test_every_lesson_has_solutions(path):
    assert (path.parent / "solutions" / path.name).is_file()


def reading_order():
    """The lessons as notebooks/README.md lists them."""
    listed = (FOLDER / "README.md").read_text().split("## The lessons")[1].split("The experiments replay")[0]
    return re.findall(r"^\| \[(\w+)\]\(\1\.ipynb\)", listed, flags=re.M)


def links(text, word):
    """Text and file of the links after a bold word, up to the end of its sentence."""
    return re.findall(r"\[([^\]]*)\]\(([^)]*)\)", text.split(f"**{word}**:")[1].split("**")[0])


def test_the_lessons_are_one_chain_without_loops_and_orphans():
    order = reading_order()
    assert sorted(order) == sorted(path.stem for path in FOLDER.glob("*.ipynb")), "README.md lists each lesson once"
    notebooks = {name: read(FOLDER / f"{name}.ipynb") for name in order}
    titles = {name: book.cells[0].source.splitlines()[0].removeprefix("# ") for name, book in notebooks.items()}
    named = {f"{name}.ipynb": f"{name[:2]} {title}" for name, title in titles.items()}
    for place, (name, book) in enumerate(notebooks.items()):
        earlier = [f"{other}.ipynb" for other in order[:place]]
        before, following = links(book.cells[0].source, "Before this"), links(book.cells[-1].source, "Next")
        assert bool(before) == (place > 0) and all(named[file] == text for text, file in before), name
        assert all(file in earlier for _, file in before), f"{name} asks for what comes later"
        if place + 1 < len(order):
            after = f"{order[place + 1]}.ipynb"
            assert following == [(named[after], after)], f"{name} must lead to {after}"
        else:
            assert [file for _, file in following] == ["your_own_likes.md"]


KEPT = FOLDER.parent / "papermill_runs" / "reference"
# lessons whose figures wait for their words
WITHOUT_WORDS = {"30_train_with_likes", "40_win_rates"} | {path.stem for path in FOLDER.glob("experiments/*.ipynb")}


@pytest.mark.parametrize("path", [p for p in LESSONS if p.stem not in WITHOUT_WORDS], ids=lambda path: path.stem)
def test_every_figure_of_a_kept_run_has_an_alternative_text(path):
    words = {cell.id: cell.metadata.get("alt", "") for cell in code_cells(read(path))}
    kept = KEPT / path.stem / "notebook.ipynb"
    if not kept.exists() or not is_current(path, kept.with_name("run.json")):
        pytest.skip("no kept run of the present lesson")
    for cell in code_cells(read(kept)):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}) and cell.id in words:
                assert len(words[cell.id]) >= 30, (
                    f"cell {cell.id} draws a figure: say in its metadata, alt, what it shows"
                )
                assert output.metadata["image/png"]["alt"] == words[cell.id]


@every_lesson
def test_words_of_the_glossary_are_linked_where_a_lesson_first_uses_them(path):
    uses = {term: first_uses(read(path), term) for term in TERMS}
    missed = [term for term, use in uses.items() if use and not use[2]]
    assert not missed, f"link to GLOSSARY.md: {', '.join(missed)}"


def test_the_glossary_holds_words_that_lessons_use():
    used = "\n".join(path.read_text() for path in LESSONS)
    assert len(TERMS) >= 20 and sorted(TERMS, key=str.lower) == TERMS
    assert [term for term in TERMS if f"GLOSSARY.md#{anchor(term)})" not in used] == []


def test_every_solution_belongs_to_a_lesson():
    assert {path.name for path in SOLUTIONS} <= {path.name for path in LESSONS}
