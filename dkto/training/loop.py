"""Fine-tune a diffusion model from likes: a generator of step records over accelerate.

    for record in train(config):
        ...   # log it, plot it, or stop

One step: draw rows with the biased sampler, noise them, predict with policy and reference on the
same noise and timestep, and let `dkto.objective.losses` turn the two errors into a loss. Losses and reference
point are means over the global batch, so the number of processes changes neither.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from dkto.common.files import keep_records
from dkto.common.processes import sole_writer
from dkto.common.progress import progress
from dkto.data.encoded import PreparedFeedback
from dkto.models import DiffusionModel, load_model
from dkto.objective.accuracy import implicit_accuracy
from dkto.objective.losses import (
    denoising_error,
    dpo_loss,
    effective_weight,
    implicit_reward,
    kto_loss,
    reference_point,
    sft_loss,
)
from dkto.objective.utilities import Utility, get_utility
from dkto.training.batches import Batch, GlobalBatches
from dkto.training.config import TrainConfig
from dkto.training.engine import Engine
from dkto.training.run_folder import CheckpointStore


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then constant (paper A.1). `step` counts from 0."""
    return config.learning_rate * min(1.0, (step + 1) / max(config.warmup_steps, 1))


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


def _any_rank(asked: bool, accelerator: Accelerator) -> bool:
    """Whether any process was asked to stop: all must leave after the same step."""
    if accelerator.num_processes == 1:
        return asked
    return bool(accelerator.reduce(torch.tensor(float(asked), device=accelerator.device), "sum") > 0)


def train(config: TrainConfig, should_stop: Callable[[], bool] = lambda: False) -> Iterator[dict]:
    """Train and yield one record per optimiser step.

    A run whose output folder holds checkpoints of the same configuration goes on from the last one;
    one that is finished yields nothing. A step whose loss or gradient is not finite changes nothing,
    leaves no record and is counted in `skipped_steps`.
    At the end the folder holds `metrics.jsonl`, `run.json` and the weights for plain diffusers:
    `model/`, a whole pipeline, after full fine-tuning; `lora/` after training adapters.

    Args:
        config: what to train.
        should_stop: asked after every step; once it is true on any process, a checkpoint is written and the
            run ends there, to go on when it is called again.

    Raises:
        ValueError: if the feedback was prepared with another model, has one class only while both
            are asked for, has no pairs for "dpo", the utility is unknown, or the folder belongs to
            another configuration.
        BlockingIOError: if another process trains into the folder.
        FloatingPointError: after `max_bad_steps` steps in a row with a non-finite loss or gradient.
        RuntimeError: if a checkpoint cannot be written.
    """
    utility = get_utility(config.utility)
    store = CheckpointStore(config)
    if store.is_finished():
        return
    model = load_model(config.model)
    batches = GlobalBatches(config, PreparedFeedback(config.prepared_dir, model), model)
    engine = Engine(config, model)
    accelerator = engine.accelerator
    rank = (accelerator.process_index, accelerator.num_processes)
    with sole_writer(config.output_dir) if accelerator.is_main_process else nullcontext():
        store.restore(engine)
        if accelerator.is_main_process:
            keep_records(store.records_path, store.state["global_step"])
            store.describe(accelerator.num_processes)
        if config.tracker != "none":
            accelerator.init_trackers("dkto", config.to_dict())
        try:
            for step in range(store.state["global_step"], config.max_train_steps):
                record = train_step(step, config, utility, model, batches, engine, store.state, rank)
                if record is not None:
                    if accelerator.is_main_process:
                        store.append(record)
                    if config.tracker != "none":
                        accelerator.log(record, step=step + 1)
                last = step + 1 == config.max_train_steps
                stopping = _any_rank(should_stop(), accelerator) and not last
                if stopping or ((step + 1) % config.checkpoint_every == 0 and not last):
                    store.save(engine)
                if record is not None:
                    yield record
                if stopping:
                    return
            store.finish(engine, model)
            accelerator.wait_for_everyone()
        finally:
            if config.tracker != "none":
                accelerator.end_training()


def train_step(
    step: int,
    config: TrainConfig,
    utility: Utility,
    model: DiffusionModel,
    batches: GlobalBatches,
    engine: Engine,
    state: dict,
    rank: tuple[int, int],
) -> dict | None:
    """One optimiser step; returns its record, or None if it was skipped for a loss or gradient that is not finite."""
    began, tables = time.monotonic(), []
    engine.set_rate(learning_rate_at(step, config))
    for micro in range(config.gradient_accumulation):
        batch = batches.draw(step, micro, *rank).to(engine.device)
        with engine.no_sync(last=micro + 1 == config.gradient_accumulation):
            errors, unrelated = denoising_errors(model, engine, batch)
            loss, table = objective(config, utility, errors, unrelated, batch, engine.sum)
            engine.backward(loss / config.gradient_accumulation)
        tables.append(table)
    grad_norm = engine.clip()
    table = engine.accelerator.gather(torch.cat(tables, 1).T.contiguous()).T.cpu()
    finite = bool(torch.isfinite(table).all())
    stepped = engine.step(finite and math.isfinite(grad_norm))
    state["global_step"] = step + 1
    state["seconds"] += time.monotonic() - began
    if not stepped:
        state["skipped_steps"] += 1
        # a gradient that overflows in fp16 is the loss scaler's everyday business, a loss is not
        state["bad_steps"] += engine.scaler is None or not finite
        if state["bad_steps"] >= config.max_bad_steps:
            raise FloatingPointError(
                f"loss or gradient was not finite for {state['bad_steps']} steps in a row, last at step {step + 1}; "
                f"the last checkpoint in {config.output_dir} is whole. Lower learning_rate or beta"
            )
        return None
    state["bad_steps"] = 0
    return {
        "global_step": step + 1,
        **measures(config, table),
        "grad_norm": grad_norm,
        "learning_rate": learning_rate_at(step, config),
        "samples_per_second": config.batch_size / (time.monotonic() - began),
        "peak_memory_mb": round(engine.peak_memory_mb(), 1),
        "skipped_steps": state["skipped_steps"],
    }


def run_training(config: TrainConfig) -> Path:
    """Train to the end with a progress bar; returns the run's folder (see `dkto.models.system.System.of_run`).

    SIGTERM lets the present step end, writes a checkpoint and returns; the next call goes on from there.
    """
    bar = progress(total=config.max_train_steps, desc="training", unit="step")
    with bar, stop_on_sigterm() as should_stop:
        for record in train(config, should_stop):
            bar.update(record["global_step"] - bar.n)
            bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
    return config.output_dir


Errors = tuple[Tensor, Tensor]  # policy's and reference's denoising error, each (B,)


def denoising_errors(model: DiffusionModel, engine: Engine, batch: Batch) -> tuple[Errors, Errors | None]:
    """Errors of policy and reference on the same noise and timestep, and the same under another sample's
    prompt if the batch carries one (paper 4.1; without gradient)."""

    def error(denoiser: torch.nn.Module, conditioning: dict[str, Tensor]) -> Tensor:
        with engine.autocast():
            prediction = model.predict(denoiser, batch.noisy_latents, batch.timesteps, conditioning)
        return denoising_error(prediction, batch.target)

    unrelated = None
    with engine.pair.as_reference() as reference:
        reference_error = error(reference, batch.conditioning)
        if batch.unrelated is not None:
            unrelated_reference = error(reference, batch.unrelated)
    if batch.unrelated is not None:
        with torch.no_grad():
            unrelated = error(engine.policy, batch.unrelated), unrelated_reference
    return (error(engine.policy, batch.conditioning), reference_error), unrelated


ROWS = ("reward", "is_desirable", "policy_error", "loss", "reference_point", "utility_slope")


def objective(
    config: TrainConfig,
    utility: Utility,
    errors: Errors,
    unrelated: Errors | None,
    batch: Batch,
    total: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The loss of one rank's share: its mean over the ranks is the loss of the global micro-batch.

    Args:
        errors: policy's and reference's denoising error, each (B,).
        unrelated: the same under mismatched prompts, for the estimator of that name.
        total: sums a tensor over all ranks.

    Returns:
        The loss, and (len(ROWS), B) without gradient, from which `measures` are taken.
    """
    reward = implicit_reward(*errors, config.beta)
    point, slope = torch.zeros_like(reward[0]), torch.ones_like(reward)
    if config.objective == "kto":
        point = reference_point(
            reward,
            config.estimator,
            is_desirable=batch.is_desirable,
            unrelated_reward=None if unrelated is None else implicit_reward(*unrelated, config.beta),
            clamp=config.clamp,
            reduce=total,
        )
        weights = {"desirable_weight": config.desirable_weight, "undesirable_weight": config.undesirable_weight}
        loss = kto_loss(reward, batch.is_desirable, point, utility, **weights)
        slope = effective_weight(reward, batch.is_desirable, point, utility, **weights).abs()
    elif config.objective == "dpo":
        chosen, rejected = reward[0::2], reward[1::2]
        loss = dpo_loss(chosen, rejected)
        slope = torch.sigmoid(rejected - chosen).repeat_interleave(2)
    else:
        loss = sft_loss(errors[0])  # the sampler has drawn what counts
    columns = (reward, batch.is_desirable, errors[0], loss, point, slope)
    return loss, torch.stack([value.detach().to(reward.dtype).expand_as(reward) for value in columns])


def measures(config: TrainConfig, table: Tensor) -> dict[str, float]:
    """What a step's record says of the global batch.

    Args:
        table: (len(ROWS), batch_size), from `objective`, over all ranks and micro-batches.
    """
    reward, liked, policy_error, loss, point, slope = table
    liked = liked.bool()
    values = {
        "loss": loss.mean(),
        "policy_error": policy_error.mean(),
        "mean_abs_reward": reward.abs().mean(),
        "implicit_accuracy/sample": implicit_accuracy(reward, liked, definition="sample"),
    }
    if config.objective == "kto":
        values["reference_point"] = point.mean()
        values["implicit_accuracy/sample_centred"] = implicit_accuracy(reward - point, liked, definition="sample")
    if config.objective == "dpo":
        chosen, rejected = reward[0::2], reward[1::2]
        values["implicit_accuracy/pair"] = implicit_accuracy(chosen, definition="pair", rejected_reward=rejected)
    if config.objective in ("kto", "dpo"):
        values["utility_slope"] = slope.mean()
    if liked.any():
        values["reward/desirable"] = reward[liked].mean()
    if not liked.all():
        values["reward/undesirable"] = reward[~liked].mean()
    if liked.any() and not liked.all():
        values["reward/margin"] = values["reward/desirable"] - values["reward/undesirable"]
    return {name: float(value) for name, value in values.items()}
