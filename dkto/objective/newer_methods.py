"""Methods for single likes and for pairs that were published after Diffusion-KTO, each in the terms of `Errors`.

e and e0 are the errors of policy and reference, r = beta (e0 - e) is the implicit reward, d the mean squared distance
of their predictions (`Errors.shift`), w = +1 for a liked sample and -1 for a disliked one.

KTO with utility "kahneman_tversky" and estimator "zero" is what others call apo_zero_unpaired: it needs no entry here.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dkto.objective.felt import Errors, Felt
from dkto.objective.losses import check_labels, dpo_loss, implicit_reward, weights_of
from dkto.objective.paper_methods import kto


def bco(
    errors: Errors,
    is_desirable: Tensor,
    *,
    beta: float | Tensor,
    desirable_weight: float | Tensor = 1.0,
    undesirable_weight: float | Tensor = 1.0,
    past: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Felt:
    """Binary classifier optimisation (Jung et al., arXiv 2404.04656).

        loss = mean( -log sigmoid(w (r - delta)) ),    delta = mean of all rewards since training began

    This is KTO with the loss-averse utility and a running reference point that may fall below 0, less a constant.

    >>> felt = bco(Errors(torch.tensor([0.5, 0.0]), torch.tensor([0.75, 0.75])), torch.tensor([True, False]), beta=8.0)
    >>> felt.point, felt.past  # rewards 2 and 6
    (tensor(4.), tensor([8., 2.], dtype=torch.float64))
    """
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    settings = {"utility": "loss_averse", "estimator": "running", "clamp": False}
    felt = kto(errors, is_desirable, beta=beta, past=past, reduce=reduce, **settings, **weights)
    constant = weights_of(is_desirable, desirable_weight, undesirable_weight, None, felt.reward).mean(-1)
    return felt._replace(loss=felt.loss - constant)


def tgo(errors: Errors, is_desirable: Tensor, *, beta: float | Tensor, sample_weight: Tensor | None = None) -> Felt:
    """Threshold-guided optimisation (arXiv 2605.04653): the threshold decides what is liked, the distance how much.

        loss = mean( weight * -log sigmoid(w r) ),    w = sign(score - tau),  weight = 1 + c |score - tau|

    tau, the median score, and c belong to the data: they make the labels and `sample_weight`. Without weights every
    sample counts 1, as likes alone allow.

    >>> felt = tgo(Errors(torch.tensor([0.2, 0.4]), torch.tensor([0.3, 0.3])), torch.tensor([True, False]), beta=10.0)
    >>> felt.loss  # both rewards lie 1 on the right side
    tensor(0.3133)
    """
    felt = kto(errors, is_desirable, beta=beta, utility="loss_averse", estimator="zero", sample_weight=sample_weight)
    constant = weights_of(is_desirable, 1.0, 1.0, sample_weight, felt.reward).mean(-1)
    return felt._replace(loss=felt.loss - constant)


def nft(errors: Errors, is_desirable: Tensor, *, mixing: float = 1.0) -> Felt:
    """DiffusionNFT on likes that are there (Zheng et al., ICLR 2026), without its adaptive weight.

    With predictions v of the policy, v0 of the reference, target t and b = `mixing`, the published loss is

        liked     mean( ((1 - b) v0 + b v - t)^2 ) / b  =   e + (1 - b) / b e0 - (1 - b) d
        disliked  mean( ((1 + b) v0 - b v - t)^2 ) / b  =  -e + (1 + b) / b e0 + (1 + b) d

    so it is the linear utility with a brake on disliked samples that grows with the square of the shift. Nothing has to
    be predicted beyond what KTO predicts.

    Args:
        errors: with `shift`.
        is_desirable: (..., B) bool.
        mixing: b > 0. At 1 a liked sample counts as in SFT.

    >>> errors = Errors(torch.tensor([0.2, 0.4]), torch.tensor([0.3, 0.3]), shift=torch.tensor([0.01, 0.02]))
    >>> nft(errors, torch.tensor([True, False])).loss  # (0.2 + (-0.4 + 2 * 0.3 + 2 * 0.02)) / 2
    tensor(0.2200)
    """
    if not mixing > 0:
        raise ValueError(f"mixing must be > 0, got {mixing}")
    check_labels(is_desirable, errors.policy)
    policy, reference, shift = errors.policy, errors.reference, _shift("nft", errors)
    liked = policy + (1 - mixing) / mixing * reference - (1 - mixing) * shift
    disliked = -policy + (1 + mixing) / mixing * reference + (1 + mixing) * shift
    return Felt(torch.where(is_desirable, liked, disliked).mean(-1))


def awm(errors: Errors, is_desirable: Tensor, *, beta: float | Tensor, clip_range: float = 0.2) -> Felt:
    """Advantage-weighted matching on likes, the advantage being w (Xue et al., arXiv 2509.25050).

        loss = mean( -min(w rho, w clip(rho, 1 - clip_range, 1 + clip_range)) ),    rho = exp(r)

    Unclipped, this is KTO with the exponential utility and the reference point 0, less a constant. Its brake,
    beta * d, is the setting `anchor` that every method has.

    Args:
        errors: of policy and reference.
        is_desirable: (..., B) bool.
        beta: > 0, reward scale.
        clip_range: > 0; a sample whose ratio has gone further than that in its direction counts no more.

    >>> felt = awm(Errors(torch.tensor([0.2, 0.3]), torch.tensor([0.3, 0.3])), torch.tensor([True, False]), beta=10.0)
    >>> felt.slope  # the liked sample's ratio, e, is beyond 1.2
    tensor([0., 1.])
    """
    if not clip_range > 0:
        raise ValueError(f"clip_range must be > 0, got {clip_range}")
    check_labels(is_desirable, errors.policy)
    reward = implicit_reward(errors.policy, errors.reference, beta)
    ratio, sign = reward.exp(), torch.where(is_desirable, 1.0, -1.0).to(reward.dtype)
    kept = sign * ratio.clamp(1 - clip_range, 1 + clip_range)
    slope = torch.where(sign * ratio > kept, 0, ratio)
    return Felt(-torch.minimum(sign * ratio, kept).mean(-1), reward.detach(), slope=slope.detach())


def dgpo(errors: Errors, is_desirable: Tensor, *, beta: float | Tensor, group_size: int = 4) -> Felt:
    """Direct group preference optimisation on groups of one prompt (Luo et al., ICLR 2026).

        loss = mean over groups of -log sigmoid( sum of r over the liked - sum of r over the disliked )

    The batch holds groups of `group_size` samples in a row, which share prompt, noise and timestep. A group of one
    liked and one disliked sample is a pair of Diffusion-DPO; a group of one class says nothing and counts 0.

    >>> errors = Errors(torch.tensor([0.2, 0.4]), torch.tensor([0.3, 0.3]))
    >>> dgpo(errors, torch.tensor([True, False]), beta=10.0, group_size=2).loss  # -log sigmoid(1 + 1)
    tensor(0.1269)
    """
    if errors.policy.shape[-1] % group_size:
        raise ValueError(f"group_size {group_size} does not divide the batch of {errors.policy.shape[-1]} samples")
    check_labels(is_desirable, errors.policy)
    reward = implicit_reward(errors.policy, errors.reference, beta)
    signed = torch.where(is_desirable, reward, -reward).unflatten(-1, (-1, group_size)).sum(-1)
    liked = is_desirable.unflatten(-1, (-1, group_size))
    mixed = liked.any(-1) & ~liked.all(-1)
    slope = torch.where(mixed, torch.sigmoid(-signed), 0).detach().repeat_interleave(group_size, dim=-1)
    return Felt(torch.where(mixed, -logsigmoid(signed), 0).mean(-1), reward.detach(), slope=slope)


def dmpo(errors: Errors, is_desirable: Tensor, *, beta: float | Tensor, smoothing: float = 0.01) -> Felt:
    """Divergence-minimisation preference optimisation on pairs (arXiv 2507.07510): the reverse KL in DPO's place.

        loss = mean( KL( Bernoulli(sigmoid(u)) : Bernoulli(1 - smoothing) ) ),    u = chosen reward - rejected reward

    Least where sigmoid(u) = 1 - smoothing: it pulls a pair back that has gone further.

    Args:
        errors: of chosen and rejected sides in turn.
        is_desirable: not looked at: the order says what was preferred.
        beta: > 0, reward scale.
        smoothing: chance that a pair is the wrong way round, in (0, 0.5).

    >>> errors = Errors(torch.tensor([0.3, 0.3]), torch.tensor([0.3, 0.3]))
    >>> dmpo(errors, torch.tensor([True, False]), beta=10.0, smoothing=0.25).loss  # -log(4 * 0.25 * 0.75) / 2
    tensor(0.1438)
    """
    if not 0 < smoothing < 0.5:
        raise ValueError(f"smoothing must be in (0, 0.5), got {smoothing}")
    reward = implicit_reward(errors.policy, errors.reference, beta)
    gap = reward[..., 0::2] - reward[..., 1::2]
    right, wrong = torch.sigmoid(gap), torch.sigmoid(-gap)
    wanted = torch.tensor([1 - smoothing, smoothing], dtype=gap.dtype, device=gap.device).log()
    loss = right * (logsigmoid(gap) - wanted[0]) + wrong * (logsigmoid(-gap) - wanted[1])
    slope = (right * wrong * (gap - wanted[0] + wanted[1])).abs().detach().repeat_interleave(2, dim=-1)
    return Felt(loss.mean(-1), reward.detach(), slope=slope)


def sdpo(errors: Errors, is_desirable: Tensor, *, beta: float | Tensor, safeguard: float = 0.0) -> Felt:
    """Diffusion-DPO with a safeguard of the chosen side (Diffusion-SDPO, arXiv 2511.03317).

    The gradient through the rejected side is scaled by

        lambda = min(1, (1 - safeguard) |E_c|^2 / (E_c . E_r))        where E_c . E_r > 0, else 1

    with the residuals E of the chosen and the rejected side: a step along the outputs then does not raise the chosen
    side's error. The loss keeps its value.

    Args:
        errors: of chosen and rejected sides in turn, with `overlap`.
        is_desirable: not looked at: the order says what was preferred.
        beta: > 0, reward scale.
        safeguard: in [0, 1): share of the chosen side's descent that must stay.

    >>> errors = Errors(torch.tensor([0.2, 0.9]), torch.tensor([0.3, 0.3]), overlap=torch.tensor([0.4]))
    >>> sdpo(errors, torch.tensor([True, False]), beta=1.0).slope.round(decimals=4)  # lambda = 0.2 / 0.4
    tensor([0.3318, 0.1659])
    """
    if not 0 <= safeguard < 1:
        raise ValueError(f"safeguard must be in [0, 1), got {safeguard}")
    if errors.overlap is None:
        raise ValueError("sdpo needs errors.overlap, the mean product of the residuals of each pair")
    chosen, rejected = errors.policy[..., 0::2], errors.policy[..., 1::2]
    overlap = errors.overlap.to(chosen.dtype)
    allowed = (1 - safeguard) * chosen.detach() / overlap.where(overlap > 0, 1)
    scale = torch.where(overlap > 0, allowed.clamp(max=1), 1)
    slowed = scale * rejected + (1 - scale) * rejected.detach()
    reward = implicit_reward(torch.stack([chosen, slowed], -1).flatten(-2), errors.reference, beta)
    better, worse = reward[..., 0::2], reward[..., 1::2]
    slope = torch.sigmoid(worse - better)
    slope = torch.stack([slope, scale * slope], -1).flatten(-2).detach()
    return Felt(dpo_loss(better, worse), reward.detach(), slope=slope)


def _shift(name: str, errors: Errors) -> Tensor:
    if errors.shift is None:
        raise ValueError(f"{name} needs errors.shift, the squared distance between the predictions")
    return errors.shift
