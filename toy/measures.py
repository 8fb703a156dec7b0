"""What is measured on trained ensembles, beside exact limits, with intervals over seeds (paper 7).

Points are in paper units here; leading dimensions are members. A member whose points are not finite has NaN
measures, and `over_seeds` counts it instead of averaging it away.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

from dkto.objective.accuracy import implicit_accuracy
from dkto.objective.losses import denoising_error, reference_point
from toy.network import Ensemble, one_thread, stream
from toy.schedule import Schedule
from toy.world import DESIRABLE, PRETRAINING, UNDESIRABLE, gaussian_kl, preference_reward

DIVERGED_KL = 1e3  # nats above which a member counts as diverged: 45 standard deviations off, or non-finite points
ACCURACY_PAIRS = 1024
ACCURACY_TIMESTEPS = 12
DIRECTIONS = 16
LAGS = 64


def fitted_kl(points: Tensor) -> Tensor:
    """KL in nats from the Gaussian fitted to points (..., N, 2) to the desirable distribution, (...) float64.

    Blind to any shape that is not Gaussian. Below 0.05 it is an order of magnitude. NaN where a point is not finite.
    """
    points = points.double()
    mean = points.mean(-2)
    centred = points - mean[..., None, :]
    covariance = centred.mT @ centred / (points.shape[-2] - 1)
    broken = ~covariance.isfinite().all(-1).all(-1)
    safe = torch.where(broken[..., None, None], torch.eye(2, dtype=torch.float64), covariance)
    return gaussian_kl(mean, safe, DESIRABLE).masked_fill(broken, math.nan)


def sliced_wasserstein(points: Tensor) -> Tensor:
    """Sliced Wasserstein-2 distance of points (..., N, 2) to the desirable distribution, (...) in paper units.

        sqrt( mean over directions and order statistics of (sorted projection - the Gaussian's quantile)^2 )

    The Gaussian's side is its exact quantiles, not a second sample; 16 directions, evenly spaced over half a turn.
    NaN where a point is not finite.
    """
    angle = torch.arange(DIRECTIONS, dtype=torch.float64) * math.pi / DIRECTIONS
    directions = torch.stack([angle.cos(), angle.sin()])  # (2, directions)
    count = points.shape[-2]
    quantiles = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    centred = points.double() - torch.tensor(DESIRABLE.mean, dtype=torch.float64)
    projections = np.sort((centred @ directions).transpose(-1, -2).contiguous().numpy(), axis=-1)
    return (torch.from_numpy(projections) - DESIRABLE.std * quantiles).square().mean((-1, -2)).sqrt()


def energy_distance(points: Tensor) -> Tensor:
    """Energy distance to the desirable distribution, 2 E|X - Y| - E|X - X'| - E|Y - Y'|, in paper units.

    The two terms with the Gaussian are exact (E|x - Y| is a Rice mean); E|X - X'| is the mean over the pairs of points
    at 64 distances in the sample's order, unbiased since points are independent.

    Args:
        points: (..., N, 2); a ValueError unless N > 64.

    Returns:
        (...) float64, may be slightly negative; NaN where a point is not finite.
    """
    if points.shape[-2] <= LAGS:
        raise ValueError(f"points must be more than {LAGS}, got {points.shape[-2]}")
    points = points.double()
    offset = ((points - torch.tensor(DESIRABLE.mean, dtype=torch.float64)) / DESIRABLE.std).square().sum(-1) / 2
    # mean of a Rice variable: sqrt(pi/2) L_{1/2}(-q) with q = offset, written with scaled Bessel functions
    bessel = [torch.from_numpy(f(offset.numpy() / 2)) for f in (special.i0e, special.i1e)]
    cross = DESIRABLE.std * math.sqrt(math.pi / 2) * ((1 + offset) * bessel[0] + offset * bessel[1]).mean(-1)
    within = torch.stack([(points - points.roll(lag, -2)).norm(dim=-1).mean(-1) for lag in range(1, LAGS + 1)]).mean(0)
    return 2 * cross - within - DESIRABLE.std * math.sqrt(math.pi)


def undesirable_rate(points: Tensor) -> Tensor:
    """Share of points that are more likely under the undesirable than under the desirable distribution, (...)."""
    return _share(preference_reward(points) < 0, points)


def off_manifold_rate(points: Tensor) -> Tensor:
    """Share of points beyond 3 standard deviations of both the desirable and the pretraining distribution, (...)."""
    distances = [(points - points.new_tensor(g.mean)).norm(dim=-1) / g.std for g in (DESIRABLE, PRETRAINING)]
    return _share(torch.minimum(*distances) > 3, points)


def normal_points(count: int, dimensions: int) -> Tensor:
    """Scrambled Sobol points of N(0, I), (count, dimensions) float64: a sample that covers its distribution evenly."""
    uniform = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=0).draw(count, dtype=torch.float64)
    return torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12))


@dataclass(frozen=True)
class Rewards:
    """Error gaps on the fixed test set: (M, 1024) of desirable and undesirable points, mean squared error.

    Attributes:
        chosen, rejected: averaged over 12 timesteps and a noise with its negative.
        chosen_once, rejected_once: at one timestep and noise, as a training log sees them.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_once: Tensor
    rejected_once: Tensor

    def accuracies(self) -> dict[str, Tensor]:
        """Implicit accuracies (M,) by definition; the suffix "/one_draw" marks those of a single draw.

        "sample_centred" measures from the clamped mean over the test set.
        """
        found = {}
        once = self.chosen_once, self.rejected_once
        for suffix, (chosen, rejected) in {"": (self.chosen, self.rejected), "/one_draw": once}.items():
            both = torch.cat([chosen, rejected], dim=-1)
            liked = (torch.arange(both.shape[-1]) < chosen.shape[-1]).expand_as(both)
            found[f"pair{suffix}"] = implicit_accuracy(chosen, definition="pair", rejected_reward=rejected)
            found[f"sample{suffix}"] = implicit_accuracy(both, liked, definition="sample")
            centred = {"definition": "sample_centred", "reference_point": reference_point(both)}
            found[f"sample_centred{suffix}"] = implicit_accuracy(both, liked, **centred)
        return found


def held_out_rewards(
    policy: Ensemble, reference: Ensemble, schedule: Schedule, labels: Sequence[float], pairs: int = ACCURACY_PAIRS
) -> Rewards:
    """Error gaps of every member on a fixed test set of pairs; beta only scales them, and no accuracy feels it.

    Args:
        policy: K x S members, method after method.
        reference: S members.
        schedule: noise levels.
        labels: K labels that the policies get.
        pairs: of the test set, a power of 2.
    """
    seeds, dtype = reference.members, policy.parameters.dtype
    normal = normal_points(pairs, 4)
    sides = DESIRABLE.model_units().place(normal[:, :2]), UNDESIRABLE.model_units().place(normal[:, 2:])
    clean = torch.cat(sides)[None].to(dtype)  # (1, 2 pairs, 2)
    noise = torch.randn(ACCURACY_TIMESTEPS, pairs, 2, generator=stream(0, "accuracy noise")).to(dtype)
    every = schedule.num_train_timesteps
    timesteps = [int((i + 0.5) * every / ACCURACY_TIMESTEPS) for i in range(ACCURACY_TIMESTEPS)]
    when = torch.arange(pairs) % ACCURACY_TIMESTEPS  # the one timestep of each pair
    total = torch.zeros(policy.members, 2, pairs, dtype=dtype)
    once = torch.zeros_like(total)
    with one_thread():
        for index, timestep in enumerate(timesteps):
            for sign in (1, -1):
                drawn = sign * noise[index].repeat(2, 1)[None]
                noisy = schedule.add_noise(clean, drawn, torch.full(clean.shape[:-1], timestep))
                expected = [_error(reference, seed, noisy, timestep, drawn) for seed in range(seeds)]
                for member in range(policy.members):
                    label = torch.tensor([labels[member // seeds]])
                    error = _error(policy, member, noisy, timestep, drawn, label)
                    gap = (expected[member % seeds] - error).view(2, pairs)
                    total[member] += gap / (2 * len(timesteps))
                    if sign == 1:
                        once[member] += torch.where(when == index, gap, 0)
    return Rewards(*total.unbind(1), *once.unbind(1))


@dataclass(frozen=True)
class Estimate:
    """A measure over seeds."""

    mean: float  # over the seeds that did not diverge; NaN if all did
    low: float  # to high: the 95 % interval of that mean (Student's t); NaN with fewer than two seeds
    high: float
    n: int  # seeds in the mean
    diverged: int = 0  # seeds left out of it

    def against(self, value: float = 0.0) -> str:
        """On which side of a value the whole interval lies: "above", "below", or "not clearly off" where on neither.

        >>> over_seeds([1.0, 2.0, 3.0]).against(), over_seeds([1.0, 1.1, 1.2]).against()
        ('not clearly off', 'above')
        """
        return "above" if self.low > value else "below" if self.high < value else "not clearly off"

    def __str__(self) -> str:
        if not self.n:
            return f"all {self.diverged} seeds diverged" if self.diverged else "-"
        lost = f", {self.diverged} of {self.n + self.diverged} seeds diverged" if self.diverged else ""
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}] n={self.n}{lost}"


NONE = Estimate(math.nan, math.nan, math.nan, 0)
"""What a method has that a measure is not defined for, as implicit accuracy for the base."""


def over_seeds(
    values: Tensor | np.ndarray | Sequence[float],
    diverged: Sequence[bool] | None = None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """Mean over seeds with its 95 % interval; seeds that diverged are counted, never averaged.

    Args:
        values: (S,), one a seed.
        diverged: (S,) which seeds diverged; those with a value that is not finite always count as such.
        bounds: between which the measure lies, (0, 1) for a rate; the interval ends there at the latest.

    >>> str(over_seeds([1.0, 2.0, 3.0, float("nan")]))
    '2 [-0.484, 4.48] n=3, 1 of 4 seeds diverged'
    """
    values = np.asarray(values, dtype=np.float64)
    kept = values[np.isfinite(values) & ~np.asarray(False if diverged is None else diverged, dtype=bool)]
    mean, low, high = float(kept.mean()) if len(kept) else math.nan, math.nan, math.nan
    if len(kept) > 1:
        half = float(stats.t.ppf(0.975, len(kept) - 1) * kept.std(ddof=1) / math.sqrt(len(kept)))
        low, high = max(mean - half, bounds[0]), min(mean + half, bounds[1])
    return Estimate(mean, low, high, len(kept), len(values) - len(kept))


def measure_points(points: Tensor) -> dict[str, Tensor]:
    """Every measure on sampled points, by name; (..., N, 2) in paper units to (...)."""
    return {
        "kl": fitted_kl(points),
        "undesirable_share": undesirable_rate(points),
        "off_manifold_share": off_manifold_rate(points),
        "sliced_wasserstein": sliced_wasserstein(points),
        "energy_distance": energy_distance(points),
        **{f"mean_{axis}": points[..., i].double().mean(-1) for i, axis in enumerate("xy")},
        **{f"std_{axis}": points[..., i].double().std(-1) for i, axis in enumerate("xy")},
    }


def bounds_of(measure: str) -> tuple[float, float]:
    """Between which numbers a measure lies by its definition, for its interval."""
    if "accuracy" in measure or measure.endswith("_share"):
        return 0.0, 1.0
    return (0.0, math.inf) if measure in ("kl", "sliced_wasserstein", "std_x", "std_y") else (-math.inf, math.inf)


def has_diverged(measures: Mapping[str, Tensor]) -> Tensor:
    """Which members diverged: a point that is not finite, or a KL above 1000 nats. Bool, shape of the measures."""
    return ~(measures["kl"] < DIVERGED_KL)


def _share(condition: Tensor, points: Tensor) -> Tensor:
    return condition.double().mean(-1).masked_fill(~points.isfinite().all(-1).all(-1), math.nan)


def _error(
    ensemble: Ensemble, member: int, noisy: Tensor, timestep: int, noise: Tensor, label: Tensor | None = None
) -> Tensor:
    noise_pred = ensemble.select([member])(noisy, timestep, label)
    return denoising_error(noise_pred, noise, batch_dims=2)[0]
