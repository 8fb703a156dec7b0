"""Training of an ensemble: pretraining and tuning as generators of step records (paper 7).

All members of all methods take a step in the same batched products. Each seed has random streams of its own,
which all its methods share: member k of an ensemble is the model that its seed gives when it trains alone, and
methods of one seed differ by their objective, not by their luck.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dkto.common.names import check_name
from dkto.common.settings import checked_number
from dkto.objective.felt import Errors
from dkto.objective.losses import denoising_error, pair_overlap, sft_loss
from dkto.objective.methods import METHODS as LOSSES
from toy.network import Ensemble, one_thread, stream
from toy.objectives import Draws, Felt, Method, draw_samples, drawing_of, error_weights, group_methods
from toy.objectives import independent_samples as independent_of
from toy.schedule import Schedule
from toy.world import DESIRABLE, PRETRAINING, UNDESIRABLE, Gaussian, preference_reward, to_paper_units

STEPS_AT_ONCE = 25  # how many steps' randomness is drawn in one call; part of what a seed means
EMA_DECAY = 0.995


@dataclass(frozen=True)
class Recipe:
    """Sizes and rates of one experiment; the defaults are the small recipe, `FULL` the large one.

    Attributes:
        num_train_timesteps: T of the linear schedule.
        width: units of each of 3 hidden layers.
        batch_size: samples of each member's step, even (pairs fill it with both sides).
        pretrain_steps, pretrain_learning_rate: Adam, the rate falls to 0 by a cosine, weights averaged.
        max_train_steps, learning_rate: tuning by Adam at a constant rate.
        num_samples: points drawn from each model (paper 7: 3500).
    """

    num_train_timesteps: int = 50
    width: int = 32
    batch_size: int = 128
    pretrain_steps: int = 2000
    pretrain_learning_rate: float = 2e-3
    max_train_steps: int = 1000
    learning_rate: float = 3e-4
    num_samples: int = 3500

    def __post_init__(self) -> None:
        for name in ("num_train_timesteps", "width", "pretrain_steps", "max_train_steps", "num_samples"):
            checked_number(name, getattr(self, name), least=1)
        if checked_number("batch_size", self.batch_size, least=2) % 2:
            raise ValueError(f"batch_size must be even and at least 2, got {self.batch_size}")
        for name in ("pretrain_learning_rate", "learning_rate"):
            checked_number(name, getattr(self, name), float, above=0)

    def replace(self, **changes: float) -> "Recipe":
        """The same recipe with other values; an unknown name raises a sentence.

        >>> SMALL.replace(max_train_steps=300).max_train_steps
        300
        """
        for name in changes:
            check_name("recipe setting", name, vars(self))
        return replace(self, **changes)


SMALL = Recipe()
FULL = Recipe(100, width=64, batch_size=256, pretrain_steps=3000, max_train_steps=2000, learning_rate=1e-4)
RECIPES = {"small": SMALL, "full": FULL}


class Record(NamedTuple):
    """One step of training, (K, S) for K methods of S seeds; pretraining has K = 1. NaN is what a method lacks."""

    global_step: int  # optimiser steps done
    loss: Tensor  # no unit for preference objectives, mean squared error for SFT and CSFT
    reward_desirable: Tensor  # mean implicit reward of the class as labelled
    reward_undesirable: Tensor
    reference_point: Tensor  # an implicit reward


def draw_steps(
    seeds: Sequence[int], purpose: str, batch_size: int, num_train_timesteps: int, dtype: torch.dtype
) -> Iterator[Draws]:
    """Randomness of step after step, each seed from a stream of its own.

    Drawn in float32 whatever `dtype`, so that a seed means the same in every precision.
    """
    generators = [stream(seed, purpose) for seed in seeds]
    shape = (STEPS_AT_ONCE, batch_size)
    while True:
        normal = torch.stack([torch.randn(*shape, 8, generator=g) for g in generators], 1).to(dtype)
        uniform = torch.stack([torch.rand(*shape, 2, generator=g) for g in generators], 1)
        timesteps = torch.stack([torch.randint(num_train_timesteps, shape, generator=g) for g in generators], 1)
        for step in range(STEPS_AT_ONCE):
            yield Draws(*normal[step].split(2, dim=-1), *uniform[step].unbind(-1), timesteps[step])


def pretrain(
    ensemble: Ensemble, schedule: Schedule, seeds: Sequence[int], recipe: Recipe = SMALL, record_every: int = 100
) -> Iterator[Record]:
    """Teach fresh members, one a seed, the pretraining distribution (paper eq. 3), in place.

    Yields a record of every `record_every`-th step and of the last one; then the members hold averaged weights.
    """
    optimizer = torch.optim.Adam([ensemble.parameters], lr=recipe.pretrain_learning_rate, fused=True)
    averaged = ensemble.parameters.clone()
    draws = draw_steps(seeds, "pretraining", recipe.batch_size, schedule.num_train_timesteps, averaged.dtype)
    nothing = torch.full((1, len(seeds)), math.nan)
    for step in range(recipe.pretrain_steps):
        batch = next(draws)
        noisy = schedule.add_noise(PRETRAINING.model_units().place(batch.points), batch.noise, batch.timesteps)
        noise_pred, trace = ensemble.forward(ensemble.inputs(noisy, batch.timesteps))
        ensemble.parameters.grad = ensemble.backward(trace, (noise_pred - batch.noise) / recipe.batch_size)
        progress = step / recipe.pretrain_steps
        optimizer.param_groups[0]["lr"] = recipe.pretrain_learning_rate * (1 + math.cos(math.pi * progress)) / 2
        optimizer.step()
        averaged.lerp_(ensemble.parameters, 1 - EMA_DECAY)
        if _is_due(step + 1, record_every, recipe.pretrain_steps):
            loss = sft_loss(denoising_error(noise_pred, batch.noise, batch_dims=2))[None]
            yield Record(step + 1, loss, nothing, nothing, nothing)
    ensemble.parameters.copy_(averaged)
    ensemble.parameters.grad = None


def tune(
    policy: Ensemble,
    reference: Ensemble,
    schedule: Schedule,
    methods: Sequence[Method],
    seeds: Sequence[int],
    recipe: Recipe = SMALL,
    record_every: int = 100,
    *,
    classes: tuple[Gaussian, Gaussian] = (DESIRABLE, UNDESIRABLE),
) -> Iterator[Record]:
    """Tune every method of every seed at once; fresh samples each step (paper 4.1-4.3).

    Args:
        policy: K x S members, method after method, in most cases `reference.copy(len(methods))`; changed in place.
        reference: S members, frozen.
        schedule: noise levels.
        methods: K of them.
        seeds: S, of the data.
        recipe: sizes and rates.
        record_every: steps between records; the last step has one too.
        classes: the desirable and the undesirable distribution, in paper units.

    Raises:
        ValueError: if the ensembles do not have that many members.
    """
    if policy.members != len(methods) * len(seeds) or reference.members != len(seeds):
        raise ValueError(
            f"policy must have {len(methods)} methods x {len(seeds)} seeds members and reference {len(seeds)}, "
            f"got {policy.members} and {reference.members}"
        )
    dtype = policy.parameters.dtype
    objectives = group_methods(methods, dtype)
    drawings = list(dict.fromkeys(map(drawing_of, methods)))
    drawing_of_row = torch.tensor([drawings.index(drawing_of(method)) for method in methods])
    told = torch.tensor([method.objective == "csft" for method in methods], dtype=dtype)[:, None, None]
    independent = [row for row, method in enumerate(methods) if method.estimator == "independent"]
    optimizer = torch.optim.Adam([policy.parameters], lr=recipe.learning_rate, fused=True)
    draws = draw_steps(seeds, "tuning", recipe.batch_size, schedule.num_train_timesteps, dtype)
    shape = (len(methods), len(seeds), recipe.batch_size)
    shifted = any(method.needs_shift for method in methods)
    reads, felt = {name for method in methods for name in LOSSES[method.objective].reads}, []
    for step in range(recipe.max_train_steps):
        batch = next(draws)
        drawn = [draw_samples(drawing, batch, classes) for drawing in drawings]
        clean, is_desirable, noise, timesteps = (torch.stack(part) for part in zip(*drawn, strict=True))  # (U, S, B)
        read = reference.inputs(schedule.add_noise(clean, noise, timesteps), timesteps)  # (U, S, B, 19)
        expected = _predict(reference, read)
        reference_error = denoising_error(expected, noise, batch_dims=3)[drawing_of_row]
        read, noise, is_desirable = (part[drawing_of_row] for part in (read, noise, is_desirable))  # (K, S, B)
        if told.any():
            read[..., 2] = told * torch.where(is_desirable, 1, -1)
        noise_pred, trace = policy.forward(read.flatten(0, 1))
        residual = noise_pred.view(*shape, 2) - noise
        errors = Errors(denoising_error(residual, torch.zeros_like(residual), batch_dims=3), reference_error)
        if shifted:
            step_away = noise_pred.view(*shape, 2) - expected[drawing_of_row]
            errors = errors._replace(shift=denoising_error(step_away, torch.zeros_like(step_away), batch_dims=3))
        if "overlap" in reads:
            overlap = pair_overlap(torch.stack(residual.chunk(2, -2), -2).flatten(2, 3), batch_dims=3)
            errors = errors._replace(overlap=overlap)
        weight = None
        if "sample_weight" in reads:  # TGO's: a score's distance from its threshold
            weight = 1 + preference_reward(to_paper_units(clean)).abs()[drawing_of_row]
        gap = _independent_gap(policy, reference, schedule, batch, independent, shape) if independent else None
        pull = error_weights(objectives, errors, is_desirable, gap, felt, weight)
        # the error is a mean over 2 coordinates, so its derivative by the prediction is 2/2 times the residual
        by_prediction = pull.on_error[..., None] * residual
        if pull.on_shift is not None:
            by_prediction += pull.on_shift[..., None] * step_away
        policy.parameters.grad, felt = policy.backward(trace, by_prediction.flatten(0, 1)), pull.felt
        optimizer.step()
        if _is_due(step + 1, record_every, recipe.max_train_steps):
            yield _record(step + 1, objectives, felt, is_desirable)
    policy.parameters.grad = None


def run(steps: Iterator[Record]) -> list[Record]:
    """Take all steps, on one thread, and give the records; for callers who watch nothing in between."""
    with one_thread():
        return list(steps)


def _predict(ensemble: Ensemble, read: Tensor) -> Tensor:
    """Predictions (U, S, B, 2) of an ensemble that has one member a seed, on inputs (U, S, B, 19)."""
    drawings, _, batch_size, _ = read.shape
    noise_pred, _ = ensemble.forward(read.transpose(0, 1).flatten(1, 2))
    return noise_pred.unflatten(1, (drawings, batch_size)).transpose(0, 1)


def _independent_gap(
    policy: Ensemble, reference: Ensemble, schedule: Schedule, batch: Draws, rows: list[int], shape: tuple[int, ...]
) -> Tensor:
    """Reference minus policy error on fresh pretraining samples, (K, S, B); 0 for the methods that do not ask."""
    samples = independent_of(batch)
    read = reference.inputs(schedule.add_noise(samples.clean, samples.noise, samples.timesteps), samples.timesteps)
    members = [row * shape[1] + seed for row in rows for seed in range(shape[1])]
    asked, _ = policy.select(members).forward(read.repeat(len(rows), 1, 1))
    noise = samples.noise.expand(len(rows), *samples.noise.shape)
    policy_error = denoising_error(asked.view(noise.shape), noise, batch_dims=3)
    gap = torch.zeros(shape, dtype=read.dtype)
    gap[rows] = denoising_error(_predict(reference, read[None]), samples.noise[None], batch_dims=3) - policy_error
    return gap


def _is_due(step: int, record_every: int, last: int) -> bool:
    return step % record_every == 0 or step == last


def _record(step: int, objectives: Sequence, felt: Sequence[Felt], is_desirable: Tensor) -> Record:
    values = torch.full((4, *is_desirable.shape[:2]), math.nan)
    for objective, part in zip(objectives, felt, strict=True):
        rows, liked = objective.rows, is_desirable[objective.rows]
        values[0, rows] = part.loss.detach().float()
        if part.reward is not None:
            reward = part.reward.detach()
            values[1, rows] = (torch.where(liked, reward, 0).sum(-1) / liked.sum(-1)).float()
            values[2, rows] = (torch.where(liked, 0, reward).sum(-1) / (~liked).sum(-1)).float()
        if part.point is not None:
            values[3, rows] = part.point.float()
    return Record(step, *values)
