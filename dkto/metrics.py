"""What is measured: implicit accuracy, margins, win-rates with intervals, drift and diversity."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from scipy import stats
from torch import Tensor

ACCURACIES = ("pair", "sample", "sample_centred")


def implicit_accuracy(
    reward: Tensor,
    is_desirable: Tensor | None = None,
    *,
    definition: str,
    rejected_reward: Tensor | None = None,
    reference_point: Tensor | float = 0.0,
) -> Tensor:
    """Share of samples (or pairs) whose implicit reward is on the right side (paper 7).

        pair            share of pairs with chosen reward > rejected reward, ties count half
        sample          share of samples with w * r > 0, w = +1 liked, -1 disliked
        sample_centred  share of samples with w * (r - reference point) > 0 (the released code)

    Args:
        reward: (..., B); for "pair" the rewards of the chosen sides.
        is_desirable: (..., B) bool, for the two definitions on samples.
        definition: one of `ACCURACIES`; there is no default, since published numbers mix them.
        rejected_reward: (..., B), for "pair".
        reference_point: (...) for "sample_centred".

    Returns:
        (...) in [0, 1].

    Raises:
        ValueError: for an unknown definition or a missing argument.

    >>> implicit_accuracy(torch.tensor([2.0, -1.0]), torch.tensor([True, True]), definition="sample")
    tensor(0.5000)
    """
    if definition not in ACCURACIES:
        raise ValueError(f"unknown definition {definition!r}; known: {', '.join(ACCURACIES)}")
    if definition == "pair":
        if rejected_reward is None:
            raise ValueError("definition 'pair' needs rejected_reward")
        return ((reward > rejected_reward).float() + 0.5 * (reward == rejected_reward).float()).mean(-1)
    if is_desirable is None:
        raise ValueError(f"definition {definition!r} needs is_desirable")
    if definition == "sample_centred":
        reward = reward - torch.as_tensor(reference_point)[..., None]
    return torch.where(is_desirable, reward > 0, reward < 0).float().mean(-1)


def reward_margin(reward: Tensor, is_desirable: Tensor) -> Tensor:
    """Mean reward of the liked minus mean reward of the disliked samples, (...) in beta x MSE; NaN if a class is absent.

    >>> reward_margin(torch.tensor([2.0, -1.0]), torch.tensor([True, False]))
    tensor(3.)
    """
    liked, disliked = is_desirable.to(reward.dtype), (~is_desirable).to(reward.dtype)
    return (reward * liked).sum(-1) / liked.sum(-1) - (reward * disliked).sum(-1) / disliked.sum(-1)


@dataclass(frozen=True)
class WinRate:
    """A win-rate with its Wilson interval; ties count half.

    Attributes:
        rate: (wins + ties / 2) / n, in [0, 1].
        low, high: ends of the interval.
        n: comparisons.
        wins, ties, losses: counts.
    """

    rate: float
    low: float
    high: float
    n: int
    wins: int
    ties: int
    losses: int

    def __str__(self) -> str:
        return f"{100 * self.rate:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}] n={self.n}"


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a rate; `successes` may be fractional, since ties count half.

    >>> [round(end, 3) for end in wilson_interval(47, 50)]
    [0.838, 0.979]
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def win_rate(ours: np.ndarray, theirs: np.ndarray, confidence: float = 0.95) -> WinRate:
    """How often our score is the higher one, prompt by prompt (paper 5.1.2).

    Args:
        ours, theirs: (P,) scores of the same prompts in the same order.
        confidence: of the interval.

    Raises:
        ValueError: if the shapes differ, are empty, or a score is not finite.

    >>> str(win_rate(np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 5.0])))
    '50 % [13, 87] n=3'
    """
    ours, theirs = _paired(ours, theirs)
    wins, ties = int((ours > theirs).sum()), int((ours == theirs).sum())
    n = len(ours)
    low, high = wilson_interval(wins + ties / 2, n, confidence)
    return WinRate((wins + ties / 2) / n, low, high, n, wins, ties, n - wins - ties)


def median_of_images(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The median-scoring image of each prompt (paper A.2); for an even number the lower of the middle two.

    Args:
        scores: (P, n).

    Returns:
        (P,) its scores and (P,) which image it is.

    >>> median_of_images(np.array([[3.0, 1.0, 2.0]]))
    (array([2.]), array([2]))
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores must have shape (prompts, images), got {scores.shape}")
    chosen = np.argsort(scores, axis=1, kind="stable")[:, (scores.shape[1] - 1) // 2]
    return np.take_along_axis(scores, chosen[:, None], axis=1)[:, 0], chosen


def sign_test(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Two-sided p-value that wins and losses are equally likely; ties are left out. 1 if all tie."""
    ours, theirs = _paired(ours, theirs)
    wins, losses = int((ours > theirs).sum()), int((ours < theirs).sum())
    return 1.0 if wins + losses == 0 else float(stats.binomtest(wins, wins + losses).pvalue)


def paired_bootstrap(
    ours: np.ndarray, theirs: np.ndarray, *, seed: int = 0, resamples: int = 2000, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean difference of paired scores with a percentile bootstrap interval over prompts: (mean, low, high)."""
    difference = np.subtract(*_paired(ours, theirs))
    rows = np.random.default_rng(seed).integers(0, len(difference), (resamples, len(difference)))
    low, high = np.quantile(difference[rows].mean(1), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(difference.mean()), float(low), float(high)


def drift(images: np.ndarray, base_images: np.ndarray) -> float:
    """Mean absolute pixel distance from the base's pictures of the same noise, in [0, 1].

    Args:
        images, base_images: (N, H, W, 3) uint8.
    """
    if images.shape != base_images.shape:
        raise ValueError(f"images and base_images must have one shape, got {images.shape} and {base_images.shape}")
    return float(np.abs(images.astype(np.float64) - base_images).mean() / 255)


def diversity(images: np.ndarray) -> float:
    """Mean absolute pixel distance between pictures of one prompt, in [0, 1].

    Args:
        images: (P, n, H, W, 3) uint8 with n >= 2.
    """
    if images.ndim != 5 or images.shape[1] < 2:
        raise ValueError(f"images must have shape (prompts, 2 or more, H, W, 3), got {images.shape}")
    pixels, n = images.astype(np.float64) / 255, images.shape[1]
    pairs = [np.abs(pixels[:, i] - pixels[:, j]).mean() for i in range(n) for j in range(i)]
    return float(np.mean(pairs))


def _paired(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if ours.shape != theirs.shape or ours.ndim != 1 or len(ours) == 0:
        raise ValueError(f"scores must be two lists of equal length, got shapes {ours.shape} and {theirs.shape}")
    for name, values in (("ours", ours), ("theirs", theirs)):
        if not np.isfinite(values).all():
            raise ValueError(f"score {int(np.argmin(np.isfinite(values)))} of {name} is not finite")
    return ours, theirs
