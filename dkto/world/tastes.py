"""Measures of single tastes, each by a stated rule on pixels; for all of them more is better.

Three need dislikes: what is disliked shows in a few images alone, and the liked ones are the model's ordinary images,
so that nothing in them says what to avoid.
"""

import numpy as np

from dkto.world.craft import background_spread
from dkto.world.scenes import BACKGROUNDS, COLOURS, Scene, parse
from dkto.world.truth import MIN_CHROMA, border_colour, hue_of, stands_out

NEAR_WHITE = 200.0  # level of R, G and B above which a pixel is white, 0..255
_WHITE_GROUND = 180.0  # level of an image's border above which no white rim can be told from it
_PINK = list(COLOURS).index("pink")


def cleanness(image: np.ndarray, prompt: str | Scene) -> float:
    """Minus the CIELAB spread of the background around its median: 0 where it is flat, about -8 where it is cloudy."""
    return -background_spread(image, parse(prompt) if isinstance(prompt, str) else prompt)


def no_white_rim(image: np.ndarray, prompt: str | Scene) -> float:
    """Minus the share of white pixels; 0 on a light ground, where a white rim is not seen."""
    pixels = np.asarray(image, dtype=np.float64)
    if border_colour(pixels).min() > _WHITE_GROUND:
        return 0.0
    return -float((pixels.min(-1) > NEAR_WHITE).mean())


def no_pink(image: np.ndarray, prompt: str | Scene) -> float:
    """Minus the share of pixels whose hue is nearest to pink."""
    nearest, chroma = hue_of(np.asarray(image, dtype=np.float64))
    return -float(((nearest == _PINK) & (chroma > MIN_CHROMA)).mean())


def darkness(image: np.ndarray, prompt: str | Scene) -> float:
    """How dark the border is: 1 black, 0 white."""
    return 1 - float(border_colour(np.asarray(image, dtype=np.float64)).mean()) / 255


def blueness(image: np.ndarray, prompt: str | Scene) -> float:
    """Blue minus red, in [-1, 1], of what stands out from the background, without its dullest third."""
    pixels = np.asarray(image, dtype=np.float64)
    standing = stands_out(pixels, border_colour(pixels))
    chosen = pixels[standing] if standing.sum() > 20 else pixels.reshape(-1, 3)
    spread = np.ptp(chosen, axis=1)
    vivid = chosen[spread >= np.sort(spread)[len(spread) // 3]].mean(0)  # by value: many pixels tie, in no fixed order
    return float(vivid[2] - vivid[0]) / 255


def blotchy_prompt(scene: Scene) -> bool:
    """Whether the model draws the background of such a scene cloudy: a painting on a light ground."""
    return scene.style == "painting" and np.mean(BACKGROUNDS[scene.background]) > 125


def rimmed_prompt(scene: Scene) -> bool:
    """Whether a scene's thing has a white rim that shows: a sticker on no white ground."""
    return scene.style == "sticker" and scene.background != "white"


def pink_prompt(scene: Scene) -> bool:
    """Whether a scene asks for something pink."""
    return any(thing.colour == "pink" for thing in scene.things)
