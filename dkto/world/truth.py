"""Exact judgement of small-world pictures: does it show what the prompt says, how beautiful is it, how red.

Every rule is stated here and works on pixels alone; no learned model judges anything.

- *colour*: the share of named things found as a connected patch of their colour's hue;
- *shape*: the share of named things whose patch overlaps its own shape's template best;
- *relation*: whether the first thing lies where the prompt says, relative to the second;
- *background*: whether the picture's border is nearest to the named background;
- *fidelity*: the mean of the parts that the prompt has, in [0, 1].
"""

from functools import cache

import numpy as np
from scipy.ndimage import label

from dkto.world.painter import IMAGE_SIZE, shape_distance
from dkto.world.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, parse

RULES_VERSION = 1  # one more whenever a rule gives another number: stored scores are then computed again
MIN_AREA = 70  # pixels of a patch that counts as a thing
CLEAR = 45.0  # difference of a channel from the border above which a pixel stands out
MIN_CHROMA = 26.0  # chroma above which a pixel has a hue, 0..255 scale
MIN_OVERLAP = 0.6  # intersection over union below which no shape is recognised
_GRID = 32  # side of the normalised mask that is compared with the templates
_REACH = 1.15  # half side of that mask in units of sqrt(area)
_TO_CHROMA = np.array([[1.0, -0.5, -0.5], [0.0, 3**0.5 / 2, -(3**0.5) / 2]]).T


def _chroma(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) RGB to the plane of hue and chroma, as complex numbers."""
    plane = rgb @ _TO_CHROMA
    return plane[..., 0] + 1j * plane[..., 1]


_HUES = np.array([_chroma(np.float64(rgb)) for rgb in COLOURS.values()])
_HUES = _HUES / np.abs(_HUES)


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Shape templates, tilted and normalised as `_normalised` does: (M, GRID * GRID) bool and their shape index."""
    masks, owners = [], []
    y, x = np.mgrid[0:128, 0:128] - 63.5
    for index, shape in enumerate(SHAPES):
        for tilt in np.linspace(-0.2, 0.2, 5):
            u, v = np.cos(tilt) * x + np.sin(tilt) * y, np.cos(tilt) * y - np.sin(tilt) * x
            masks.append(_normalised(shape_distance(shape, 40.0, u, v) < 0).ravel())
            owners.append(index)
    return np.array(masks), np.array(owners)


def _normalised(mask: np.ndarray) -> np.ndarray:
    """Resample a patch to a fixed grid by its centroid and area."""
    rows, columns = np.nonzero(mask)
    reach = _REACH * np.sqrt(len(rows))
    offsets = (np.arange(_GRID) + 0.5) / _GRID * 2 - 1
    r = np.rint(rows.mean() + reach * offsets).astype(int)
    c = np.rint(columns.mean() + reach * offsets).astype(int)
    inside = ((r >= 0) & (r < mask.shape[0]))[:, None] & ((c >= 0) & (c < mask.shape[1]))[None]
    return inside & mask[np.clip(r, 0, mask.shape[0] - 1)][:, np.clip(c, 0, mask.shape[1] - 1)]


def recognise_shape(mask: np.ndarray) -> str | None:
    """The shape whose template overlaps the patch best, or None below `MIN_OVERLAP`."""
    masks, owners = _templates()
    found = _normalised(mask).ravel()
    intersection = (masks & found).sum(1)
    overlap = intersection / np.maximum((masks | found).sum(1), 1)
    best = int(overlap.argmax())
    return SHAPES[owners[best]] if overlap[best] >= MIN_OVERLAP else None


def check_image(image: np.ndarray) -> np.ndarray:
    """The image, which must be (64, 64, 3) uint8; a ValueError says what came."""
    image = np.asarray(image)
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"image must be uint8 of shape ({IMAGE_SIZE}, {IMAGE_SIZE}, 3), got {image.dtype} of shape {image.shape}"
        )
    return image


def border_colour(image: np.ndarray) -> np.ndarray:
    """Median RGB of the two-pixel border."""
    sides = (image[:2], image[-2:], image[2:-2, :2], image[2:-2, -2:])
    return np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0)


def hue_of(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place in `COLOURS` of the hue nearest to each pixel, and its chroma, 0..255, of (..., 3) RGB."""
    chroma = _chroma(pixels)
    return np.argmax(np.real(chroma[..., None] * _HUES.conj()), axis=-1), np.abs(chroma)


def patch_of(image: np.ndarray, thing: Thing, background: np.ndarray) -> np.ndarray | None:
    """Largest connected patch of the thing's hue that differs from the background, or None."""
    nearest, chroma = hue_of(image)
    away = np.abs(image - background).max(-1) > 36
    wanted = away & (chroma > MIN_CHROMA) & (nearest == list(COLOURS).index(thing.colour))
    labels, count = label(wanted)
    if count == 0:
        return None
    areas = np.bincount(labels.ravel())[1:]
    return labels == areas.argmax() + 1 if areas.max() >= MIN_AREA else None


def _holds(relation: str, first: np.ndarray, second: np.ndarray) -> bool:
    (y1, x1), (y2, x2) = (np.argwhere(m).mean(0) for m in (first, second))
    dx, dy = x2 - x1, y2 - y1
    return {"left of": dx > abs(dy), "above": dy > abs(dx)}[relation]


def judge(image: np.ndarray, prompt: str | Scene) -> dict[str, float]:
    """Compare one picture with its prompt.

    Args:
        image: (64, 64, 3) uint8 RGB.
        prompt: a caption of the world, or its scene.

    Returns:
        `colour`, `shape`, `background`, `fidelity`, each in [0, 1], and `relation` for a pair
        (absent for a lone thing).

    Raises:
        ValueError: if the picture has another size, or the prompt is not of this world.
    """
    pixels = check_image(image).astype(np.float64)
    scene = parse(prompt) if isinstance(prompt, str) else prompt
    border = border_colour(pixels)
    patches = [patch_of(pixels, thing, border) for thing in scene.things]
    shapes = [p is not None and recognise_shape(p) == t.shape for p, t in zip(patches, scene.things, strict=True)]
    parts = {
        "colour": float(np.mean([p is not None for p in patches])),
        "shape": float(np.mean(shapes)),
        "background": float(nearest_background(border) == scene.background),
    }
    if scene.relation:
        parts["relation"] = float(all(p is not None for p in patches) and _holds(scene.relation, *patches))
    return {**parts, "fidelity": float(np.mean(list(parts.values())))}


def stands_out(pixels: np.ndarray, border: np.ndarray) -> np.ndarray:
    """(H, W) bool: where an RGB image differs clearly from its border's colour."""
    return np.abs(pixels - border).max(-1) > CLEAR


def nearest_background(border: np.ndarray) -> str:
    """The name in `BACKGROUNDS` nearest to a border's RGB; chroma counts double, since exposure and haze shift light.

    >>> nearest_background(np.array([30.0, 40.0, 100.0]))
    'navy'
    """
    palette = np.float64(list(BACKGROUNDS.values()))
    chroma = np.abs(_chroma(palette) - _chroma(border))
    luma = np.abs((palette - border).mean(-1))
    return list(BACKGROUNDS)[int(np.argmin(luma + 2 * chroma))]


def aesthetics(image: np.ndarray) -> float:
    """How vivid, contrasty and sharp a picture is, in [0, 1]; each part is capped, so more is not always better.

    - *vividness*: 95th percentile of chroma over 150;
    - *contrast*: 98th minus 2nd percentile of brightness over 130;
    - *sharpness*: 98th percentile of the brightness step between neighbours over 60.

    Args:
        image: (H, W, 3) uint8 RGB.
    """
    pixels = np.asarray(image, dtype=np.float64)
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    low, high = np.percentile(luma, [2, 98])
    steps = np.maximum(np.abs(np.diff(luma, axis=0))[:, :-1], np.abs(np.diff(luma, axis=1))[:-1])
    vividness = np.percentile(np.abs(_chroma(pixels)), 95) / 150
    parts = (vividness, (high - low) / 130, np.percentile(steps, 98) / 60)
    return float(np.mean(np.minimum(parts, 1.0)))


def redness(image: np.ndarray) -> float:
    """Mean over pixels of red minus half of green and blue, in [-1, 1].

    >>> redness(np.full((4, 4, 3), [255, 0, 0], dtype=np.uint8))
    1.0
    """
    red, green, blue = (np.asarray(image, dtype=np.float64)[..., channel].mean() for channel in range(3))
    return float((red - (green + blue) / 2) / 255)
