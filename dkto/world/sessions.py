"""Sessions of comparing painted pictures, in the schema of Pick-a-Pic v2: a small stand-in whose truth is known.

As in the app that the data set came from (Kirstain et al. 2023), the picture that is preferred stays on the screen and
the other is replaced by a new one. Few pictures win, then, and most lose once: that is why the paper counts three times
as many disliked pictures as liked ones.
"""

import io
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from PIL import Image

from dkto.common.settings import checked_number
from dkto.world.painter import paint, random_finish
from dkto.world.scenes import parse
from dkto.world.truth import aesthetics


def session_pairs(
    prompts: Sequence[str],
    rounds: int,
    *,
    mistakes: float = 0.0,
    tie_width: float = 0.0,
    seed: int = 0,
    measure: Callable[[np.ndarray], float] = aesthetics,
) -> pd.DataFrame:
    """One session per prompt of a user who prefers the picture with the higher measure.

    Args:
        prompts: prompts of the small world, each the subject of one session.
        rounds: comparisons in a session, which shows `rounds + 1` pictures.
        mistakes: chance that a verdict is the wrong way round, in [0, 0.5].
        tie_width: two pictures whose measures are closer than this are a tie; after one, either stays.
        seed: of pictures and verdicts.
        measure: of a (64, 64, 3) uint8 picture.

    Returns:
        One row per comparison: jpg_0, jpg_1 (PNG bytes), label_0, label_1, caption, image_0_uid, image_1_uid,
        has_label.

    Raises:
        ValueError: if a number is out of its range or a prompt is none of the small world.
    """
    rounds = checked_number("rounds", rounds, least=1)
    mistakes = checked_number("mistakes", mistakes, float, least=0, most=0.5)
    rng = np.random.default_rng(seed)
    rows = []
    for number, prompt in enumerate(prompts):
        scene = parse(prompt)
        on_screen = [_picture(scene, rng, f"{number:05d}-{place}", measure) for place in range(2)]
        for place in range(2, rounds + 2):
            gap = on_screen[0][2] - on_screen[1][2]
            first_wins = (gap > 0) != (rng.random() < mistakes)
            label = 0.5 if abs(gap) < tie_width else float(first_wins)
            rows.append(_row(on_screen, label, prompt))
            on_screen[int(first_wins)] = _picture(scene, rng, f"{number:05d}-{place}", measure)
    return pd.DataFrame(rows)


def _picture(scene, rng: np.random.Generator, uid: str, measure: Callable) -> tuple[str, bytes, float]:
    pixels = paint(scene, random_finish(rng), rng)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return uid, buffer.getvalue(), measure(pixels)


def _row(on_screen: list, label: float, prompt: str) -> dict:
    sides = {}
    for i, (uid, data, _) in enumerate(on_screen):
        sides |= {f"jpg_{i}": data, f"image_{i}_uid": uid, f"label_{i}": label if i == 0 else 1 - label}
    return sides | {"caption": prompt, "has_label": True}
