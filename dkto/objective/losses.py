"""The objective: pure functions of the policy's error, the reference's error, the like and the reference point.

Everywhere the last dimension is the batch, B; leading dimensions, written "...", are members of an
ensemble that do not see each other. Stable Diffusion and the 2-D laboratory call the same functions.
One batch goes through them in this order: `denoising_error` (of policy and reference),
`implicit_reward`, `reference_point`, `kto_loss`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dkto.common.names import check_name
from dkto.common.settings import checked_number
from dkto.objective.utilities import Utility, get_utility

ESTIMATORS = ("batch", "unrelated", "independent", "per_class", "running", "zero")
REDUCTIONS = ("mean", "none")


def denoising_error(noise_pred: Tensor, target: Tensor, batch_dims: int = 1) -> Tensor:
    """Squared error of a denoiser, mean over everything but the batch (paper 3.1).

        e = mean((target - noise_pred)^2)

    Computed in float32 or wider whatever the inputs' precision: a gap of errors is a small difference
    of near-equal numbers, and `beta` multiplies it by thousands.

    Args:
        noise_pred: (..., B, *sample) model output.
        target: same shape; what it should equal.
        batch_dims: leading dimensions that are kept: 1, or more with ensemble members.

    Returns:
        (..., B) per-element mean squared error, float32 or wider.

    Raises:
        ValueError: if the shapes differ or leave nothing to average over.

    >>> denoising_error(torch.zeros(2, 3), torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 3.0]]))
    tensor([1., 3.])
    """
    if noise_pred.shape != target.shape:
        raise ValueError(f"target must have the shape of noise_pred {_shape(noise_pred)}, got {_shape(target)}")
    if noise_pred.ndim < 2:
        raise ValueError(f"noise_pred must have shape (..., B, *sample), got {_shape(noise_pred)}")
    checked_number("batch_dims", batch_dims, least=1, most=noise_pred.ndim - 1)
    wide = _wide(torch.promote_types(noise_pred.dtype, target.dtype))
    return (noise_pred.to(wide) - target.to(wide)).square().flatten(batch_dims).mean(-1)


def pair_overlap(residual: Tensor, batch_dims: int = 1) -> Tensor:
    """Mean product of the residuals of the two sides of each pair, for `Errors.overlap`.

    Args:
        residual: (..., B, *sample) prediction less target; chosen and rejected sides in turn.
        batch_dims: leading dimensions that are kept.

    Returns:
        (..., B / 2) float32 or wider.

    >>> pair_overlap(torch.tensor([[1.0, 2.0], [3.0, 1.0]]))
    tensor([2.5000])
    """
    sides = residual.to(_wide(residual.dtype)).unflatten(batch_dims - 1, (-1, 2))
    return sides.prod(batch_dims).flatten(batch_dims).mean(-1)


def implicit_reward(policy_error: Tensor, reference_error: Tensor, beta: float | Tensor) -> Tensor:
    """Reward that a policy gives without saying so (paper 3.4; Diffusion-DPO's estimate of a log-ratio).

        r = beta * (reference_error - policy_error)

    Positive where the policy denoises the sample better than the reference does. Both errors must
    come from the same noise and the same timestep.

    Args:
        policy_error: (..., B), carries gradient.
        reference_error: (..., B), without gradient.
        beta: > 0, reward scale, per unit of mean squared error (paper A.1: 5000); a tensor (...) gives
            each ensemble member its own.

    Returns:
        (..., B) implicit rewards; they have no other unit, and reference points and gains are measured in them.

    Raises:
        ValueError: if shapes differ, `beta` is not positive, or the reference error carries a gradient.

    >>> implicit_reward(torch.tensor([0.25]), torch.tensor([0.5]), beta=8.0)
    tensor([2.])
    """
    _check_same_shape("reference_error", reference_error, "policy_error", policy_error)
    if reference_error.requires_grad:
        raise ValueError("reference_error must not carry a gradient: compute the reference under torch.no_grad()")
    return _per_member("beta", beta, policy_error) * (reference_error - policy_error)


def reference_point(
    reward: Tensor,
    estimator: str = "batch",
    *,
    is_desirable: Tensor | None = None,
    unrelated_reward: Tensor | None = None,
    past: Tensor | None = None,
    clamp: bool = True,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Level from which gains and losses are felt: an estimate of beta * KL(policy || reference) (paper eq. 15).

        batch        mean reward of the batch's own samples (what the released model used; costs nothing)
        unrelated    mean reward of noisy samples under another sample's prompt (the paper's text, 4.1)
        independent  mean reward of fresh samples from the pretraining data (no prompts: the 2-D toy)
        per_class    average of the liked samples' mean and the disliked samples' mean; where a class
                     has no sample, the other's mean alone
        running      mean of all rewards since training began, this batch's too (BCO, arXiv 2404.04656); `past` holds
                     their sums, which `running_sums` carries from batch to batch
        zero         0

    The mean is clamped at 0 from below, since no KL is negative; the result is detached. (Released code:
    only `batch` is clamped, and an empty class counts as a mean of 0 in `per_class`.)

    On several processes pass `reduce`: a mean of clamped means, or of means over unequal counts, is not
    the clamped mean of the global batch. Sums and counts go through it in one tensor before they are
    divided and clamped, so ranks may hold different numbers of samples, or none of a class. Every rank
    must make the call; "zero" needs no communication and skips it.

    Args:
        reward: (..., B) implicit rewards of the batch.
        estimator: one of `ESTIMATORS`.
        is_desirable: (..., B) bool; only "per_class" looks at it.
        unrelated_reward: (..., M) rewards of the mismatched or independent samples, any M >= 1; only
            "unrelated" and "independent" look at it, and need it.
        past: (2, ...) what `running_sums` gives for this batch; only "running" looks at it, and needs it.
        clamp: keep the point at or above 0.
        reduce: sums a tensor elementwise over all processes (a mean over them serves as well: only
            the ratio counts), as `lambda x: accelerator.reduce(x, "sum")`.

    Returns:
        (...) in the unit and precision of `reward`, without gradient; NaN where a reward is.

    Raises:
        ValueError: for an unknown estimator, or if the tensor that it needs is missing or of a wrong shape.

    >>> reference_point(torch.tensor([3.0, -1.0]))
    tensor(1.)
    >>> reference_point(torch.tensor([1.0, -3.0]))
    tensor(0.)
    >>> liked = torch.tensor([True, True, True, False])
    >>> reference_point(torch.tensor([3.0, 3.0, 3.0, -1.0]), "per_class", is_desirable=liked)
    tensor(1.)
    """
    check_name("estimator", estimator, ESTIMATORS)
    if estimator == "zero":
        return torch.zeros_like(reward[..., 0], requires_grad=False)
    if estimator == "running":
        if past is None or past.shape != (2, *reward.shape[:-1]):
            came = "none" if past is None else f"shape {_shape(past)}"
            raise ValueError(f"estimator 'running' needs past of shape {(2, *reward.shape[:-1])}, got {came}")
        point = past[0] / past[1]
        return (point.clamp(min=0) if clamp else point).to(reward.dtype)
    mismatched = estimator in ("unrelated", "independent")
    averaged = _unrelated(reward, unrelated_reward, estimator) if mismatched else reward
    averaged = averaged.detach().to(_wide(averaged.dtype))  # a count of 300 is not exact in bfloat16
    if estimator == "per_class":
        if is_desirable is None:
            raise ValueError("estimator 'per_class' needs is_desirable")
        check_labels(is_desirable, reward)
        groups = torch.stack([is_desirable, ~is_desirable])  # (2, ..., B)
    else:
        groups = torch.ones_like(averaged, dtype=torch.bool)[None]  # (1, ..., B)
    sums = torch.where(groups, averaged, 0).sum(-1)  # (groups, ...)
    totals = torch.stack([sums, groups.sum(-1).to(sums.dtype)])  # (2, groups, ...)
    if reduce is not None:
        totals = reduce(totals)
    sums, counts = totals
    present = counts > 0
    means = torch.where(present, sums / counts.where(present, 1), 0)
    point = means.sum(0) / present.sum(0)
    return (point.clamp(min=0) if clamp else point).to(reward.dtype)


def running_sums(
    reward: Tensor, past: Tensor | None = None, reduce: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Sum and count of all rewards so far, from which the estimator "running" takes its mean.

    The state of that estimator, kept by the caller: a training stores it in its checkpoints. With `reduce`, which must
    sum, every rank holds the sums of all of them.

    Args:
        reward: (..., B) implicit rewards of this batch.
        past: (2, ...) what the last batch gave; None before the first.
        reduce: sums a tensor elementwise over all processes.

    Returns:
        (2, ...) float64, without gradient.

    >>> first = running_sums(torch.tensor([1.0, 3.0]))
    >>> running_sums(torch.tensor([8.0, 0.0]), first)
    tensor([12.,  4.], dtype=torch.float64)
    """
    sums = reward.detach().to(torch.float64).sum(-1)
    now = torch.stack([sums, torch.full_like(sums, reward.shape[-1])])
    now = now if reduce is None else reduce(now)
    return now if past is None else past.to(now) + now


def kto_loss(
    implicit_reward: Tensor,
    is_desirable: Tensor,
    reference_point: Tensor,
    utility: str | Utility = "kahneman_tversky",
    *,
    desirable_weight: float | Tensor = 1.0,
    undesirable_weight: float | Tensor = 1.0,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Utility shortfall of a batch of liked and disliked samples (paper eq. 14-15).

    The reward is measured from the reference point z; a disliked sample counts with opposite sign; the
    utility says how much that gain or loss is felt. With w = +1 for a liked sample, -1 for a disliked one:

        loss = weight_w * (1 - U(w * (r - z)))      utilities with the sign "inside", the default
        loss = weight_w * (1 - w * U(r - z))        with the sign "outside": risk_seeking, exponential

    Args:
        implicit_reward: (..., B) float. Carries gradient.
        is_desirable: (..., B) bool, True for a liked sample.
        reference_point: (...) float, unit of `implicit_reward`, without gradient.
        utility: name or `Utility`, see `dkto.objective.utilities`.
        desirable_weight, undesirable_weight: > 0, no unit; a tensor (...) gives each ensemble member its
            own. The paper keeps both at 1 and balances by sampling (4.3).
        sample_weight: (..., B) >= 0, no unit, of each sample beside its class's; 1 if left out.
        reduction: "mean" over the batch, or "none".

    Returns:
        (...) float, or (..., B) without reduction. Compare values only between runs with the same utility.

    Raises:
        ValueError: if shapes differ, `is_desirable` is not bool, a weight is not positive, the reference
            point carries a gradient, or utility or reduction is unknown.

    >>> reward = torch.tensor([2.0, -1.0])
    >>> kto_loss(reward, torch.tensor([True, False]), torch.tensor(0.0)).round(decimals=4)
    tensor(0.1941)
    """
    check_name("reduction", reduction, REDUCTIONS)
    utility = get_utility(utility)
    sign, gain = _sign_and_gain(implicit_reward, is_desirable, reference_point)
    felt = utility.value(sign * gain) if utility.sign == "inside" else sign * utility.value(gain)
    loss = weights_of(is_desirable, desirable_weight, undesirable_weight, sample_weight, gain) * (1 - felt)
    return loss.mean(-1) if reduction == "mean" else loss


def effective_weight(
    implicit_reward: Tensor,
    is_desirable: Tensor,
    reference_point: Tensor,
    utility: str | Utility = "kahneman_tversky",
    *,
    desirable_weight: float | Tensor = 1.0,
    undesirable_weight: float | Tensor = 1.0,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """How hard each sample pulls: `kto_loss` is denoising with these weights (paper C.4).

        gradient of kto_loss = mean( beta * effective_weight * gradient of policy_error )

        effective_weight = w * weight_w * U'(w * (r - z))      sign "inside"
        effective_weight = w * weight_w * U'(r - z)            sign "outside"

    Training pulls the denoising error down where the weight is positive and pushes it up where it is
    negative; w = +1 for liked, -1 for disliked samples.

    Args:
        implicit_reward: (..., B) float; its gradient, if any, is not used.
        is_desirable, reference_point, utility, desirable_weight, undesirable_weight, sample_weight: as in `kto_loss`.

    Returns:
        (..., B) without gradient and without unit: the weight per unit of beta.

    Raises:
        ValueError: as `kto_loss`.

    >>> effective_weight(torch.tensor([0.0, 0.0]), torch.tensor([True, False]), torch.tensor(0.0))
    tensor([ 0.2500, -0.2500])
    """
    utility = get_utility(utility)
    sign, gain = _sign_and_gain(implicit_reward.detach(), is_desirable, reference_point)
    slope = utility.slope(sign * gain if utility.sign == "inside" else gain)
    return sign * weights_of(is_desirable, desirable_weight, undesirable_weight, sample_weight, gain) * slope


def dpo_loss(chosen_reward: Tensor, rejected_reward: Tensor) -> Tensor:
    """Diffusion-DPO on pairs whose two sides share noise and timestep (Wallace et al. 2023).

        loss = mean( -log sigmoid(chosen_reward - rejected_reward) ),   both from `implicit_reward`

    Here `beta` has one unit everywhere, Diffusion-KTO's. Diffusion-DPO's released code halves its own,
    so its 5000 is `beta` = 2500 in `implicit_reward`; the Stable Diffusion 1.5 example of diffusers
    has the half folded into its default, 2500, which is used as it is.

    Args:
        chosen_reward, rejected_reward: (..., B) implicit rewards of the two sides. Carry gradient.

    Returns:
        (...) batch mean.

    Raises:
        ValueError: if the shapes differ.

    >>> dpo_loss(torch.tensor([1.0]), torch.tensor([1.0])).round(decimals=4)
    tensor(0.6931)
    """
    _check_same_shape("rejected_reward", rejected_reward, "chosen_reward", chosen_reward)
    return -logsigmoid(chosen_reward - rejected_reward).mean(-1)


def sft_loss(policy_error: Tensor, is_desirable: Tensor | None = None) -> Tensor:
    """Denoising loss on the liked samples (paper eq. 3).

        loss = mean of policy_error over the liked samples

    The mean is over the liked samples alone, so the step size does not depend on how many there are
    (the released code divides by the whole batch). CSFT is this loss without labels: there the
    like is in the prompt.

    Args:
        policy_error: (..., B), carries gradient.
        is_desirable: (..., B) bool; if left out, every sample counts.

    Returns:
        (...) in mean squared error.

    Raises:
        ValueError: if `is_desirable` is not bool of that shape, or a member has no liked sample.

    >>> sft_loss(torch.tensor([1.0, 5.0]), torch.tensor([True, False]))
    tensor(1.)
    """
    if is_desirable is None:
        return policy_error.mean(-1)
    check_labels(is_desirable, policy_error)
    liked = is_desirable.sum(-1)
    if not bool((liked > 0).all()):
        raise ValueError(f"sft_loss needs a liked sample in every batch, got none among {policy_error.shape[-1]}")
    return torch.where(is_desirable, policy_error, 0).sum(-1) / liked


def _sign_and_gain(reward: Tensor, is_desirable: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    check_labels(is_desirable, reward)
    if not isinstance(point, Tensor) or point.shape != reward.shape[:-1]:
        came = f"shape {_shape(point)}" if isinstance(point, Tensor) else type(point).__name__
        raise ValueError(f"reference_point must be a tensor of shape {tuple(reward.shape[:-1])}, got {came}")
    if point.requires_grad:
        raise ValueError("reference_point must not carry a gradient: detach it")
    return torch.where(is_desirable, 1, -1).to(reward.dtype), reward - point[..., None]


def _unrelated(reward: Tensor, unrelated_reward: Tensor | None, estimator: str) -> Tensor:
    if unrelated_reward is None:
        raise ValueError(f"estimator {estimator!r} needs unrelated_reward")
    if unrelated_reward.shape[:-1] != reward.shape[:-1] or unrelated_reward.ndim == 0 or not unrelated_reward.shape[-1]:
        expected = ", ".join([*map(str, reward.shape[:-1]), "1 or more"])
        raise ValueError(f"unrelated_reward must have shape ({expected}), got {_shape(unrelated_reward)}")
    return unrelated_reward


def weights_of(
    is_desirable: Tensor, desirable: float | Tensor, undesirable: float | Tensor, sample: Tensor | None, like: Tensor
) -> Tensor:
    """(..., B) the weight of each sample in `like`'s precision: its class's times its own."""
    weights = torch.where(
        is_desirable,
        _per_member("desirable_weight", desirable, like),
        _per_member("undesirable_weight", undesirable, like),
    )
    if sample is None:
        return weights
    _check_same_shape("sample_weight", sample, "implicit_reward", like)
    return weights * sample.to(like.dtype)


def _per_member(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A positive setting in `like`'s precision that broadcasts against (..., B)."""
    if isinstance(value, Tensor):
        if value.shape not in ((), like.shape[:-1]):
            raise ValueError(f"{name} must be a number or of shape {tuple(like.shape[:-1])}, got shape {_shape(value)}")
        return value.to(like)[..., None]
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def check_labels(is_desirable: Tensor, like: Tensor) -> None:
    """Refuse labels that are not bool or not one for each value.

    Raises:
        ValueError: if dtype or shape differ.
    """
    if is_desirable.dtype != torch.bool or is_desirable.shape != like.shape:
        kind = str(is_desirable.dtype).removeprefix("torch.")
        raise ValueError(
            f"is_desirable must be bool of shape {_shape(like)}, got {kind} of shape {_shape(is_desirable)}"
        )


def _check_same_shape(name: str, x: Tensor, other: str, like: Tensor) -> None:
    if x.shape != like.shape:
        raise ValueError(f"{name} must have the shape of {other} {_shape(like)}, got {_shape(x)}")


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
