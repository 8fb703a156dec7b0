"""Paint scenes as 64 x 64 RGB images from signed distance functions (about 1 ms each).

An image has a *style* that the caption names (icon, toy, sticker, painting) and a *finish* that it
does not: saturation, exposure, haze and blur, as images on the web differ. The finish is the
headroom that aesthetic feedback can win.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import gaussian_filter, zoom

from dkto.world.scenes import BACKGROUNDS, COLOURS, PAIR_SIZE, SIZES, Scene, Thing

IMAGE_SIZE = 64  # pixels
DARK = 70.0  # mean of R, G and B, 0..255, below which a background takes a light outline


@dataclass(frozen=True)
class Finish:
    """How an image was 'processed', the uncaptioned, aesthetic side of it; as painted by default."""

    saturation: float = 1.0  # factor on chroma
    exposure: float = 1.0  # factor on brightness
    haze: float = 0.0  # share of a light grey veil
    blur: float = 0.0  # standard deviation in pixels
    contrast: float = 1.0  # factor on the distance from mid-grey
    outline: float = 0.0  # width in pixels of a dark line around things (light on a dark background)


BRILLIANT_FINISH = Finish(saturation=1.2, contrast=1.2, outline=1.5)
"""Finer than anything the small model was trained on, as images of larger models are beside those of SD v1.5."""
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


def _star(points: int, outer: float, inner: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a star, the first point at the top: one edge, seen from the sector that it bounds."""
    sector = np.pi / points
    angle, reach = np.arctan2(x, -y), np.hypot(x, y)
    angle = np.abs((angle + sector) % (2 * sector) - sector)  # 0 towards a point, `sector` towards a notch
    along, across = reach * np.cos(angle) - outer, reach * np.sin(angle)
    ex, ey = inner * np.cos(sector) - outer, inner * np.sin(sector)
    place = np.clip((along * ex + across * ey) / (ex * ex + ey * ey), 0, 1)
    distance = np.hypot(along - place * ex, across - place * ey)
    return np.where(along * ey < across * ex, -distance, distance)


def _box(half_width: float, half_height: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    qx, qy = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0)


def shape_distance(shape: str, radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance in pixels to a shape centred at the origin (y points down), negative inside."""
    match shape:
        case "circle":
            return np.hypot(x, y) - radius
        case "square":
            return _box(0.88 * radius, 0.88 * radius, x, y)
        case "triangle":
            return _star(3, 1.15 * radius, 0.575 * radius, x, y - 0.2 * radius)
        case "star":
            return _star(5, 1.12 * radius, 0.504 * radius, x, y)
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


@dataclass(frozen=True)
class Place:
    """Where a thing stands and how: its centre and radius in pixels (y points down), its tilt in radians."""

    x: float
    y: float
    radius: float
    tilt: float


@dataclass(frozen=True)
class Texture:
    """What a brush leaves, for the style *painting*: (64, 64) fields, one of colour for each thing."""

    wobble: np.ndarray | float = 0.0  # pixels that the rims are moved by
    ground: np.ndarray | float = 1.0  # factor on the background
    things: tuple[np.ndarray | float, ...] = (1.0, 1.0)  # factors on the things' colours


GRID = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] + 0.5  # (2, 64, 64): y and x of the pixels' centres


def distance_to(thing: Thing, place: Place, grid: np.ndarray = GRID) -> np.ndarray:
    """Signed distance in pixels of a (2, H, W) grid's points to a thing's rim, negative inside."""
    y, x = grid
    dx, dy = x - place.x, y - place.y
    c, s = np.cos(place.tilt), np.sin(place.tilt)
    return shape_distance(thing.shape, place.radius, c * dx + s * dy, c * dy - s * dx)


def compose(
    scene: Scene,
    places: Sequence[Place],
    *,
    ground: Sequence[float] | None = None,
    colours: Sequence[Sequence[float]] | None = None,
    texture: Texture = Texture(),
    outline: float = 0.0,
    grid: np.ndarray = GRID,
) -> np.ndarray:
    """The ideal image of a scene with its things at given places, before any finish.

    Args:
        scene: what is shown.
        places: of its things.
        ground, colours: RGB, 0..255, of the background and of each thing; as the scene names them if left out.
        texture: of the brush.
        outline: see `Finish`.
        grid: (2, H, W) the points that are painted: y, then x.

    Returns:
        (H, W, 3) float64, 0..255.
    """
    ground = np.float64(BACKGROUNDS[scene.background] if ground is None else ground)
    canvas = np.broadcast_to(ground, (*grid.shape[1:], 3)) * np.asarray(texture.ground)[..., None]
    for number, (thing, place) in enumerate(zip(scene.things, places, strict=True)):
        colour = np.float64(COLOURS[thing.colour] if colours is None else colours[number])
        distance = distance_to(thing, place, grid) + texture.wobble
        cover = np.clip(0.5 - distance, 0, 1)
        if scene.style == "toy":
            shadow = np.roll(cover, (2, 2), (0, 1))
            canvas = _over(canvas, np.zeros(3), 0.5 * gaussian_filter(shadow, 1.2))
            shade = 1.0 - 0.22 * (grid[1] - place.x + grid[0] - place.y) / place.radius
            colour = np.clip(colour * shade[..., None] + 22 * np.maximum(shade - 1, 0)[..., None], 0, 255)
        elif scene.style == "sticker":
            canvas = _over(canvas, np.full(3, 252.0), np.clip(2.8 - distance, 0, 1))
        elif scene.style == "painting":
            colour = colour * np.asarray(texture.things[number])[..., None]
        if outline > 0:
            line = np.full(3, 255.0 if np.mean(BACKGROUNDS[scene.background]) < DARK else 0.0)
            canvas = _over(canvas, line, np.clip(0.5 + outline - distance, 0, 1))
        canvas = _over(canvas, colour, cover)
    return canvas


def paint(scene: Scene, finish: Finish, rng: np.random.Generator) -> np.ndarray:
    """Paint a scene as (64, 64, 3) uint8; place, size within its range and tilt are drawn from `rng`."""
    radii = [rng.uniform(*SIZES.get(thing.size, PAIR_SIZE)) / 2 for thing in scene.things]
    painted, texture = scene.style == "painting", Texture()
    if painted:
        texture = Texture(0.8 * _smooth_noise(rng), 1 + 0.06 * _smooth_noise(rng))
    places, fields = [], []
    for radius, (x, y) in zip(radii, _centres(scene, radii, rng), strict=True):
        places.append(Place(x, y, radius, rng.uniform(-0.17, 0.17)))
        if painted:
            fields.append(1 + 0.10 * _smooth_noise(rng))
    if painted:
        texture = replace(texture, things=tuple(fields))
    return apply_finish(compose(scene, places, texture=texture, outline=finish.outline), finish)


def apply_finish(canvas: np.ndarray, finish: Finish) -> np.ndarray:
    """Saturation, exposure, haze, contrast and blur on an (H, W, 3) image in 0..255; returns uint8."""
    luma = canvas @ np.array([0.299, 0.587, 0.114])
    canvas = luma[..., None] + finish.saturation * (canvas - luma[..., None])
    canvas = finish.exposure * canvas
    canvas = canvas + finish.haze * (170.0 - canvas)
    if finish.contrast != 1:
        canvas = 128.0 + finish.contrast * (canvas - 128.0)
    if finish.blur > 0:
        canvas = gaussian_filter(canvas, (finish.blur, finish.blur, 0))
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
