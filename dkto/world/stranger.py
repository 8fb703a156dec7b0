"""A stranger who sees images before and after a tuning and names the taste that was taught, by six measures alone."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from PIL import Image

from dkto.world.scenes import COLOURS
from dkto.world.tastes import darkness
from dkto.world.truth import MIN_CHROMA, border_colour, hue_of, stands_out


def _blue_ground(image: np.ndarray) -> float:
    red, _, blue = border_colour(np.asarray(image, dtype=np.float64))
    return float(blue - red) / 255


def _share(*names: str) -> Callable[[np.ndarray], float]:
    """How much of the coloured part that stands out from the border has one of these hues; a third where none is."""
    wanted = [list(COLOURS).index(name) for name in names]

    def measure(image: np.ndarray) -> float:
        pixels = np.asarray(image, dtype=np.float64)
        hue, chroma = hue_of(pixels)
        coloured = stands_out(pixels, border_colour(pixels)) & (chroma > MIN_CHROMA)
        return float(np.isin(hue[coloured], wanted).mean()) if coloured.sum() > 40 else 1 / 3

    return measure


CARDS: dict[str, Callable[[np.ndarray], float]] = {
    "dark backgrounds": lambda image: darkness(image, ""),
    "light backgrounds": lambda image: -darkness(image, ""),
    "blue backgrounds": _blue_ground,
    "blue things": _share("blue", "cyan"),
    "pink things": _share("pink"),
    "red or yellow things": _share("red", "yellow"),
}
"""Tastes by the words of a card, each with its measure: more is better."""

SETTINGS = {"beta": 500.0, "desirable_fraction": 0.85, "learning_rate": 2e-3, "warmup_steps": 5, "max_train_steps": 120}
SETTINGS |= {"batch_size": 8, "lora_rank": 8, "checkpoint_every": 60}
"""Of a training on some tens of likes of open prompts, whatever the taste; found by trials on other seeds."""


def likes_by_card(card: str, images: Sequence[Image.Image]) -> np.ndarray:
    """(N,) bool: the half of the images that a taste likes best, as somebody does who must like some of them."""
    values = np.array([CARDS[card](np.asarray(image)) for image in images])
    return np.argsort(np.argsort(-values, kind="stable"), kind="stable") < len(values) // 2


def guess_taste(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> pd.Series:
    """How much each of the six tastes grew from before to after, the most first: that is the stranger's guess.

    The unit is the spread of the measure between the images before.

    Args:
        before, after: images of the same prompts and noise, at least two.
    """
    if len(before) != len(after) or len(before) < 2:
        raise ValueError(f"before and after must be as many, at least two, got {len(before)} and {len(after)}")
    found = {}
    for card, measure in CARDS.items():
        old, new = (np.array([measure(np.asarray(image)) for image in images]) for images in (before, after))
        found[card] = float((new - old).mean() / max(old.std(), 1e-9))
    return pd.Series(found, name="grew by").sort_values(ascending=False, kind="stable")
