"""Likes and dislikes as one table: image, prompt, is_desirable, and the comparison they came from where known.

Every source becomes a `FeedbackTable`: a CSV, TSV, JSONL or Parquet file with the columns `image`, `prompt` and
`liked`; scores by a stated rule (`dkto.data.scores`); the authors' own table (`file_name`, `caption`, `split`); a
folder with `liked/` and `disliked/`; rankings as HPDv2's or ImageRewardDB's; or lists made in a notebook. (Pairs that
carry their images, as Pick-a-Pic's, are first unpacked by `dkto.data.pairs`.) Each image stays in its folder: a file
name that points outside is refused.
"""

import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from dkto.common.files import write_atomically
from dkto.common.names import shown
from dkto.common.settings import checked_number
from dkto.data.comparisons import write_comparisons
from dkto.data.folders import Folder
from dkto.data.scores import ScoreRule, read_scores
from dkto.data.sources import SetAside, commonest_reasons, parse_label, read_file, read_folder, refuse_unused
from dkto.data.tables import whole_numbers
from dkto.data.texts import check_prompt, same_prompt

MOST_PAIRS = 20_000_000  # that pair ids may make: a third of a gigabyte


@dataclass(frozen=True)
class FeedbackTable:
    """Binary feedback on single images.

    Attributes:
        images: absolute path of each image, one per row.
        prompts: the prompt of each image.
        is_desirable: (N,) bool, True where the image was liked.
        pair_ids: (N,) int, equal for the images of one comparison; -1 where there was none.
        comparisons: (P, 2) int64, rows of the chosen and the rejected image, where an image may be in
            several comparisons; None where `pair_ids` tell all there is.
        counts: how the table was made, in words and numbers; empty where it was simply read.
        set_aside: rows of the source that could not be used: source_row, image and reason of each.
        weights: (N,) float >= 0, how much each row counts in a method that reads it (TGO); None for all alike.
    """

    images: tuple[Path, ...]
    prompts: tuple[str, ...]
    is_desirable: np.ndarray
    pair_ids: np.ndarray
    comparisons: np.ndarray | None = None
    counts: dict = field(default_factory=dict)
    set_aside: tuple[dict, ...] = ()
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        sizes = {len(self.images), len(self.prompts), len(self.is_desirable), len(self.pair_ids)}
        if len(sizes) != 1:
            raise ValueError(
                f"images, prompts, is_desirable and pair_ids must have one length, got {len(self.images)}, "
                f"{len(self.prompts)}, {len(self.is_desirable)} and {len(self.pair_ids)}"
            )
        if self.is_desirable.dtype != np.bool_:
            raise ValueError(f"is_desirable must be bool, got {self.is_desirable.dtype}")
        weights = np.ones(len(self)) if self.weights is None else self.weights
        if weights.shape != (len(self),) or not (np.isfinite(weights) & (weights >= 0)).all():
            raise ValueError(f"weights must be {len(self)} finite numbers from 0 on, got {shown(weights)}")
        if self.comparisons is not None and len(self.comparisons):
            low, high = int(self.comparisons.min()), int(self.comparisons.max())
            if not 0 <= low <= high < len(self):
                raise ValueError(f"comparisons must be rows of {len(self)} images, got rows {low} to {high}")

    def __len__(self) -> int:
        return len(self.images)

    def __str__(self) -> str:
        liked = int(self.is_desirable.sum())
        text = f"{len(self)} images, {liked} liked, {len(self) - liked} disliked, {len(set(self.prompts))} prompts"
        lines = [text, *(f"  {name}: {value}" for name, value in self.counts.items())]
        if self.set_aside:
            reasons = commonest_reasons(each["reason"] for each in self.set_aside)
            lines.append(f"  rows or images set aside: {len(self.set_aside)}: {reasons}")
        return "\n".join(lines)

    @property
    def pairs(self) -> np.ndarray:
        """(P, 2) int64, rows of the chosen and the rejected image of each comparison (for Diffusion-DPO, paper eq. 8).

        Without `comparisons`, every liked image of a `pair_id` is chosen over every disliked one of it.
        """
        if self.comparisons is not None:
            return self.comparisons
        if (count := self.count_pairs()) > MOST_PAIRS:
            raise ValueError(f"pair_id must join few images, but its values make {count:,} pairs, over {MOST_PAIRS:,}")
        has_id = self.pair_ids >= 0
        sides = pd.DataFrame({"pair_id": self.pair_ids, "row": np.arange(len(self))})
        liked, disliked = sides[has_id & self.is_desirable], sides[has_id & ~self.is_desirable]
        return liked.merge(disliked, on="pair_id")[["row_x", "row_y"]].to_numpy(np.int64)

    def count_pairs(self) -> int:
        """How many `pairs` there are."""
        if self.comparisons is not None:
            return len(self.comparisons)
        has_id = self.pair_ids >= 0
        codes = np.unique(self.pair_ids[has_id], return_inverse=True)[1]
        liked = np.bincount(codes, self.is_desirable[has_id])
        return int((liked * (np.bincount(codes) - liked)).sum()) if len(codes) else 0

    def subset(self, rows: np.ndarray) -> "FeedbackTable":
        """Some rows, in the order given; comparisons with an image outside them are left out."""
        rows = np.arange(len(self))[rows]
        comparisons = None
        if self.comparisons is not None:
            new_row = np.full(len(self), -1)
            new_row[rows] = np.arange(len(rows))
            comparisons = new_row[self.comparisons]
            comparisons = comparisons[(comparisons >= 0).all(1)]
        images, prompts = tuple(self.images[row] for row in rows), tuple(self.prompts[row] for row in rows)
        weights = None if self.weights is None else self.weights[rows]
        liked, pair_ids = self.is_desirable[rows], self.pair_ids[rows]
        return FeedbackTable(images, prompts, liked, pair_ids, comparisons, weights=weights)

    def split_by_prompt(self, held_out_fraction: float, seed: int = 0) -> tuple["FeedbackTable", "FeedbackTable"]:
        """Training and held-out rows that share no prompt, by a hash of the prompt.

        A prompt falls on the same side in every table; `dkto.data.texts.same_prompt` says which are one.

        Args:
            held_out_fraction: expected share of the prompts to hold out, in [0, 1].
            seed: another seed holds out other prompts.

        Returns:
            Both tables; rows that were set aside stay with the first.

        Raises:
            ValueError: if that leaves no liked, or no disliked image for training though there are some.
        """
        held_out = self._held_out(held_out_fraction, seed)
        for name, side in (("liked", self.is_desirable), ("disliked", ~self.is_desirable)):
            if held_out_fraction < 1 and side.any() and not (side & ~held_out).any():
                raise ValueError(
                    f"held_out_fraction {held_out_fraction:g} leaves no {name} image for training, of {side.sum()} in "
                    f"the feedback: hold out less, or choose another seed (got {seed})"
                )
        train = replace(self.subset(np.flatnonzero(~held_out)), set_aside=self.set_aside)
        return train, self.subset(np.flatnonzero(held_out))

    def _held_out(self, fraction: float, seed: int) -> np.ndarray:
        fraction = checked_number("held_out_fraction", fraction, float, least=0, most=1)
        if fraction == 0:
            return np.zeros(len(self), bool)
        codes, prompts = pd.factorize(np.array(self.prompts, dtype=object))
        return np.array([_hash_place(prompt, seed) < fraction for prompt in prompts], dtype=bool)[codes]

    def flipped(self, rate: float, seed: int = 0) -> "FeedbackTable":
        """The same images with contradictions: each like, and each comparison, is turned by chance.

        Comparisons are those of what was meant, with `pair_ids` too: methods that learn from likes and methods that
        learn from comparisons see the same share of contradictions.

        Args:
            rate: share that is turned, in [0, 0.5]; above a half the user would mean the opposite.
            seed: of the contradictions.

        >>> table = make_feedback(["a.png", "b.png"], ["a star"] * 2, [True, False])
        >>> table.flipped(0.0).is_desirable.tolist()
        [True, False]
        """
        rate = checked_number("rate", rate, float, least=0, most=0.5)
        turned = np.random.default_rng([seed, 0]).random(len(self)) < rate
        comparisons = self.comparisons if rate == 0 or not len(self.pairs) else self.pairs
        if comparisons is not None:
            swapped = np.random.default_rng([seed, 1]).random(len(comparisons)) < rate
            comparisons = np.where(swapped[:, None], comparisons[:, ::-1], comparisons)
        return replace(self, is_desirable=self.is_desirable ^ turned, comparisons=comparisons)

    def shuffled_likes(self, seed: int) -> "FeedbackTable":
        """The same images with their likes, and with them their weights, permuted: a control without preference."""
        order, no_ids = np.random.default_rng(seed).permutation(len(self)), np.full(len(self), -1)
        weights = None if self.weights is None else self.weights[order]
        return FeedbackTable(self.images, self.prompts, self.is_desirable[order], no_ids, weights=weights)

    def to_frame(self) -> pd.DataFrame:
        """As a data frame with the columns image, prompt, is_desirable, pair_id and, where known, weight."""
        columns = {"image": [str(path) for path in self.images], "prompt": self.prompts}
        columns |= {"is_desirable": self.is_desirable, "pair_id": self.pair_ids}
        return pd.DataFrame(columns | ({} if self.weights is None else {"weight": self.weights}))


def make_feedback(
    images: Iterable[str | Path], prompts: Iterable[str], liked: Iterable, pair_ids: Iterable[int] | None = None
) -> FeedbackTable:
    """Build a table from lists; `liked` may hold bools, 0/1 or "like"/"dislike".

    Raises:
        ValueError: if the lists differ in length, or one of the values has no meaning; the sentence names the row.

    >>> str(make_feedback(["a.png", "b.png"], ["a star", "a star"], ["like", "dislike"]))
    '2 images, 1 liked, 1 disliked, 1 prompts'
    """
    paths = tuple(Path(image).absolute() for image in images)
    texts = tuple(check_prompt(value, f"row {row}") for row, value in enumerate(prompts))
    labels = np.array([parse_label(value, f"row {row}") for row, value in enumerate(liked)], dtype=bool)
    pairs = np.full(len(paths), -1)
    if pair_ids is not None:
        pairs = whole_numbers(pd.Series(list(pair_ids), dtype=object), "pair_ids", "pair_id", least=-1, blank=-1)
    return FeedbackTable(paths, texts, labels, pairs)


def read_feedback(
    source: str | Path,
    *,
    partition: str | None = None,
    ties: str | None = None,
    image_folder: str | Path | None = None,
    score: str | None = None,
    rule: str | None = None,
    threshold: float | None = None,
    weight_scale: float | None = None,
    strict: bool = False,
) -> FeedbackTable:
    """Read likes and dislikes from a file or a folder.

    A file (.csv, .tsv, .jsonl, .parquet, or .json with a list of rows) needs the columns `image` (path relative to
    `image_folder`), `prompt` and `liked` (0/1, true/false, like/dislike); `file_name`, `image_path`, `caption`, `text`,
    `is_desirable` and `label` are taken as their synonyms; `pair_id` and `weight` are kept where present. Instead of
    `liked` it may have `split`, as the authors' `train_processed_v3.csv`, or `rank` (1 is the best), as ImageRewardDB's
    metadata, or any column of scores that `score` names. A .json file may hold rankings as HPDv2's or HPDv3's too, see
    `dkto.data.votes.read_rankings`. What spreadsheets write is taken, see `dkto.data.tables`. The ratings of Simulacra
    Aesthetic Captions (.sqlite) and the results of open-image-preferences are read too, see `dkto.data.published`.

    A folder needs `liked/` and `disliked/`; the prompt of `x.png` is in `x.txt` beside it, in a
    `metadata.csv`, `.jsonl` or `.parquet` (`file_name`, `caption`) in that folder or the one above, or inside the PNG,
    as AUTOMATIC1111's web UI writes it. A warning names what a folder holds and is not read.

    A row that cannot be used (its image does not exist, its prompt is empty, its label is blank) is set aside with its
    reason, and a warning counts them; `dkto.data.sources` says which rows these are, and what is refused as a whole.

    Args:
        source: the file or folder.
        partition: for splits and rankings, which images count as liked: "at_least_once" (the
            default, the paper's choice), "always" or, for rankings, "mostly"; see `dkto.data.votes.PARTITIONS`. For
            scores it makes one row of an image's several judgements.
        ties: for rankings, what an equal rank says, and for scores, what one on the threshold says: "ignore" (the
            default), "liked" or "disliked".
        image_folder: where the images of a file lie; the file's own folder if not given.
        score: name of a column with numbers, higher is better, from which likes are made; a column `user` or `user_id`
            says who gave each.
        rule: how a score becomes a like: "median" (the default), "fixed" or "user_z", see `dkto.data.scores`.
        threshold: the score above which "fixed" likes, or the z-score above which "user_z" does (default 0).
        weight_scale: keep 1 + weight_scale x distance from the threshold as the weight of each row, which the objective
            tgo reads; no weights if not given.
        strict: raise at the first row or image that cannot be used.

    Raises:
        FileNotFoundError: if the source does not exist, or no row is left and an image of the first does not exist.
        ValueError: if a column is missing or there twice, the labels are no likes, a pair_id is no whole number,
            a file name leaves its folder, an option does not apply to the source, or no row can be used. The message
            names the row.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"feedback source {source} does not exist")
    if score is None:
        refuse_unused("no column of scores is named", rule=rule, threshold=threshold, weight_scale=weight_scale)
    aside = SetAside(source.name, strict)
    if source.is_dir():
        refuse_unused(f"{source} is a folder", partition=partition, ties=ties, image_folder=image_folder, score=score)
        columns = read_folder(source, aside)
    elif source.is_file():
        images = Folder(source.parent if image_folder is None else Path(image_folder))
        if score is None:
            columns = read_file(source, images, partition, ties, aside)
        else:
            how = ScoreRule(score, rule or "median", threshold, weight_scale or 0.0)
            columns = read_scores(source, images, how, partition, ties, aside)
    else:
        raise ValueError(f"feedback source {source} must be a file or a folder, and is neither")
    set_aside = aside.records()
    reasons = commonest_reasons(each["reason"] for each in set_aside)
    if len(columns.images) == 0:
        text = f"{source} holds no feedback: expected at least one image"
        kind = type(next(iter(aside.errors.values()), ValueError()))
        raise kind(f"{text}, but each of {len(set_aside)} is set aside: {reasons}" if set_aside else text)
    if set_aside:
        text = f"{source}: rows or images set aside: {len(set_aside)}, kept: {len(columns.images)}"
        warnings.warn(f"{text}; {reasons}", stacklevel=2)
    pair_ids = np.full(len(columns.images), -1) if columns.pair_ids is None else columns.pair_ids
    images, prompts = tuple(columns.images), tuple(columns.prompts)
    found = (columns.is_desirable, pair_ids, columns.comparisons, columns.counts, set_aside, columns.weights)
    return FeedbackTable(images, prompts, *found)


def describe_feedback(table: FeedbackTable, held_out_fraction: float, desirable_fraction: float) -> str:
    """What a table holds, and what the sampler makes of it at gamma = `desirable_fraction` (paper 4.3), as text.

    >>> table = make_feedback(["a.png", "b.png", "c.png"], ["x", "x", "y"], [1, 0, 0], pair_ids=[0, 0, -1])
    >>> print(describe_feedback(table, 0.0, 0.8))
    3 images, 1 liked, 2 disliked, 2 prompts
    liked: 33.3 % of the images
    pairs of a liked and a disliked image: 1
    gamma 0.8: a liked image is drawn 8 times as often as a disliked one
    held out by prompt at 0.0: 0 images, 0 liked
    """
    liked, disliked = int(table.is_desirable.sum()), int((~table.is_desirable).sum())
    lines = [str(table), f"liked: {liked / len(table):.1%} of the images".replace("%", " %")]
    lines.append(f"pairs of a liked and a disliked image: {table.count_pairs()}")
    if liked and disliked and not 0 < desirable_fraction < 1:
        drawn = "liked" if desirable_fraction else "disliked"
        lines.append(f"gamma {desirable_fraction}: only {drawn} images are drawn")
    elif liked and disliked:
        ratio = desirable_fraction / liked / ((1 - desirable_fraction) / disliked)
        lines.append(f"gamma {desirable_fraction}: a liked image is drawn {ratio:.3g} times as often as a disliked one")
    else:
        lines.append("one class only: train with desirable_fraction 1 or 0, or with the objective sft")
    held_out = table._held_out(held_out_fraction, seed=0)
    text = f"{held_out.sum()} images, {(held_out & table.is_desirable).sum()} liked"
    return "\n".join([*lines, f"held out by prompt at {held_out_fraction}: {text}"])


def write_feedback(table: FeedbackTable, path: str | Path) -> Path:
    """Write a table as .csv or .parquet with image paths relative to the file's folder (inside which they must lie).

    Comparisons go to a second file beside it, `NAME.pairs.parquet`, which `read_feedback` takes up again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    root = Folder(path.parent)
    frame = table.to_frame()
    frame["image"] = [root.relative(image) for image in table.images]
    frame["liked"] = np.where(frame.pop("is_desirable"), "like", "dislike")
    frame = frame[["image", "prompt", "liked", "pair_id", *(["weight"] if "weight" in frame else [])]]
    write = {".csv": frame.to_csv, ".parquet": frame.to_parquet}.get(path.suffix)
    if write is None:
        raise ValueError(f"feedback is written as .csv or .parquet, got {path.name!r}")
    write_comparisons(path, frame, table.comparisons)
    write_atomically(path, lambda part: write(part, index=False))
    return path


def _hash_place(prompt: str, seed: int) -> float:
    """Where in [0, 1) a prompt falls."""
    text = f"{seed}\0{same_prompt(prompt)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
