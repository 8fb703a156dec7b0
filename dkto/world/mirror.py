"""What liked images have in common and disliked ones do not: words of their prompts, and what their pixels show."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from PIL import Image
from scipy.stats import fisher_exact

from dkto.common.pixels import to_rgb
from dkto.world.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, STYLES
from dkto.world.truth import MIN_CHROMA, border_colour, hue_of, nearest_background, stands_out

WORDS = {"style": STYLES, "colour": COLOURS, "shape": SHAPES, "size": SIZES, "background": BACKGROUNDS}
SURE = 0.05  # chance that a mirror names a trait although there is no taste
_SIDE = 64  # pixels of the copy that is looked at
_LITTLE = 0.02  # share of the image from which a hue counts as seen
_LARGE = 0.17  # share of the image that a large thing covers
_SHORT = 4  # letters of a word that says something, in prompts of another world


def traits(image: Image.Image, prompt: str) -> set[str]:
    """The traits of one image, such as "shape star": by its prompt, and by its pixels where the prompt says nothing.

    Colours and sizes are those of what stands out from the border. A prompt without a word of the small world gives
    its long words.

    >>> sorted(traits(Image.new("RGB", (64, 64), (20, 20, 20)), "a toy of a large red star"))
    ['background black, seen', 'colour red', 'shape star', 'size large', 'style toy']
    """
    words = [word.strip(".,;:!?\"'()").lower() for word in prompt.split()]
    found = {f"{kind} {word}" for kind, known in WORDS.items() for word in words if word in known}
    if not found:
        found = {f"word {word}" for word in words if len(word) >= _SHORT}
    return found | {f"{kind} {value}, seen" for kind, value in _seen(image).items() if not _names(found, kind)}


def _names(found: Iterable[str], kind: str) -> bool:
    return any(trait.startswith(f"{kind} ") for trait in found)


def _seen(image: Image.Image) -> dict[str, str]:
    pixels = np.asarray(to_rgb(image).resize((_SIDE, _SIDE)), dtype=np.float64)
    border = border_colour(pixels)
    hue, chroma = hue_of(pixels)
    standing = stands_out(pixels, border)
    counts = np.bincount(hue[standing & (chroma > MIN_CHROMA)], minlength=len(COLOURS)) / hue.size
    found = {"background": nearest_background(border)}
    if standing.mean() > _LITTLE:
        found["size"] = "large" if standing.mean() > _LARGE else "small"
    if counts.max() > _LITTLE:
        found["colour"] = list(COLOURS)[int(counts.argmax())]
    return found


def taste_mirror(traits_of: Sequence[set[str]], is_desirable: Sequence[bool]) -> pd.DataFrame:
    """How many liked and how many disliked images have each trait; what parts them most comes first.

    Args:
        traits_of: the traits of each image, see `traits`.
        is_desirable: whether it was liked.

    Returns:
        A row for each trait: liked, disliked (counts), of_liked, of_disliked (all of them), p (Fisher's exact test).
    """
    groups = [
        [t for t, liked in zip(traits_of, is_desirable, strict=True) if bool(liked) is side] for side in (True, False)
    ]
    all_of = [len(group) for group in groups]
    rows = {}
    for trait in sorted(set().union(*traits_of)):
        have = [sum(trait in each for each in group) for group in groups]
        p = fisher_exact([have, [n - k for n, k in zip(all_of, have, strict=True)]]).pvalue if all(all_of) else 1.0
        rows[trait] = [*have, *all_of, p]
    columns = ["liked", "disliked", "of_liked", "of_disliked", "p"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).sort_values("p", kind="stable")


def mirror_sentences(mirror: pd.DataFrame, most: int = 3) -> list[str]:
    """The traits that part liked from disliked images by more than chance, at most so many, a sentence each.

    With n traits, `SURE / n` is asked of each (Bonferroni): without a taste one in twenty mirrors names anything.
    """
    return [
        f"{trait}: {row.liked:.0f} of {row.of_liked:.0f} liked, {row.disliked:.0f} of {row.of_disliked:.0f} disliked"
        for trait, row in mirror[mirror["p"] < SURE / max(1, len(mirror))].head(most).iterrows()
    ]
