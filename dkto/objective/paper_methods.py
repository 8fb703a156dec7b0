"""The paper's method and those that it compares with, each a function of the errors and the likes."""

from collections.abc import Callable

import torch
from torch import Tensor

from dkto.objective.felt import Errors, Felt
from dkto.objective.losses import (
    dpo_loss,
    effective_weight,
    implicit_reward,
    kto_loss,
    reference_point,
    running_sums,
    sft_loss,
)
from dkto.objective.utilities import Utility


def kto(
    errors: Errors,
    is_desirable: Tensor,
    *,
    beta: float | Tensor,
    utility: str | Utility = "kahneman_tversky",
    estimator: str = "batch",
    clamp: bool = True,
    desirable_weight: float | Tensor = 1.0,
    undesirable_weight: float | Tensor = 1.0,
    noise_draws: int = 1,
    sample_weight: Tensor | None = None,
    past: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Felt:
    """Diffusion-KTO (paper eq. 14-15): rewards, their reference point, and the utility of the gap.

    With `noise_draws` K > 1 each image lies K times in a row in the batch, with K noises, and its reward is their mean:
    the utility of a mean is not the mean of utilities (ELBO-KTO, arXiv 2510.23658). The paper draws once.
    """
    reward = implicit_reward(errors.policy, errors.reference, beta)
    unrelated = errors.unrelated and implicit_reward(errors.unrelated.policy, errors.unrelated.reference, beta)
    images, liked = reward, is_desirable
    if noise_draws > 1:
        images, liked = reward.unflatten(-1, (-1, noise_draws)).mean(-1), is_desirable[..., ::noise_draws]
    if estimator == "running":
        past = running_sums(images, past, reduce)
    point = reference_point(
        images, estimator, is_desirable=liked, unrelated_reward=unrelated, past=past, clamp=clamp, reduce=reduce
    )
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    if sample_weight is not None:
        weights["sample_weight"] = sample_weight[..., ::noise_draws]
    loss = kto_loss(images, liked, point, utility, **weights)
    slope = effective_weight(images, liked, point, utility, **weights).abs().repeat_interleave(noise_draws, dim=-1)
    return Felt(loss, reward.detach(), point, slope, past if estimator == "running" else None)


def dpo(errors: Errors, is_desirable: Tensor, *, beta: float | Tensor) -> Felt:
    """Diffusion-DPO (paper eq. 8); the batch alternates chosen and rejected sides of pairs, whatever their labels."""
    reward = implicit_reward(errors.policy, errors.reference, beta)
    chosen, rejected = reward[..., 0::2], reward[..., 1::2]
    slope = torch.sigmoid(rejected - chosen).detach().repeat_interleave(2, dim=-1)
    return Felt(dpo_loss(chosen, rejected), reward.detach(), slope=slope)


def sft(errors: Errors, is_desirable: Tensor) -> Felt:
    """Supervised fine-tuning on the liked samples (paper eq. 3)."""
    return Felt(sft_loss(errors.policy, is_desirable))


def sft_all(errors: Errors, is_desirable: Tensor) -> Felt:
    """The same on every sample: without the preference, or, for CSFT, with the like in the prompt (paper 5.1.2)."""
    return Felt(sft_loss(errors.policy))
