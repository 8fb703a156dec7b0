"""Run the plan of a sweep: what is done stays, failures are gathered, one page shows all runs.

A run is done when it finished with the same parameters. It is outdated when its notebook has other code cells now, when
a room that it imports has other code, when a settings file has other content, or when a run that it reads is newer.
Sweeps, the demo, the toy, the paper's replay and the kept lessons all go through `run_sweep`.
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from dkto.common.files import remove, write_json
from dkto.common.machine import accelerators, said
from dkto.common.names import printable, shown
from dkto.common.processes import following, has_writer, sole_writer
from dkto.common.progress import QUIET_VARIABLE
from dkto.runs.notebooks import run_notebook
from dkto.runs.record import RECORD_NAME, files_of, read_metrics, read_record, rooms_of, source_hash
from dkto.runs.sweeps import CHECKOUT, Plan, PlannedRun, plan_to_dict
from dkto.runs.yaml12 import read_yaml

MOST_NAMED = 50  # runs that are not done, in the sentence at the end
BATCH = CHECKOUT / "papermill_runs"
ENGINE_LOG = "engine.log"
# Snakemake; but on Kubernetes too the runs share the sweep's folder, where it would insist on a storage in the cloud
ENGINE = """
import os, shlex, sys
from contextlib import suppress
from snakemake.cli import main
with suppress(ImportError):
    import snakemake_executor_plugin_kubernetes as plugin
    plugin.common_settings.implies_no_shared_fs = False
    plugin.Executor.get_job_exec_prefix = lambda self, job: "cd " + shlex.quote(os.getcwd())
main(sys.argv[1:])
"""
CHANGES_NO_RESULT = "processes"  # the parameter that another machine may have another value of


@dataclass(frozen=True)
class State:
    """How a run stands: done, changed (begun with other parameters), running, or missing, failed, killed, again.

    One that is done and has a detail is outdated: the detail says by what.
    """

    word: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {printable(self.detail)}" if self.detail else self.word


def run_states(plan: Plan) -> dict[str, State]:
    """How each run of a plan stands, read from the files that it left."""
    states, began, code = {}, {}, {}
    for run in plan.runs:
        state, began[run.name] = _state(plan, run, code)
        if state.word == "done":
            newer = [name for name in run.inputs.values() if began[name] > began[run.name]]
            if waits := _waits(run, states):
                state = State("again", f"{waits[0]}, which it reads, is not done")
            elif newer and not state.detail:
                state = State("done", f"before {newer[0]}, which it reads, was run again")
        states[run.name] = state
    return states


def _state(plan: Plan, run: PlannedRun, code: dict) -> tuple[State, str]:
    """How a run stands by itself, and when it began; `code` keeps the hashes of each notebook for its other runs."""
    folder = plan.folder / run.name
    path = folder / RECORD_NAME
    if not path.is_file():
        return State("missing"), ""
    record = read_record(path)
    stored, asked = record["parameters"], run.parameters
    held = record["status"] == "running" and has_writer(folder)
    differ = [key for key in asked if key not in stored or stored[key] != asked[key]]
    changed = [key for key in differ if key != CHANGES_NO_RESULT and not key.endswith("_file")]  # its content counts
    if changed and not held:
        key = changed[0]
        state = State("changed", f"{key} was {shown(stored.get(key))} and is {shown(asked[key])} now")
    elif record["status"] == "running":
        state = State("running") if held else State("killed", "it ended without a word; out of memory?")
    elif record["status"] == "failed":
        state = State("failed", record["error"])
    elif not (folder / "metrics.json").is_file():
        state = State("missing", "its metrics.json is gone")
    else:
        state = State("done", _outdated_by(record, run, code))
    return state, record.get("began", "")


def _outdated_by(record: dict, run: PlannedRun, code: dict) -> str:
    """What a finished run has been outdated by, or nothing."""
    if run.notebook not in code:
        code[run.notebook] = source_hash(run.notebook), rooms_of(run.notebook)
    source, rooms = code[run.notebook]
    if record["source_hash"] != source:
        return "by an older version of its notebook"
    for key, now, word in (("files", files_of(run.parameters), "content"), ("rooms", rooms, "code")):
        stored = record.get(key, {})
        if differ := [name for name in stored | now if stored.get(name) != now.get(name)]:
            return f"by other {word} of {', '.join(differ)}"
    return ""


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
    plan: Plan,
    *,
    profile: str = "local",
    cores: int = 0,
    retries: int = 0,
    redo: bool = False,
    renew: bool = False,
    in_turn: bool = False,
) -> dict[str, State]:
    """Do what is missing or failed of a plan; whatever fails, the others are done and the page is written.

    Called again it goes on. Two calls at once on one folder: the second is refused. A folder whose engine was
    killed is free again at once, since the hold on it ends with the processes that have it.

    Args:
        plan: see `dkto.runs.sweeps.read_sweep`.
        profile: local, slurm, kubernetes, or a folder with Snakemake's `config.yaml`.
        cores: CPU cores to use on this machine, 0 for all.
        retries: how often a failed run is tried again at once.
        redo: remove what was made with other parameters or is outdated, and run it again.
        renew: run what is outdated again in its folder, on the trainings, images and scores that lie there.
        in_turn: one run after the other in this process, without Snakemake and what is for it alone.

    Raises:
        ModuleNotFoundError: without the extra `batch`, unless `in_turn`.
        BlockingIOError: if another call works on the same folder.
        ValueError: before anything starts, if a run was done with other parameters and `redo` is not asked for, if
            this machine has less than a run asks for, or the profile is unknown.
        RuntimeError: at the end, if runs are not done; the sentence names each with its error.
    """
    if not in_turn and importlib.util.find_spec("snakemake") is None:
        raise ModuleNotFoundError("dkto sweep runs on Snakemake: pip install 'dkto[batch]'; --dry-run works without")
    settings = _profile_folder(profile)
    engine_settings = read_yaml((settings / "config.yaml").read_text())
    local = engine_settings.get("executor", "local") == "local"
    with sole_writer(plan.folder) as hold:
        states = run_states(plan)
        again = _to_do_again(plan, states, redo, renew)
        todo = [run for run in plan.runs if states[run.name].word != "done" or run.name in again]
        _clear(plan, todo, states, again if redo else set())
        if todo:
            limits = _limits(todo, cores) if local and not in_turn else _of_slurm(engine_settings)
            print(f"sweep {plan.name}: {len(todo)} of {len(plan.runs)} runs to do, in {plan.folder}", flush=True)
        if todo and in_turn:
            _run_in_turn(plan, todo)
        elif todo:
            _write_plan(plan, local)
            with _engine(plan, [*limits, "--profile", str(settings), "--retries", str(retries)], hold) as engine:
                import dkto.runs.page  # noqa: F401 - pandas loads while the engine starts

                _tell(plan, todo, engine)
        return _conclude(plan)


def _run_in_turn(plan: Plan, todo: list[PlannedRun]) -> None:
    """Each run in this process; one whose notebook fails, or that reads such a one, does not stop the others."""
    failed = set()
    for number, run in enumerate(todo, 1):
        if failed & set(run.inputs.values()):
            failed.add(run.name)
            continue
        print(f"[{number}/{len(todo)}] {run.name}: notebook {Path(run.notebook).stem}", flush=True)
        try:
            progress = QUIET_VARIABLE not in os.environ
            run_notebook(run.notebook, plan.executed(run), plan.told(run), progress=progress)
        except RuntimeError as error:
            failed.add(run.name)
            print(f"{run.name} failed: {printable(error)}", flush=True)


def results_of(folder: str | Path, names: Sequence[str] = ()) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Metrics and seconds by run of a sweep's folder; no names take all runs directly below it that finished."""
    metrics, seconds = {}, {}
    for path in [Path(folder, name, RECORD_NAME) for name in names] or sorted(Path(folder).glob(f"*/{RECORD_NAME}")):
        record, name = read_record(path), str(path.parent.relative_to(folder))
        if record["status"] == "finished":
            metrics[name] = read_metrics(path.with_name("metrics.json"))
            seconds[name] = record["seconds"]
    return metrics, seconds


def _profile_folder(profile: str) -> Path:
    for folder in (BATCH / "profiles" / profile, Path(profile)):
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    known = ", ".join(sorted(path.parent.name for path in (BATCH / "profiles").glob("*/config.yaml")))
    raise ValueError(f"profile must be one of {known}, or a folder with a config.yaml, got {shown(profile)}")


def _to_do_again(plan: Plan, states: dict[str, State], redo: bool, renew: bool) -> set[str]:
    """Runs to make again: outdated ones, with `redo` changed ones too, and all that read one of these."""
    found: set[str] = set()
    for run in plan.runs if redo or renew else ():  # what is read comes before what reads it
        word, outdated = states[run.name].word, states[run.name].detail
        if (word == "done" and outdated) or (redo and word == "changed") or found & set(run.inputs.values()):
            found.add(run.name)
    return found


def _clear(plan: Plan, todo: list[PlannedRun], states: dict[str, State], removed: set[str]) -> None:
    """Make way for what is to be done, and never for anything else."""
    changed = [run for run in todo if states[run.name].word == "changed" and run.name not in removed]
    if changed:
        first = changed[0].name
        raise ValueError(
            f"{len(changed)} runs in {plan.folder} were made with other parameters ({first}: {states[first].detail}): "
            "choose another --output-dir, or remove them (`dkto sweep --redo` does, and runs them again)"
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


def _of_slurm(settings: dict) -> list[str]:
    """What a Slurm without job accounting needs, as arguments: there `sacct`, which the engine asks, knows nothing.

    Then it would wait indefinitely for jobs that have ended, and refuse an account, which no command can vouch for.
    """
    if settings.get("executor") != "slurm" or "slurm-status-command" in settings:
        return []
    if not re.search(r"AccountingStorageType *= accounting_storage/none", said("scontrol", "show", "config")):
        return []
    default = settings.get("default-resources", {})
    kept = [f"{name}={value}" for name, value in default.items() if name != "slurm_account"]
    return ["--slurm-status-command", "squeue", "--default-resources", *kept]


def _cards() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [card.strip() for card in visible.split(",") if card.strip()]
    return [str(number) for number in range(len(accelerators()))]


def _write_plan(plan: Plan, local: bool) -> None:
    about = {"sweep": plan.name, "folder": str(plan.folder), "working_directory": os.getcwd(), "python": sys.executable}
    about |= {"cards": ",".join(_cards()) if local else None, "runs": plan_to_dict(plan)}
    write_json(plan.folder / "plan.json", about)


@contextmanager
def _engine(plan: Plan, arguments: list[str], hold: int) -> Iterator[subprocess.Popen]:
    """Snakemake on the plan's folder. It inherits the hold on the folder and dies with this process."""
    command = [sys.executable, "-c", ENGINE, "--snakefile", str(BATCH / "Snakefile"), *arguments]
    command += ["--directory", str(plan.folder), "--configfile", str(plan.folder / "plan.json"), "--nocolor"]
    remove(plan.folder / ENGINE_LOG)  # which may be a link of whoever made the folder
    with (plan.folder / ENGINE_LOG).open("w") as log:
        process = subprocess.Popen(
            following(command, signal.SIGKILL),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[hold],
            start_new_session=True,  # an interrupt from the keyboard comes to this process alone
            env=os.environ | {QUIET_VARIABLE: "1"},
        )
        try:
            yield process
        finally:
            process.kill()  # if it is still there this process was interrupted; its runs end with it
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
            record = read_record(path)
            if record["status"] != "running":
                told.add(run.name)
                end = f": {printable(record['error'])}" if record["error"] else ""
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
    waits = {run.name: _waits(run, states) for run in plan.runs}
    texts = {name: f"not started: it reads {waits[name][0]}" if waits[name] else str(states[name]) for name in states}
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
    more = f"; and {len(undone) - MOST_NAMED} more, see the page" if len(undone) > MOST_NAMED else ""
    raise RuntimeError(f"{head}: {'; '.join(undone[:MOST_NAMED])}{more}")


def _waits(run: PlannedRun, states: dict[str, State]) -> list[str]:
    """The runs that one reads and that are not done."""
    return [name for name in run.inputs.values() if states[name].word != "done"]
