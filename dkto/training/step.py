"""One optimiser step of Diffusion-KTO and of every other method that learns from prepared feedback.

Draw rows, noise them, predict with policy and reference on the same noise and timestep, and let
`dkto.objective.methods` turn the two errors into a loss. Losses and reference point are means over the global batch, so
the number of processes changes neither.
"""

import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dkto.objective.accuracy import measures
from dkto.objective.losses import denoising_error, implicit_reward, pair_overlap
from dkto.objective.methods import BRAKES, METHODS, Errors, Felt, Method, method_loss
from dkto.objective.utilities import get_utility
from dkto.training.batches import Batch, GlobalBatches
from dkto.training.config import RunConfig

if TYPE_CHECKING:
    from dkto.models import DiffusionModel
    from dkto.training.engine import Engine


@dataclass
class Progress:
    """How far a run is, and what a checkpoint remembers beside weights; `bad_steps` are those in a row."""

    global_step: int = 0
    skipped_steps: int = 0
    bad_steps: int = 0
    seconds: float = 0.0
    past: list[float] | None = None  # sum and count of rewards, for the "running" reference point


@dataclass
class Run:
    """A training under way: what is trained, with what, on what, and how far it is."""

    config: RunConfig
    model: "DiffusionModel"
    engine: "Engine"
    batches: GlobalBatches
    progress: Progress = field(default_factory=Progress)
    past: Tensor | None = None  # as `progress.past`, the present step included
    ahead: ThreadPoolExecutor | None = None  # where the next micro-batch is drawn while the device works on this one
    _next: dict[tuple[int, int], Future[Batch]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.engine.device.type != "cpu":  # which has no hand free
            self.ahead = ThreadPoolExecutor(1)

    @property
    def method(self) -> Method:
        """The entry of the table of methods."""
        return METHODS[self.config.objective]

    @cached_property
    def settings(self) -> dict[str, object]:
        """What the method's loss takes of the configuration; a utility is looked up once."""
        found = self.method.loss_settings(self.config) | {name: getattr(self.config, name) for name in BRAKES}
        return found | ({"utility": get_utility(found["utility"])} if "utility" in found else {})

    def micro_batches(self) -> Iterator[Batch]:
        """This process's shares of the global batch of the step; gradients are added up over processes in the last."""
        parts = self.config.gradient_accumulation
        for micro in range(parts):
            with self.engine.no_sync(last=micro + 1 == parts):
                yield self._drawn(self.progress.global_step, micro).to(self.engine.device)

    def _drawn(self, step: int, micro: int) -> Batch:
        """A micro-batch, and the one after it on its way: draws have an address, so that no order changes them."""
        waiting = self._next.pop((step, micro), None)
        batch = waiting.result() if waiting else self.batches.draw(step, micro, *self.engine.rank)
        after = (step, micro + 1) if micro + 1 < self.config.gradient_accumulation else (step + 1, 0)
        if self.ahead is not None and after[0] < self.config.max_train_steps:
            self._next = {after: self.ahead.submit(self.batches.draw, *after, *self.engine.rank)}
        return batch


def train_step(run: Run) -> dict[str, float]:
    """The gradients of one step (paper eq. 14-15 for "kto"); returns the measures of the global batch."""
    config, seen = run.config, []
    run.past = None if run.progress.past is None else torch.tensor(run.progress.past, dtype=torch.float64)
    for batch in run.micro_batches():
        errors = denoising_errors(run, batch)
        given = {"past": run.past, "reduce": run.engine.sum, "sample_weight": batch.sample_weight}
        felt = method_loss(config.objective, errors, batch.is_desirable, **given, **run.settings)
        run.past = felt.past
        run.engine.backward(felt.loss / config.gradient_accumulation)
        seen.append(columns(felt, errors, batch, config.beta))
    return measures(**run.engine.gather(seen), pairs=run.method.draws == "pairs")


def denoising_errors(run: Run, batch: Batch) -> Errors:
    """Errors of policy and reference on the same noise and timestep, each (B,); under another sample's prompt too,
    without gradient, if the batch carries one (paper 4.1)."""

    def predict(denoiser: torch.nn.Module, conditioning: dict[str, Tensor]) -> Tensor:
        with run.engine.autocast():
            return run.model.predict(denoiser, batch.noisy_latents, batch.timesteps, conditioning)

    unrelated, target = None, batch.target
    with run.engine.pair.as_reference() as reference:
        reference_prediction = predict(reference, batch.conditioning) if batch.expected is None else batch.expected
        if batch.unrelated is not None:
            unrelated_reference = denoising_error(predict(reference, batch.unrelated), target)
    if batch.unrelated is not None:
        with torch.no_grad():
            policy_error = denoising_error(predict(run.engine.policy, batch.unrelated), target)
        unrelated = Errors(policy_error, unrelated_reference)
    prediction = predict(run.engine.policy, batch.conditioning)
    return Errors(
        denoising_error(prediction, target),
        denoising_error(reference_prediction, target),
        unrelated,
        shift=denoising_error(prediction, reference_prediction),
        overlap=pair_overlap(prediction.detach() - target) if "overlap" in run.method.reads else None,
    )


def columns(felt: Felt, errors: Errors, batch: Batch, beta: float) -> dict[str, Tensor]:
    """What a step's measures are taken from: one value for each sample, without gradient."""
    reward = implicit_reward(errors.policy.detach(), errors.reference, beta)
    found = {"reward": reward, "is_desirable": batch.is_desirable, "policy_error": errors.policy, "loss": felt.loss}
    found |= {"point": felt.point, "slope": felt.slope}
    return {k: v.detach().to(reward.dtype).expand_as(reward) for k, v in found.items() if v is not None}


def finish_step(run: Run, measured: dict[str, float], rate: float, began: float) -> dict | None:
    """Move the weights; returns the step's record, or None if a loss or gradient that is not finite left it out.

    Raises:
        FloatingPointError: after `max_bad_steps` such steps in a row.
    """
    config, engine, progress = run.config, run.engine, run.progress
    grad_norm, finite = engine.clip(), all(map(math.isfinite, measured.values()))
    stepped = engine.step(finite and math.isfinite(grad_norm))
    progress.global_step += 1
    progress.seconds += time.monotonic() - began
    if not stepped:
        progress.skipped_steps += 1
        # a gradient that overflows in float16 is the loss scaler's everyday business, a loss is not
        progress.bad_steps += engine.scaler is None or not finite
        if progress.bad_steps >= config.max_bad_steps:
            raise FloatingPointError(
                f"loss or gradient was not finite for {progress.bad_steps} steps in a row, last at step "
                f"{progress.global_step}; the last checkpoint in {config.output_dir} is whole. "
                "Lower learning_rate or beta"
            )
        return None
    progress.bad_steps = 0
    progress.past = None if run.past is None else run.past.tolist()  # a step that was left out leaves no trace in it
    speed = {"samples_per_second": config.batch_size / (time.monotonic() - began)}
    speed |= {"peak_memory_mb": round(engine.peak_memory_mb(), 1), "skipped_steps": progress.skipped_steps}
    return {"global_step": progress.global_step, **measured, "grad_norm": grad_norm, "learning_rate": rate, **speed}
