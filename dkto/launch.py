"""Start trainings as sub-processes that cannot outlive the notebook or program that started them."""

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from dkto.config import TrainConfig
from dkto.progress import progress
from dkto.records import read_records
from dkto.utilities import get_utility

PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """Linux: ask the kernel to end this process when the thread that made it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def config_arguments(config: TrainConfig) -> list[str]:
    """The configuration as command-line arguments of `dkto train`."""
    arguments = []
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name == "utility":  # one defined as text here is unknown there: send its definition
            value = get_utility(value).definition or value
        name = field.name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        else:
            arguments += [f"--{name}", str(value)]
    return arguments


def start_training(config: TrainConfig, *, threads: int = 1) -> subprocess.Popen:
    """Start one training; its output goes to `train.log` in the run's folder.

    Args:
        config: what to train.
        threads: CPU threads of the process.
    """
    config.output_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dkto.cli", "train", *config_arguments(config), "--threads", str(threads)]
    with (config.output_dir / "train.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent)


def run_trainings(
    configs: Sequence[TrainConfig], *, threads: int = 1, on_progress: Callable[[], None] | None = None
) -> None:
    """Run several trainings side by side and wait for all.

    Args:
        configs: one per process.
        threads: CPU threads of each process.
        on_progress: called about once a second, for a live view.

    Raises:
        RuntimeError: if one fails; the sentence names its log and quotes the last line of it.
    """
    processes = [start_training(config, threads=threads) for config in configs]
    total = sum(config.max_train_steps for config in configs)
    bar = progress(total=total, desc="training", unit="step")
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(0.5)
            bar.update(sum(map(_steps_done, configs)) - bar.n)
            if on_progress is not None:
                on_progress()
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()
        bar.close()
    for config, process in zip(configs, processes, strict=True):
        if process.returncode:
            log = config.output_dir / "train.log"
            last = (log.read_text().strip().splitlines() or ["no output"])[-1]
            raise RuntimeError(
                f"training in {config.output_dir} ended with code {process.returncode}: {last} (see {log})"
            )


def _steps_done(config: TrainConfig) -> int:
    path = Path(config.output_dir) / "metrics.jsonl"
    records = read_records(path) if path.exists() else []
    return records[-1]["global_step"] if records else 0
