"""Start trainings as sub-processes that cannot outlive the notebook or program that started them."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from dkto.config import TrainConfig
from dkto.online_config import OnlineConfig
from dkto.processes import die_with_parent
from dkto.progress import progress
from dkto.records import read_records
from dkto.utilities import get_utility

AnyConfig = TrainConfig | OnlineConfig
COMMANDS = {TrainConfig: "train", OnlineConfig: "train-online"}


def config_arguments(config: AnyConfig) -> list[str]:
    """The configuration as command-line arguments of `dkto train` or `dkto train-online`."""
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


def start_training(config: AnyConfig, *, threads: int = 1) -> subprocess.Popen:
    """Start one training; its output goes to `train.log` in the run's folder.

    Args:
        config: what to train.
        threads: CPU threads of the process.
    """
    config.output_dir.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "dkto.cli",
        COMMANDS[type(config)],
        *config_arguments(config),
        "--threads",
        str(threads),
    ]
    with (config.output_dir / "train.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=die_with_parent)


def run_trainings(
    configs: Sequence[AnyConfig],
    *,
    processes: int = 0,
    threads: int = 1,
    on_progress: Callable[[], None] | None = None,
) -> None:
    """Run several trainings side by side and wait for all.

    When one fails, those that run are ended (they go on from their checkpoints when called again) and no
    other is started.

    Args:
        configs: one per training.
        processes: how many run at a time, in the order given; 0 runs all at once.
        threads: CPU threads of each process.
        on_progress: called about once a second, for a live view.

    Raises:
        ValueError: if `processes` is below 0.
        RuntimeError: if one fails; the sentence names its log and quotes the last line of it.
    """
    if processes < 0:
        raise ValueError(f"processes must be 0 or above, got {processes}")
    waiting, running = list(configs), []
    bar = progress(total=sum(config.max_train_steps for config in configs), desc="training", unit="step")
    try:
        while waiting or running:
            while waiting and (not processes or len(running) < processes):
                running.append((waiting[0], start_training(waiting.pop(0), threads=threads)))
            time.sleep(0.5)
            bar.update(sum(map(_steps_done, configs)) - bar.n)
            if on_progress is not None:
                on_progress()
            for config, process in [pair for pair in running if pair[1].poll() is not None]:
                if process.returncode:
                    raise RuntimeError(_failure(config, process.returncode))
                running.remove((config, process))
    finally:
        for _, process in running:
            if process.poll() is None:
                process.terminate()
                process.wait()
        bar.close()


def _failure(config: AnyConfig, code: int) -> str:
    log = config.output_dir / "train.log"
    last = (log.read_text().strip().splitlines() or ["no output"])[-1]
    return f"training in {config.output_dir} ended with code {code}: {last} (see {log})"


def _steps_done(config: AnyConfig) -> int:
    path = Path(config.output_dir) / "metrics.jsonl"
    records = read_records(path) if path.exists() else []
    return records[-1]["global_step"] if records else 0
