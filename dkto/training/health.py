"""Whether a training of Diffusion-KTO is well, read from its records: one light, and the sentence behind it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dkto.objective.utilities import get_utility

LEAST_SLOPE = 0.4  # of the slope where nothing is learned yet; below it beta or the rate is too large
LOST_SLOPE = 0.2
MOST_ERROR = 1.5  # denoising error of the policy, relative to the first steps; above it the model forgets how to draw


@dataclass(frozen=True)
class Health:
    """What the last steps of a training show."""

    light: str  # "green", "yellow" or "red"
    slope: float  # mean slope of the utility, relative to that at 0
    margin: float  # mean reward of liked minus disliked samples
    error: float  # denoising error of the policy, relative to that of the first steps
    sentence: str

    def __repr__(self) -> str:
        return self.sentence


def training_health(
    records: Sequence[Mapping[str, float]], utility: str = "kahneman_tversky", window: int = 20
) -> Health:
    """Judge a training by slope, margin and error over its last `window` records, the error beside the first ones.

    Args:
        records: step records of `dkto.training.loop.train`.
        utility: the one it was trained with.
        window: records at the end, and for the error at the start too.

    Raises:
        ValueError: if there is no record, or none with a slope.
    """

    def mean(key: str, part: Sequence[Mapping[str, float]]) -> float:
        values = [record[key] for record in part if np.isfinite(record.get(key, np.nan))]
        return float(np.mean(values)) if values else float("nan")

    if not any("utility_slope" in record for record in records):
        raise ValueError(f"records must hold a step with its utility_slope, got {len(records)} without")
    at_zero = float(get_utility(utility).slope(torch.zeros((), dtype=torch.float64)))
    slope, margin = mean("utility_slope", records[-window:]) / at_zero, mean("reward/margin", records[-window:])
    error = mean("policy_error", records[-window:]) / mean("policy_error", records[:window])
    if not slope >= LOST_SLOPE or error > MOST_ERROR:
        light, advice = "red", "beta or the learning rate is far too large"
    elif slope < LEAST_SLOPE or error > (1 + MOST_ERROR) / 2:
        light, advice = "yellow", "take a smaller beta or rate, or fewer steps"
    elif not margin > 0:
        light, advice = "yellow", "liked and disliked do not part yet"
    else:
        light, advice = "green", "liked and disliked part, and most samples still teach"
    sentence = (
        f"{light}: the slope is {slope:.0%} of that at the start, the margin {margin:+.2f}, "
        f"the denoising error {error:.2f} times the first steps'; {advice}"
    )
    return Health(light, slope, margin, error, sentence)
