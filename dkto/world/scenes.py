"""The small world's language: scenes, captions, and prompts kept apart by split.

A scene is one thing, or two things in a relation, in a picture style on a background.
The caption is a small grammar over it:

    "a sticker of a large red star on a navy background"
    "an icon of a green ring left of a pink cross on a white background"

`caption` writes it, `parse` reads it back (ground truth for any prompt of the world), and
`split_of` assigns every caption to training, validation or test by a hash of its text, so that
no prompt is ever in two splits.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from dkto.common.names import check_choice

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (224, 42, 42),
    "yellow": (242, 206, 44),
    "green": (48, 172, 68),
    "cyan": (52, 200, 218),
    "blue": (48, 84, 228),
    "pink": (232, 84, 196),
}
BACKGROUNDS = {
    "black": (18, 18, 20),
    "white": (240, 240, 238),
    "grey": (132, 132, 134),
    "navy": (24, 32, 92),
    "brown": (116, 78, 50),
}
STYLES = ("icon", "toy", "sticker", "painting")
SIZES = {"small": (22, 26), "large": (32, 40)}  # diameters in pixels
PAIR_SIZE = (23, 28)  # of each of two things
RELATIONS = ("left of", "above")
ATTRIBUTES = ("shape", "colour", "background", "relation", "style", "size")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Thing:
    """One object: a shape name, a colour name and, for a lone object, a size name."""

    shape: str
    colour: str
    size: str = ""


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for. `relation` places the first thing relative to the second.

    >>> scene = parse("a toy of a red star left of a blue ring on a black background")
    >>> scene.things[1].shape, scene.relation
    ('ring', 'left of')
    """

    style: str
    things: tuple[Thing, ...]
    relation: str
    background: str


def random_scene(rng: np.random.Generator, two_things: float = 0.5) -> Scene:
    """Draw a scene; with probability `two_things` it holds two things of different colours."""
    colours = [tuple(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:2]]
    shapes = [SHAPES[i] for i in rng.integers(len(SHAPES), size=2)]
    style, background = _one(rng, STYLES), _one(rng, tuple(BACKGROUNDS))
    if rng.random() < two_things:
        things = tuple(Thing(shape, colour) for shape, colour in zip(shapes, colours, strict=True))
        return Scene(style, things, _one(rng, RELATIONS), background)
    return Scene(style, (Thing(shapes[0], colours[0], _one(rng, tuple(SIZES))),), "", background)


def _one(rng: np.random.Generator, names: Sequence[str]) -> str:
    return names[rng.integers(len(names))]  # `rng.choice` makes an array of the names first, ten times the work


def changed(scene: Scene, attribute: str, rng: np.random.Generator) -> Scene | None:
    """The scene with one attribute (of `ATTRIBUTES`) another, or None where it has none such.

    A relation is broken by letting the things swap places; a size needs a lone thing. Shape and colour are the first
    thing's, and no two things get one colour.

    >>> scene = parse("an icon of a large red star on a navy background")
    >>> caption(changed(scene, "size", np.random.default_rng(0)))
    'an icon of a small red star on a navy background'

    Raises:
        ValueError: if `attribute` is unknown.
    """
    check_choice("attribute", attribute, ATTRIBUTES)
    first, *others = scene.things

    def another(known: Iterable[str], *taken: str) -> str:
        return _one(rng, [name for name in known if name not in taken])

    if attribute == "relation":
        return replace(scene, things=scene.things[::-1]) if scene.relation else None
    if attribute == "size":
        return replace(scene, things=(replace(first, size=another(SIZES, first.size)),)) if first.size else None
    if attribute == "shape":
        return replace(scene, things=(replace(first, shape=another(SHAPES, first.shape)), *others))
    if attribute == "colour":
        other = another(COLOURS, *(thing.colour for thing in scene.things))
        return replace(scene, things=(replace(first, colour=other), *others))
    if attribute == "background":
        return replace(scene, background=another(BACKGROUNDS, scene.background))
    return replace(scene, style=another(STYLES, scene.style))


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(scene: Scene) -> str:
    """The scene's full prompt (lower case, no full stop).

    >>> caption(Scene("icon", (Thing("star", "red", "large"),), "", "navy"))
    'an icon of a large red star on a navy background'
    """
    things = [_with_article(" ".join(filter(None, (t.size, t.colour, t.shape)))) for t in scene.things]
    return (
        f"{_with_article(scene.style)} of {f' {scene.relation} '.join(things)} "
        f"on {_with_article(scene.background)} background"
    )


_THING = (
    rf"an? (?:(?P<size{{i}}>{'|'.join(SIZES)}) )?"
    rf"(?P<colour{{i}}>{'|'.join(COLOURS)}) (?P<shape{{i}}>{'|'.join(SHAPES)})"
)
_PROMPT = re.compile(
    rf"an? (?P<style>{'|'.join(STYLES)}) of {_THING.format(i=0)}"
    rf"(?: (?P<relation>{'|'.join(RELATIONS)}) {_THING.format(i=1)})?"
    rf" on an? (?P<background>{'|'.join(BACKGROUNDS)}) background"
)


def parse(prompt: str) -> Scene:
    """The scene of a prompt, which must be a full caption of this world."""
    match = _PROMPT.fullmatch(prompt.strip().lower())
    if match is None:
        raise ValueError(
            f"prompt {prompt!r} is not a caption of the small world; expected for example "
            "'a sticker of a large red star on a navy background'"
        )
    found = match.groupdict()
    things = tuple(
        Thing(found[f"shape{i}"], found[f"colour{i}"], found[f"size{i}"] or "")
        for i in range(1 + bool(found["relation"]))
    )
    return Scene(found["style"], things, found["relation"] or "", found["background"])


def split_of(prompt: str) -> str:
    """The split a prompt belongs to: 80 % training, 10 % validation, 10 % test, by hash of the text.

    >>> split_of("an icon of a large red star on a navy background") in SPLITS
    True
    """
    bucket = hashlib.sha256(prompt.encode()).digest()[0] % 10
    return "train" if bucket < 8 else ("validation" if bucket == 8 else "test")


def prompts_for(
    split: str, count: int, seed: int = 0, two_things: float = 0.5, where: Callable[[Scene], bool] | None = None
) -> list[str]:
    """`count` distinct prompts of one split, the four styles in turn; with `where`, of such scenes alone, in any style.

    >>> prompts_for("test", 2)
    ['an icon of a small red cross on a white background', 'a toy of a large cyan square on a grey background']

    Raises:
        ValueError: if `split` is unknown or has fewer than `count` prompts.
    """
    check_choice("split", split, SPLITS)
    return list(_prompts_for(split, count, seed, two_things, where))


@lru_cache(maxsize=32)
def _prompts_for(
    split: str, count: int, seed: int, two_things: float, where: Callable[[Scene], bool] | None
) -> tuple[str, ...]:
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    wanted: dict[str, None] = {}
    for _ in range(200 * count + 2_000):
        if len(wanted) == count:
            return tuple(wanted)
        scene = random_scene(rng, two_things)
        fits = where(scene) if where else scene.style == STYLES[len(wanted) % len(STYLES)]
        if fits and split_of(text := caption(scene)) == split:
            wanted.setdefault(text)
    raise ValueError(f"split {split!r} has fewer than {count} prompts (found {len(wanted)})")


def open_prompts(shapes: Sequence[str] = SHAPES) -> tuple[list[str], list[str]]:
    """Prompts that name a style and a shape alone: 16 to give likes on, and 8 others to judge on.

    The model chooses colour, background and number by itself, and otherwise for each noise. `shapes` are all of them,
    in another order if wished: a third of each style's is held out, another one of each.

    >>> shown, judged = open_prompts()
    >>> len(shown), judged[0]
    (16, 'an icon of a circle')
    """
    pairs = [(style, shape) for style in STYLES for shape in shapes]
    texts = [f"{_with_article(style)} of {_with_article(shape)}" for style, shape in pairs]
    apart = [n % 3 == (n // len(shapes)) % 3 for n in range(len(texts))]
    return tuple([text for text, held in zip(texts, apart, strict=True) if held is side] for side in (False, True))
