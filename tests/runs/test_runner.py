"""Sweeps really run by Snakemake: what fails hides nothing, what is killed leaves nothing, what is done stays."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import nbformat
import psutil
import pytest

from dkto.common.ends import INTERRUPTED
from dkto.common.files import write_json
from dkto.common.processes import sole_writer
from dkto.runs import runner as engine
from dkto.runs.notebooks import declared_parameters
from dkto.runs.record import recorded
from dkto.runs.runner import results_of, run_states, run_sweep, show_plan
from dkto.runs.sweeps import plan_to_dict, read_sweep

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parents[1] / "files"
TRAIN, JUDGE = DATA / "tiny_train.ipynb", DATA / "tiny_judge.ipynb"
MARK = "DKTO_TEST_MARK"


@pytest.fixture
def sweep(tmp_path):
    """Write a sweep of the tiny notebooks and read it; its outputs land in tmp_path/out."""

    def read(text):
        path = tmp_path / "tiny.yaml"
        path.write_text(text.format(train=TRAIN, judge=JUDGE, mended=tmp_path / "mended"))
        return read_sweep(path, tmp_path / "out")

    return read


ONE_STAGE = "notebook: {train}\nparameters: {{mended: '{mended}', failing_seed: 1, slow_seed: 2}}\n"
TWO_STAGES = """
stages:
  - {{name: train, notebook: {train}, parameters: {{mended: '{mended}', failing_seed: 1}}}}
  - {{name: judge, notebook: {judge}, parameters: {{runs_dir: {{stage: train}}}}}}
grid: {{train.seed: [0, 1]}}
"""


def leave(plan, run, **changes):
    """What a finished run leaves, without running it."""
    folder = plan.folder / run.name
    folder.mkdir(parents=True)
    parameters = run.parameters | {"output_dir": str(folder)} | changes
    with recorded(folder, Path(run.notebook), folder / "notebook.ipynb", parameters):
        write_json(folder / "metrics.json", {"metrics": {"kl": 1.0}})
    return folder


def runs_of(folder):
    return {row["run"]: row for row in csv.DictReader((folder / "table.csv").read_text().splitlines())}


# How runs stand


def test_how_a_run_stands_is_read_from_its_files(sweep):
    plan = sweep(ONE_STAGE + "grid: {{seed: [0, 1, 2, 3, 4, 5]}}")
    done, changed, failed, killed, lost, _ = plan.runs
    leave(plan, done)
    leave(plan, changed, beta=3.0)
    with pytest.raises(RuntimeError, match="no likes"):
        fail_in(plan, failed)
    record = leave(plan, killed) / "run.json"
    write_json(record, json.loads(record.read_text()) | {"status": "running"})
    (leave(plan, lost) / "metrics.json").unlink()
    states = run_states(plan)
    assert [str(states[run.name]) for run in plan.runs] == [
        "done",
        "changed: beta was 3.0 and is 1.0 now",
        "failed: no likes",
        "killed: it ended without a word; out of memory?",
        "missing: its metrics.json is gone",
        "missing",
    ]
    with sole_writer(plan.folder / killed.name):
        assert run_states(plan)[killed.name].word == "running"
    text = show_plan(plan)
    assert "6 runs" in text and "5 to do" in text and "at most 5 CPU hours and 0 GPU hours" in text
    assert text.count("dkto run ") == 5 and done.name + "/notebook" not in text


def fail_in(plan, run):
    folder = plan.folder / run.name
    folder.mkdir(parents=True)
    with recorded(folder, Path(run.notebook), folder / "notebook.ipynb", run.parameters):
        raise RuntimeError("no likes")


def test_what_a_record_says_reaches_a_terminal_spelled_out_and_cut(sweep):
    plan = sweep(ONE_STAGE + "grid: {{seed: [0, 1]}}")
    with (
        pytest.raises(ValueError, match="clear"),
        recorded(leave(plan, plan.runs[0]), TRAIN, plan.folder / "n.ipynb", plan.runs[0].parameters),
    ):
        raise ValueError("\x1b[2J clear\n" + "x" * 5000)
    shown = show_plan(plan)
    assert "\\x1b[2J clear\\nxxx" in shown and all(line.isprintable() for line in shown.splitlines())
    assert max(map(len, shown.splitlines())) < 1000
    write_json(plan.folder / plan.runs[0].name / "run.json", {"notebook": "a", "status": "finished"})
    with pytest.raises(ValueError, match=r"run.json is no record of a run: source_hash must be text, got nothing"):
        run_states(plan)


def test_other_code_of_a_room_other_settings_and_a_newer_input_are_said(sweep, monkeypatch):
    plan = sweep(TWO_STAGES)
    for run in plan.runs:
        leave(plan, run)
    assert {str(state) for state in run_states(plan).values()} == {"done"}
    record = json.loads((plan.folder / "train/train.seed=0/run.json").read_text())
    write_json(plan.folder / "train/train.seed=0/run.json", record | {"began": "2999-01-01T00:00:00+00:00"})
    before = "done: before train/train.seed=0, which it reads, was run again"
    assert str(run_states(plan)["judge/train.seed=0"]) == before
    monkeypatch.setattr(engine, "rooms_of", lambda path: record["rooms"] | {"toy": "new"})
    assert str(run_states(plan)["train/train.seed=1"]) == "done: by other code of toy"
    monkeypatch.setattr(engine, "files_of", lambda parameters: {"settings_file": "new"})
    assert str(run_states(plan)["train/train.seed=1"]) == "done: by other content of settings_file"


def test_neither_the_number_of_processes_nor_the_place_of_a_file_changes_a_result(sweep, tmp_path):
    plan = sweep(ONE_STAGE + "grid: {{seed: [0]}}")
    run = plan.runs[0]
    for name in ("here", "there"):
        (tmp_path / name).write_text("{}")
    leave(plan, run, processes=2, settings_file=str(tmp_path / "here"))
    given = run.parameters | {"processes": 8, "settings_file": str(tmp_path / "there")}
    moved = replace(plan, runs=(replace(run, parameters=given),))
    assert str(run_states(moved)[run.name]) == "done"
    (tmp_path / "there").write_text("[]")
    assert str(run_states(moved)[run.name]) == "done: by other content of settings_file"


def test_an_edited_notebook_is_said_and_a_run_below_an_undone_one_is_made_again(sweep, monkeypatch):
    plan = sweep(TWO_STAGES)
    for run in plan.runs:
        leave(plan, run)
    (plan.folder / "train/train.seed=0/metrics.json").unlink()
    monkeypatch.setattr(engine, "source_hash", lambda path: "another")
    states = run_states(plan)
    assert str(states["judge/train.seed=1"]) == "done: by an older version of its notebook"
    assert str(states["judge/train.seed=0"]) == "again: train/train.seed=0, which it reads, is not done"


# In turn, in this process


@pytest.fixture
def executed(monkeypatch):
    """Names of the runs whose notebook is executed, in order, without a kernel; trainings of seed 1 fail."""
    names = []

    def execute(notebook, output, told, **options):
        folder = Path(told["output_dir"])
        names.append(f"{folder.parent.name}/{folder.name}")
        folder.mkdir(parents=True, exist_ok=True)
        defaults = {name: parameter.default for name, parameter in declared_parameters(notebook).items()}
        with recorded(folder, Path(notebook), output, defaults | told):
            if told.get("seed") == 1 and not Path(told["mended"]).exists():
                raise RuntimeError("no <likes>")
            write_json(folder / "metrics.json", {"metrics": {"kl": 1.0}})

    monkeypatch.setattr(engine, "run_notebook", execute)
    return names


def test_in_turn_one_failure_hides_no_other_run_and_the_next_call_does_just_the_rest(sweep, executed, tmp_path, capsys):
    plan = sweep(TWO_STAGES)
    with pytest.raises(
        RuntimeError, match=r"2 of 4 runs are not done; .*: train/train.seed=1 failed: no <likes>; judge/"
    ):
        run_sweep(plan, in_turn=True)
    assert executed == ["train/train.seed=0", "train/train.seed=1", "judge/train.seed=0"]
    assert "train/train.seed=1 failed: no <likes>" in capsys.readouterr().out
    assert "engine.log" not in (plan.folder / "index.html").read_text(), "there is no engine"
    executed.clear()
    (tmp_path / "mended").touch()
    assert {state.word for state in run_sweep(plan, in_turn=True).values()} == {"done"}
    assert executed == ["train/train.seed=1", "judge/train.seed=1"]
    executed.clear()
    run_sweep(plan, in_turn=True, renew=True)
    assert executed == [] and results_of(plan.folder, ["judge/train.seed=1"])[0]["judge/train.seed=1"] == {"kl": 1.0}


def test_outdated_runs_are_renewed_in_their_folder_and_changed_ones_refused(sweep, executed, tmp_path, monkeypatch):
    (tmp_path / "mended").touch()
    plan = sweep(TWO_STAGES)
    run_sweep(plan, in_turn=True)
    (plan.folder / "train/train.seed=0" / "pictures").mkdir()
    executed.clear()
    rooms = engine.rooms_of
    monkeypatch.setattr(engine, "rooms_of", lambda path: rooms(path) | ({"toy": "new"} if "train" in path else {}))
    run_sweep(plan, in_turn=True)
    assert executed == [], "outdated is said, and run again only when asked"
    run_sweep(plan.only(["judge/train.seed=0"]), in_turn=True, renew=True)
    assert executed == ["train/train.seed=0", "judge/train.seed=0"]
    assert (plan.folder / "train/train.seed=0" / "pictures").is_dir(), "what lies in the folder is kept"
    changed = sweep(TWO_STAGES.replace("failing", "likes: many, failing"))
    with pytest.raises(
        ValueError, match=r"with other parameters \(train/train.seed=0: likes was 'few' and is 'many' now"
    ):
        run_sweep(changed, in_turn=True, renew=True)


# What is refused before anything starts


@pytest.fixture
def nothing_starts(monkeypatch):
    def start(*args, **more):
        raise AssertionError("the engine was started")

    monkeypatch.setattr(engine, "_engine", start)


def test_results_of_other_parameters_are_not_overwritten(sweep, nothing_starts):
    plan = sweep(ONE_STAGE + "grid: {{seed: [0]}}")
    folder = leave(plan, plan.runs[0], beta=3.0)
    with pytest.raises(ValueError, match=r"1 runs in .* with other parameters \(runs/seed=0: beta was 3.0 and is 1.0"):
        run_sweep(plan)
    assert (folder / "metrics.json").is_file()


def test_also_a_failed_run_is_not_taken_up_with_other_parameters(sweep, nothing_starts):
    plan = sweep(ONE_STAGE + "grid: {{seed: [0]}}")
    with pytest.raises(RuntimeError, match="no likes"):
        fail_in(plan, replace(plan.runs[0], parameters=plan.runs[0].parameters | {"beta": 3.0}))
    with pytest.raises(ValueError, match=r"runs/seed=0: beta was 3.0 and is 1.0"):
        run_sweep(plan)


def test_what_reads_a_run_that_is_redone_is_redone_from_an_empty_folder(sweep, monkeypatch):
    plan = sweep(TWO_STAGES)
    for run in plan.runs:
        (leave(plan, run, **({"beta": 3.0} if run.name == "train/train.seed=0" else {})) / "pictures").mkdir()
    monkeypatch.setattr(engine, "_engine", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_sweep(plan, redo=True)
    left = {run.name: (plan.folder / run.name / "pictures").exists() for run in plan.runs}
    assert left == {run.name: run.name.endswith("seed=1") for run in plan.runs}


def test_the_engine_is_told_the_same_however_a_sweep_is_written(sweep):
    one = sweep(ONE_STAGE + "grid: {{seed: [0]}}")
    other = sweep(
        "notebook: {train}\nparameters: {{slow_seed: 2, beta: 1.0, mended: '{mended}', failing_seed: 1}}\n"
        "grid: {{seed: [0]}}"
    )
    assert plan_to_dict(one) == plan_to_dict(other)


def test_a_second_sweep_on_the_same_folder_is_refused(sweep, nothing_starts):
    plan = sweep(ONE_STAGE + "grid: {{seed: [0]}}")
    with (
        sole_writer(plan.folder),
        pytest.raises(BlockingIOError, match=rf"out is being written by process {os.getpid()} on .*: wait for it"),
    ):
        run_sweep(plan)


@pytest.mark.parametrize(
    ("resources", "sentence"),
    [
        ("{{gpus: 16}}", r"runs/seed=0 asks for gpus: 16, this machine has 0: see --profile"),
        ("{{memory_gb: 1e6}}", r"runs/seed=0 asks for memory_gb: 1e\+06, this machine has"),
    ],
)
def test_what_this_machine_does_not_have_is_refused(sweep, nothing_starts, monkeypatch, resources, sentence):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match=sentence):
        run_sweep(sweep(ONE_STAGE + f"grid: {{{{seed: [0]}}}}\nresources: {resources}"))


def test_an_unknown_profile_is_refused(sweep, nothing_starts):
    with pytest.raises(
        ValueError, match=r"profile must be one of kubernetes, local, slurm, or a folder .*got 'slurmm'"
    ):
        run_sweep(sweep(ONE_STAGE), profile="slurmm")


def test_without_the_extra_one_sentence_says_what_to_install(sweep, monkeypatch):
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dkto\[batch\]'; --dry-run works without"):
        run_sweep(sweep(ONE_STAGE))


# Real sweeps


def call(tmp_path, *options, mark="", **popen):
    command = [sys.executable, "-m", "dkto.cli", "sweep", str(tmp_path / "tiny.yaml")]
    command += ["--output-dir", str(tmp_path / "out"), *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {MARK: mark}, **popen
    )


def finish(process, seconds=300):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def snakemake_dry_run(plan, profile, *options):
    """What Snakemake itself would do with a plan that a call has written."""
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(ROOT / "papermill_runs" / "Snakefile"),
        "--dry-run",
    ]
    command += ["--profile", str(ROOT / "papermill_runs" / "profiles" / profile), "--directory", str(plan.folder)]
    command += ["--configfile", str(plan.folder / "plan.json"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def marked(mark):
    """Processes that carry a mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def assert_no_orphan(mark):
    deadline = time.monotonic() + 60
    while left := marked(mark):
        assert time.monotonic() < deadline, [process.cmdline() for process in left]
        time.sleep(0.2)


def wait_until(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_one_failure_hides_no_other_run_and_the_next_call_does_just_the_rest(sweep, tmp_path):
    """The training of seed 1 fails: its judgement waits, the others are done; mended, a second call does these two."""
    plan = sweep(TWO_STAGES)
    code, out, err = finish(call(tmp_path))
    assert code == 2
    assert "2 of 4 runs are not done; the same call does just these: train/train.seed=1 failed: tiny_train.ipynb" in err
    assert "no <likes> for seed 1" in err and "judge/train.seed=1 not started: it reads train/train.seed=1" in err
    assert "4 of 4 runs to do" in out and "2 of 4 runs are done" in out
    kept = nbformat.read(plan.folder / "train/train.seed=1/notebook.ipynb", as_version=4)
    assert "ValueError" in json.dumps(kept)
    page = (plan.folder / "index.html").read_text()
    assert "no &lt;likes&gt; for seed 1" in page and "<likes>" not in page
    assert 'href="train/train.seed%3D1/notebook.ipynb"' in page and "not started: it reads train/train.seed=1" in page
    record = json.loads((plan.folder / "train/train.seed=0/run.json").read_text())
    assert record["hardware"]["visible_accelerators"] == "none", "a run that asks for no card sees none"
    assert record["peak_memory_mb"] > 20 and record["seconds"] > 0.5

    stamps = {run: (plan.folder / run / "metrics.json").stat().st_mtime_ns for run in ("train/train.seed=0",)}
    (tmp_path / "mended").touch()
    code, out, err = finish(call(tmp_path))
    assert (code, err) == (0, "")
    assert "2 of 4 runs to do" in out and "4 of 4 runs are done" in out
    for run, stamp in stamps.items():
        assert (plan.folder / run / "metrics.json").stat().st_mtime_ns == stamp
    table = runs_of(plan.folder)
    assert len(table) == 4 and all(row["state"] == "done" for row in table.values())
    assert float(table["judge/train.seed=1"]["metric.score"]) == pytest.approx(10.1)

    code, out, err = finish(call(tmp_path))
    assert (code, err) == (0, "") and "to do" not in out
    engine_says = snakemake_dry_run(plan, "local", "--cores", "1")
    assert "Nothing to be done" in engine_says


@pytest.mark.slow
def test_twelve_runs_one_failing_one_killed(sweep, tmp_path):
    """Seed 1 fails for one beta, seed 2 is slow for one beta and its process is killed half-way."""
    text = "notebook: {train}\nparameters: {{mended: '{mended}'}}\nresources: {{memory_gb: 0.2}}\n"
    text += "list: [{{failing_seed: 1, beta: 1}}, {{slow_seed: 2, beta: 2}}, {{beta: 4}}, {{beta: 8}}]\n"
    plan = sweep(text + "grid: {{seed: [0, 1, 2]}}")
    assert len(plan.runs) == 12
    failing, slow = "runs/failing_seed=1,beta=1,seed=1", "runs/slow_seed=2,beta=2,seed=2"
    mark = uuid.uuid4().hex
    process = call(tmp_path, mark=mark)
    wait_until((plan.folder / slow / "run.json").is_file, process)
    time.sleep(4)
    (runner,) = [p for p in marked(mark) if "dkto.cli" in p.cmdline() and any(slow in word for word in p.cmdline())]
    runner.send_signal(signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 2 and "10 of 12 runs are done" in out
    assert f"2 of 12 runs are not done; the same call does just these: {failing} failed: " in err
    assert f"{slow} killed: it ended without a word" in err
    assert_no_orphan(mark)
    first = {run.name: (plan.folder / run.name / "run.json").stat().st_mtime_ns for run in plan.runs}
    assert len(runs_of(plan.folder)) == 12

    (tmp_path / "mended").touch()
    code, out, err = finish(call(tmp_path, mark=mark))
    assert (code, err) == (0, "") and "2 of 12 runs to do" in out and "12 of 12 runs are done" in out
    again = {
        run.name for run in plan.runs if (plan.folder / run.name / "run.json").stat().st_mtime_ns != first[run.name]
    }
    assert again == {failing, slow}
    table = runs_of(plan.folder)
    assert len(table) == 12 and all(row["state"] == "done" and row["metric.kl"] for row in table.values())
    assert_no_orphan(mark)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["dkto.cli", "snakemake"])
def test_a_killed_engine_leaves_neither_orphans_nor_a_lock(sweep, tmp_path, victim):
    """SIGKILL to `dkto sweep` or to Snakemake in the middle of a run; meanwhile a second call is refused."""
    plan = sweep(ONE_STAGE + "grid: {{seed: [0, 2]}}")
    mark = uuid.uuid4().hex
    process = call(tmp_path, mark=mark)
    slow = plan.folder / "runs/seed=2/run.json"
    wait_until(lambda: slow.is_file() and (plan.folder / "runs/seed=0/metrics.json").is_file(), process)
    time.sleep(3)
    code, _, err = finish(call(tmp_path, mark="second"))
    assert code == 2 and f"is being written by process {process.pid}" in err
    assert list((plan.folder / ".snakemake" / "locks").iterdir()), "the engine holds its own lock"
    if victim == "dkto.cli":
        process.kill()
        process.communicate()
    else:
        (target,) = [p for p in psutil.Process(process.pid).children() if "snakemake" in p.cmdline()]
        target.kill()
        code, _, err = finish(process)
        assert code == 2 and "runs/seed=2 failed: interrupted" in err
    assert_no_orphan(mark)
    assert list((plan.folder / ".snakemake" / "locks").iterdir()), "its lock is stale now"

    (tmp_path / "mended").touch()
    code, out, err = finish(call(tmp_path, mark=mark))
    assert (code, err) == (0, "") and "1 of 2 runs to do" in out and "2 of 2 runs are done" in out
    assert_no_orphan(mark)


@pytest.mark.slow
def test_an_interrupt_from_the_keyboard_ends_all_and_the_next_call_goes_on(sweep, tmp_path):
    plan = sweep(ONE_STAGE + "grid: {{seed: [2]}}")
    mark = uuid.uuid4().hex
    process = call(tmp_path, mark=mark)
    wait_until((plan.folder / "runs/seed=2/run.json").is_file, process)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    assert finish(process, 60)[::2] == (130, f"dkto: {INTERRUPTED}\n")
    assert_no_orphan(mark)
    (tmp_path / "mended").touch()
    assert finish(call(tmp_path))[0] == 0


@pytest.mark.slow
def test_redo_makes_again_what_changed_and_retries_try_again(sweep, tmp_path):
    (tmp_path / "mended").touch()
    plan = sweep(ONE_STAGE + "grid: {{seed: [0]}}")
    assert run_sweep(plan)[plan.runs[0].name].word == "done"
    changed = sweep(ONE_STAGE.replace("failing", "likes: many, failing") + "grid: {{seed: [0]}}")
    assert run_states(changed)["runs/seed=0"].word == "changed"
    run_sweep(changed, redo=True)
    metrics = json.loads((plan.folder / "runs/seed=0/metrics.json").read_text())["metrics"]
    assert metrics["kl"] == pytest.approx(1.1)
    (tmp_path / "mended").unlink()
    failing = sweep(ONE_STAGE + "grid: {{seed: [1]}}")
    with pytest.raises(RuntimeError, match="1 of 1 runs are not done"):
        run_sweep(failing, retries=1)
    assert (plan.folder / "engine.log").read_text().count("Trying to restart job") == 1
