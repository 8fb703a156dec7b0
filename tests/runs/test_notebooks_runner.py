"""`dkto.runs.notebooks`: what a notebook declares, what is refused before anything starts, and what a run leaves."""

import json
import math
import os
import sys
from pathlib import Path
from unittest import mock

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from dkto.common import progress as bars
from dkto.runs.notebooks import (
    Parameter,
    check_parameters,
    coerce,
    declared_parameters,
    environment_table,
    project_path,
    run_notebook,
    write_metrics,
)

PARAMETERS = """\
rate: float = 1e-4  # step size, no unit
steps: int = 3  # optimiser steps
colour: str = "#d55e00"  # of the undesirable samples
quiet: bool = False  # no figure
gammas: list = [0.5, 0.8]  # chances of a desirable sample
seed: int = 0  # of everything
output_dir: str = "out"  # metrics land here
"""
HAND_OVER = """\
from dkto.runs.notebooks import write_metrics
write_metrics(output_dir, {"rate": rate, "steps": steps}, {"rate": rate, "steps": steps}, seed)
"""

ROOT = Path(__file__).parents[2]


@pytest.fixture
def make(tmp_path):
    """Write a small notebook: its parameters cell and the cells below."""

    def write(*cells, parameters=PARAMETERS, tagged=1, name="lesson.ipynb", metadata=None):
        head = [new_code_cell(parameters, metadata={"tags": ["parameters"]}) for _ in range(tagged)]
        notebook = new_notebook(cells=[new_markdown_cell("# Why?"), *head, *map(new_code_cell, cells)])
        notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}} | (metadata or {})
        nbformat.write(notebook, tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def nothing_starts():
    """Fail if papermill is called."""
    with mock.patch("papermill.execute_notebook", side_effect=AssertionError("papermill was started")):
        yield


# What a notebook declares


@pytest.mark.parametrize("text", ["{}", "[1]", '{"cells": 3}', "{"])
def test_a_file_that_is_no_notebook_is_named(tmp_path, text):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=r"notebook .*metrics\.json is no notebook: "):
        declared_parameters(tmp_path / "metrics.json")


def test_declared_parameters_have_type_default_and_comment(make):
    found = declared_parameters(make())
    assert list(found) == ["rate", "steps", "colour", "quiet", "gammas", "seed", "output_dir"]
    assert found["rate"] == Parameter("rate", "float", 1e-4, "step size, no unit")
    assert found["gammas"] == Parameter("gammas", "list", [0.5, 0.8], "chances of a desirable sample")


def test_a_hash_inside_a_string_is_no_comment(make):
    assert declared_parameters(make())["colour"] == Parameter("colour", "str", "#d55e00", "of the undesirable samples")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("seed = 0", r"parameters must read 'name: type = literal', got 'seed = 0'"),
        ("seed: int", r"parameters must read 'name: type = literal', got 'seed: int'"),
        ("import os", r"parameters must read 'name: type = literal', got 'import os'"),
        ("seed: int | None = None", r"type of seed must be one of int, float, str, bool, list, got int \| None"),
        ("steps: int = 2 * width", r"default of steps must be a literal, got 2 \* width"),
        ("rate: float = 1", r"default of rate must be float, got 1"),
        ("steps: int = True", r"default of steps must be int, got True"),
        ("seed: int = 0\nseed: int = 1", r"parameter seed is declared twice"),
        ("seed: int = 0\nsteps: int =", r"line 2 of its parameters is not Python"),
    ],
)
def test_a_cell_that_declares_anything_else_is_refused(make, source, sentence):
    with pytest.raises(ValueError, match=f"lesson.ipynb: {sentence}"):
        declared_parameters(make(parameters=source))


@pytest.mark.parametrize("tagged", [0, 2])
def test_there_is_one_parameters_cell(make, tagged):
    with pytest.raises(ValueError, match=f"must have one cell tagged 'parameters', found {tagged}"):
        declared_parameters(make(tagged=tagged))


def test_a_missing_notebook_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.ipynb does not exist"):
        declared_parameters(tmp_path / "nowhere.ipynb")


CELL = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["seed: int = 0"]}


def deep(value, levels):
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[" * 3000, r"is no notebook: it is nested too deeply"),
        ({"cells": [], "nbformat": 3}, r"must be of format 4, got 3: open and save it with Jupyter"),
        ({"cells": [], "nbformat": 4, "metadata": []}, r"is no notebook: metadata must be an object, got"),
        ({"cells": [CELL, 7], "nbformat": 4}, r"cell 2: expected an object, got 7"),
        ({"cells": [CELL | {"cell_type": "kode"}], "nbformat": 4}, r"cell 1: cell_type must be code, .*, got 'kode'"),
        (
            {"cells": [CELL | {"source": {}}], "nbformat": 4},
            r"cell 1: source must be text or a list of lines, got \{\}",
        ),
        ({"cells": [CELL | {"source": [1]}], "nbformat": 4}, r"cell 1: source must be text .*, got \[1\]"),
        ({"cells": [CELL | {"source": "a = '\ud800'"}], "nbformat": 4}, r"cell 1: source must be text"),
        ({"cells": [CELL | {"metadata": None}], "nbformat": 4}, r"cell 1: metadata must be an object, .*, got None"),
        ({"cells": [CELL | {"metadata": {"tags": 3}}], "nbformat": 4}, r"cell 1: metadata must be an object, its tags"),
        (
            {"cells": [CELL | {"source": "a: int = 1\0"}], "nbformat": 4},
            r"its parameters (is not Python|are nested too deep)",
        ),
        (
            {"cells": [CELL | {"source": f"a: list = {'(' * 5000}"}], "nbformat": 4},
            r"its parameters (is not|are nested)",
        ),
        (
            {"cells": [CELL | {"source": f"a: int = {'-' * 5000}1"}], "nbformat": 4},
            r"its parameters (is not|are nested)|a literal",
        ),
        ({"cells": [CELL | {"source": "a: list = {[]: 1}"}], "nbformat": 4}, r"default of a must be a literal"),
        ({"cells": [CELL | {"source": "a: float = 1e999"}], "nbformat": 4}, r"parameter a must be finite, got inf"),
        ({"cells": [CELL | {"source": "a: list = [b'x']"}], "nbformat": 4}, r"a may hold numbers, texts and lists"),
    ],
)
def test_every_damage_to_a_notebook_is_one_sentence_with_its_name(tmp_path, text, sentence):
    path = tmp_path / "lesson.ipynb"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(ValueError, match=rf"^notebook .*lesson\.ipynb.*{sentence}") as caught:
        declared_parameters(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"nbformat_minor": "x"}, r"notebook .*lesson.ipynb is no notebook"),
        ({"metadata": {"deep": deep(1, 600)}}, r"notebook .*lesson.ipynb is no notebook"),
        ({"metadata": {"title": "\ud800"}}, r"notebook .*lesson.ipynb is no notebook: .*surrogates not allowed"),
        ({"metadata": {"kernelspec": 3}}, r"notebook .*lesson.ipynb is no notebook"),
    ],
)
def test_what_papermill_could_not_read_is_refused_before_it_starts(make, tmp_path, nothing_starts, change, sentence):
    path = make(HAND_OVER)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=sentence) as caught:
        run_notebook(path, tmp_path / "done.ipynb", {"output_dir": str(tmp_path / "out")}, progress=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


# What a notebook may be told


@pytest.mark.parametrize(
    ("type_name", "given", "read"),
    [
        ("float", "1e-7", 1e-7),  # what PyYAML makes of 1e-7
        ("float", 2, 2.0),
        ("int", "12", 12),
        ("int", 12, 12),
        ("bool", "yes", True),
        ("bool", "False", False),
        ("bool", True, True),
        ("str", "12", "12"),
        ("list", "[1, 2]", [1, 2]),
        ("list", [1, 2], [1, 2]),
    ],
)
def test_values_are_read_by_the_declared_type(type_name, given, read):
    value = coerce(Parameter("p", type_name, None, ""), given, "lesson.ipynb")
    assert value == read
    assert type(value) is type(read)


@pytest.mark.parametrize(
    ("type_name", "given"),
    [
        ("float", "fast"),
        ("float", True),
        ("float", None),
        ("int", 1.5),
        ("int", "1.5"),
        ("int", True),
        ("bool", 1),
        ("bool", "maybe"),
        ("str", 12),
        ("list", "[1,"),
        ("list", "12"),
    ],
)
def test_mistyped_values_are_refused(type_name, given):
    with pytest.raises(TypeError) as caught:
        coerce(Parameter("p", type_name, None, ""), given, "lesson.ipynb")
    assert str(caught.value) == f"lesson.ipynb: parameter p must be {type_name}, got {given!r}"


@pytest.mark.parametrize(
    ("type_name", "given", "sentence"),
    [
        ("float", "nan", "parameter p must be finite, got nan"),
        ("float", math.inf, "parameter p must be finite, got inf"),
        ("list", "[1, [NaN]]", "parameter p must be finite, got nan"),
        ("list", '["a", {"b": 1}]', "parameter p may hold numbers, texts and lists, got {'b': 1}"),
        ("str", "a\0b", r"parameter p must be text without NUL and half signs, got 'a\\x00b'"),
        ("str", "\ud800", r"parameter p must be text without NUL and half signs, got '\\ud800'"),
        ("float", 10**400, "parameter p must be float, got 1000"),
        ("list", "[" * 3000, r"parameter p must be list, got '\[\["),
        ("int", "9" * 5000, "parameter p must be int, got '9999"),
    ],
)
def test_values_that_no_record_or_command_line_can_hold_are_refused(type_name, given, sentence):
    with pytest.raises((TypeError, ValueError), match=f"^lesson.ipynb: {sentence}") as caught:
        coerce(Parameter("p", type_name, None, ""), given, "lesson.ipynb")
    assert len(str(caught.value)) < 200


def test_an_unknown_name_is_refused_with_the_nearest_one(make):
    with pytest.raises(ValueError, match=r"^lesson.ipynb has no parameter 'step'; did you mean 'steps'\? known: rate,"):
        check_parameters(make(), {"step": 5})


def test_without_a_near_name_the_known_ones_are_listed(make):
    with pytest.raises(ValueError, match=r"^lesson.ipynb has no parameter 'xyz'; known: rate, steps, colour, quiet,"):
        check_parameters(make(), {"xyz": 5})


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"stepss": 5}, ValueError, "no parameter 'stepss'"),
        ({"rate": "fast"}, TypeError, "parameter rate must be float, got 'fast'"),
    ],
)
def test_nothing_starts_with_wrong_parameters(make, tmp_path, nothing_starts, given, error, sentence):
    with pytest.raises(error, match=sentence):
        run_notebook(make(HAND_OVER), tmp_path / "done.ipynb", given, progress=False)
    assert not (tmp_path / "done.ipynb").exists()


def test_a_notebook_without_output_dir_is_refused(make, tmp_path, nothing_starts):
    with pytest.raises(ValueError, match="must declare the parameter output_dir; declared: seed"):
        run_notebook(make(parameters="seed: int = 0"), tmp_path / "done.ipynb")


# Runs


def test_a_run_returns_what_the_notebook_wrote(make, tmp_path, monkeypatch, capfd):
    """A relative `output_dir` is taken from where the caller stands; text from a shell arrives as a number."""
    monkeypatch.chdir(tmp_path)
    before = make("assert isinstance(rate, float)\nimport os\nassert os.environ['DKTO_QUIET']", HAND_OVER)
    metrics = run_notebook(before, "kept/done.ipynb", {"rate": "1e-7", "output_dir": "here"}, progress=False)
    assert metrics == {"rate": 1e-7, "steps": 3}
    written = json.loads((tmp_path / "here" / "metrics.json").read_text())
    assert written["metrics"] == metrics
    executed = nbformat.read(tmp_path / "kept" / "done.ipynb", as_version=4)
    assert executed.metadata.papermill.parameters == {"rate": 1e-7, "output_dir": "here"}
    assert "DKTO_QUIET" not in os.environ
    assert capfd.readouterr() == ("", "")


def test_a_failing_cell_is_one_sentence_and_keeps_the_executed_notebook(make, tmp_path):
    output = tmp_path / "done.ipynb"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text('{"metrics": {"stale": 1}}')
    lesson = make("print('so far')", "raise KeyError('no such likes')", HAND_OVER)
    with pytest.raises(RuntimeError) as caught:
        run_notebook(lesson, output, {"output_dir": str(tmp_path / "out")}, progress=False)
    assert str(caught.value) == f"lesson.ipynb, cell 4: KeyError: 'no such likes' (executed copy: {output})"
    assert type(caught.value.__cause__).__name__ == "PapermillExecutionError"
    executed = nbformat.read(output, as_version=4)
    assert "so far" in json.dumps([cell.get("outputs") for cell in executed.cells])
    assert not (tmp_path / "out" / "metrics.json").exists(), "metrics of an earlier run must not pass for this one's"


def test_a_kernel_that_dies_is_one_sentence(make, tmp_path):
    lesson = make("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(RuntimeError, match=r"^lesson.ipynb: its kernel died, most often for lack of memory"):
        run_notebook(lesson, tmp_path / "done.ipynb", {"output_dir": str(tmp_path)}, progress=False)
    assert (tmp_path / "done.ipynb").is_file()


def test_a_notebook_that_writes_no_metrics_is_told_so(make, tmp_path):
    with pytest.raises(RuntimeError, match=r"^lesson.ipynb ran to its end but wrote no metrics.json into"):
        run_notebook(make("1 + 1"), tmp_path / "done.ipynb", {"output_dir": str(tmp_path)}, progress=False)


def test_a_notebook_without_kernelspec_runs(make, tmp_path):
    lesson = make(HAND_OVER)
    notebook = nbformat.read(lesson, as_version=4)
    notebook.metadata = {}
    nbformat.write(notebook, lesson)
    metrics = run_notebook(lesson, tmp_path / "done.ipynb", {"output_dir": str(tmp_path), "steps": 7}, progress=False)
    assert metrics["steps"] == 7


@pytest.mark.parametrize("way", ["same", "relative", "link", "hard link"])
def test_a_run_never_writes_over_its_notebook(make, tmp_path, monkeypatch, nothing_starts, way):
    lesson, output = make(HAND_OVER), tmp_path / "other.ipynb"
    before = lesson.read_bytes()
    if way == "same":
        output = lesson
    elif way == "relative":
        (tmp_path / "sub").mkdir()
        monkeypatch.chdir(tmp_path / "sub")
        output = "../lesson.ipynb"
    else:
        (output.symlink_to if way == "link" else output.hardlink_to)(lesson)
    with pytest.raises(ValueError, match="is the notebook itself, which would be lost"):
        run_notebook(lesson, output, {"output_dir": str(tmp_path / "out")}, progress=False)
    assert lesson.read_bytes() == before


def test_nor_over_another_that_was_not_executed(make, tmp_path, nothing_starts):
    lesson, other = make(HAND_OVER), make("1 + 1", name="other.ipynb")
    with pytest.raises(ValueError, match=r"other.ipynb is a notebook that was not executed, which would be lost"):
        run_notebook(lesson, other, {"output_dir": str(tmp_path / "out")}, progress=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "linked.ipynb").symlink_to(tmp_path / "done.ipynb")
    (tmp_path / "done.ipynb").write_text("{}")
    with pytest.raises(ValueError, match=r"linked.ipynb is a link that leaves its folder"):
        run_notebook(lesson, tmp_path / "out" / "linked.ipynb", {"output_dir": str(tmp_path / "x")}, progress=False)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / ".lock").symlink_to(lesson)
    with pytest.raises(ValueError, match=r"x/.lock is a link: remove it"):
        run_notebook(lesson, tmp_path / "new.ipynb", {"output_dir": str(tmp_path / "x")}, progress=False)
    assert "cells" in lesson.read_text()
    with pytest.raises(IsADirectoryError, match="is a folder: name a file in it"):
        run_notebook(lesson, tmp_path, {"output_dir": str(tmp_path / "out")}, progress=False)


@pytest.mark.parametrize("given", ["", " "])
def test_a_run_has_a_folder_of_its_own(make, tmp_path, monkeypatch, nothing_starts, given):
    lesson, output = make(HAND_OVER), tmp_path / "done.ipynb"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"output_dir must name the folder of the run, got '{given}'"):
        run_notebook(lesson, output, {"output_dir": given}, progress=False)
    with pytest.raises(NotADirectoryError, match=r"output_dir .*lesson.ipynb is a file: choose another folder"):
        run_notebook(lesson, output, {"output_dir": str(lesson)}, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lesson.ipynb"]


@pytest.mark.process
def test_an_executed_copy_is_its_notebook_and_the_kernel_is_this_interpreter(make, tmp_path, monkeypatch):
    """A cell that a former run put in does not count, whatever mark, brace or kernel of another Python there is."""
    spec = tmp_path / "home" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["/bin/false"], "display_name": "another", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "home"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    lesson = make("import sys; assert sys.executable == " + repr(sys.executable), HAND_OVER, name="{steps}.ipynb")
    notebook = json.loads(lesson.read_text())
    stale = {"cell_type": "code", "metadata": {"tags": ["injected-parameters"]}, "source": "steps = 99", "outputs": []}
    notebook["cells"].insert(2, stale | {"execution_count": 3})
    del notebook["cells"][3]["metadata"]
    notebook["metadata"]["papermill"] = {"parameters": {"steps": 99}}
    lesson.write_text("\ufeff" + json.dumps(notebook))
    parameters = {"output_dir": str(tmp_path / "{rate}")}
    metrics = run_notebook(lesson, tmp_path / "{rate}" / "done.ipynb", parameters, progress=False)
    assert metrics["steps"] == 3
    executed = nbformat.read(tmp_path / "{rate}" / "done.ipynb", as_version=4)
    assert executed.metadata.papermill.parameters == parameters and "steps = 99" not in json.dumps(executed.cells)
    record = json.loads((tmp_path / "{rate}" / "run.json").read_text())
    assert record["parameters"]["steps"] == 3


# Results


def test_metrics_carry_what_is_needed_to_read_them(tmp_path):
    path = write_metrics(
        tmp_path / "new", {"win_rate/a/low": np.float32(0.5), "n": np.int64(60)}, {"beta": 5.0}, seed=3
    )
    written = json.loads(path.read_text())
    assert written["schema_version"] == 1
    assert written["metrics"] == {"win_rate/a/low": 0.5, "n": 60}
    assert (written["parameters"], written["seed"]) == ({"beta": 5.0}, 3)
    assert {"python", "dkto", "torch", "diffusers", "transformers"} <= set(written["versions"])
    assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan"), "0.5", None, True, {"low": 0.5}])
def test_a_metric_that_is_no_finite_number_is_refused_and_nothing_is_written(tmp_path, value):
    with pytest.raises(ValueError, match=r"metric 'win_rate' must be a finite number, got"):
        write_metrics(tmp_path, {"seconds": 1.0, "win_rate": value}, {}, seed=0)
    assert not (tmp_path / "metrics.json").exists()


def test_an_interrupted_write_leaves_the_old_metrics(tmp_path):
    write_metrics(tmp_path, {"seconds": 1.0}, {}, seed=0)
    with mock.patch("pathlib.Path.replace", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        write_metrics(tmp_path, {"seconds": 2.0}, {}, seed=0)
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"] == {"seconds": 1.0}


@pytest.mark.parametrize("name", ["papermill_runs/reference/sweep", "likes/likes.csv"])
def test_a_default_path_is_found_from_wherever_a_kernel_starts(name, tmp_path, monkeypatch):
    for folder in (ROOT, ROOT / "notebooks", ROOT / "notebooks" / "solutions", tmp_path):
        monkeypatch.chdir(folder)
        assert project_path(name).exists()
    assert project_path("nowhere.csv") == Path("nowhere.csv"), "the reader's sentence names what was asked for"
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).touch()
    assert project_path(name) == Path(name), "what lies here comes first"


def test_environment_table_names_versions_and_device():
    table = environment_table()
    assert {"python", "torch", "diffusers", "device"} <= {*table.index, *table.columns}
    assert sys.version.split()[0] in table.to_string()


def test_bars_are_quiet_under_the_runner(monkeypatch, capfd):
    monkeypatch.setenv(bars.QUIET_VARIABLE, "1")
    assert list(bars.progress(range(3))) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")
    monkeypatch.delenv(bars.QUIET_VARIABLE)
    assert list(bars.progress(range(3), desc="steps")) == [0, 1, 2]
    assert "steps: 100%" in capfd.readouterr().err
