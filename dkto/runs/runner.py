"""Run the plan of a sweep with Snakemake: what is done stays, failures are gathered, one page tells of all runs."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from dkto.common.files import read_json, write_json
from dkto.common.machine import accelerators
from dkto.common.processes import following, has_writer, sole_writer
from dkto.common.progress import QUIET_VARIABLE
from dkto.runs.record import RECORD_NAME, source_hash
from dkto.runs.sweeps import Plan, PlannedRun, plan_to_dict
from dkto.runs.yaml12 import read_yaml

BATCH = Path(__file__).parents[2] / "papermill_runs"
ENGINE_LOG = "engine.log"
GRACE = 30.0  # seconds that the engine has to end its jobs after an interruption


@dataclass(frozen=True)
class State:
    """How a run stands: done, changed (begun with other parameters), running, or missing, failed, killed, again."""

    word: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {self.detail}" if self.detail else self.word


def run_states(plan: Plan) -> dict[str, State]:
    """How each run of a plan stands, read from the files that it left."""
    states = {}
    for run in plan.runs:
        state = _state(plan, run)
        waits = [name for name in run.inputs.values() if states[name].word != "done"]
        if state.word == "done" and waits:
            state = State("again", f"{waits[0]}, which it reads, is not done")
        states[run.name] = state
    return states


def _state(plan: Plan, run: PlannedRun) -> State:
    folder = plan.folder / run.name
    path = folder / RECORD_NAME
    if not path.is_file():
        return State("missing")
    record = read_json(path, "record of a run", ["status"])
    stored = record.get("parameters", run.parameters)
    changed = next((key for key, value in run.parameters.items() if key not in stored or stored[key] != value), None)
    held = record["status"] == "running" and has_writer(folder)
    if changed is not None and not held:
        return State("changed", f"{changed} was {stored.get(changed)!r} and is {run.parameters[changed]!r} now")
    if record["status"] == "running":
        return State("running") if held else State("killed", "it ended without a word; out of memory?")
    if record["status"] == "failed":
        return State("failed", record["error"])
    if not (folder / "metrics.json").is_file():
        return State("missing", "its metrics.json is gone")
    if record["source_hash"] != source_hash(run.notebook):
        return State("done", "by an older version of its notebook")
    return State("done")


def show_plan(plan: Plan) -> str:
    """What a sweep would do, nothing done: every run, how it stands, what it may take, and its command by hand."""
    states = run_states(plan)
    todo = [run for run in plan.runs if states[run.name].word != "done"]
    lines = [f"sweep {plan.name}: {len(plan.runs)} runs into {plan.folder}, {len(todo)} to do", ""]
    width = max(len(run.name) for run in plan.runs)
    for run in plan.runs:
        want = run.resources
        takes = f"cpus {want.cpus}  gpus {want.gpus}  hours {want.hours:g}  memory {want.memory_gb:g} GB"
        lines.append(f"{run.name:<{width}}  {takes}  {states[run.name]}")
    cpu_hours = sum(run.resources.cpus * run.resources.hours for run in todo)
    gpu_hours = sum(run.resources.gpus * run.resources.hours for run in todo)
    lines += ["", f"at most {cpu_hours:g} CPU hours and {gpu_hours:g} GPU hours by the limits above"]
    lines += ["", "each by hand:", *(plan.shell_command(run) for run in todo)] if todo else []
    return "\n".join(lines)


def run_sweep(
    plan: Plan, *, profile: str = "local", cores: int = 0, retries: int = 0, redo: bool = False
) -> dict[str, State]:
    """Do what is missing or failed of a plan; whatever fails, the others are done and the page is written.

    Called again it goes on. Two calls at once on one folder: the second is refused. A folder whose engine was
    killed is free again at once, since the hold on it ends with the processes that have it.

    Args:
        plan: see `dkto.runs.sweeps.read_sweep`.
        profile: local, slurm, kubernetes, or a folder with Snakemake's `config.yaml`.
        cores: CPU cores to use on this machine, 0 for all.
        retries: how often a failed run is tried again at once.
        redo: remove and make again what was made with other parameters or by an older version of its notebook.

    Returns:
        How each run stands; all are done.

    Raises:
        ModuleNotFoundError: without the extra `batch`.
        BlockingIOError: if another call works on the same folder.
        ValueError: before anything starts, if a run was done with other parameters and `redo` is not asked for, if
            this machine has less than a run asks for, or the profile is unknown.
        RuntimeError: at the end, if runs are not done; the sentence names each with its error.
    """
    if importlib.util.find_spec("snakemake") is None:
        raise ModuleNotFoundError("dkto sweep runs on Snakemake: pip install 'dkto[batch]'; --dry-run works without")
    settings = _profile_folder(profile)
    local = read_yaml((settings / "config.yaml").read_text()).get("executor", "local") == "local"
    with sole_writer(plan.folder) as hold:
        states = run_states(plan)
        removed = _outdated(plan, states) if redo else set()
        todo = [run for run in plan.runs if states[run.name].word != "done" or run.name in removed]
        _clear(plan, todo, states, removed)
        if todo:
            limits = _limits(todo, cores) if local else []
            _write_plan(plan, local)
            print(f"sweep {plan.name}: {len(todo)} of {len(plan.runs)} runs to do, in {plan.folder}", flush=True)
            with _engine(plan, [*limits, "--profile", str(settings), "--retries", str(retries)], hold) as engine:
                import dkto.runs.page  # noqa: F401 - pandas loads while the engine starts

                _tell(plan, todo, engine)
        return _conclude(plan)


def _profile_folder(profile: str) -> Path:
    for folder in (BATCH / "profiles" / profile, Path(profile)):
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    known = ", ".join(sorted(path.parent.name for path in (BATCH / "profiles").glob("*/config.yaml")))
    raise ValueError(f"profile must be one of {known}, or a folder with a config.yaml, got {profile!r}")


def _outdated(plan: Plan, states: dict[str, State]) -> set[str]:
    """Runs of other parameters or an older notebook, and with them all that read from one of these."""
    found: set[str] = set()
    for run in plan.runs:  # what is read comes before what reads it
        state = states[run.name]
        if state.word == "changed" or (state.word == "done" and state.detail) or found & set(run.inputs.values()):
            found.add(run.name)
    return found


def _clear(plan: Plan, todo: list[PlannedRun], states: dict[str, State], removed: set[str]) -> None:
    """Make way for what is to be done, and never for anything else."""
    changed = [run for run in todo if states[run.name].word == "changed" and run.name not in removed]
    if changed:
        first = changed[0].name
        raise ValueError(
            f"{len(changed)} runs in {plan.folder} were made with other parameters ({first}: {states[first].detail}): "
            "choose another --output-dir, or --redo to remove them and make them again"
        )
    for run in todo:
        if states[run.name].word == "running":
            raise ValueError(f"{plan.folder / run.name} is being written by another process: wait for it")
        if run.name in removed and (plan.folder / run.name).exists():
            shutil.rmtree(plan.folder / run.name)  # what cannot be removed is said, not taken for a new run
        (plan.folder / run.name / "metrics.json").unlink(missing_ok=True)
    shutil.rmtree(plan.folder / ".snakemake" / "locks", ignore_errors=True)  # of a killed engine: we hold the folder


def _limits(todo: list[PlannedRun], cores: int) -> list[str]:
    """What this machine has, as arguments for the engine."""
    memory = int(psutil.virtual_memory().total / 1e6)
    has = {"gpus": len(_cards()), "memory_gb": memory / 1000}
    for run in todo:
        for name, amount in has.items():
            wanted = getattr(run.resources, name)
            if wanted > amount:
                raise ValueError(f"{run.name} asks for {name}: {wanted:g}, this machine has {amount:g}: see --profile")
    cores = cores or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
    return ["--cores", str(cores), "--resources", f"gpu={has['gpus']}", f"mem_mb={memory}"]


def _cards() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [card.strip() for card in visible.split(",") if card.strip()]
    return [str(number) for number in range(len(accelerators()))]


def _write_plan(plan: Plan, local: bool) -> None:
    about = {
        "sweep": plan.name,
        "folder": str(plan.folder),
        "working_directory": os.getcwd(),
        "python": sys.executable,
        "cards": ",".join(_cards()) if local else None,
    }
    write_json(plan.folder / "plan.json", {**about, "runs": plan_to_dict(plan)})


@contextmanager
def _engine(plan: Plan, arguments: list[str], hold: int) -> Iterator[subprocess.Popen]:
    """Snakemake on the plan's folder. It inherits the hold on the folder and dies with this process."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(BATCH / "Snakefile"), *arguments]
    command += ["--directory", str(plan.folder), "--configfile", str(plan.folder / "plan.json"), "--nocolor"]
    with (plan.folder / ENGINE_LOG).open("w") as log:
        process = subprocess.Popen(
            following(command, signal.SIGKILL),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[hold],
            start_new_session=True,  # an interrupt from the keyboard comes here, and is passed on once
            env=os.environ | {QUIET_VARIABLE: "1"},
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _tell(plan: Plan, todo: list[PlannedRun], engine: subprocess.Popen) -> None:
    """One line for each run as it ends, until the engine ends."""
    told, began = set(), time.time()
    while True:
        over = engine.poll() is not None
        for run in todo:
            path = plan.folder / run.name / RECORD_NAME
            if run.name in told or not path.is_file() or path.stat().st_mtime < began - 1:
                continue
            record = read_json(path, "record of a run", ["status"])
            if record["status"] != "running":
                told.add(run.name)
                end = f": {record['error']}" if record["error"] else ""
                seconds = f"{record['seconds']:.0f} s"
                print(f"[{len(told)}/{len(todo)}] {run.name} {record['status']}, {seconds}{end}", flush=True)
        if over:
            return
        time.sleep(0.2)


def _conclude(plan: Plan) -> dict[str, State]:
    """Write table and page; say what is not done."""
    from dkto.runs.page import write_page

    states = run_states(plan)
    words = Counter(state.word for state in states.values())
    texts = {run.name: _why(run, states) for run in plan.runs}
    page = write_page(plan.folder, plan.name, texts)
    print(f"{words['done']} of {len(states)} runs are done; table: {plan.folder / 'table.csv'}, page: {page}")
    undone = [f"{name} {texts[name]}" for name, state in states.items() if state.word != "done"]
    if not undone:
        return states
    if words["missing"] == len(undone):
        log = plan.folder / ENGINE_LOG
        last = "\n".join(log.read_text().strip().splitlines()[-8:])
        raise RuntimeError(f"the engine stopped before any run failed; the end of {log}:\n{last}")
    head = f"{len(undone)} of {len(states)} runs are not done; the same call does just these"
    raise RuntimeError(f"{head}: {'; '.join(undone)}")


def _why(run: PlannedRun, states: dict[str, State]) -> str:
    waits = [name for name in run.inputs.values() if states[name].word != "done"]
    return f"not started: it reads {waits[0]}" if waits else str(states[run.name])
