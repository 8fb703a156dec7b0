"""Kept runs of the lessons: `python -m dkto.workshop.keep_lessons` makes what is missing or outdated.

A lesson is outdated when its code has changed since its kept run; the hash of its code cells without imports is in its
`run.json`. A change of its prose, or of where a name is imported from, is copied into the kept notebook without a run.
A lesson that reads another's folder (a parameter whose default is the other's `output_dir`) runs after it.
An experiment (`notebooks/experiments/`) takes an hour: its kept run may be older than its code and stays as it ran;
remove its folder to run it again.

The tables of `make paper PROFILE=full` are kept by the same command with their folder as its argument, and so is the
run of a single notebook, such as a page of `notebooks/pages/`, under its notebook's name.
"""

import base64
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from graphlib import TopologicalSorter
from pathlib import Path

from PIL import Image

from dkto.common.ends import guarded
from dkto.common.files import read_json, write_atomically
from dkto.runs.notebooks import Parameter, declared_parameters
from dkto.runs.record import RECORD_NAME, source_hash
from dkto.runs.runner import State, results_of, run_states, run_sweep
from dkto.runs.sweeps import OUTPUTS, Plan, PlannedRun, Resources, read_sweep

ROOT = Path(__file__).parents[2]
EXAMPLE = "toy_reward"  # the sweep whose records the notebook "reading runs" reads
EXAMPLE_FOLDER = "sweep"
NOT_RUN_HERE = {"54_published_checkpoints": "needs released weights and a GPU"}  # lessons without a reference run
HANDS: dict[str, dict[str, object]] = {
    "61_teach_by_likes": {"simulated_judge": "blue_things", "press_button": True},
    "62_judge_blind": {"simulated_scorer": "world_aesthetics"},
    "63_watch_training": {"wait": True},
}
"""Lessons that wait for a person: in their reference runs a simulated one takes the place."""
CARDS = ("*card*.csv", "verdicts.csv")
PAPER = "paper_full"
TABLES = ("metrics.json", RECORD_NAME, "*.csv")  # of a replay and of each of its runs
FIGURE = "win_rates.png"  # of the replay
LIKES = "likes.csv"  # what a run's user was shown: of the images, which are not kept
LARGE_FIGURE = 54_000  # characters of base64 from which a figure is tried in 256 colours
FRAME = re.compile(r"(?<=data:image/png;base64,)[A-Za-z0-9+/=\\\n]+")  # of an animation, in lines that go on


def outdated_lessons(root: Path = ROOT) -> dict[str, str]:
    """Lessons without a reference run of just this text, with the reason, in the order of their numbers."""
    found = {}
    for path in _lessons(root).values():
        if path.stem in NOT_RUN_HERE:
            continue
        kept = root / "papermill_runs" / "reference" / path.stem / RECORD_NAME
        if not kept.is_file():
            found[path.stem] = "no reference run"
        elif path.parent.name != "experiments" and not is_current(path, kept):
            found[path.stem] = "its cells have changed since its reference ran"
    return found


def is_current(lesson: str | Path, record: Path) -> bool:
    """Whether a kept run, known by its `run.json`, is of the lesson's present code."""
    return read_json(record, "record of a run", ["source_hash"])["source_hash"] == source_hash(lesson)


def refresh(root: Path = ROOT) -> list[str]:
    """Bring prose and imports of the kept notebooks up to the lessons', where the code is the same; nothing is run.

    Returns the lessons whose kept notebook was changed.
    """
    changed = []
    for name, path in _lessons(root).items():
        kept = root / "papermill_runs" / "reference" / name / "notebook.ipynb"
        if not kept.is_file() or not is_current(path, kept.with_name(RECORD_NAME)):
            continue
        text = kept.read_text(encoding="utf-8")
        notebook = refreshed(json.loads(text), json.loads(path.read_text(encoding="utf-8")))
        new = json.dumps(notebook, indent=1) + "\n"
        if new != text:
            write_atomically(kept, lambda part, new=new: part.write_text(new, encoding="utf-8"))
            changed.append(name)
    return changed


def refreshed(executed: dict, lesson: dict) -> dict:
    """The lesson's cells with the outputs of an executed copy whose code cells are the same, imports aside."""
    ran = [cell for cell in executed["cells"] if cell["cell_type"] == "code"]
    given = [cell for cell in ran if "injected-parameters" in cell["metadata"].get("tags", [])]
    ran = [cell for cell in ran if cell not in given]
    code = [cell for cell in lesson["cells"] if cell["cell_type"] == "code"]
    if len(ran) != len(code):
        raise ValueError(f"the executed copy has {len(ran)} code cells, its notebook {len(code)}: run it again")
    outputs, cells = iter(ran), []
    for cell in lesson["cells"]:
        if cell["cell_type"] == "code":
            ran = next(outputs)
            cell = described(ran | {"source": cell["source"], "metadata": ran["metadata"] | cell["metadata"]})
        cells.append(cell)
        if "parameters" in cell["metadata"].get("tags", []):
            cells += given
    return executed | {"cells": cells}


def described(cell: dict) -> dict:
    """A code cell whose figures carry the alternative text in the cell's metadata, `alt`."""
    if text := cell.get("metadata", {}).get("alt"):
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                output["metadata"] = output.get("metadata", {}) | {"image/png": {"alt": text}}
    return cell


def lesson_plan(names: list[str], root: Path = ROOT) -> Plan:
    """A plan of these lessons and of those whose folders they read, with their defaults."""
    declared = {name: declared_parameters(path) for name, path in _lessons(root).items()}
    home = {parameters["output_dir"].default: name for name, parameters in declared.items()}
    inputs = {name: _inputs(parameters, home) for name, parameters in declared.items()}
    runs = []
    for name in TopologicalSorter({name: sorted(read.values()) for name, read in inputs.items()}).static_order():
        given, notebook = HANDS.get(name, {}), str(_lessons(root)[name].relative_to(root))
        values = {key: parameter.default for key, parameter in declared[name].items()} | given
        own = {key: value for key, value in values.items() if key not in {"output_dir", *inputs[name]}}
        runs.append(PlannedRun(name, notebook, given, own, inputs[name], Resources()))
    return Plan("reference", OUTPUTS / "reference", tuple(runs)).only(names)


def _lessons(root: Path) -> dict[str, Path]:
    notebooks = root / "notebooks"
    paths = [*notebooks.glob("*.ipynb"), *notebooks.glob("experiments/*.ipynb")]
    return {path.stem: path for path in sorted(paths, key=lambda path: path.stem)}


def _inputs(parameters: dict[str, Parameter], home: dict[str, str]) -> dict[str, str]:
    found = {key: p.default for key, p in parameters.items() if key != "output_dir" and p.type_name == "str"}
    return {key: home[default] for key, default in found.items() if default in home}


def make_reference(root: Path = ROOT) -> list[str]:
    """Run what is missing or outdated and keep it; what has run in `outputs/reference` before is not run again.

    Returns the lessons whose kept run was made.

    Raises:
        ValueError: if the checkout, `root`, is not the working directory.
        RuntimeError: if a lesson fails; the others are kept.
    """
    if Path.cwd() != root.resolve():
        raise ValueError(f"reference runs are made in the checkout: cd {root}")
    reference = root / "papermill_runs" / "reference"
    _make_example(root, reference / EXAMPLE_FOLDER)
    names = list(outdated_lessons(root))
    if not names:
        return []
    plan = lesson_plan(names, root)
    made = []
    try:
        run_sweep(plan, redo=True, in_turn=True)  # one at a time, so that its seconds mean something
    finally:
        states = run_states(plan)
        for name in names:
            if states[name] == State("done"):
                keep(plan.folder / name, reference / name)
                made.append(name)
    return made


def _make_example(root: Path, kept: Path) -> None:
    """The records of a real sweep, as small files, for the notebook that reads runs."""
    sweep = root / "papermill_runs" / "sweeps" / f"{EXAMPLE}.yaml"
    if not sweep.is_file():
        return
    plan = read_sweep(sweep)
    records = [(run.notebook, kept / run.name / RECORD_NAME) for run in plan.runs]
    if all(record.is_file() and is_current(notebook, record) for notebook, record in records):
        return
    run_sweep(plan, redo=True)
    shutil.rmtree(kept, ignore_errors=True)
    for run in plan.runs:
        (kept / run.name).mkdir(parents=True)
        for name in (RECORD_NAME, "metrics.json"):
            shutil.copyfile(plan.folder / run.name / name, kept / run.name / name)


def keep(run: Path, kept: Path) -> None:
    """Copy what a reader needs of a run: notebook with small figures, record, metrics, cards; all or nothing."""
    with _replacing(kept) as part:
        notebook = json.loads((run / "notebook.ipynb").read_text(encoding="utf-8"))
        (part / "notebook.ipynb").write_text(json.dumps(shrink(notebook), indent=1) + "\n", encoding="utf-8")
        cards = [path for pattern in CARDS for path in run.glob(pattern)]
        for path in (run / RECORD_NAME, run / "metrics.json", *cards):
            shutil.copyfile(path, part / path.name)


@contextmanager
def _replacing(kept: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `kept` once it is filled."""
    part = kept.with_name(kept.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    shutil.rmtree(kept, ignore_errors=True)
    part.replace(kept)


def keep_paper(folder: Path, kept: Path) -> list[str]:
    """Copy tables of a replay's finished runs, and numbers of the whole or, before all ran, of each; all or nothing.

    Returns the names of the runs. `kept` loses what was there of another replay.

    Raises:
        FileNotFoundError: if no run has finished in `folder`, that of a profile of `dkto.paper.replay.run_paper`.
    """
    runs = list(results_of(folder)[0])
    if not runs:
        raise FileNotFoundError(f"{folder} holds no finished run of a replay (RUN/{RECORD_NAME})")
    with _replacing(kept) as part:
        left_out = {"metrics.json"} if (folder / "metrics.json").is_file() else set()  # those of the whole hold them
        own = [name for name in TABLES if name not in left_out]
        for source, patterns in ((folder, (*TABLES, FIGURE)), *((folder / run, own) for run in runs)):
            target = part / source.relative_to(folder)
            target.mkdir(exist_ok=True)
            for path in (path for pattern in patterns for path in source.glob(pattern) if path.name != LIKES):
                shutil.copyfile(path, target / path.name)
    return runs


def shrink(notebook: dict) -> dict:
    """The notebook without the state of live widgets, large figures and frames of animations in 256 colours."""
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if len(data) > 1:
                data.pop("application/vnd.jupyter.widget-view+json", None)
            if "image/png" in data and len(data["image/png"]) > LARGE_FIGURE:
                data["image/png"] = _smaller(data["image/png"])
            if "frames[" in "".join(data.get("text/html", "")):
                data["text/html"] = FRAME.sub(lambda found: _smaller(found.group()), "".join(data["text/html"]))
        if cell["cell_type"] == "code":
            described(cell)
    return notebook


def _smaller(encoded: str) -> str:
    data = base64.b64decode(encoded.replace("\\\n", ""))
    image = Image.open(io.BytesIO(data))
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A") if "A" in image.getbands() else None)
    file = io.BytesIO()
    flat.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode() if len(file.getvalue()) < len(data) else encoded


def _main() -> None:
    # the folder of a replay holds the record of its page, too, but not its notebook under that name
    if len(sys.argv) > 1 and Path(sys.argv[1], "notebook.ipynb").is_file():
        record = read_json(Path(sys.argv[1], RECORD_NAME), "record of a run", ["notebook"])
        kept = ROOT / "papermill_runs" / "reference" / Path(record["notebook"]).stem
        keep(Path(sys.argv[1]), kept)
        print(f"run kept: {kept.relative_to(ROOT)}")
    elif len(sys.argv) > 1:
        found = keep_paper(Path(sys.argv[1]), ROOT / "papermill_runs" / "reference" / PAPER)
        print(f"steps kept: {', '.join(found)}")
    else:
        print(f"reference runs made: {', '.join(make_reference()) or 'none was missing or outdated'}")
        print(f"refreshed without running: {', '.join(refresh()) or 'none'}")


if __name__ == "__main__":
    sys.exit(guarded(_main, "dkto"))
