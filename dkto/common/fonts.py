"""Which installed fonts can draw a figure's labels, whatever their script."""

import warnings
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib import font_manager

from dkto.common.names import shown

BOX = "\u25a1"  # for a sign that no font has


def drawable(labels: Sequence[str]) -> tuple[list[str], list[str]]:
    """Labels with a box for each sign that no font has, and the fonts to draw them with: the usual ones come first."""
    families, missing = list(plt.rcParams["font.family"]), {sign for sign in "".join(labels) if sign.isprintable()}
    missing -= _signs_of(font_manager.findfont(font_manager.FontProperties()), missing)
    for name in sorted({font.name for font in font_manager.fontManager.ttflist}) if missing else ():
        if missing and "Last Resort" not in name and (found := _signs_of(font_manager.findfont(name), missing)):
            families.append(name)
            missing -= found
    if missing:
        named = shown("".join(sorted(missing)))
        text = f"no installed font has {named} of the labels, which are drawn as boxes: install a font of their script"
        warnings.warn(text, stacklevel=3)
    boxes = str.maketrans(dict.fromkeys(missing, BOX))
    return [label.translate(boxes) for label in labels], families


def _signs_of(font: str, signs: set[str]) -> set[str]:
    """Those of some signs that a font file has."""
    try:
        return {sign for sign in signs if font_manager.get_font(font).get_char_index(ord(sign))}
    except (RuntimeError, OSError):  # of a kind that cannot be drawn with, or gone since the list was made
        return set()
