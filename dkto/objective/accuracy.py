"""How often implicit rewards are on the right side: accuracies, the margin, and the measures of a step (paper 7).

Measures on tensors keep leading ensemble dimensions, and a NaN makes that member's measure NaN, so that a diverged run
is seen.
"""

import torch
from torch import Tensor

from dkto.common.names import check_name
from dkto.objective.losses import check_labels

ACCURACIES = ("pair", "sample", "sample_centred")


def implicit_accuracy(
    reward: Tensor,
    is_desirable: Tensor | None = None,
    *,
    definition: str,
    rejected_reward: Tensor | None = None,
    reference_point: Tensor | float = 0.0,
) -> Tensor:
    """Share of samples, or pairs, whose implicit reward is on the right side (paper 7).

        pair            share of pairs with chosen reward > rejected reward; a tie counts half
        sample          share of samples with w * r > 0, w = +1 liked, -1 disliked
        sample_centred  share of samples with w * (r - reference point) > 0 (the released code)

    A tie of a sample (a reward of exactly 0, or at the reference point) is not on the right side: before
    the first step, policy = reference gives 0 by "sample", and 0.5 by "pair".

    Args:
        reward: (..., B) implicit rewards; for "pair" those of the chosen sides.
        is_desirable: (..., B) bool, for the two definitions on samples.
        definition: one of `ACCURACIES`; there is no default, since published numbers mix them.
        rejected_reward: (..., B), for "pair".
        reference_point: (...) or a number, for "sample_centred".

    Returns:
        (...) in [0, 1]; NaN where a reward is NaN.

    Raises:
        ValueError: for an unknown definition, or a missing or misshapen argument.

    >>> implicit_accuracy(torch.tensor([2.0, -1.0]), torch.tensor([True, True]), definition="sample")
    tensor(0.5000)
    """
    check_name("definition", definition, ACCURACIES)
    if definition == "pair":
        if rejected_reward is None:
            raise ValueError("definition 'pair' needs rejected_reward")
        if rejected_reward.shape != reward.shape:
            shape, came = tuple(reward.shape), tuple(rejected_reward.shape)
            raise ValueError(f"rejected_reward must have the shape of reward {shape}, got {came}")
        gap = reward - rejected_reward
        right = torch.where(reward == rejected_reward, 0.5, (gap > 0).to(torch.float32))
    else:
        if is_desirable is None:
            raise ValueError(f"definition {definition!r} needs is_desirable")
        check_labels(is_desirable, reward)
        point = torch.as_tensor(reference_point if definition == "sample_centred" else 0.0).to(reward)
        gap = reward - point[..., None]
        right = torch.where(is_desirable, gap > 0, gap < 0).to(torch.float32)
    unknown = reward.isnan() if rejected_reward is None else reward.isnan() | rejected_reward.isnan()
    return right.to(torch.promote_types(reward.dtype, torch.float32)).masked_fill(unknown, torch.nan).mean(-1)


def measures(
    reward: Tensor,
    is_desirable: Tensor,
    policy_error: Tensor,
    loss: Tensor,
    point: Tensor | None = None,
    slope: Tensor | None = None,
    *,
    pairs: bool = False,
) -> dict[str, float]:
    """A step's measures of the global batch.

    Args:
        reward: (B,) implicit rewards.
        is_desirable: (B,), true or 1 where liked.
        policy_error: (B,) denoising errors.
        loss, point, slope: (B,) the loss, the reference point and the utility's slope as each sample felt them; None
            for a method without.
        pairs: whether samples alternate between the chosen and the rejected side of a pair.

    >>> found = measures(torch.tensor([2.0, -1.0]), torch.tensor([True, False]), torch.ones(2), torch.zeros(2))
    >>> found["reward/margin"], found["implicit_accuracy/sample"]
    (3.0, 1.0)
    """
    liked = is_desirable.bool()
    values = {
        "loss": loss.mean(),
        "policy_error": policy_error.mean(),
        "mean_abs_reward": reward.abs().mean(),
        "implicit_accuracy/sample": implicit_accuracy(reward, liked, definition="sample"),
    }
    if point is not None:
        values["reference_point"] = point.mean()
        values["implicit_accuracy/sample_centred"] = implicit_accuracy(reward - point, liked, definition="sample")
    if pairs:
        chosen, rejected = reward[0::2], reward[1::2]
        values["implicit_accuracy/pair"] = implicit_accuracy(chosen, definition="pair", rejected_reward=rejected)
    if slope is not None:
        values["utility_slope"] = slope.mean()
    if liked.any():
        values["reward/desirable"] = reward[liked].mean()
    if not liked.all():
        values["reward/undesirable"] = reward[~liked].mean()
    if liked.any() and not liked.all():
        values["reward/margin"] = values["reward/desirable"] - values["reward/undesirable"]
    return {name: float(value) for name, value in values.items()}
