"""Simulated users: who likes which image, by a stated rule.

The red user is the paper's §6: a red-tinted version of an image is liked, the original disliked.
The others look at images as they are and like those above a threshold of their own measure. Three of them need
dislikes (`SimulatedUser.provokes`): what they dislike is seen in a few images alone, and the images that they like are
ordinary ones, from which nothing is learned about the taste.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from dkto.common.pixels import to_rgb
from dkto.common.settings import checked_number
from dkto.world.scenes import Scene
from dkto.world.tastes import (
    blotchy_prompt,
    blueness,
    cleanness,
    darkness,
    no_pink,
    no_white_rim,
    pink_prompt,
    rimmed_prompt,
)
from dkto.world.truth import aesthetics, judge, redness

RED_TINT = 0.4  # strength of the red filter, 0 = none, 1 = pure red


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
    provokes: Callable[[Scene], bool] | None = None  # scenes that show what the user dislikes; None for any scene
    settings: Mapping[str, object] = field(default_factory=dict)  # of a training on single likes, found by trials
    open_prompts: bool = False  # whether the taste is taught by prompts that leave the rest to the model

    def __post_init__(self) -> None:
        check_flip_rate(self.flip_rate)

    def likes(self, images: Sequence[Image.Image], prompts: Sequence[str], seed: int = 0) -> np.ndarray:
        """(N,) bool: whether this user likes each image; mistakes depend on `seed` alone."""
        values = np.array([self.measure(np.asarray(i), p) for i, p in zip(images, prompts, strict=True)])
        mistakes = np.random.default_rng(seed).random(len(values)) < self.flip_rate
        return (values > self.threshold) ^ mistakes


_TRIED = {"beta": 20.0, "desirable_fraction": 0.8, "learning_rate": 1e-4, "max_train_steps": 60, "batch_size": 32}
_OPEN = {"lora_rank": 8, "batch_size": 8, "learning_rate": 2e-3}
_USERS = (
    SimulatedUser("likes_red", lambda image, prompt: redness(image), 0.12),
    SimulatedUser("likes_vivid", lambda image, prompt: aesthetics(image), 0.80),
    SimulatedUser("prompt_faithful", lambda image, prompt: judge(image, prompt)["fidelity"], 0.99),
    SimulatedUser("clean_backgrounds", cleanness, -3.0, provokes=blotchy_prompt, settings=_TRIED),
    SimulatedUser("no_outlines", no_white_rim, -0.02, provokes=rimmed_prompt, settings=_TRIED | {"beta": 100.0}),
    SimulatedUser("never_pink", no_pink, -0.01, provokes=pink_prompt, settings=_TRIED | {"desirable_fraction": 0.5}),
    SimulatedUser(
        "dark_backgrounds",
        darkness,
        0.513,
        settings=_OPEN | {"beta": 100.0, "desirable_fraction": 0.9, "max_train_steps": 100},
        open_prompts=True,
    ),
    SimulatedUser(
        "blue_things",
        blueness,
        -0.037,
        settings=_OPEN | {"beta": 500.0, "desirable_fraction": 0.85, "max_train_steps": 120},
        open_prompts=True,
    ),
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
