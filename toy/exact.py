"""Exact references: what the samplers and the optima of the objectives must give, without training (paper 3.4, 7).

*Closed forms*: the sampler's output law for an affine denoiser, the optimum of Diffusion-DPO. *Four parameters*: the
optimum over Gaussian policies with exact likelihoods. All in model units, float64, unless said otherwise.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from dkto.common.names import check_name
from dkto.objective.losses import dpo_loss, kto_loss
from toy.sampling import SAMPLERS, NoisePred
from toy.schedule import Schedule
from toy.world import DESIRABLE, ORIGIN, PRETRAINING, UNDESIRABLE, UNIT, Gaussian, exact_noise_pred

REWARD_SLOPE = (0.0, 4.0)  # gradient of log p_desirable - log p_undesirable in model units: 20 y is 4 z_y


@dataclass(frozen=True)
class AffineDenoiser:
    """Noise prediction slope_t * x + offset_t: (T,) and (T, 2) float64."""

    slope: Tensor
    offset: Tensor

    def __call__(self, noisy: Tensor, timestep: int) -> Tensor:
        """Predicted noise (..., 2)."""
        return self.slope[timestep].to(noisy) * noisy + self.offset[timestep].to(noisy)


def exact_denoiser(gaussian: Gaussian, schedule: Schedule) -> AffineDenoiser:
    """The best denoiser of a Gaussian in model units (`toy.world.exact_noise_pred`), which is affine."""
    abar = schedule.alphas_cumprod
    at_zero = exact_noise_pred(gaussian, torch.zeros(len(abar), 2, dtype=torch.float64), abar)
    at_one = exact_noise_pred(gaussian, torch.ones(len(abar), 2, dtype=torch.float64), abar)
    return AffineDenoiser((at_one - at_zero)[:, 0], at_zero)


def output_law(denoiser: AffineDenoiser, schedule: Schedule, sampler: str = "ancestral") -> tuple[Tensor, float]:
    """Mean (2,) and standard deviation of what a sampler draws with an affine denoiser: an affine recursion.

        x' = scale * (x - gain * (slope x + offset)) + std * noise

    Compare a trained model with this law, not with its target: with few steps the spread is a few percent short.
    The sampler is "ancestral" or "ddim"; another one raises a ValueError.
    """
    check_name("sampler", sampler, SAMPLERS)
    mean, variance = torch.zeros(2, dtype=torch.float64), 1.0
    for timestep in reversed(range(schedule.num_train_timesteps)):
        if sampler == "ancestral":
            scale, gain, std = schedule.ancestral_coefficients(timestep)
        else:
            (scale, gain), std = schedule.ddim_coefficients(timestep), 0.0
        factor = scale * (1 - gain * float(denoiser.slope[timestep]))
        mean = factor * mean - scale * gain * denoiser.offset[timestep]
        variance = factor**2 * variance + (std**2 if timestep else 0.0)
    return mean, math.sqrt(variance)


def dpo_optimum(schedule: Schedule, beta: float) -> AffineDenoiser:
    """The optimum of Diffusion-DPO in closed form, from the exact pretrained denoiser.

        eps = eps_ref - a / (beta * sqrt(1 - abar) * sqrt(abar)),    a = (0, 4)

    With shared noise and timestep the reward difference of a pair is linear in the points' difference, and this
    shift makes it the difference of the true rewards. It grows as 1/sqrt(abar) towards pure noise.

    DGPO on groups with as many likes as dislikes has the same optimum: their rewards add up. Other methods on pairs
    have none in closed form. DMPO wants the gap log((1 - a) / a) tanh(d / 2) of a pair whose true rewards differ by
    d, which is no difference of two rewards. The safeguard of Diffusion-SDPO scales gradients: they belong to no loss.
    """
    reference = exact_denoiser(Gaussian((0.0, 0.0), 1.0), schedule)
    abar = schedule.alphas_cumprod
    shift = torch.tensor(REWARD_SLOPE, dtype=torch.float64) / (beta * ((1 - abar) * abar).sqrt())[:, None]
    return AffineDenoiser(reference.slope, reference.offset - shift)


def class_posterior(noisy: Tensor, abar: Tensor, desirable_fraction: float) -> tuple[Tensor, Tensor]:
    """Of a noisy point, for the liked and the disliked class: chances (N, 2) and means of the noise (N, 2, 2)."""
    classes = [gaussian.model_units() for gaussian in (DESIRABLE, UNDESIRABLE)]
    laws = [
        Gaussian(tuple(float(abar.sqrt()) * m for m in g.mean), math.sqrt(float(abar) * g.std**2 + 1 - float(abar)))
        for g in classes
    ]
    fractions = noisy.new_tensor([desirable_fraction, 1 - desirable_fraction])
    chances = torch.softmax(fractions.log() + torch.stack([law.log_density(noisy) for law in laws], -1), -1)
    return chances, torch.stack([exact_noise_pred(g, noisy, abar) for g in classes], -2)


def nft_optimum(schedule: Schedule, mixing: float = 1.0, desirable_fraction: float = 0.8) -> NoisePred:
    """The optimum of DiffusionNFT on likes in closed form, from the exact pretrained denoiser.

        eps = eps_ref + ( P(liked | x_t) (eps_liked - eps_ref) - P(disliked | x_t) (eps_disliked - eps_ref) ) / mixing

    with the best denoiser of each class. The loss of a noisy point is a parabola of the prediction, of curvature
    `mixing` whatever the labels are: the brake makes up exactly for what a disliked sample bends the other way.
    """

    def best(noisy: Tensor, timestep: int) -> Tensor:
        chances, means = class_posterior(noisy, schedule.alphas_cumprod[timestep], desirable_fraction)
        reference = exact_noise_pred(PRETRAINING.model_units(), noisy, schedule.alphas_cumprod[timestep])
        away = chances[..., None] * (means - reference[..., None, :])
        return reference + (away[..., 0, :] - away[..., 1, :]) / mixing

    return best


@dataclass(frozen=True)
class PolicyOptimum:
    """The best Gaussian policy with exact likelihoods: mean and std of each coordinate in paper units.

    The reference point, in units of the log-likelihood ratio, is the given one, or the best where it was free.
    """

    mean: tuple[float, float]
    std: tuple[float, float]
    reference_point: float


def policy_optimum(
    objective: str,
    beta: float,
    *,
    desirable_fraction: float = 0.5,
    reference_point: float | None = 0.0,
    flip_rate: float = 0.0,
    nodes: int = 24,
) -> PolicyOptimum:
    """Minimise an objective over Gaussian policies N(mean, diag(std^2)) with exact likelihoods (paper eq. 8, 14-15).

    The reward is beta * log(p_policy / p_pretraining) itself, not its denoising estimate; expectations are
    Gauss-Hermite sums.

    Args:
        objective: "dpo", or a utility's name for the objective of Diffusion-KTO.
        beta: reward scale, > 0.
        desirable_fraction: gamma; "dpo" ignores it.
        reference_point: in units of the log-ratio, or None to optimise it too; "dpo" has none.
        flip_rate: chance of a wrong label.
        nodes: of the quadrature in the direction of the reward; 8 in the other one.
    """
    liked, disliked = (_nodes(g.model_units(), nodes) for g in (DESIRABLE, UNDESIRABLE))
    free = reference_point is None and objective != "dpo"

    def loss_of(parameters: Tensor) -> Tensor:
        chosen, rejected = (beta * _log_ratio(points, parameters) for points, _ in (liked, disliked))
        if objective == "dpo":
            gap = (chosen[:, None] - rejected[None])[..., None]
            weight = liked[1][:, None] * disliked[1][None]
            right, wrong = (dpo_loss(sign * gap, torch.zeros_like(gap)) for sign in (1, -1))
            return (weight * ((1 - flip_rate) * right + flip_rate * wrong)).sum()
        point = beta * (parameters[4] if free else torch.tensor(float(reference_point), dtype=torch.float64))
        total = torch.zeros((), dtype=torch.float64)
        for rewards, (_, weight), truth, share in (
            (chosen, liked, True, desirable_fraction),
            (rejected, disliked, False, 1 - desirable_fraction),
        ):
            shifted = rewards - point  # the point is subtracted here so that it may be optimised
            for label, chance in ((truth, 1 - flip_rate), (not truth, flip_rate)):
                if chance and share:
                    labels = torch.full(shifted.shape, label)
                    losses = kto_loss(shifted, labels, total.new_zeros(()), objective, reduction="none")
                    total = total + share * chance * (weight * losses).sum()
        return total

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        loss = loss_of(parameters)
        (gradient,) = torch.autograd.grad(loss, parameters)
        return float(loss.detach()), gradient.numpy()

    found = minimize(value_and_gradient, np.zeros(5 if free else 4), jac=True, method="BFGS", options={"gtol": 1e-10})
    mean, std = ORIGIN + UNIT * found.x[:2], UNIT * np.exp(found.x[2:4])
    point = float(found.x[4]) if free else float(reference_point or 0.0)
    return PolicyOptimum(tuple(map(float, mean)), tuple(map(float, std)), point)


def _log_ratio(z: Tensor, parameters: Tensor) -> Tensor:
    """log N(z; mean, diag std^2) - log N(z; 0, I), with parameters (mean, log std)."""
    mean, log_std = parameters[:2], parameters[2:4]
    return (z.square() / 2 - ((z - mean) / log_std.exp()).square() / 2 - log_std).sum(-1)


def _nodes(gaussian: Gaussian, count: int) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite points (8 count, 2) and weights of a Gaussian."""
    (x, wx), (y, wy) = normal_quadrature(8), normal_quadrature(count)
    points = torch.stack(torch.meshgrid(x, y, indexing="ij"), dim=-1).flatten(0, 1)
    return gaussian.place(points), (wx[:, None] * wy).flatten()


def normal_quadrature(count: int) -> tuple[Tensor, Tensor]:
    """Points and weights (count,) of the Gauss-Hermite rule for N(0, 1); exact for polynomials below degree 2 count."""
    points, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(points), torch.from_numpy(weights / weights.sum())
