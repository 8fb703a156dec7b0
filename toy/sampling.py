"""Drawing points from trained ensembles: ancestral and DDIM (paper 3.1, 7)."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dkto.common.names import check_name
from toy.network import Ensemble, one_thread, stream
from toy.schedule import Schedule

NoisePred = Callable[[Tensor, int], Tensor]
SAMPLERS = ("ancestral", "ddim")


def starting_noise(seeds: Sequence[int], num_samples: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """N(0, I) points from which samplers start, (S, N, 2); the same for all methods of a seed."""
    draws = [torch.randn(num_samples, 2, generator=stream(seed, "starting noise")) for seed in seeds]
    return torch.stack(draws).to(dtype)


def ancestral(noise_pred: NoisePred, schedule: Schedule, start: Tensor, step_noise: Callable[[int], Tensor]) -> Tensor:
    """Ancestral (DDPM) sampling with the posterior's variance, to (..., 2) points in model units.

    Args:
        noise_pred: takes noisy points (..., 2) and a timestep, gives the predicted noise.
        schedule: noise levels.
        start: (..., 2) draws of N(0, I).
        step_noise: gives (..., 2) draws of N(0, I) for each timestep t > 0.
    """
    sample = start
    for timestep in reversed(range(schedule.num_train_timesteps)):
        noise = step_noise(timestep) if timestep else start
        sample = schedule.step(noise_pred(sample, timestep), timestep, sample, noise)
    return sample


def ddim(noise_pred: NoisePred, schedule: Schedule, start: Tensor) -> Tensor:
    """Deterministic (DDIM, eta = 0) sampling over every timestep; arguments and points as of `ancestral`."""
    sample = start
    for timestep in reversed(range(schedule.num_train_timesteps)):
        sample = schedule.ddim_step(noise_pred(sample, timestep), timestep, sample)
    return sample


def sample_ensemble(
    policy: Ensemble,
    schedule: Schedule,
    seeds: Sequence[int],
    num_samples: int,
    labels: Sequence[float] | None = None,
    sampler: str = "ancestral",
) -> Tensor:
    """Points of every method of every seed, (K, S, N, 2) in model units; methods of one seed share all noise.

    A member that diverged has points that are NaN or infinite.

    Args:
        policy: K x S members, method after method.
        schedule: noise levels.
        seeds: S.
        num_samples: N of each member.
        labels: K labels that the networks get (+1: CSFT's "good"), or None for 0.
        sampler: "ancestral" or "ddim"; another one raises a ValueError.
    """
    check_name("sampler", sampler, SAMPLERS)
    labels = [0.0] * (policy.members // len(seeds)) if labels is None else labels
    rows = []
    with one_thread():
        for number, seed in enumerate(seeds):
            start = starting_noise([seed], num_samples, policy.parameters.dtype)
            if sampler == "ddim":
                draw = partial(ddim, schedule=schedule, start=start)
            else:
                shape, generator = (schedule.num_train_timesteps, *start.shape), stream(seed, "sampling noise")
                noise = torch.randn(shape, generator=generator).to(start.dtype)
                draw = partial(ancestral, schedule=schedule, start=start, step_noise=noise.__getitem__)
            columns = []
            for row, label in enumerate(labels):
                # one member at a time: its activations stay in a core's cache
                member = policy.select([row * len(seeds) + number])
                columns.append(draw(partial(member, label=torch.tensor([label])))[0])
            rows.append(torch.stack(columns))
    return torch.stack(rows, dim=1)
