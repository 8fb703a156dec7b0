"""Scores become likes by a stated rule: what lies above a threshold is liked, and how far, if asked, is its weight.

    median   the threshold is the median of the scores that can be used (TGO, arXiv 2605.04653)
    fixed    the threshold is given
    user_z   of each user's scores: (score - mean) / standard deviation, above a threshold that is 0 if not given

A score on the threshold says nothing, unless `ties` makes it a like or a dislike; a warning counts those left out. An
image with several judgements stays in as many rows, or becomes one by a partition (`dkto.data.votes.PARTITIONS`).
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dkto.common.names import check_choice
from dkto.common.settings import checked_number
from dkto.data.folders import Folder
from dkto.data.published import SQLITE_SUFFIXES, simulacra_ratings
from dkto.data.sources import COLUMN_ALIASES, Columns, SetAside, checked_prompts, find_images, refuse_unused
from dkto.data.tables import columns_by_meaning, is_blank, need_columns, plain_name, read_objects, said
from dkto.data.votes import PARTITIONS, TIE_RULES, numbers_of, verdicts

RULES = {
    "median": "liked above the median of all scores",
    "fixed": "liked above the threshold",
    "user_z": "liked above the threshold in standard deviations of the user's own scores from their mean",
}
LARGEST_SCORE = 1e12  # weights stay exact enough in float32
TIED = 1e-9  # a z-score so near to the threshold lies on it: rounding tells no more


@dataclass(frozen=True)
class ScoreRule:
    """The column that holds scores, and how these become likes.

    Attributes:
        column: its name; case and blanks around it do not matter.
        rule: a key of `RULES`.
        threshold: of the rule "fixed", or in standard deviations of "user_z".
        weight_scale: c of the weight 1 + c |distance from the threshold|; 0 keeps no weights.

    Raises:
        ValueError: for a rule that is not known, or a threshold that it needs or has no use for.

    >>> ScoreRule("rating", "fixed").rule
    Traceback (most recent call last):
    ValueError: rule 'fixed' needs a threshold, above which a score is a like
    """

    column: str
    rule: str = "median"
    threshold: float | None = None
    weight_scale: float = 0.0

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, RULES)
        checked_number("weight_scale", self.weight_scale, float, least=0, most=1e6)
        if self.threshold is not None:
            checked_number("threshold", self.threshold, float)
        if self.rule == "median":
            refuse_unused("the rule 'median' finds it in the scores", threshold=self.threshold)
        elif self.rule == "fixed" and self.threshold is None:
            raise ValueError("rule 'fixed' needs a threshold, above which a score is a like")

    def distances(self, scores: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, float]:
        """How far scores lie above the threshold, and the threshold.

        Args:
            scores: (N,) finite.
            users: (N,) int, who gave them; of "user_z" alone.

        >>> ScoreRule("rating").distances(np.array([1.0, 5.0, 9.0]), np.zeros(3, int))
        (array([-4.,  0.,  4.]), 5.0)
        >>> ScoreRule("rating", "user_z").distances(np.array([1.0, 3.0, 4.0, 8.0]), np.array([0, 0, 1, 1]))
        (array([-1.,  1., -1.,  1.]), 0.0)
        """
        if self.rule != "user_z":
            threshold = float(np.median(scores)) if self.rule == "median" else float(self.threshold)
            return scores - threshold, threshold
        threshold, count = float(self.threshold or 0.0), np.bincount(users)
        gap = scores - (np.bincount(users, scores) / count)[users]
        z = gap / np.sqrt(np.bincount(users, gap**2) / count)[users]
        return np.where(np.abs(z - threshold) < TIED, 0.0, z - threshold), threshold


def read_scores(
    source: Path, images: Folder, rule: ScoreRule, partition: str | None, ties: str | None, aside: SetAside
) -> Columns:
    """Likes from a file with one judgement a row: image, prompt, a score and, where known, its user."""
    ties = ties or "ignore"
    check_choice("ties", ties, TIE_RULES)
    column = plain_name(rule.column)
    synonyms = {name: meaning for name, meaning in COLUMN_ALIASES.items() if meaning in ("image", "prompt")}
    synonyms = {**synonyms, "user_id": "user", column: column}
    if source.suffix.lower() in SQLITE_SUFFIXES:
        frame = simulacra_ratings(source)
    else:
        frame = read_objects(source, {*synonyms, *synonyms.values()})
    named = frame.attrs.get("columns", ())
    frame = frame.set_axis(list(columns_by_meaning(frame.columns, synonyms, str(source))), axis=1)
    by_user = ["user"] if rule.rule == "user_z" else []
    need_columns(frame.columns, ("image", "prompt", column, *by_user), str(source), named)
    frame = frame.assign(prompt=checked_prompts(frame, aside))
    scores = numbers_of(frame[column])
    good = np.abs(scores) <= LARGEST_SCORE
    aside.check(frame, column, good, f"{said(rule.column)} must be a finite number, at most {LARGEST_SCORE:g}")
    frame = frame.assign(score=scores, path=find_images(frame, images, aside))
    if "user" in frame:
        codes, names = pd.factorize(np.array(list(map(str, frame["user"])), object))
        frame = frame.assign(code=codes)
        named = ~np.array([is_blank(name) for name in names], bool)
    if by_user:
        aside.check(frame, "user", named[codes], "user must be named for user_z")
    frame = frame[aside.kept(frame)]
    if by_user and len(frame):
        given = frame.groupby("code")["score"]
        several = (given.transform("min") < given.transform("max")).to_numpy()
        aside.check(frame, "user", several, "user must have given two different scores for user_z")
        frame = frame[several]
    return _likes(frame, rule, partition, ties, aside) if len(frame) else Columns([], [], np.zeros(0, bool))


def _likes(frame: pd.DataFrame, rule: ScoreRule, partition: str | None, ties: str, aside: SetAside) -> Columns:
    codes, known = pd.factorize(frame["code"]) if "user" in frame else (np.zeros(len(frame), int), [])
    distances, threshold = rule.distances(frame["score"].to_numpy(), codes)
    tied = distances == 0
    counts = {"score": rule.column, "rule": RULES[rule.rule], "threshold": threshold, "judgements": len(frame)}
    counts |= {"users": len(known)} if "user" in frame else {}
    counts |= {"scores_on_the_threshold": int(tied.sum()), "ties": ties}
    frame = frame.assign(liked=(distances > 0) | (tied & (ties == "liked")))
    frame["weight"] = 1 + rule.weight_scale * np.abs(distances)
    if ties == "ignore" and tied.any():
        frame = frame[~tied]
        text = f"{aside.where}: {tied.sum()} of {len(tied)} scores lie on the threshold {threshold:g}"
        if frame.empty:
            raise ValueError(f"{text}: none is a like or a dislike; choose another rule, or what ties mean")
        warnings.warn(f"{text} and are left out; ties says what else they may count as", stacklevel=4)
    codes, _ = pd.factorize(frame["path"].to_numpy(object))
    several = np.bincount(codes) > 1
    counts |= {"images": len(several), "images_with_several_judgements": int(several.sum())}
    if partition is not None:
        frame = _one_row_an_image(frame, codes, partition)
        counts["partition"] = PARTITIONS[partition]
    weights = frame["weight"].to_numpy() if rule.weight_scale else None
    liked = frame["liked"].to_numpy(bool)
    return Columns(frame["path"].tolist(), frame["prompt"].tolist(), liked, counts=counts, weights=weights)


def _one_row_an_image(frame: pd.DataFrame, codes: np.ndarray, partition: str) -> pd.DataFrame:
    """The first row of each image with the verdict of all, weighing the mean of the judgements that agree with it."""
    check_choice("partition", partition, PARTITIONS)
    likes, weights = frame["liked"].to_numpy(bool), frame["weight"].to_numpy()
    liked = verdicts(np.bincount(codes, likes), np.bincount(codes, ~likes))[partition]
    agree = likes == liked[codes]
    mean = np.bincount(codes, weights * agree) / np.bincount(codes, agree)
    first = frame[~pd.Series(codes).duplicated().to_numpy()]
    return first.assign(liked=liked, weight=mean)
