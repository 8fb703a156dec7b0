"""Start trainings as sub-processes that cannot outlive the notebook or program that started them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dkto.common.ends import PARENT_VARIABLE
from dkto.common.files import last_record
from dkto.common.processes import following
from dkto.common.progress import progress
from dkto.common.settings import checked_number
from dkto.training.config import OnlineConfig, RunConfig, TrainConfig

COMMANDS = {TrainConfig: "train", OnlineConfig: "train-online"}


def config_arguments(config: RunConfig) -> list[str]:
    """The configuration as command-line arguments of `dkto train` or `dkto train-online`."""
    arguments = []
    for name, value in config.resolved().to_dict().items():  # a utility defined as text here is unknown there
        name = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        else:
            arguments += [f"--{name}", str(value)]
    return arguments


def training_command(config: RunConfig, *, threads: int, ranks: int, accelerate_config: str | Path) -> list[str]:
    """The command that `start_training` runs."""
    ranks, threads = checked_number("ranks", ranks, least=1), checked_number("threads", threads, least=0)
    if accelerate_config and ranks > 1:
        raise ValueError(f"ranks must be 1 with accelerate_config, whose file names their number, got {ranks}")
    if accelerate_config and not Path(accelerate_config).is_file():
        raise FileNotFoundError(f"accelerate_config {str(accelerate_config)!r} does not exist")
    launcher = []
    if accelerate_config:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(accelerate_config)]
    elif ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, "-m", "dkto.cli", COMMANDS[type(config)], *config_arguments(config)]
    return [*command, "--threads", str(threads)]


def start_training(
    config: RunConfig, *, threads: int = 1, ranks: int = 1, accelerate_config: str | Path = ""
) -> subprocess.Popen:
    """Start one training; its output goes to `train.log` in the run's folder.

    It ends with the process that started it, however that ends, and with it all that it has started (Linux).

    Args:
        config, threads: what to train, and CPU threads of each process.
        ranks: processes that share the training on this machine, under torchrun if more than 1.
        accelerate_config: a file for `accelerate launch` instead, see papermill_runs/profiles/accelerate.

    Raises:
        ValueError: for a number of ranks that is below 1, or above it with a file.
        FileNotFoundError: if there is no such file.
    """
    command = training_command(config, threads=threads, ranks=ranks, accelerate_config=accelerate_config)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {PARENT_VARIABLE: str(os.getpid())}
    with (config.output_dir / "train.log").open("a") as log:
        return subprocess.Popen(following(command), stdout=log, stderr=subprocess.STDOUT, env=environment)


def run_trainings(
    configs: Sequence[RunConfig],
    *,
    processes: int = 0,
    threads: int = 1,
    ranks: int = 1,
    accelerate_config: str | Path = "",
    on_progress: Callable[[], None] | None = None,
) -> None:
    """Run several trainings side by side and wait for all.

    When one fails, those that run are ended (they go on from their checkpoints when called again) and no
    other is started.

    Args:
        configs: one for each training.
        processes: how many run at a time, in the order given; 0 runs all at once.
        threads, ranks, accelerate_config: of each training, as in `start_training`.
        on_progress: called about once a second, for a live view.

    Raises:
        ValueError: if `processes` is below 0.
        RuntimeError: if one fails; the sentence names its log and quotes the last line of it.
    """
    processes = checked_number("processes", processes, least=0)
    waiting, running = list(configs), []
    options = {"threads": threads, "ranks": ranks, "accelerate_config": accelerate_config}
    bar = progress(total=sum(config.max_train_steps for config in configs), desc="training", unit="step")
    try:
        while waiting or running:
            while waiting and (not processes or len(running) < processes):
                running.append((waiting[0], start_training(waiting.pop(0), **options)))
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
            process.terminate()
        for _, process in running:
            process.wait()
        bar.close()


def _failure(config: RunConfig, code: int) -> str:
    log = config.output_dir / "train.log"
    lines = log.read_text().strip().splitlines() or ["no output"]
    last = next((line for line in reversed(lines) if "dkto: " in line), lines[-1])  # launchers write pages after it
    return f"training in {config.output_dir} ended with code {code}: {last} (see {log})"


def _steps_done(config: RunConfig) -> int:
    record = last_record(config.output_dir / "metrics.jsonl")
    return record["global_step"] if record else 0
