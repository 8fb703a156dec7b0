"""Reference runs: kept for every lesson, of the lesson as it is now, small, and made by one command."""

import base64
import io
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from dkto.common.files import write_json
from dkto.runs.record import source_hash
from dkto.runs.sweeps import read_sweep
from dkto.workshop.keep_lessons import (
    EXAMPLE,
    EXAMPLE_FOLDER,
    NOT_RUN_HERE,
    is_current,
    keep_paper,
    lesson_plan,
    make_reference,
    outdated_lessons,
    refreshed,
    shrink,
)

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parents[1] / "files"
REFERENCE = ROOT / "papermill_runs" / "reference"
EXPERIMENTS = sorted((ROOT / "notebooks" / "experiments").glob("*.ipynb"))
LESSONS = [*sorted((ROOT / "notebooks").glob("*.ipynb")), *EXPERIMENTS]
MEGABYTES = 10
# Lessons without a kept run or whose code has changed since, and "sweep", the example whose lesson may still change:
# make reference makes them, and then they leave this list.
NOT_KEPT: set[str] = set()


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_every_lesson_has_a_reference_run_of_its_present_text(lesson):
    folder = REFERENCE / lesson.stem
    if lesson.stem in NOT_RUN_HERE:
        pytest.skip(f"{lesson.stem} {NOT_RUN_HERE[lesson.stem]}")
    if not folder.exists():
        assert lesson.stem in NOT_KEPT, f"{lesson.stem} has no reference run: make reference"
        pytest.skip(f"{lesson.stem} has no reference run yet, as NOT_KEPT says: make reference")
    current = is_current(lesson, folder / "run.json")
    if lesson.stem in NOT_KEPT and not current:
        pytest.skip(f"{lesson.stem} has changed since its reference run, as NOT_KEPT says: make reference")
    assert lesson.stem not in NOT_KEPT, f"{lesson.stem} has a reference run: strike it from NOT_KEPT"
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert current or lesson in EXPERIMENTS, f"{lesson.stem} changed: make reference"
    assert json.loads((folder / "metrics.json").read_text())["metrics"]
    executed = nbformat.read(folder / "notebook.ipynb", as_version=4)
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs and not [output for output in outputs if output.output_type == "error"]
    if not current:  # takes an hour: what it shows is the code that ran
        pytest.skip(f"{lesson.stem} was kept by commit {record['git_commit'][:12]}, older than the notebook")
    text = json.loads(lesson.read_text())
    assert refreshed(json.loads((folder / "notebook.ipynb").read_text()), text)["cells"] == executed_cells(folder)


def executed_cells(folder):
    return json.loads((folder / "notebook.ipynb").read_text())["cells"]


def cell(kind, source, *tags, **more):
    return {"cell_type": kind, "source": source, "metadata": {"tags": list(tags)}} | more


def test_prose_and_imports_of_a_kept_notebook_follow_the_lesson_without_a_run():
    executed = {
        "cells": [
            cell("markdown", "# Old"),
            cell("code", "from a import b", outputs=[]),
            cell("code", "x: int = 1", "parameters", outputs=[]),
            cell("code", "x = 2", "injected-parameters", outputs=[]),
            cell("code", "b(x)", outputs=["a figure"]),
        ]
    }
    lesson = {
        "cells": [
            cell("markdown", "# New"),
            cell("code", "from c import b"),
            cell("code", "x: int = 1", "parameters"),
            cell("markdown", "Look."),
            cell("code", "b(x)"),
        ]
    }
    found = refreshed(executed, lesson)["cells"]
    assert [c["source"] for c in found] == ["# New", "from c import b", "x: int = 1", "x = 2", "Look.", "b(x)"]
    assert found[-1]["outputs"] == ["a figure"]
    lesson["cells"].append(cell("code", "more"))
    with pytest.raises(ValueError, match="has 3 code cells, its notebook 4"):
        refreshed(executed, lesson)


def test_not_kept_names_lessons():
    assert {EXAMPLE_FOLDER, *(path.stem for path in LESSONS)} >= NOT_KEPT


def test_the_example_sweep_was_made_by_the_present_lesson(monkeypatch):
    if EXAMPLE_FOLDER in NOT_KEPT:
        pytest.skip("the example sweep is to be made again, as NOT_KEPT says: make reference")
    monkeypatch.chdir(ROOT)
    plan = read_sweep(f"papermill_runs/sweeps/{EXAMPLE}.yaml")
    for run in plan.runs:
        record = json.loads((REFERENCE / EXAMPLE_FOLDER / run.name / "run.json").read_text())
        assert record["source_hash"] == source_hash(run.notebook), "make reference"


def test_references_are_small_and_name_no_place_on_a_machine():
    files = [path for path in REFERENCE.rglob("*") if path.is_file()]
    assert len(files) >= 2 * len(LESSONS), "a notebook and its metrics for nearly every lesson"
    assert sum(path.stat().st_size for path in files) < MEGABYTES * 1e6
    for path in files:
        if path.suffix in (".json", ".csv", ".ipynb"):
            text = re.sub(r'"image/png": "[^"]*"', "", path.read_text())
            found = re.search(r"(?<![\w.:/~-])/(?:home|root|Users|tmp|mnt|opt|srv|work)/\S+", text)
            assert not found, f"{path.relative_to(ROOT)} names {found.group()}"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Two lessons, of which the second reads the first's folder, in a folder of their own."""
    (tmp_path / "notebooks").mkdir()
    for name, source in (("10_first", "tiny_train"), ("05_second", "tiny_judge")):
        text = (DATA / f"{source}.ipynb").read_text()
        own = 'output_dir: str = \\"outputs/' + name
        text = text.replace('output_dir: str = \\"out', own)
        text = text.replace('runs_dir: str = \\"out', 'runs_dir: str = \\"outputs/10_first')
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_lesson_runs_after_those_that_it_reads(checkout):
    assert list(outdated_lessons(checkout)) == ["05_second", "10_first"]
    plan = lesson_plan(["05_second"], checkout)
    assert [run.name for run in plan.runs] == ["10_first", "05_second"]
    assert plan.runs[1].inputs == {"runs_dir": "10_first"} and plan.runs[1].given == {}


def test_outside_the_checkout_nothing_is_made(checkout, monkeypatch):
    monkeypatch.chdir(checkout / "notebooks")
    with pytest.raises(ValueError, match="reference runs are made in the checkout"):
        make_reference(checkout)


@pytest.mark.slow
def test_one_command_makes_what_is_missing_or_outdated_and_nothing_else(checkout):
    assert make_reference(checkout) == ["05_second", "10_first"]
    kept = checkout / "papermill_runs" / "reference"
    assert sorted(path.name for path in (kept / "10_first").iterdir()) == ["metrics.json", "notebook.ipynb", "run.json"]
    assert make_reference(checkout) == [] and outdated_lessons(checkout) == {}
    stamp = (checkout / "papermill_runs/outputs/reference/10_first/run.json").stat().st_mtime_ns
    lesson = checkout / "notebooks" / "05_second.ipynb"
    lesson.write_text(lesson.read_text().replace("kl * prompts", "kl * prompts * 2"))
    assert outdated_lessons(checkout) == {"05_second": "its cells have changed since its reference ran"}
    assert make_reference(checkout) == ["05_second"]
    assert (checkout / "papermill_runs/outputs/reference/10_first/run.json").stat().st_mtime_ns == stamp
    broken = checkout / "notebooks" / "10_first.ipynb"
    broken.write_text(broken.read_text().replace("kl = 1 / beta", "kl = 1 / 0"))
    before = (kept / "10_first" / "run.json").read_text()
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        make_reference(checkout)
    assert (kept / "10_first" / "run.json").read_text() == before, "a failed lesson leaves the old reference"


def figure(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_large_figures_become_small_and_small_ones_stay():
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 400).astype(np.uint8)
    large = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], 128), -1).astype(np.uint8)
    large = np.clip(large.astype(int) + rng.integers(-4, 5, large.shape), 0, 255).astype(np.uint8)
    small = figure(np.zeros((8, 8, 3), np.uint8))
    view = {"application/vnd.jupyter.widget-view+json": {}, "image/png": small}
    outputs = [{"data": {"image/png": figure(large)}}, {"data": view}]
    notebook = shrink({"metadata": {"widgets": {}}, "cells": [{"cell_type": "code", "outputs": outputs}]})
    first, second = (output["data"] for output in notebook["cells"][0]["outputs"])
    assert len(first["image/png"]) < len(figure(large)) / 2
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(first["image/png"]))).convert("RGB")).astype(int)
    assert np.abs(shown - large).mean() < 8
    assert second == {"image/png": small} and notebook["metadata"] == {}


def test_frames_of_an_animation_become_small_and_stay_frames():
    """Frames of matplotlib's animation are PNGs in lines that end with a backslash."""
    rng = np.random.default_rng(0)
    frame = figure(rng.integers(0, 256, (60, 60, 1)).repeat(3, 2).astype(np.uint8))
    lines = "\\\n".join(frame[start : start + 76] for start in range(0, len(frame), 76))
    html = (
        f'<script>frames[0] = "data:image/png;base64,{lines}\\\n"\nframes[1] = "data:image/png;base64,{lines}"</script>'
    )
    cell = {"cell_type": "code", "outputs": [{"data": {"text/html": html}}]}
    found = shrink({"metadata": {}, "cells": [cell]})["cells"][0]["outputs"][0]["data"]["text/html"]
    assert len(found) < len(html) / 2 and found.startswith("<script>frames[0] = ")
    for part in re.findall(r'base64,([^"]*)"', found):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(part))).convert("RGB"))
        assert (pixels == np.asarray(Image.open(io.BytesIO(base64.b64decode(frame))))).all()


TABLES_OF_A_RUN = ("run.json", "win_rates.csv")


def test_of_a_replay_the_tables_are_kept_and_not_the_pictures(tmp_path):
    folder, kept = tmp_path / "full", tmp_path / "kept"
    with pytest.raises(FileNotFoundError, match=r"full holds no finished run of a replay \(RUN/run.json\)"):
        keep_paper(folder, kept)
    for name in (
        "metrics.json",
        "win_rates.png",
        "report.html",
        "tables-0/run.json",
        "tables-0/win_rates.csv",
        "tables-0/win_rates.png",
        "tables-0/images/base/scores.csv",
        "tables-0/likes.csv",
        "tables-1/run.json",
        "tables-1/win_rates.csv",
        "search/tries.csv",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name, status in (("tables-0", "finished"), ("tables-1", "failed")):
        record = {"status": status, "seconds": 1.0, "error": "", "notebook": "", "source_hash": "", "parameters": {}}
        write_json(folder / name / "run.json", record)
    write_json(folder / "tables-0" / "metrics.json", {"metrics": {}})
    kept.mkdir()
    (kept / "former.csv").write_text("of another replay")
    assert keep_paper(folder, kept) == ["tables-0"]
    found = {path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()}
    assert found == {"metrics.json", "win_rates.png", *(f"tables-0/{name}" for name in TABLES_OF_A_RUN)}
    assert (kept / "tables-0" / "win_rates.csv").read_text() == "tables-0/win_rates.csv"
    (folder / "metrics.json").unlink()  # before all ran, the numbers of each run are kept
    keep_paper(folder, kept)
    assert (kept / "tables-0" / "metrics.json").is_file()
