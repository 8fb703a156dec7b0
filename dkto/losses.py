"""The objective: pure functions of the policy's error, the reference's error, the like and the reference point.

Everywhere the last dimension is the batch, B; leading dimensions are members of an ensemble that
do not see each other. Stable Diffusion and the 2-D laboratory call the same functions.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dkto.utilities import Utility, get_utility

ESTIMATORS = ("batch", "unrelated", "per_class", "zero")


def denoising_error(noise_pred: Tensor, target: Tensor, batch_dims: int = 1) -> Tensor:
    """Squared error of a denoiser, mean over everything but the batch (paper 3.1).

        e = mean((target - noise_pred)^2)

    Computed in float32 or wider, whatever the inputs' precision.

    Args:
        noise_pred: (..., B, *sample) model output.
        target: same shape; what it should equal.
        batch_dims: number of leading dimensions that are kept: 1, or more with ensemble members.

    Returns:
        (..., B) per-element mean squared error.

    Raises:
        ValueError: if the shapes differ.

    >>> denoising_error(torch.zeros(2, 3), torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 3.0]]))
    tensor([1., 3.])
    """
    if noise_pred.shape != target.shape:
        raise ValueError(f"noise_pred and target must have one shape, got {_shape(noise_pred)} and {_shape(target)}")
    wide = torch.promote_types(torch.promote_types(noise_pred.dtype, target.dtype), torch.float32)
    return (noise_pred.to(wide) - target.to(wide)).square().flatten(batch_dims).mean(-1)


def implicit_reward(policy_error: Tensor, reference_error: Tensor, beta: float) -> Tensor:
    """Reward that a policy gives implicitly (paper 3.4; Diffusion-DPO's estimate of its log-ratio).

        r = beta * (reference_error - policy_error)

    Positive where the policy denoises the sample better than the reference does. Both errors must
    come from the same noise and timestep.

    Args:
        policy_error: (..., B), carries gradient.
        reference_error: (..., B), without gradient.
        beta: reward scale, multiplies mean squared error; the paper's 5000.

    Returns:
        (..., B) in beta x MSE.

    Raises:
        ValueError: if shapes differ, or the reference error carries a gradient.

    >>> implicit_reward(torch.tensor([0.25]), torch.tensor([0.5]), beta=8.0)
    tensor([2.])
    """
    if policy_error.shape != reference_error.shape:
        raise ValueError(
            f"reference_error must have the shape of policy_error {_shape(policy_error)}, got {_shape(reference_error)}"
        )
    if reference_error.requires_grad:
        raise ValueError("reference_error carries a gradient: compute the reference under torch.no_grad()")
    return beta * (reference_error - policy_error)


def reference_point(
    reward: Tensor,
    estimator: str = "batch",
    *,
    is_desirable: Tensor | None = None,
    clamp: bool = True,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Level from which gains and losses are felt: an estimate of beta * KL(policy || reference) (paper eq. 15).

        batch      mean reward of the batch's own samples (the released code's default)
        unrelated  mean reward of mismatched samples and prompts, which `reward` must then hold (the paper's text)
        per_class  half the mean over the liked plus half the mean over the disliked samples; a class
                   without a sample leaves the other's mean alone
        zero       0

    Clamped at 0 from below after the mean, since a KL is never negative; detached.

    Args:
        reward: (..., B) implicit rewards, of mismatched pairs for "unrelated".
        estimator: one of `ESTIMATORS`.
        is_desirable: (..., B) bool, needed by "per_class".
        clamp: keep the point at or above 0.
        reduce: sums a tensor over all processes; sums and counts pass through it *before* the
            mean is taken and clamped, so that the point is that of the global batch.

    Returns:
        (...) in the unit of `reward`, without gradient.

    Raises:
        ValueError: for an unknown estimator, or when "per_class" gets no labels.

    >>> reference_point(torch.tensor([3.0, -1.0]))
    tensor(1.)
    >>> reference_point(torch.tensor([1.0, -3.0]))
    tensor(0.)
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
    reward = reward.detach()
    if estimator == "zero":
        return torch.zeros_like(reward[..., 0])
    if estimator == "per_class":
        if is_desirable is None:
            raise ValueError("estimator 'per_class' needs is_desirable")
        _check_labels(is_desirable, reward)
        groups = torch.stack([is_desirable, ~is_desirable])  # (2, ..., B)
    else:
        groups = torch.ones_like(reward, dtype=torch.bool)[None]  # (1, ..., B)
    sums = torch.stack([(groups * reward).sum(-1), groups.sum(-1).to(reward.dtype)])  # (2, groups, ...)
    if reduce is not None:
        sums = reduce(sums)
    total, count = sums
    present = count > 0
    means = torch.where(present, total / count.clamp(min=1), 0)
    point = means.sum(0) / present.sum(0).clamp(min=1)
    return point.clamp(min=0) if clamp else point


def kto_loss(
    implicit_reward: Tensor,
    is_desirable: Tensor,
    reference_point: Tensor,
    utility: str | Utility = "kahneman_tversky",
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Utility shortfall of a batch of liked and disliked samples (paper eq. 14-15).

    The reward is measured from the reference point; a disliked sample counts with opposite sign;
    the utility says how much that gain or loss is felt. With w = +1 for liked, -1 for disliked:

        loss = mean( weight_w * (1 - U(w * (r - z))) )      sign inside, the default
        loss = mean( weight_w * (1 - w * U(r - z)) )        sign outside (risk_seeking, exponential)

    Args:
        implicit_reward: (..., B) float, beta x mean-squared-error gap. Carries gradient.
        is_desirable: (..., B) bool, True for a liked sample.
        reference_point: (...) float, unit of `implicit_reward`, without gradient.
        utility: name or `Utility`, see `dkto.utilities`.
        desirable_weight, undesirable_weight: > 0, no unit. The paper keeps both at 1 and balances
            by sampling (4.3).

    Returns:
        (...) float, batch mean. Compare values only between runs with the same utility.

    Raises:
        ValueError: if shapes differ, `is_desirable` is not bool, or the reference point carries a gradient.

    >>> reward = torch.tensor([2.0, -1.0])
    >>> kto_loss(reward, torch.tensor([True, False]), torch.tensor(0.0)).round(decimals=4)
    tensor(0.1941)
    """
    utility = get_utility(utility)
    sign, gain = _signed_gain(implicit_reward, is_desirable, reference_point)
    felt = utility.value(sign * gain) if utility.sign == "inside" else sign * utility.value(gain)
    weight = torch.where(is_desirable, desirable_weight, undesirable_weight).to(gain.dtype)
    return (weight * (1 - felt)).mean(-1)


def sample_weight(
    implicit_reward: Tensor,
    is_desirable: Tensor,
    reference_point: Tensor,
    utility: str | Utility = "kahneman_tversky",
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """How hard each sample pulls: `kto_loss` is denoising with these weights (paper C.4).

        gradient of kto_loss = mean( beta * sample_weight * gradient of policy_error )
        sample_weight = w * weight_w * U'(w (r - z))  inside;   w * weight_w * U'(r - z)  outside

    Positive weights pull the denoising error down, negative ones push it up.

    Args: as `kto_loss`.

    Returns:
        (..., B) without gradient.

    >>> sample_weight(torch.tensor([0.0, 0.0]), torch.tensor([True, False]), torch.tensor(0.0))
    tensor([ 0.2500, -0.2500])
    """
    utility = get_utility(utility)
    sign, gain = _signed_gain(implicit_reward.detach(), is_desirable, reference_point)
    slope = utility.slope(sign * gain if utility.sign == "inside" else gain)
    return sign * torch.where(is_desirable, desirable_weight, undesirable_weight).to(gain.dtype) * slope


def dpo_loss(chosen_reward: Tensor, rejected_reward: Tensor) -> Tensor:
    """Diffusion-DPO on pairs that share noise and timestep (Wallace et al. 2023).

        loss = mean( -log sigmoid(chosen_reward - rejected_reward) ),   rewards as `implicit_reward`

    `beta` has Diffusion-KTO's unit here. The published code halves it: its 5000 is beta = 2500 in
    `implicit_reward`.

    Args:
        chosen_reward, rejected_reward: (..., B) implicit rewards of the two sides of each pair.

    Returns:
        (...) batch mean.

    Raises:
        ValueError: if the shapes differ.

    >>> dpo_loss(torch.tensor([1.0]), torch.tensor([1.0])).round(decimals=4)
    tensor(0.6931)
    """
    if chosen_reward.shape != rejected_reward.shape:
        raise ValueError(
            f"rejected_reward must have the shape of chosen_reward {_shape(chosen_reward)}, got {_shape(rejected_reward)}"
        )
    return -logsigmoid(chosen_reward - rejected_reward).mean(-1)


def sft_loss(policy_error: Tensor, is_desirable: Tensor | None = None) -> Tensor:
    """Denoising loss on the liked samples (paper eq. 3).

    Args:
        policy_error: (..., B), carries gradient.
        is_desirable: (..., B) bool; left out, every sample counts.

    Returns:
        (...) mean over the liked samples, not over the batch.

    Raises:
        ValueError: if an ensemble member has no liked sample.

    >>> sft_loss(torch.tensor([1.0, 5.0]), torch.tensor([True, False]))
    tensor(1.)
    """
    if is_desirable is None:
        return policy_error.mean(-1)
    _check_labels(is_desirable, policy_error)
    count = is_desirable.sum(-1)
    if not bool((count > 0).all()):
        raise ValueError("sft_loss needs at least one liked sample in every batch, got none")
    return (policy_error * is_desirable).sum(-1) / count


def _signed_gain(reward: Tensor, is_desirable: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    _check_labels(is_desirable, reward)
    if point.requires_grad:
        raise ValueError("reference_point carries a gradient: it must be detached")
    if point.shape != reward.shape[:-1]:
        raise ValueError(f"reference_point must have shape {tuple(reward.shape[:-1])}, got {_shape(point)}")
    return torch.where(is_desirable, 1, -1).to(reward.dtype), reward - point[..., None]


def _check_labels(is_desirable: Tensor, like: Tensor) -> None:
    if is_desirable.dtype != torch.bool or is_desirable.shape != like.shape:
        kind = str(is_desirable.dtype).removeprefix("torch.")
        raise ValueError(f"is_desirable must be bool of shape {_shape(like)}, got {kind} of shape {_shape(is_desirable)}")


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
