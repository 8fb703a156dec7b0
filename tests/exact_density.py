"""The exact density that DDIM draws points with, and with it the KL of a trained network: an oracle for measures."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu

from toy.exact import AffineDenoiser
from toy.measures import normal_points
from toy.network import Ensemble
from toy.schedule import Schedule
from toy.world import DESIRABLE, Gaussian


def exact_kl(
    policy: Ensemble, schedule: Schedule, labels: Tensor | None = None, target: Gaussian = DESIRABLE, draws: int = 2048
) -> Tensor:
    """KL in nats from what DDIM draws to a target, exact but for the integral over the starting noise.

    Its 2048 Sobol points leave an error of about 0.002 nats: 4 % of a KL of 0.05, 0.2 % of one of 0.6.

        KL = E_{x_T ~ N(0, I)} [ log p(x_0) - log p_target(x_0) ]

    Densities by change of variables (`ddim_with_density`), in float64; the expectation by Sobol points.
    It is the KL of the *DDIM* model: ancestral sampling gives another distribution wherever the noise prediction
    is not the score of one density, and most of all for Diffusion-DPO.

    Args:
        policy: M members.
        schedule: noise levels.
        labels: (M,) what the networks are told, or None for 0.
        target: in paper units.
        draws: Sobol points, a power of 2.

    Returns:
        (M,) float64; NaN where a member's DDIM map folds the plane or is not finite.
    """
    double = Ensemble(policy.architecture, policy.parameters.double())
    start = normal_points(draws, 2).expand(double.members, draws, 2)
    points, log_density = ddim_with_density(lambda x, t: with_jacobian(double, x, t, labels), schedule, start)
    return (log_density - target.model_units().log_density(points)).mean(-1)


def ddim_with_density(
    noise_pred_with_jacobian: Callable[[Tensor, int], tuple[Tensor, Tensor]], schedule: Schedule, start: Tensor
) -> tuple[Tensor, Tensor]:
    """DDIM samples and the exact logarithm of the density that DDIM draws them with.

    Each step is a smooth map x -> scale * (x - gain * eps(x)) of the plane, so densities follow by change of variables;
    there is no solver and no tolerance:

        log p(x_0) = log N(x_T; 0, I) - sum over t of log |det( scale_t * (I - gain_t * d eps / d x_t) )|

    Args:
        noise_pred_with_jacobian: takes points (..., 2) and a timestep, gives predicted noise (..., 2) and its
            derivatives (..., 2, 2).
        schedule: noise levels.
        start: (..., 2), float64.

    Returns:
        Points (..., 2) in model units, and log-densities (...) per square model unit; NaN where a step folds the
        plane (its determinant is not positive), since several starts could then give the same point.
    """
    sample = start
    log_density = -start.square().sum(-1) / 2 - math.log(2 * math.pi)
    eye = torch.eye(2, dtype=start.dtype)
    for timestep in reversed(range(schedule.num_train_timesteps)):
        scale, gain = schedule.ddim_coefficients(timestep)
        prediction, jacobian = noise_pred_with_jacobian(sample, timestep)
        log_density = log_density - torch.log(torch.linalg.det(scale * (eye - gain * jacobian)))
        sample = schedule.ddim_step(prediction, timestep, sample)
    return sample, log_density


def with_jacobian(
    ensemble: Ensemble, noisy: Tensor, timestep: int, label: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Predicted noise and its derivatives by the point.

    Args:
        ensemble: that predicts.
        noisy, timestep, label: as when it is called.

    Returns:
        (M, B, 2) and (M, B, 2, 2), d noise_pred[i] / d noisy[j].
    """
    (weight, bias), *rest = ensemble._layers
    hidden = torch.baddbmm(ensemble._bias_at(timestep, label), noisy, weight[:, :2])
    tangents = [weight[:, None, j].expand_as(hidden) for j in (0, 1)]
    for weight, bias in rest:
        slope = _silu_slope(hidden)
        tangents = [torch.bmm(slope * tangent, weight) for tangent in tangents]
        hidden = torch.baddbmm(bias, silu(hidden), weight)
    return hidden, torch.stack(tangents, dim=-1)


def affine_with_jacobian(denoiser: AffineDenoiser, noisy: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
    """Predicted noise (..., 2) of an affine denoiser and its derivatives (..., 2, 2)."""
    jacobian = denoiser.slope[timestep].to(noisy) * torch.eye(2, dtype=noisy.dtype)
    return denoiser(noisy, timestep), jacobian.expand(*noisy.shape[:-1], 2, 2)


def _silu_slope(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))
