"""Fine-tune a diffusion model: a generator of step records over accelerate, one loop for every method.

    for record in train(config):
        ...   # log it, plot it, or stop

The step itself is in `dkto.training.step`; that of AlignProp and D3PO, which draw their own images, in
`dkto.training.online`.
"""

import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from dkto.common.processes import sole_writer
from dkto.common.progress import progress
from dkto.data.encoded import PreparedFeedback, preparing_model
from dkto.models import load_model, read_weights
from dkto.objective.methods import ONLINE
from dkto.training.batches import GlobalBatches
from dkto.training.config import RunConfig
from dkto.training.engine import Engine
from dkto.training.noise_bank import fill_bank
from dkto.training.run_folder import RunFolder
from dkto.training.step import Progress, Run, finish_step, train_step

SLOPE_STEPS, LEAST_SLOPE = 20, 0.02  # below this mean slope over so many steps a loss counts as saturated


def learning_rate_at(step: int, config: RunConfig) -> float:
    """Linear warm-up, then constant (paper A.1). `step` counts from 0."""
    return config.learning_rate * min(1.0, (step + 1) / max(config.warmup_steps, 1))


def train(config: RunConfig, should_stop: Callable[[], bool] = lambda: False) -> Iterator[dict]:
    """Train and yield one record per optimiser step.

    A run whose output folder holds checkpoints of the same configuration goes on from the last one that is whole;
    one that is finished yields nothing. More steps may be asked of a run that is not finished, or trained adapters.
    A step whose loss or gradient is not finite changes nothing,
    leaves no record and is counted in `skipped_steps`.
    At the end the folder holds `metrics.jsonl`, `training.json` and the weights for plain diffusers:
    `model/`, a whole pipeline, after full fine-tuning; `lora/` after training adapters.

    Args:
        config: a `TrainConfig`, or an `OnlineConfig` for AlignProp and D3PO.
        should_stop: asked after every step; once it is true on any process, a checkpoint is written and the
            run ends there, to go on when it is called again.

    Raises:
        ValueError: if the feedback was prepared with another model, has one class only while both are asked for, has no
            pairs for "dpo", the utility is unknown, AlignProp's reward has no gradient, a reward cannot read a prompt,
            an online method meets a model that it cannot draw with, the folder belongs to another configuration, or
            none of its checkpoints is whole.
        KeyError: if no scorer has the reward's name.
        FileNotFoundError: if prepared feedback, prompts or a reward's weights are missing.
        BlockingIOError: if another process trains into the folder.
        FloatingPointError: after `max_bad_steps` steps in a row with a non-finite loss or gradient.
        RuntimeError: if a checkpoint or the tuned weights cannot be written.
    """
    folder = RunFolder(config)
    if folder.is_finished():
        folder.clear()
        return
    config = folder.config
    run = open_run(config)
    main = run.engine.accelerator.is_main_process
    doubts = config.doubts()
    if getattr(run.batches, "leaves_weights", False):
        doubts.append(f"objective {config.objective} does not read the weights in {config.prepared_dir}; tgo does")
    for text in doubts if main else ():
        warnings.warn(text, stacklevel=2)
    slopes: deque[float] = deque(maxlen=SLOPE_STEPS)
    with sole_writer(config.output_dir) if main else nullcontext():
        resume(run, folder)
        if getattr(config, "noise_bank", 0):
            run.batches.bank = fill_bank(run)
        if main:
            folder.begin(run.engine.rank[1], run.progress)
        with run.engine.tracking():
            for step in range(run.progress.global_step, config.max_train_steps):
                began, rate = time.monotonic(), learning_rate_at(step, config)
                run.engine.set_rate(rate)
                record = finish_step(run, gradients_of(run), rate, began)
                if record is not None:
                    if main:
                        folder.append(record)
                    run.engine.track(record)
                    slopes.append(record.get("utility_slope", 1.0))
                    if main and len(slopes) == SLOPE_STEPS and sum(slopes) / SLOPE_STEPS < LEAST_SLOPE:
                        warnings.warn(_saturated(config, record["global_step"], slopes), stacklevel=2)
                        slopes = deque(maxlen=0)  # once is enough
                last = step + 1 == config.max_train_steps
                stopping = run.engine.any(should_stop()) and not last
                if stopping or ((step + 1) % config.checkpoint_every == 0 and not last):
                    folder.save(run)
                if record is not None:
                    yield record
                if stopping:
                    return
            folder.finish(run)
            run.engine.accelerator.wait_for_everyone()


def _saturated(config: RunConfig, step: int, slopes: Sequence[float]) -> str:
    return (
        f"the mean slope of the loss over the last {len(slopes)} steps to step {step} is "
        f"{sum(slopes) / len(slopes):.2g}: at beta {config.beta:g} it is saturated and samples hardly count; "
        "`dkto calibrate` proposes a smaller one"
    )


def open_run(config: RunConfig) -> Run:
    """A run at its beginning: model, batches and engine."""
    if config.objective in ONLINE:
        from dkto.training.online import open_online  # it needs the scorers

        return open_online(config)
    model = load_model(config.model or preparing_model(config.prepared_dir))
    batches = GlobalBatches(config, PreparedFeedback(config.prepared_dir, model), model)
    return Run(config, model, Engine(config, model), batches)


def gradients_of(run: Run) -> dict[str, float]:
    """The gradients of one step, by the run's method; returns the measures of the global batch."""
    if run.method.draws == "own":
        from dkto.training.online import online_step

        return online_step(run)
    return train_step(run)


def resume(run: Run, folder: RunFolder) -> None:
    """Put a run where its last checkpoint left it, if there is one, and start its engine."""
    checkpoint, state = folder.last_checkpoint(run.engine.check_checkpoint) or (None, {})
    if checkpoint is not None:
        read_weights(run.engine.pair, checkpoint)
    run.engine.start()
    if checkpoint is not None:
        run.engine.load_state(checkpoint)
        run.progress = Progress(**{name: state[name] for name in vars(run.progress)})


def run_training(config: RunConfig) -> Path:
    """Train to the end with a progress bar; returns the run's folder (see `dkto.models.System.of_run`).

    SIGTERM lets the present step end, writes a checkpoint and returns; the next call goes on from there.
    """
    bar = progress(total=config.max_train_steps, desc="training", unit="step")
    with bar, stop_on_sigterm() as should_stop:
        for record in train(config, should_stop):
            bar.update(record["global_step"] - bar.n)
            bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
    return config.output_dir


@contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM ends nothing, but makes the returned function true.

    A view's stop button, a scheduler's warning and the death of the notebook that started the training all
    arrive as SIGTERM. Only the main thread can ask for that; elsewhere the function stays false.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
