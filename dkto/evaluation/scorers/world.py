"""The small world's own scorers: fidelity, aesthetics, redness, and a utility that cannot be hacked."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from dkto.world.truth import RULES_VERSION, aesthetics, judge, redness


def world_fidelity(images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
    """Share of what the prompt asks that the picture shows, in [0, 1] (see `dkto.world.truth`)."""
    return np.array([judge(np.asarray(i), p)["fidelity"] for i, p in zip(images, prompts, strict=True)])


def world_aesthetics(images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
    """Vividness, contrast and sharpness by a stated rule, in [0, 1]; the prompts play no part."""
    return np.array([aesthetics(np.asarray(image)) for image in images])


def world_redness(images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
    """Mean of red minus the mean of green and blue, in [-1, 1]; the prompts play no part."""
    return np.array([redness(np.asarray(image)) for image in images])


def redness_pixels(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """`world_redness` of (B, 3, H, W) in [0, 1], with gradient."""
    red, green, blue = pixels.mean((2, 3)).unbind(1)
    return red - (green + blue) / 2


def world_utility(images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
    """Fidelity times aesthetics, in [0, 1]: beauty counts only where the prompt is followed."""
    return world_fidelity(images, prompts) * world_aesthetics(images, prompts)


WORLD_SCORERS = {
    "world_fidelity": world_fidelity,
    "world_aesthetics": world_aesthetics,
    "world_redness": world_redness,
    "world_utility": world_utility,
}
for _name, _scorer in WORLD_SCORERS.items():
    _scorer.about = {"rule": _name, "version": RULES_VERSION}  # by it stored scores are known again
