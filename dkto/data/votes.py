"""Comparisons to single likes: who won, what a tie says, and which images count as liked (paper 5.1.1, C.1).

Pairs (Pick-a-Pic) and rankings (HPDv2, ImageRewardDB) both become votes: image_0, image_1, prompt and label_0, which
is 1 if image_0 was preferred, 0 if image_1 was and 0.5 for a tie. `likes_from_votes` then applies a stated rule.
"""

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from dkto.common.names import check_choice, shown
from dkto.data.tables import is_blank, read_values
from dkto.data.texts import check_prompt

PARTITIONS = {
    "at_least_once": "liked if preferred at least once (paper 5.1.1)",
    "always": "liked if preferred in every comparison (paper C.1)",
    "mostly": "liked if preferred more often than not",
}
TIE_RULES = {
    "ignore": "a tie says nothing; an image that has only ties is left out",
    "liked": "a tie counts as preferred, for both images",
    "disliked": "a tie counts as not preferred, for both images",
}
PAPER_COUNTS = {"desirable": 237_530, "undesirable": 690_538}
"""Images of the whole Pick-a-Pic v2 under "at_least_once" (Appendix A.1); the paper tells no tie rule."""
AUTHORS_SPLITS = {"exclusive_win": (True, True), "intersections": (True, False), "exclusive_lose": (False, False)}
"""The `split` column of the authors' own table: liked under "at_least_once", liked under "always"."""


@dataclass(frozen=True)
class Likes:
    """What votes make of single images."""

    images: np.ndarray  # (N,) str, as named by the votes, in the order of first appearance
    prompts: np.ndarray  # (N,) str
    is_desirable: np.ndarray  # (N,) bool
    pairs: np.ndarray  # (P, 2) int64, rows of the preferred and the other image of each decided comparison
    counts: dict  # what came in and what came out, with the rules in words


def likes_from_votes(votes: pd.DataFrame, partition: str = "at_least_once", ties: str = "ignore") -> Likes:
    """Turn comparisons into likes of single images, each image once (paper 5.1.1).

    Args:
        votes: columns image_0, image_1, prompt (str) and label_0 (1, 0, or 0.5 for a tie). With a column label_1 both
            may be 1, or both 0, where both images were judged good, or bad.
        partition: a rule of `PARTITIONS`; the paper's choice is "at_least_once".
        ties: a rule of `TIE_RULES`.

    >>> votes = pd.DataFrame({"image_0": ["a", "b"], "image_1": ["b", "c"], "prompt": "x", "label_0": [1.0, 1.0]})
    >>> for rule in PARTITIONS:
    ...     likes = likes_from_votes(votes, rule)
    ...     print(rule, dict(zip(likes.images.tolist(), likes.is_desirable.tolist())))
    at_least_once {'a': True, 'b': True, 'c': False}
    always {'a': True, 'b': False, 'c': False}
    mostly {'a': True, 'b': False, 'c': False}
    """
    check_choice("partition", partition, PARTITIONS)
    check_choice("ties", ties, TIE_RULES)
    label = votes["label_0"].to_numpy(float)
    both = "label_1" in votes
    other = votes["label_1"].to_numpy(float) if both else 1 - label
    sides = np.stack([votes["image_0"].to_numpy(object), votes["image_1"].to_numpy(object)], 1)  # (V, 2)
    codes, images = pd.factorize(sides.reshape(-1))
    first, second = codes.reshape(-1, 2).T
    won, lost, tied = (
        np.bincount(first, label == at, len(images)) + np.bincount(second, other == at, len(images))
        for at in (1, 0, 0.5)
    )
    prompt_codes, prompts = pd.factorize(votes["prompt"].to_numpy(object))
    prompt_of = np.empty(len(images), np.int64)
    prompt_of[codes[::-1]] = np.repeat(prompt_codes, 2)[::-1]  # the first appearance is written last
    several_prompts = len(set(codes[prompt_of[codes] != np.repeat(prompt_codes, 2)].tolist()))
    if ties != "ignore":
        won, lost = (won + tied, lost) if ties == "liked" else (won, lost + tied)
    kept = won + lost > 0
    liked = verdicts(won, lost)
    row_of = np.cumsum(kept) - 1
    decided = label != other
    pairs = np.where((label == 1)[:, None], np.stack([first, second], 1), np.stack([second, first], 1))[decided]
    chosen = liked[partition][kept]
    counts = {
        "comparisons": len(votes),
        "ties": int((label == 0.5).sum()),
        **({"both_good": int((label + other == 2).sum()), "both_bad": int((label + other == 0).sum())} if both else {}),
        "ties_rule": TIE_RULES[ties],
        "images": len(images),
        "duplicates_by_name": len(codes) - len(images),
        "images_left_out": int((~kept).sum()),
        "images_with_several_prompts": several_prompts,
        "prompts": len(prompts),
        "partition": PARTITIONS[partition],
        "desirable": int(chosen.sum()),
        "undesirable": int((~chosen).sum()),
    }
    for name, values in liked.items():
        counts[f"desirable/{name}"] = int(values[kept].sum())
    return Likes(images[kept], prompts[prompt_of[kept]], chosen, row_of[pairs], counts)


def verdicts(won: np.ndarray, lost: np.ndarray) -> dict[str, np.ndarray]:
    """Which images are liked under each rule of `PARTITIONS`, by how often each was and was not."""
    return {"at_least_once": won > 0, "always": (won > 0) & (lost == 0), "mostly": won > lost}


@dataclass(frozen=True)
class Ranking:
    """Images of one prompt with how good each was found; higher is better, equal is a tie."""

    prompt: str
    images: tuple[str, ...]
    goodness: tuple[float, ...]


def votes_from_rankings(rankings: Iterable[Ranking]) -> pd.DataFrame:
    """Every pair within a ranking as a vote: n images make n (n - 1) / 2 comparisons.

    >>> votes_from_rankings([Ranking("x", ("a", "b", "c"), (2.0, 1.0, 1.0))]).to_numpy().tolist()
    [['a', 'b', 'x', 1.0], ['a', 'c', 'x', 1.0], ['b', 'c', 'x', 0.5]]
    """
    rows = []
    for ranking in rankings:
        for i, j in combinations(range(len(ranking.images)), 2):
            gap = ranking.goodness[i] - ranking.goodness[j]
            rows.append((ranking.images[i], ranking.images[j], ranking.prompt, 0.5 * (1 + (gap > 0) - (gap < 0))))
    return pd.DataFrame(rows, columns=["image_0", "image_1", "prompt", "label_0"])


MOST_RANKED = 1000  # images of one ranking: half a million comparisons
LARGEST = sys.float_info.max  # a larger whole number could not be compared with a float
IMAGE_KEYS = ("images", "image_path", "file_path")
PREFERRED_KEYS = ("path1", "path2")  # HPDv3: the first is the preferred one
GOODNESS_KEYS = {"scores": 1, "human_preference": 1, "rank": -1, "ranks": -1}
"""Name of the list in an entry, and its sign: a rank of 1 is the best, a higher score is better."""


def read_rankings(path: Path) -> Iterator[Ranking]:
    """Rankings from a .json list as HPDv2's, one entry per prompt, or as HPDv3's, one per comparison.

    An entry holds `prompt`, the image files (`images`, `image_path` or `file_path`) and what was found good: `rank` or
    `ranks` (1 is the best), `human_preference` (1 for the preferred one), or `scores` (higher is better). Or it holds
    `prompt`, `path1` and `path2`, of which the first was preferred; how sure the annotators were is not looked at.

    Raises:
        ValueError: if an entry lacks one of them, or has lists of unequal length; the sentence names the entry.
    """
    entries = read_values(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list of rankings, got {type(entries).__name__}")
    for number, entry in enumerate(entries, 1):
        yield ranking_of(entry, f"{path.name}, entry {number}")


def ranking_of(entry: object, where: str) -> Ranking:
    """The ranking of one entry; see `read_rankings`."""
    entry = entry if isinstance(entry, dict) else {}
    if "prompt" in entry and all(key in entry for key in PREFERRED_KEYS):
        pair = [entry[key] for key in PREFERRED_KEYS]
        return _checked(check_prompt(entry["prompt"], where), pair, (1, 0), where)
    images = next((entry[key] for key in IMAGE_KEYS if key in entry), None)
    key = next((key for key in GOODNESS_KEYS if key in entry), None)
    if "prompt" not in entry or not isinstance(images, list) or key is None:
        raise ValueError(
            f"{where} needs prompt, one of {', '.join(IMAGE_KEYS)} and one of {', '.join(GOODNESS_KEYS)}, or path1 "
            "and path2; "
            f"found: {shown(', '.join(entry)) if entry else 'nothing'}"
        )
    values = entry[key]
    if not isinstance(values, list) or len(values) != len(images):
        got = len(values) if isinstance(values, list) else type(values).__name__
        raise ValueError(f"{where}: {key} must be a list of {len(images)} numbers, one per image, got {got}")
    if not all(type(value) in (int, float) and abs(value) <= LARGEST for value in values):
        raise ValueError(f"{where}: {key} must be finite numbers, got {shown(values)}")
    goodness = [GOODNESS_KEYS[key] * value for value in values]  # whole numbers stay exact
    return _checked(check_prompt(entry["prompt"], where), images, goodness, where)


def _checked(prompt: str, images: Sequence[object], goodness: Sequence[float], where: str) -> Ranking:
    """A ranking whose images are names, each once, and not too many for a list of all pairs."""
    if len(images) > MOST_RANKED:
        raise ValueError(f"{where}: a ranking must have at most {MOST_RANKED} images, got {len(images)}")
    for image in images:
        if not isinstance(image, str) or not image.strip():
            raise ValueError(f"{where}: image must be a file name, got {shown(image)}")
        if images.count(image) > 1:
            raise ValueError(f"{where}: the image {shown(image)} is ranked more than once")
    return Ranking(prompt, tuple(images), tuple(goodness))


def rank_of(value: object) -> float:
    """A rank as a number; not a number where it is none."""
    try:
        return float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else np.nan
    except (ValueError, OverflowError):
        return np.nan


def numbers_of(values: pd.Series) -> np.ndarray:
    """(N,) `rank_of` of every value; a column of nothing but numbers as text takes a tenth of the time."""
    if set(map(type, values)) == {str}:
        try:
            return values.to_numpy(object).astype(float)
        except ValueError:
            pass
    return np.fromiter(map(rank_of, values), float, len(values))


def group_rankings(frame: pd.DataFrame, where: str) -> Iterator[Ranking]:
    """Rankings from one row per image, as ImageRewardDB's metadata: image, prompt, rank, and prompt_id where known.

    A row without its prompt_id is ranked with the others of its prompt, and a warning says so.

    Args:
        frame: the rows, with ranks as numbers; its index counts the rows of the file from 0.
        where: the file, for the sentences.
    """
    groups = frame["prompt"]
    if "prompt_id" in frame:
        lacks = np.fromiter(map(is_blank, frame["prompt_id"]), bool, len(frame))
        ids = frame["prompt_id"].astype(str).where(~lacks)
        # a row that lacks it gets that of its prompt, where another row has one; else a group of its own prompt
        groups = ids.fillna(ids.groupby(frame["prompt"]).transform("first")).fillna("\0" + frame["prompt"])
        if lacks.any():
            text = f"{where}: {lacks.sum()} of {len(frame)} rows have no prompt_id, the first is row"
            warnings.warn(f"{text} {frame.index[lacks][0] + 1}; they are ranked by their prompt", stacklevel=2)
    for _, rows in frame.groupby(groups, sort=False):
        place = f"{where}, row {rows.index[0] + 1}"
        prompt, *others = dict.fromkeys(rows["prompt"])
        if others:
            raise ValueError(f"{place}: its prompt_id stands for two prompts, {shown(prompt)} and {shown(others[0])}")
        yield _checked(prompt, list(rows["image"]), (-rows["rank"]).tolist(), place)
