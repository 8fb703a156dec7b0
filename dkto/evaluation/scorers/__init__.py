"""Scorers behind one face: (images, prompts) -> (N,) scores, higher is better.

    pickscore, hps_v2, hps_v2_1, image_reward, laion_aesthetics, clip_h14, clip_l14
        the published metrics, computed as their authors define them; their weights are loaded at the first call
    hps_v3, unified_reward, vqa_score
        vision-language models as judges, of 2 to 8 billion parameters; they have no gradient
    world_craft, world_fidelity, world_utility
        exact, stated rules on images of the small world: how well made, how true to the prompt, and their product
    world_clean, world_no_white_rim, world_no_pink, world_dark, world_blue, world_redness
        what single tastes look at, by rule
    world_aesthetics, world_utility_1
        rules that a filter can push up: the measures of dkto 0.1, kept to show what hacking looks like
    world_preference, world_clip
        small networks trained on the small world

The scorers of the small world carry names of their own: none of them is PickScore, HPS, ImageReward, CLIP or the
LAION aesthetics score.
"""

import ast
import hashlib
import inspect
import marshal
import pickle
import re
import textwrap
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from dkto.common.names import check_name
from dkto.common.pixels import to_rgb
from dkto.evaluation.scorers.clip import CLIP_H14, CLIP_L14, HPS, CLIPScore, LaionAesthetics, PickScore
from dkto.evaluation.scorers.hps_v3 import HPSv3
from dkto.evaluation.scorers.image_reward import ImageReward
from dkto.evaluation.scorers.network import NetworkScorer
from dkto.evaluation.scorers.vision_language import UnifiedReward, VQAScore
from dkto.evaluation.scorers.world import WORLD_SCORERS, WorldCLIP, WorldPreference
from dkto.world.scenes import parse

Scorer = Callable[[Sequence[Image.Image], Sequence[str]], np.ndarray]
PixelScorer = Callable[[Tensor, Sequence[str]], Tensor]

_CLIPS = (CLIPScore("clip_h14", CLIP_H14), CLIPScore("clip_l14", CLIP_L14))
_PUBLISHED = (PickScore(), HPS("hps_v2"), HPS("hps_v2_1"), ImageReward(), LaionAesthetics(), *_CLIPS)
_JUDGES = (HPSv3(), UnifiedReward(), VQAScore())
PUBLISHED_SCORERS: dict[str, Scorer] = {scorer.name: scorer for scorer in (*_PUBLISHED, *_JUDGES)}
SCORERS: dict[str, Scorer] = {**WORLD_SCORERS, "world_preference": WorldPreference(), "world_clip": WorldCLIP()}
SCORERS |= PUBLISHED_SCORERS
READS_PROMPTS = ("world_fidelity", "world_craft", "world_utility", "world_utility_1", "world_clean")


def register_scorer(name: str, scorer: Scorer) -> None:
    """Make a scorer of your own, or a published one with other weights, known by a name.

    Args:
        name: letters, digits, `_`, `-` and `.`; it becomes a file name and a key of tables.
        scorer: (images, prompts) -> (N,), higher is better. Scores that differ by less than 1e-6 tie.

    Raises:
        ValueError: if the name is taken by another scorer, or has other characters.
        TypeError: if the scorer cannot be called.

    >>> register_scorer("width", lambda images, prompts: [image.width for image in images])
    >>> score("width", [Image.new("RGB", (8, 4))], ["a star"])
    array([8.])
    >>> del SCORERS["width"]
    """
    check_scorer_name(name)
    if not callable(scorer):
        raise TypeError(f"scorer {name} must be callable with (images, prompts), got {type(scorer).__name__}")
    if SCORERS.get(name, scorer) != scorer:
        raise ValueError(f"a scorer named {name!r} exists already; choose another name")
    SCORERS[name] = scorer


def check_scorer_name(name: str) -> None:
    """Refuse a name that cannot be a file name and a key of tables, as a lambda's."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ValueError(
            f"name of a scorer must be letters, digits, '_', '-' and '.', got {name!r}; "
            "dkto.evaluation.scorers.register_scorer gives a scorer another name"
        )


def get_scorer(scorer: str | Scorer) -> Scorer:
    """The scorer of that name, or a KeyError with the nearest one; a scorer itself is handed back."""
    if not isinstance(scorer, str):
        return scorer
    check_name("scorer", scorer, SCORERS, KeyError)
    return SCORERS[scorer]


def check_scorers(scorers: Sequence[str | Scorer], prompts: Sequence[str] = ()) -> None:
    """See to it that every scorer is known and can be loaded, before images are drawn for it.

    Args:
        scorers: names in `SCORERS`, or scorers.
        prompts: that it will judge; rules that read a prompt know those of the small world alone.

    Raises:
        KeyError: as `get_scorer`.
        FileNotFoundError: if weights are missing; the sentence says what to download and where to put it.
        ValueError: if a rule cannot read a prompt.
    """
    for scorer in scorers:
        found = get_scorer(scorer)
        if isinstance(found, NetworkScorer):
            found.load()
        for prompt in prompts if scorer in READS_PROMPTS else ():
            try:
                parse(prompt)
            except ValueError as error:
                raise ValueError(f"scorer {scorer} judges the small world alone: {error}") from error


def get_pixel_scorer(scorer: str | Scorer) -> PixelScorer:
    """The differentiable form of a scorer: (B, 3, H, W) images in [0, 1] and prompts -> (B,) with gradient.

    Raises:
        KeyError: if no scorer has that name.
        ValueError: if it has none; the sentence lists those that have.
    """
    found = get_scorer(scorer)
    if not hasattr(found, "score_pixels"):
        known = [name for name, other in SCORERS.items() if hasattr(other, "score_pixels")]
        raise ValueError(f"scorer {scorer_name(scorer)} has no gradient; those that have: {', '.join(known)}")
    return found.score_pixels


def scorer_name(scorer: str | Scorer) -> str:
    """How tables and files call a scorer: the name it was asked by, registered under, or its own."""
    if isinstance(scorer, str):
        return scorer
    known = [name for name, other in SCORERS.items() if other is scorer]
    return known[0] if known else str(getattr(scorer, "name", getattr(scorer, "__name__", type(scorer).__name__)))


def describe(scorer: Scorer) -> dict:
    """What a scorer's values depend on, kept beside them: model, weights, scale, or a hash of a plain function's code.

    The hash is of the function's own statements and of the values that it closes over: comments and layout do not
    count, and neither do functions that it calls (the small world's rules tell their version instead). A value of None
    in `about` is not known here (the hash of weights that lie in no folder) and stands for any.

    Raises:
        ValueError: if a scorer that is no plain function does not tell; its scores could be taken for others'.

    >>> describe(SCORERS["world_redness"])["rule"]
    'world_redness'
    """
    if hasattr(scorer, "about"):
        return dict(scorer.about)
    if not inspect.isfunction(scorer):
        raise ValueError(
            f"scorer {scorer_name(scorer)} needs an attribute `about`, a dict of what its values depend on: by it "
            "stored scores are known again"
        )
    try:
        code: object = textwrap.dedent(inspect.getsource(scorer))
        code = ast.unparse(ast.parse(code))  # one text for all Pythons
    except SyntaxError:  # a part of a longer line: as it is written
        pass
    except OSError:  # typed in without a file
        code = marshal.dumps(scorer.__code__, 2)
    closed = [cell.cell_contents for cell in scorer.__closure__ or ()]
    try:
        told = pickle.dumps((code, closed, scorer.__defaults__, scorer.__kwdefaults__), protocol=4)
    except Exception as error:
        raise ValueError(
            f"scorer {scorer_name(scorer)} closes over something that cannot be hashed ({error}): give it an attribute "
            "`about`, a dict of what its values depend on"
        ) from error
    return {"code": hashlib.sha256(told).hexdigest()[:16]}


def raw_scores(scorer: str | Scorer, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
    """`score`, with values that are not finite left in."""
    name = scorer_name(scorer)
    if len(images) != len(prompts):
        raise ValueError(
            f"scorer {name} needs one prompt per image, got {len(images)} images and {len(prompts)} prompts"
        )
    scores = np.asarray(get_scorer(scorer)([to_rgb(image) for image in images], prompts), dtype=np.float64)
    if scores.shape != (len(images),):
        raise ValueError(f"scorer {name} must return {len(images)} scores, got shape {scores.shape}")
    return scores


def check_finite(scorer: str | Scorer, scores: np.ndarray, names: Sequence[object]) -> None:
    """Refuse a score that is not finite; `names` says what to call the N images."""
    wrong = np.flatnonzero(~np.isfinite(scores))
    if len(wrong):
        value, image = scores[wrong[0]], names[wrong[0]]
        raise ValueError(f"scorer {scorer_name(scorer)} must return finite values, got {value} for image {image}")


def score(scorer: str | Scorer, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
    """Scores of N images and their prompts, (N,) float64, checked.

    Raises:
        KeyError: if no scorer has that name.
        ValueError: if images and prompts differ in number, or the scorer returns a wrong number of
            values or one that is not finite.
    """
    scores = raw_scores(scorer, images, prompts)
    check_finite(scorer, scores, range(len(images)))
    return scores
