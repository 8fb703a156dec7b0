"""Simulated users: who likes which image, by a stated rule.

The red user is the paper's §6: a red-tinted version of an image is liked, the original disliked.
The others look at images as they are and like those above a threshold of their own measure.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dkto.common.pixels import to_rgb
from dkto.common.settings import checked_number
from dkto.world.truth import aesthetics, judge, redness

RED_TINT = 0.15  # strength of the red filter, 0 = none, 1 = pure red


def check_flip_rate(rate: float) -> None:
    """Refuse a share of mistakes outside [0, 0.5]; above a half a user would like the opposite."""
    checked_number("flip_rate", rate, float, least=0, most=0.5)


@dataclass(frozen=True)
class SimulatedUser:
    """A user whose likes follow a measure of the image."""

    name: str  # how tables call the user
    measure: Callable[[np.ndarray, str], float]  # (image as (H, W, 3) uint8, prompt) -> value
    threshold: float  # images with a higher value are liked
    flip_rate: float = 0.0  # share of likes given by mistake, in [0, 0.5]

    def __post_init__(self) -> None:
        check_flip_rate(self.flip_rate)

    def likes(self, images: Sequence[Image.Image], prompts: Sequence[str], seed: int = 0) -> np.ndarray:
        """(N,) bool: whether this user likes each image; mistakes depend on `seed` alone."""
        values = np.array([self.measure(np.asarray(i), p) for i, p in zip(images, prompts, strict=True)])
        mistakes = np.random.default_rng(seed).random(len(values)) < self.flip_rate
        return (values > self.threshold) ^ mistakes


_USERS = (
    SimulatedUser("likes_red", lambda image, prompt: redness(image), 0.12),
    SimulatedUser("likes_vivid", lambda image, prompt: aesthetics(image), 0.80),
    SimulatedUser("prompt_faithful", lambda image, prompt: judge(image, prompt)["fidelity"], 0.99),
)
USERS = {user.name: user for user in _USERS}


def tint_red(image: Image.Image, strength: float = RED_TINT) -> Image.Image:
    """The image seen through a red filter: red is lifted, green and blue are dimmed.

    red' = red + strength * (255 - red);  green' = (1 - 0.6 strength) green;  blue' likewise

    """
    strength = checked_number("strength", strength, float, least=0, most=1)
    pixels = np.asarray(to_rgb(image), dtype=np.float64)
    pixels = pixels * np.array([1 - strength, 1 - 0.6 * strength, 1 - 0.6 * strength])
    pixels[..., 0] += strength * 255
    return Image.fromarray(np.rint(pixels).astype(np.uint8))
