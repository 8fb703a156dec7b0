"""Scorers behind one face: (images, prompts) -> (N,) scores, higher is better.

The scorers of the small world judge by exact, stated rules and carry names of their own; none of
them is a learned metric such as PickScore or CLIP.
"""

from collections.abc import Callable, Sequence
from difflib import get_close_matches

import numpy as np
from PIL import Image

from dkto.scorers.world import (
    world_aesthetics,
    world_fidelity,
    world_redness,
    world_utility,
)

Scorer = Callable[[Sequence[Image.Image], Sequence[str]], np.ndarray]

SCORERS: dict[str, Scorer] = {
    "world_fidelity": world_fidelity,
    "world_aesthetics": world_aesthetics,
    "world_redness": world_redness,
    "world_utility": world_utility,
}


def get_scorer(name: str) -> Scorer:
    """The scorer of that name.

    Raises:
        KeyError: if there is none; the sentence names the nearest and lists the known ones.
    """
    if name in SCORERS:
        return SCORERS[name]
    near = get_close_matches(name, SCORERS, 1)
    raise KeyError(
        f"unknown scorer {name!r}{f'; did you mean {near[0]!r}?' if near else ''} known: {', '.join(SCORERS)}"
    )


def score(name: str, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
    """Score images and check what comes back.

    Raises:
        ValueError: if images and prompts differ in number, or the scorer returns a wrong number of
            values or one that is not finite.
    """
    if len(images) != len(prompts):
        raise ValueError(
            f"scorer {name} needs one prompt per image, got {len(images)} images and {len(prompts)} prompts"
        )
    scores = np.asarray(get_scorer(name)(images, prompts), dtype=np.float64)
    if scores.shape != (len(images),):
        raise ValueError(f"scorer {name} must return {len(images)} scores, got shape {scores.shape}")
    if not np.isfinite(scores).all():
        wrong = int(np.argmin(np.isfinite(scores)))
        raise ValueError(f"scorer {name} returned a value that is not finite for image {wrong}")
    return scores
