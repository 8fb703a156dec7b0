"""What is measured on finished images: win-rates with intervals, agreement, drift and diversity.

Paired scores are (P,), of the same prompts in the same order: other shapes, no score at all, or one that is not finite
raise a ValueError. `confidence` is that of an interval, in (0, 1).
"""

import warnings
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from dkto.common.settings import checked_number

TIE_DECIMALS = 6
"""Scores whose difference rounds to 0 at this decimal tie: one image scored in two batches may differ by 1e-7."""


@dataclass(frozen=True)
class WinRate:
    """A win-rate with its interval, each in [0, 1]; ties count half."""

    rate: float  # (wins + ties / 2) / n
    low: float
    high: float
    n: int  # comparisons: wins + ties + losses
    wins: int
    ties: int
    losses: int

    @classmethod
    def of(cls, wins: int, ties: int, losses: int, confidence: float = 0.95) -> "WinRate":
        """The rate of these counts with Tango's score interval, see `tango_interval`."""
        low, high = tango_interval(wins, ties, losses, confidence)
        n = wins + ties + losses
        return cls((wins + ties / 2) / n, low, high, n, wins, ties, losses)

    def __str__(self) -> str:
        return f"{100 * self.rate:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}] n={self.n}"


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a rate (Wilson 1927): all p that a test at 1 - confidence does not reject.

        |successes / n - p| <= z * sqrt(p * (1 - p) / n)

    Args:
        successes: in [0, n], of trials that cannot tie; `tango_interval` is for those that can.
        n: trials.

    Returns:
        Low and high end, in [0, 1].

    >>> [round(end, 3) for end in wilson_interval(47, 50)]
    [0.838, 0.979]
    """
    n = checked_number("n", n, least=1)
    successes = checked_number("successes", successes, float, least=0, most=n)
    _check_confidence(confidence)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / n
    shrink = 1 / (1 + z * z / n)
    centre = (rate + z * z / (2 * n)) * shrink
    half = z * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5 * shrink
    # at 0 and n wins one end is the rate itself, which rounding would miss
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def tango_interval(wins: int, ties: int, losses: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a win-rate whose ties count half (Tango 1998): all rates that a test does not reject.

    With d = 2 rate - 1, the share of wins minus that of losses:

        |wins - losses - n * d| <= z * sqrt(n * (2 * q + d * (1 - d)))

    where q is the likeliest share of losses, if the difference were d. Without ties this is Wilson's interval; the more
    ties, the narrower, since a tie varies less than a win or a loss.

    Returns:
        Low and high end of the rate, in [0, 1].

    >>> [round(end, 3) for end in tango_interval(47, 0, 3)], [round(end, 3) for end in tango_interval(20, 30, 0)]
    ([0.838, 0.979], [0.638, 0.769])
    """
    n = wins + ties + losses
    if n < 1 or min(wins, ties, losses) < 0:
        raise ValueError(f"wins, ties and losses must be counts, one above 0, got {wins}, {ties} and {losses}")
    _check_confidence(confidence)
    limit = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2

    def excess(d: float, won: int, lost: int) -> float:
        """Above 0 where the difference d is rejected."""
        b = (2 * n - won + lost) * d - won - lost
        q = (sqrt(max(0.0, b * b + 8 * n * lost * d * (1 - d))) - b) / (4 * n)
        return (won - lost - n * d) ** 2 - limit * n * (2 * q + d * (1 - d))

    def lowest(won: int, lost: int) -> float:
        # just below the estimate, since at it both sides of the inequality may be 0
        return -1.0 if lost == n else optimize.brentq(excess, -1.0, (won - lost) / n - 1e-9, args=(won, lost))

    return 0.5 + lowest(wins, losses) / 2, 0.5 - lowest(losses, wins) / 2


def gaps(ours: ArrayLike, theirs: ArrayLike) -> np.ndarray:
    """(P,) ours minus theirs, rounded to 1e-6, so that a tie is 0; warns where a scorer's scale makes everything tie.

    >>> gaps([0.5, 0.5], [0.50000003, 0.25]).tolist()
    [0.0, 0.25]
    """
    ours, theirs = _paired(ours, theirs)
    spread = np.ptp([ours, theirs])
    if len(ours) > 1 and 0 < spread < 10**-TIE_DECIMALS:
        warnings.warn(
            f"all scores lie within {spread:.2g} of each other and tie, since differences below 1e-6 count as ties: "
            "give the scorer a larger scale",
            stacklevel=2,
        )
    return (ours - theirs).round(TIE_DECIMALS) + 0.0  # no negative zero


def win_rate(ours: ArrayLike, theirs: ArrayLike, confidence: float = 0.95) -> WinRate:
    """How often our score is the higher one, prompt by prompt (paper 5.1.2), with Tango's score interval and counts.

    Scores that differ by less than 1e-6 tie (`gaps`). The interval is over prompts alone: what another training of the
    same method would give is not in it.

    >>> str(win_rate([1.0, 2.0, 3.0], [0.0, 2.0, 5.0]))
    '50 % [15, 85] n=3'
    """
    gap = gaps(ours, theirs)
    return WinRate.of(int((gap > 0).sum()), int((gap == 0).sum()), int((gap < 0).sum()), confidence)


def median_of_images(scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The median-scoring image of each prompt (paper 5.1.2); for an even number the lower of the middle two.

    Always the score of an image that exists, never a mean of two, so that the image can be shown. Among
    equal scores the earlier image comes first.

    Args:
        scores: (P, n), n >= 1 images of each prompt.

    Returns:
        (P,) its scores and (P,) which image it is.

    >>> median_of_images([[3.0, 1.0, 2.0]])
    (array([2.]), array([2]))
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores must have shape (prompts, images), got {scores.shape}")
    if not np.isfinite(scores).all():
        prompt, image = np.argwhere(~np.isfinite(scores))[0]
        raise ValueError(f"score of prompt {prompt}, image {image} is not finite")
    chosen = np.argsort(scores, axis=1, kind="stable")[:, (scores.shape[1] - 1) // 2]
    return np.take_along_axis(scores, chosen[:, None], axis=1)[:, 0], chosen


def sign_test(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Two-sided p-value of "wins and losses are equally likely"; ties are left out, and all ties give 1.

    >>> sign_test([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    0.25
    """
    gap = gaps(ours, theirs)
    wins, losses = int((gap > 0).sum()), int((gap < 0).sum())
    return 1.0 if wins + losses == 0 else float(stats.binomtest(wins, wins + losses).pvalue)


class MeanDifference(NamedTuple):
    """Mean of ours - theirs and its interval, in the scorer's unit."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    ours: ArrayLike, theirs: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> MeanDifference:
    """Mean difference of paired scores with a percentile bootstrap interval over prompts.

    There must be at least 2 prompts; they are drawn again `resamples` times.

    >>> paired_bootstrap([2.0, 3.0], [1.0, 2.0])
    MeanDifference(mean=1.0, low=1.0, high=1.0)
    """
    difference = np.subtract(*_paired(ours, theirs))
    _check_confidence(confidence)
    if len(difference) < 2:
        raise ValueError("paired_bootstrap needs at least 2 prompts, got 1")
    resamples = checked_number("resamples", resamples, least=1)
    options = {"n_resamples": resamples, "confidence_level": confidence, "method": "percentile"}
    options["random_state"] = np.random.default_rng(seed)  # known to every scipy; newer ones call it rng too
    interval = stats.bootstrap((difference,), np.mean, **options).confidence_interval
    return MeanDifference(float(difference.mean()), float(interval.low), float(interval.high))


class Agreement(NamedTuple):
    """How often two scorers name the same winner, with its Wilson interval; n are the prompts where both name one."""

    rate: float
    low: float
    high: float
    n: int


def agreement(first: ArrayLike, second: ArrayLike, confidence: float = 0.95) -> Agreement:
    """Agreement of two scorers on who wins: the share of prompts where their differences have one sign.

    Prompts where either sees a tie name no winner and are left out; with none left the rate is a half and
    the interval is everything.

    Args:
        first, second: (P,) our score minus theirs, by one scorer and by the other.

    >>> agreement([1.0, -1.0, 0.0, 2.0], [3.0, 1.0, 5.0, 0.1]).rate.__round__(3)
    0.667
    """
    first, second = (values.round(TIE_DECIMALS) for values in _paired(first, second))
    _check_confidence(confidence)
    decided = (first != 0) & (second != 0)
    n, same = int(decided.sum()), int((np.sign(first) == np.sign(second))[decided].sum())
    if n == 0:
        return Agreement(0.5, 0.0, 1.0, 0)
    return Agreement(same / n, *wilson_interval(same, n, confidence), n)


def drift(images: np.ndarray, base_images: np.ndarray) -> float:
    """How far tuning moved the images: mean absolute pixel distance from the base's of the same noise.

    Args:
        images, base_images: (N, H, W, 3) uint8, image by image from the same seed and prompt.

    Returns:
        In [0, 1], share of the pixel range.

    >>> drift(np.full((1, 2, 2, 3), 51, np.uint8), np.zeros((1, 2, 2, 3), np.uint8))
    0.2
    """
    _check_pixels("images", images)
    _check_pixels("base_images", base_images)
    if images.shape != base_images.shape:
        raise ValueError(f"base_images must have the shape of images {images.shape}, got {base_images.shape}")
    return _pixel_distance(images, base_images)


def diversity(images: np.ndarray) -> float:
    """How unlike each other the images of one prompt are: mean absolute pixel distance over all pairs.

    Args:
        images: (P, n, H, W, 3) uint8, n >= 2 images of each prompt.

    Returns:
        In [0, 1], share of the pixel range; 0 if every prompt always gives the same image.

    >>> diversity(np.stack([np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 51, np.uint8)], axis=1))
    0.2
    """
    _check_pixels("images", images)
    if images.ndim != 5 or images.shape[1] < 2:
        raise ValueError(f"images must have shape (prompts, 2 or more, H, W, 3), got {images.shape}")
    pairs = [_pixel_distance(images[:, i], images[:, j]) for i in range(images.shape[1]) for j in range(i)]
    return float(np.mean(pairs))


def _pixel_distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.int16) - b).mean() / 255)


def _paired(ours: ArrayLike, theirs: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if ours.shape != theirs.shape or ours.ndim != 1 or len(ours) == 0:
        raise ValueError(f"scores must be two lists of equal length, got shapes {ours.shape} and {theirs.shape}")
    for name, values in (("ours", ours), ("theirs", theirs)):
        if not np.isfinite(values).all():
            raise ValueError(f"score {int(np.argmin(np.isfinite(values)))} of {name} is not finite")
    return ours, theirs


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")


def _check_pixels(name: str, images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.size == 0:
        raise ValueError(f"{name} must be uint8 and not empty, got {images.dtype} of shape {images.shape}")
