"""How well an image is made: its distance from the nearest ideal image of what its prompt asks; continuous, in (0, 1].

Each named thing is found by its hue, and its place, radius and tilt are fitted. The scene is composed again with that
geometry, by the painter's own `compose`, and the image is compared with this ideal in seven parts. Each has a measure x
that is 0 at the ideal:

- *colour*: CIELAB distance of each thing's mean colour from that of the ideal;
- *background*: CIELAB distance of the background's median from the named one;
- *clean*: CIELAB spread (root mean square) of the background around its median: blotches, things too many;
- *fill*: the same inside the things, around the ideal's shading;
- *edge*: root mean square error within 2 pixels of the rims (4 for stickers), in units of the contrast there;
- *shape*: 1 - intersection over union of each thing and its fitted template;
- *layout*: angle off the relation's axis, sizes out of range, things that touch each other or leave the frame.

A part is exp(-x / scale), and never below exp(-4); craft is the weighted geometric mean of the parts. Every part is
best at the ideal and not beyond it, so no filter and no guidance scale can push it further. A painting has a brush's
texture: there clean, fill, edge and shape count their distance from what painted ideals have.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_dilation

from dkto.world.painter import GRID, IMAGE_SIZE, Place, compose, distance_to, shape_distance
from dkto.world.scenes import BACKGROUNDS, COLOURS, PAIR_SIZE, SIZES, Scene, Thing, parse
from dkto.world.truth import border_colour, check_image, patch_of

CRAFT_VERSION = 1  # one more whenever a part gives another number; one taste alone has its own, in the scorers
SCALES = {"colour": 12.0, "background": 9.0, "clean": 4.0, "fill": 6.0, "edge": 0.16, "shape": 0.08, "layout": 1.0}
WEIGHTS = {"colour": 2.0, "background": 1.5, "clean": 2.0, "fill": 1.0, "edge": 1.5, "shape": 1.5, "layout": 1.5}
DEEPEST = 4.0  # x / scale at which a part stops falling; what is missing counts as much
PAINTED = {"clean": 2.17, "fill": 5.04, "edge": 0.265, "shape": 0.091}
"""Medians of x over painted ideals in the style *painting*; `tests/world/test_craft.py` measures them."""
_AREA = {
    "circle": np.pi,
    "square": 1.76**2,
    "triangle": 1.15**2 * 3 * 3**0.5 / 4,
    "star": 1.12**2 * 0.45 * 10 * np.sin(np.pi / 5) / 2,
    "ring": np.pi * (1 - 0.48**2),
    "cross": 4 * 0.66 - 0.66**2,
}  # of each shape, in units of its radius squared
_ROUND = ("circle", "ring")  # shapes without a tilt
_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_TO_XYZ = (_TO_XYZ / np.array([[0.9505], [1.0], [1.089]])).T
_LEVELS = np.arange(4 * 255 + 1) / (4 * 255)
_LINEAR = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4)


@dataclass(frozen=True)
class Reading:
    """What the judge saw in one image."""

    parts: dict[str, float]  # each in (0, 1], 1 at the ideal
    craft: float  # their weighted geometric mean
    ideal: np.ndarray  # (64, 64, 3) uint8, the image that it was compared with; without the things not found
    places: tuple[Place | None, ...]  # fitted, one a thing; None where none was found


def read_craft(image: np.ndarray, prompt: str | Scene) -> Reading:
    """Compare one image with the ideal image of its prompt.

    Args:
        image: (64, 64, 3) uint8 RGB.
        prompt: a caption of the world, or its scene.

    Raises:
        ValueError: if the image has another size, or the prompt is not of this world.

    >>> scene = parse("an icon of a large red star on a navy background")
    >>> ideal = np.rint(compose(scene, [Place(32, 32, 18, 0.1)])).astype(np.uint8)
    >>> round(read_craft(ideal, scene).craft, 2)
    0.99
    """
    pixels = check_image(image).astype(np.float64)
    scene = parse(prompt) if isinstance(prompt, str) else prompt
    covers, places = _find(pixels, scene)
    seen = [n for n, place in enumerate(places) if place is not None]
    shown = Scene(scene.style, tuple(scene.things[n] for n in seen), scene.relation, scene.background)
    found = [places[n] for n in seen]
    distances = [distance_to(thing, place) for thing, place in zip(shown.things, found, strict=True)]
    ideal = compose(shown, found)
    x = _ground(pixels, scene, distances)
    rows = [
        _thing(pixels, ideal, shown, found, distances, covers[n], number, x["median"]) for number, n in enumerate(seen)
    ]
    rows = [row for row in rows if row is not None]
    missing = len(scene.things) - len(rows)
    for part in ("colour", "fill", "edge", "shape"):
        lost = [DEEPEST * SCALES[part]] * missing
        x[part] = float(np.mean([row[part] for row in rows] + lost))
    x["layout"] = sum(row["layout"] for row in rows) + DEEPEST * missing
    if scene.relation and not missing:
        x["layout"] += _relation(scene.relation, *found, *distances)
    if scene.style == "painting":
        x |= {part: abs(x[part] - usual) for part, usual in PAINTED.items()}
    logs = {part: -min(x[part] / scale, DEEPEST) for part, scale in SCALES.items()}
    mean = sum(WEIGHTS[part] * value for part, value in logs.items()) / sum(WEIGHTS.values())
    parts = {part: float(np.exp(value)) for part, value in logs.items()}
    return Reading(parts, float(np.exp(mean)), np.rint(ideal).astype(np.uint8), tuple(places))


def craft(image: np.ndarray, prompt: str | Scene) -> float:
    """How well an image is made, in (0, 1]; see `read_craft`."""
    return read_craft(image, prompt).craft


def background_spread(image: np.ndarray, scene: Scene) -> float:
    """CIELAB spread (root mean square) of an image's background around its median; things and rims are left out."""
    pixels = check_image(image).astype(np.float64)
    things = zip(scene.things, _find(pixels, scene)[1], strict=True)
    return _ground(pixels, scene, [distance_to(thing, place) for thing, place in things if place is not None])["clean"]


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) sRGB, 0..255, as CIELAB under D65; levels are rounded to quarters.

    >>> to_lab(np.array([[0, 0, 0], [255, 255, 255]])).round().tolist()
    [[0.0, 0.0, 0.0], [100.0, 0.0, 0.0]]
    """
    levels = np.rint(4 * np.clip(rgb, 0, 255)).astype(np.intp)
    t = _LINEAR[levels] @ _TO_XYZ
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def _find(pixels: np.ndarray, scene: Scene) -> tuple[list[tuple | None], list[Place | None]]:
    """Each thing's cover in its window, and the place fitted to it; None where no patch has its hue."""
    border = border_colour(pixels)
    around = np.full(3, 252.0) if scene.style == "sticker" else border
    patches = [patch_of(pixels, thing, border) for thing in scene.things]
    covers = [None if patch is None else _cover(pixels, patch, around) for patch in patches]
    return covers, [None if c is None else _fit(t.shape, *c) for t, c in zip(scene.things, covers, strict=True)]


def _window(rows: np.ndarray, columns: np.ndarray, margin: int) -> tuple[slice, slice]:
    """The part of an image that holds these pixels and a margin around them."""
    low = [max(int(axis.min()) - margin, 0) for axis in (rows, columns)]
    return tuple(slice(a, int(axis.max()) + margin + 1) for a, axis in zip(low, (rows, columns), strict=True))


def _cover(pixels: np.ndarray, patch: np.ndarray, around: np.ndarray) -> tuple[np.ndarray, tuple[slice, slice]]:
    """How far each pixel is covered by a thing, 0..1, in a window around its patch: between two colours."""
    window = _window(*np.nonzero(patch), 4)
    pixels, patch = pixels[window], patch[window]
    inside = np.median(pixels[patch], axis=0)
    a, b = np.abs(pixels - around).sum(-1), np.abs(pixels - inside).sum(-1)
    return np.where(binary_dilation(patch), np.clip(1.3 * a / (a + b + 1e-9) - 0.15, 0, 1), 0), window


def _fit(shape: str, cover: np.ndarray, window: tuple[slice, slice]) -> Place:
    """The place whose cover is nearest to the one seen: Gauss-Newton, from the centroid and the area."""
    y, x = GRID[:, *window].astype(np.float32)  # a fit needs no more, and takes half as long
    cover = cover.astype(np.float32)
    mass = max(cover.sum(), 1.0)
    free = 3 if shape in _ROUND else 4
    steps = np.diag([0.4, 0.4, 0.4, 0.05])[:free]

    def covers(places: np.ndarray) -> np.ndarray:
        cx, cy, radius, tilt = np.moveaxis(places.astype(np.float32), -1, 0)[..., None, None]
        c, s = np.cos(tilt), np.sin(tilt)
        dx, dy = x - cx, y - cy
        return np.clip(0.5 - shape_distance(shape, radius, c * dx + s * dy, c * dy - s * dx), 0, 1)

    def errors(covered: np.ndarray) -> np.ndarray:
        return ((covered - cover) ** 2).sum((-2, -1))

    tilts = [0.0] if shape in _ROUND else [-0.14, 0.0, 0.14]
    start = [(cover * x).sum() / mass, (cover * y).sum() / mass, (mass / _AREA[shape]) ** 0.5]
    if shape == "triangle":  # it hangs a fifth of its radius below its centre
        start[1] -= 0.2 * start[2]
    tried = np.array([[*start, tilt] for tilt in tilts])
    best = here = tried[errors(covers(tried)).argmin()]
    error = np.inf
    for _ in range(6):
        around = covers(np.concatenate([here[None], here + steps, here - steps]))
        before, now = error, errors(around[0])
        if now >= before:
            break
        best, error = here, now
        if before - now < 1e-3:
            break
        slopes = ((around[1 : free + 1] - around[free + 1 :]) / (2 * steps.max(1))[:, None, None]).reshape(free, -1)
        move = np.linalg.solve(slopes @ slopes.T + 1e-3 * np.eye(free), slopes @ (cover - around[0]).ravel())
        here = best + np.pad(np.clip(move, -2, 2), (0, 4 - free))
        here[2:] = max(here[2], 2.0), np.clip(here[3], -0.3, 0.3)
    return Place(*(float(value) for value in best))


def _ground(pixels: np.ndarray, scene: Scene, distances: list[np.ndarray]) -> dict:
    """x of background and clean; the background's median colour is handed on."""
    free = np.ones((IMAGE_SIZE, IMAGE_SIZE), bool)
    for distance in distances:
        free &= distance > (5.0 if scene.style == "sticker" else 3.0)
        if scene.style == "toy":  # its shadow lies two pixels down and to the right
            free &= np.roll(distance, (2, 2), (0, 1)) > 4.0
    ground = pixels[free] if free.sum() > 50 else pixels.reshape(-1, 3)
    seen = to_lab(ground)
    median = np.median(seen, axis=0)
    far = np.linalg.norm(median - to_lab(np.float64(BACKGROUNDS[scene.background])))
    spread = float(np.sqrt(((seen - median) ** 2).sum(-1).mean()))
    return {"background": float(far), "clean": spread, "median": np.median(ground, axis=0)}


def _thing(
    pixels: np.ndarray,
    ideal: np.ndarray,
    scene: Scene,
    places: list[Place],
    distances: list[np.ndarray],
    cover: tuple[np.ndarray, tuple[slice, slice]],
    number: int,
    ground: np.ndarray,
) -> dict[str, float] | None:
    """x of one thing's colour, fill, edge, shape and layout; None if nearly nothing of it is in the image."""
    thing, place, distance = scene.things[number], places[number], distances[number]
    window = _window(*np.nonzero(distance < 8), 0) if (distance < 8).any() else (slice(0, 0), slice(0, 0))
    pixels, ideal, distance = pixels[window], ideal[window], distance[window]
    inside = distance < -1.5
    if inside.sum() < 20:
        return None
    rest = to_lab(pixels[inside]) - to_lab(ideal[inside])
    seen = np.zeros((IMAGE_SIZE, IMAGE_SIZE))
    seen[cover[1]] = cover[0]
    free = np.ones(distance.shape, bool)
    for other in distances[number + 1 :]:
        free &= other[window] >= 3.5
    a, b = (seen[window] > 0.5) & free, (distance < 0) & free
    own = _own_colour(pixels[inside], ideal[inside], scene.style, thing)
    alone = Scene(scene.style, (thing,), "", scene.background)
    drawn = compose(alone, [place], ground=ground, colours=[own], grid=GRID[:, *window])
    rim = (np.abs(distance) <= (4.0 if scene.style == "sticker" else 2.0)) & free
    outside = (distance > 4.5) & (distance < 8)
    contrast = np.abs(drawn[inside].mean(0) - (drawn[outside].mean(0) if outside.any() else ground)).mean()
    error = np.sqrt(((pixels - drawn)[rim] ** 2).mean()) if rim.any() else 0.0
    return {
        "colour": float(np.linalg.norm(rest.mean(0))),
        "fill": float(np.sqrt(((rest - rest.mean(0)) ** 2).sum(-1).mean())),
        "edge": float(error / max(contrast, 25.0)),
        "shape": float(1 - (a & b).sum() / max((a | b).sum(), 1)),
        "layout": _size(thing, place),
    }


def _own_colour(pixels: np.ndarray, ideal: np.ndarray, style: str, thing: Thing) -> np.ndarray:
    """The colour that a thing has in this image, before shading."""
    if style != "toy":
        return np.median(pixels, axis=0)
    return COLOURS[thing.colour] * np.clip(pixels.mean(0) / np.maximum(ideal.mean(0), 1), 0.4, 1.6)


def _size(thing: Thing, place: Place) -> float:
    """Pixels of the radius out of the size's range / 1.5 + pixels that leave the frame / 3."""
    low, high = SIZES.get(thing.size, PAIR_SIZE)
    wrong = max(low / 2 - place.radius, place.radius - high / 2, 0)
    edges = (place.x, place.y, IMAGE_SIZE - place.x, IMAGE_SIZE - place.y)
    return wrong / 1.5 + max(0.0, 1 + place.radius - min(edges)) / 3


def _relation(relation: str, first: Place, second: Place, to_first: np.ndarray, to_second: np.ndarray) -> float:
    """Degrees beyond 35 off the relation's axis / 10 + pixels by which the things touch / 3."""
    dx, dy = second.x - first.x, second.y - first.y
    along, across = (dx, abs(dy)) if relation == "left of" else (dy, abs(dx))
    angle = np.degrees(np.arctan2(across, along))  # 0 on the axis, 180 the wrong way round
    gap = np.where(to_first < 0, to_second, np.inf).min()
    return float(max(0.0, angle - 35) / 10 + max(0.0, 1 - gap) / 3)
