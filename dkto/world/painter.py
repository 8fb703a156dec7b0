"""Paint scenes as 64 x 64 RGB pictures from signed distance functions (about 1 ms each).

A picture has a *style* that the caption names (icon, toy, sticker, painting) and a *finish* that it
does not: saturation, exposure, haze and blur, as pictures on the web differ. The finish is the
headroom that aesthetic feedback can win.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter, zoom

from dkto.world.scenes import BACKGROUNDS, COLOURS, SIZES, Scene

IMAGE_SIZE = 64  # pixels
DARK = 70.0  # mean of R, G and B, 0..255, below which a background takes a light outline


@dataclass(frozen=True)
class Finish:
    """How a picture was 'processed', the uncaptioned, aesthetic side of it; as painted by default."""

    saturation: float = 1.0  # factor on chroma
    exposure: float = 1.0  # factor on brightness
    haze: float = 0.0  # share of a light grey veil
    blur: float = 0.0  # standard deviation in pixels
    contrast: float = 1.0  # factor on the distance from mid-grey
    outline: float = 0.0  # width in pixels of a dark line around things (light on a dark background)


BRILLIANT_FINISH = Finish(saturation=1.2, contrast=1.2, outline=1.5)
"""Finer than anything the small model was trained on, as pictures of larger models are beside those of SD v1.5."""
GOOD_FINISH = Finish()
BAD_FINISH = Finish(saturation=0.55, exposure=0.8, haze=0.35, blur=0.9)


def random_finish(rng: np.random.Generator) -> Finish:
    """A finish as found on the web: anything between good and bad, often in between."""
    return Finish(
        saturation=float(rng.uniform(0.65, 1.08)),
        exposure=float(rng.uniform(0.82, 1.06)),
        haze=float(rng.uniform(0, 0.3) * (rng.random() < 0.5)),
        blur=float(rng.uniform(0, 0.8) * (rng.random() < 0.5)),
    )


def _polygon(points: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a closed polygon, negative inside (even-odd rule)."""
    distance = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        distance = np.minimum(distance, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ex * (y - ay) / ey + ax)
    return np.where(inside, -1, 1) * np.sqrt(distance)


def _box(half_width: float, half_height: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    qx, qy = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0)


def _corners(reach: np.ndarray) -> np.ndarray:
    """Points at these distances from the origin, at equal angles, the first one at the top."""
    angle = -np.pi / 2 + np.arange(len(reach)) * 2 * np.pi / len(reach)
    return np.stack([reach * np.cos(angle), reach * np.sin(angle)], 1)


def shape_distance(shape: str, radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance in pixels to a shape centred at the origin (y points down), negative inside."""
    match shape:
        case "circle":
            return np.hypot(x, y) - radius
        case "square":
            return _box(0.88 * radius, 0.88 * radius, x, y)
        case "triangle":
            return _polygon(_corners(np.full(3, 1.15 * radius)), x, y - 0.2 * radius)
        case "star":
            return _polygon(_corners(np.tile([1.0, 0.45], 5) * (1.12 * radius)), x, y)
        case "ring":
            return np.abs(np.hypot(x, y) - 0.74 * radius) - 0.26 * radius
        case "cross":
            return np.minimum(_box(radius, 0.33 * radius, x, y), _box(0.33 * radius, radius, x, y))
    raise ValueError(f"unknown shape {shape!r}")


def _centres(scene: Scene, radii: list[float], rng: np.random.Generator) -> list[tuple[float, float]]:
    """Where the things stand: a lone one anywhere, a pair apart along its relation's axis."""
    low, high = 2.0, IMAGE_SIZE - 2.0
    if len(radii) == 1:
        (r,) = radii
        return [tuple(rng.uniform(low + 1.1 * r, high - 1.1 * r, 2))]
    first, second = radii
    gap = max(high - low - 2 * (first + second) - 2, 0)
    start = low + first + rng.uniform(0, 0.5) * gap
    along = (start, min(start + first + second + 2 + rng.uniform(0.3, 1) * 0.5 * gap, high - second))
    across = [rng.uniform(22 + 0.3 * r, 42 - 0.3 * r) for r in radii]
    return list(zip(along, across, strict=True) if scene.relation == "left of" else zip(across, along, strict=True))


def _smooth_noise(rng: np.random.Generator) -> np.ndarray:
    return zoom(rng.standard_normal((6, 6)), IMAGE_SIZE / 6, order=3)


def _over(canvas: np.ndarray, colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return canvas + (colour - canvas) * alpha[..., None]


def paint(scene: Scene, finish: Finish, rng: np.random.Generator) -> np.ndarray:
    """Paint a scene as (64, 64, 3) uint8; place, size within its range and tilt are drawn from `rng`."""
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] + 0.5
    ranges = [SIZES[t.size] if t.size else (23, 28) for t in scene.things]
    radii = [rng.uniform(*r) / 2 for r in ranges]
    canvas = np.broadcast_to(np.float64(BACKGROUNDS[scene.background]), (IMAGE_SIZE, IMAGE_SIZE, 3))
    painted = scene.style == "painting"
    wobble = 0.8 * _smooth_noise(rng) if painted else 0.0
    if painted:
        canvas = canvas * (1 + 0.06 * _smooth_noise(rng))[..., None]
    for thing, radius, (cx, cy) in zip(scene.things, radii, _centres(scene, radii, rng), strict=True):
        tilt = rng.uniform(-0.17, 0.17)
        dx, dy = x - cx, y - cy
        u, v = np.cos(tilt) * dx + np.sin(tilt) * dy, np.cos(tilt) * dy - np.sin(tilt) * dx
        colour = np.float64(COLOURS[thing.colour])
        distance = shape_distance(thing.shape, radius, u, v) + wobble
        cover = np.clip(0.5 - distance, 0, 1)
        if scene.style == "toy":
            shadow = np.roll(cover, (2, 2), (0, 1))
            canvas = _over(canvas, np.zeros(3), 0.5 * gaussian_filter(shadow, 1.2))
            shade = 1.0 - 0.22 * (dx + dy) / radius
            colour = np.clip(colour * shade[..., None] + 22 * np.maximum(shade - 1, 0)[..., None], 0, 255)
        elif scene.style == "sticker":
            canvas = _over(canvas, np.full(3, 252.0), np.clip(2.8 - distance, 0, 1))
        elif painted:
            colour = colour * (1 + 0.10 * _smooth_noise(rng))[..., None]
        if finish.outline > 0:
            line = np.full(3, 255.0 if np.mean(BACKGROUNDS[scene.background]) < DARK else 0.0)
            canvas = _over(canvas, line, np.clip(0.5 + finish.outline - distance, 0, 1))
        canvas = _over(canvas, colour, cover)
    return apply_finish(canvas, finish)


def apply_finish(canvas: np.ndarray, finish: Finish) -> np.ndarray:
    """Saturation, exposure, haze, contrast and blur on an (H, W, 3) picture in 0..255; returns uint8."""
    luma = canvas @ np.array([0.299, 0.587, 0.114])
    canvas = luma[..., None] + finish.saturation * (canvas - luma[..., None])
    canvas = finish.exposure * canvas
    canvas = canvas + finish.haze * (170.0 - canvas)
    if finish.contrast != 1:
        canvas = 128.0 + finish.contrast * (canvas - 128.0)
    if finish.blur > 0:
        canvas = gaussian_filter(canvas, (finish.blur, finish.blur, 0))
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
