"""The five diagrams of the course, as SVG: `python -m dkto.workshop.diagrams` writes them into `notebooks/images`.

Each has a title and a description in its text for who does not see it; the lesson that shows it repeats both.
"""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import torch

from dkto.common.files import write_atomically
from dkto.objective.utilities import get_utility
from dkto.plotting import COLOURS

FOLDER = Path(__file__).parents[2] / "notebooks" / "images"
LIKED, DISLIKED, POINT = COLOURS["desirable"], COLOURS["undesirable"], COLOURS["reference_point"]
GREY, PALE = "#555555", "#f2f2f2"
HEIGHT = 34  # of a box
COURSE = (
    ("start", "00"),
    ("1  what people feel", "05  10  60"),
    ("2  diffusion", "15  16  17"),
    ("3  the laboratory", "20-28  64"),
    ("4  from likes to a model", "30-32  63  61"),
    ("5  did it work?", "40-42  62"),
    ("6  your likes, at scale", "33  70"),
)


def _text(x: float, y: float, words: str, *, size: int = 13, colour: str = "black", anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{escape(words)}</text>'


def _box(x: float, y: float, width: float, words: str, *, under: str = "", colour: str = GREY) -> str:
    """A box with its left upper corner at (x, y); a second line of words stands below the first."""
    height = HEIGHT + (16 if under else 0)
    lines = [
        _text(x + width / 2, y + 22, words),
        _text(x + width / 2, y + 39, under, size=12, colour=GREY) if under else "",
    ]
    frame = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{PALE}" stroke="{colour}"/>'
    return frame + "".join(lines)


def _arrow(*points: tuple[float, float], colour: str = GREY) -> str:
    way = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="1.5" marker-end="url(#tip)"/>'


def _svg(width: int, height: int, title: str, about: str, *parts: str) -> str:
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    tip += f'<path d="M0,0 L8,4 L0,8 z" fill="{GREY}"/></marker>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
    head += f'font-family="sans-serif" role="img" aria-label="{escape(title, quote=True)}">'
    words = f"<title>{escape(title)}</title><desc>{escape(about)}</desc>"
    ground = f'<rect width="{width}" height="{height}" fill="white"/>'
    return "\n".join([head, words, f"<defs>{tip}</defs>", ground, *parts, "</svg>"])


def _flow(boxes: Sequence[tuple[str, str, str]], width: int) -> list[str]:
    """Boxes (words, words under them, colour) in rows of four, with an arrow from each to the next."""
    parts = []
    for place, (words, under, colour) in enumerate(boxes):
        x, y = 15 + place % 4 * 180, 15 + place // 4 * 90
        parts.append(_box(x, y, width, words, under=under, colour=colour))
        if place + 1 == len(boxes):
            break
        if place % 4 < 3:
            parts.append(_arrow((x + width, y + 25), (x + 179, y + 25)))
        else:
            out, into = x + width / 2, 15 + width / 2
            parts.append(_arrow((out, y + 50), (out, y + 70), (into, y + 70), (into, y + 88)))
    return parts


def course() -> str:
    """The seven parts of the course in reading order."""
    about = "Seven boxes. " + " ".join(f"{part.capitalize()}: lessons {lessons}." for part, lessons in COURSE)
    parts = _flow([(part, lessons, GREY) for part, lessons in COURSE], 160)
    return _svg(730, 170, "The course: seven parts in reading order", about, *parts)


def one_like() -> str:
    """What becomes of one like in one training step."""
    about = "An image, its prompt and a like enter; latents get noise. Policy and reference predict that noise. "
    about += "Their errors give a reward, the reward a gain, the gain a slope, which weighs the gradient."
    boxes = [
        ("image, prompt", "and a like", LIKED),
        ("latents", "encoded once", GREY),
        ("+ noise at t", "the same for both", GREY),
        ("two errors", "policy, reference", GREY),
        ("reward r", "beta x gap", GREY),
        ("gain r - z", "from the point", POINT),
        ("slope U'", "how much it counts", GREY),
        ("gradient", "+ liked, - disliked", GREY),
    ]
    return _svg(720, 170, "One like through one training step", about, *_flow(boxes, 150))


def same_noise() -> str:
    """Policy and reference on the same noise."""
    about = "A clean image and a noise make a noisy image, for the policy and for the frozen reference. "
    about += (
        "Each prediction is compared with that noise. The gap is the error of the reference minus that of the policy."
    )
    parts = [
        _box(15, 20, 120, "clean image"),
        _box(15, 116, 120, "noise, t", colour=POINT),
        _box(185, 68, 120, "noisy image"),
        _arrow((135, 37), (160, 37), (160, 80), (184, 80)),
        _arrow((135, 133), (160, 133), (160, 92), (184, 92)),
        _box(355, 20, 130, "policy", under="learns", colour=LIKED),
        _box(355, 108, 130, "reference", under="frozen"),
        _arrow((305, 85), (330, 85), (330, 45), (354, 45)),
        _arrow((305, 85), (330, 85), (330, 133), (354, 133)),
        _box(535, 28, 110, "error"),
        _box(535, 116, 110, "error"),
        _arrow((485, 45), (534, 45)),
        _arrow((485, 133), (534, 133)),
        _arrow((75, 150), (75, 175), (590, 175), (590, 151), colour=POINT),
        _text(330, 190, "the same noise is what both should predict", size=12, colour=POINT),
        _box(695, 68, 130, "gap", under="reference - policy"),
        _arrow((645, 45), (670, 45), (670, 85), (694, 85)),
        _arrow((645, 133), (670, 133), (670, 100), (694, 100)),
    ]
    return _svg(840, 205, "Policy and reference on the same noise", about, *parts)


def utility_slope_weight() -> str:
    """From a utility to its slope to the weight of a sample, for the sigmoid."""
    about = "Three small curves over the gain. The sigmoid rises from 0 to 1. Its slope is a bell around 0. "
    about += "The weight of a sample is that bell if it is liked, and its mirror image below zero if not."
    x = torch.linspace(-6, 6, 61, dtype=torch.float64)
    utility = get_utility("kahneman_tversky")
    value, slope = utility.value(x), utility.slope(x)

    def curve(left: float, y: torch.Tensor, low: float, high: float, colour: str) -> str:
        dots = zip(left + 100 + x * 15, 140 - (y - low) / (high - low) * 105, strict=True)
        way = " ".join(f"{float(a):.1f},{float(b):.1f}" for a, b in dots)
        return f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2.5"/>'

    parts = []
    for left, words, lines in (
        (10, "utility U: what is felt", [(value, 0, 1, "black")]),
        (260, "slope U': what counts", [(slope, 0, 0.26, "black")]),
        (510, "weight: + liked, - disliked", [(slope, -0.26, 0.26, LIKED), (-slope, -0.26, 0.26, DISLIKED)]),
    ):
        zero = 87.5 if len(lines) > 1 else 140
        parts.append(f'<line x1="{left}" x2="{left + 200}" y1="{zero}" y2="{zero}" stroke="#bbbbbb"/>')
        parts.append(
            f'<line x1="{left + 100}" x2="{left + 100}" y1="30" y2="140" stroke="{POINT}" stroke-dasharray="3 3"/>'
        )
        parts += [curve(left, *line) for line in lines]
        parts += [_text(left + 100, 20, words), _text(left + 100, 158, "reference point", size=12, colour=POINT)]
    parts += [_arrow((215, 88), (250, 88)), _arrow((465, 88), (500, 88))]
    return _svg(720, 170, "From utility to slope to the weight of a sample", about, *parts)


def sampler() -> str:
    """How gamma draws a batch."""
    about = "Two boxes, few liked and many disliked images. With chance gamma the sampler draws from the liked box, "
    about += (
        "else from the other one. Within a box all images are equally likely. With gamma 0.8 four of five are liked."
    )
    dots = [
        f'<circle cx="{310 + k % 10 * 24}" cy="{75 + k // 10 * 24}" r="8" fill="{LIKED if k % 5 else DISLIKED}"/>'
        for k in range(20)
    ]
    parts = [
        _box(15, 20, 150, "liked", under="few", colour=LIKED),
        _box(15, 110, 150, "disliked", under="many", colour=DISLIKED),
        _arrow((165, 45), (230, 45), (230, 80), (290, 80)),
        _arrow((165, 135), (230, 135), (230, 100), (290, 100)),
        _text(228, 36, "gamma", colour=LIKED),
        _text(228, 155, "1 - gamma", colour=DISLIKED),
        _text(418, 52, "a batch at gamma = 0.8"),
        *dots,
        _text(418, 130, "within a box every image is equally likely", size=12, colour=GREY),
    ]
    return _svg(600, 175, "The sampler with gamma", about, *parts)


DIAGRAMS: dict[str, Callable[[], str]] = {
    "course": course,
    "one_like": one_like,
    "same_noise": same_noise,
    "utility_slope_weight": utility_slope_weight,
    "sampler": sampler,
}


def write_diagrams(folder: Path = FOLDER) -> None:
    """Draw all diagrams into a folder, each as NAME.svg."""
    for name, draw in DIAGRAMS.items():
        write_atomically(folder / f"{name}.svg", lambda part, draw=draw: part.write_text(draw(), encoding="utf-8"))


if __name__ == "__main__":
    write_diagrams()
