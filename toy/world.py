"""The world of the toy analysis: three round Gaussians, their densities, draws and exact denoisers (paper 7).

Points have two coordinate systems. *Paper units* are those of the paper's figure. *Model units* z put the
pretraining distribution at N(0, I), where the networks live: x = (0.5, 0.8) + 0.2 z.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dkto.common.names import check_name

ORIGIN = (0.5, 0.8)
UNIT = 0.2


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std^2 I) in the plane; the paper gives variances, 0.04 and 0.01."""

    mean: tuple[float, float]
    std: float

    def __post_init__(self) -> None:
        if len(self.mean) != 2:
            raise ValueError(f"mean must have 2 coordinates, got {len(self.mean)}")
        if not self.std > 0:
            raise ValueError(f"std must be > 0, got {self.std}")

    def log_density(self, x: Tensor) -> Tensor:
        """Logarithm of the density: (..., 2) to (...), per square unit of `x`."""
        square = (x - x.new_tensor(self.mean)).square().sum(-1) / self.std**2
        return -square / 2 - math.log(2 * math.pi * self.std**2)

    def place(self, noise: Tensor) -> Tensor:
        """Points of this Gaussian from draws of N(0, I), (..., 2)."""
        return noise.new_tensor(self.mean) + self.std * noise

    def model_units(self) -> "Gaussian":
        """The same distribution in model units.

        >>> DESIRABLE.model_units()
        Gaussian(mean=(-1.0, 0.0), std=0.5)
        """
        mean = (round((m - o) / UNIT, 12) for m, o in zip(self.mean, ORIGIN, strict=True))
        return Gaussian(tuple(mean), self.std / UNIT)


PRETRAINING = Gaussian((0.5, 0.8), 0.2)
DESIRABLE = Gaussian((0.3, 0.8), 0.1)
UNDESIRABLE = Gaussian((0.3, 0.6), 0.1)
ROLES = {"pretraining": PRETRAINING, "desirable": DESIRABLE, "undesirable": UNDESIRABLE}


def to_model_units(x: Tensor) -> Tensor:
    """Paper units to model units, (..., 2)."""
    return (x - x.new_tensor(ORIGIN)) / UNIT


def to_paper_units(z: Tensor) -> Tensor:
    """Model units to paper units, (..., 2)."""
    return z.new_tensor(ORIGIN) + UNIT * z


def preference_reward(x: Tensor) -> Tensor:
    """The reward behind the labels, log p_desirable - log p_undesirable; a plane, 20 y - 14 (paper eq. 4).

    A sample counts as undesirable where it is negative: more likely under the undesirable distribution.

    >>> preference_reward(torch.tensor([[0.3, 0.8], [0.3, 0.6]])).round(decimals=4)
    tensor([ 2., -2.])
    """
    return DESIRABLE.log_density(x) - UNDESIRABLE.log_density(x)


def exact_noise_pred(gaussian: Gaussian, noisy: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The best noise prediction for data from a Gaussian: the mean of the noise given the noisy point (paper 3.1).

        eps*(x_t) = sqrt(1 - abar) * (x_t - sqrt(abar) * mean) / (abar * std^2 + 1 - abar)

    Args:
        gaussian: in the units of `noisy`.
        noisy: (..., 2) noisy points x_t.
        alphas_cumprod: abar_t, broadcasts against (...).
    """
    abar = alphas_cumprod[..., None]
    shifted = noisy - abar.sqrt() * noisy.new_tensor(gaussian.mean)
    return (1 - abar).sqrt() * shifted / (abar * gaussian.std**2 + 1 - abar)


def gaussian_kl(mean: Tensor, covariance: Tensor, target: Gaussian) -> Tensor:
    """KL(N(mean, covariance) || target) in nats, of means (..., 2) and covariances (..., 2, 2).

        ( trace(C)/s^2 + |mean - m|^2/s^2 - 2 - log det(C)/s^4 ) / 2

    NaN where a covariance is not positive.

    >>> eye = torch.eye(2, dtype=torch.float64)
    >>> gaussian_kl(torch.tensor(PRETRAINING.mean, dtype=torch.float64), 0.2**2 * eye, DESIRABLE).round(decimals=4)
    tensor(3.6137, dtype=torch.float64)
    """
    square = (mean - mean.new_tensor(target.mean)).square().sum(-1) / target.std**2
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) / target.std**2
    return (trace + square - 2 - torch.logdet(covariance) + 4 * math.log(target.std)) / 2


def undesirable_share(gaussian: Gaussian) -> float:
    """Exact share of a Gaussian that is more likely under the undesirable distribution: the mass below y = 0.7.

    >>> round(undesirable_share(DESIRABLE), 4), round(undesirable_share(PRETRAINING), 4)
    (0.1587, 0.3085)
    """
    boundary = (DESIRABLE.mean[1] + UNDESIRABLE.mean[1]) / 2
    return _normal_cdf((boundary - gaussian.mean[1]) / gaussian.std)


def bayes_accuracy(definition: str) -> float:
    """The best accuracy that any reward can reach, by "pair" or "sample" (`dkto.objective.accuracy.implicit_accuracy`).

        pair    P(r(x_w) > r(x_l)) = Phi(d / (sqrt(2) s))      d: distance of the means, s: their std
        sample  P(r(x) > 0 | desirable) = Phi(d / (2 s))

    Another definition raises a ValueError.

    >>> round(bayes_accuracy("pair"), 4), round(bayes_accuracy("sample"), 4)
    (0.9214, 0.8413)
    """
    divisors = {"pair": math.sqrt(2), "sample": 2.0}
    check_name("definition", definition, divisors)
    return _normal_cdf(math.dist(DESIRABLE.mean, UNDESIRABLE.mean) / DESIRABLE.std / divisors[definition])


_MEAN = torch.tensor(PRETRAINING.mean, dtype=torch.float64)
BASE_KL = float(gaussian_kl(_MEAN, PRETRAINING.std**2 * torch.eye(2, dtype=torch.float64), DESIRABLE))
"""KL(pretraining || desirable) = 3.6137 nats: what no tuning costs."""


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2
