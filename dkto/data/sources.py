"""The readers behind `dkto.data.feedback.read_feedback`: files and folders of likes, each to the same five columns."""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from dkto.common.names import check_choice
from dkto.data.comparisons import read_comparisons
from dkto.data.images import IMAGE_SUFFIXES
from dkto.data.tables import TABLE_SUFFIXES, need_columns, read_table, refuse_rows
from dkto.data.votes import (
    AUTHORS_SPLITS,
    PARTITIONS,
    Ranking,
    group_rankings,
    likes_from_votes,
    read_rankings,
    votes_from_rankings,
)

COLUMN_ALIASES = {"file_name": "image", "image_path": "image", "caption": "prompt", "text": "prompt"}
COLUMN_ALIASES |= {"is_desirable": "liked", "label": "liked"}
LIKED = frozenset({"1", "1.0", "true", "like", "liked"})
DISLIKED = frozenset({"0", "0.0", "false", "dislike", "disliked"})
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True)
class Columns:
    """What a reader found; see `dkto.data.feedback.FeedbackTable` for the meaning of each column."""

    images: list[Path]
    prompts: list[str]
    is_desirable: np.ndarray
    pair_ids: np.ndarray | None = None
    comparisons: np.ndarray | None = None
    counts: dict = field(default_factory=dict)


class ImageFolder:
    """A folder that the file names of a table may not leave; folders below it are resolved once each."""

    def __init__(self, folder: Path) -> None:
        self.root = folder.resolve()
        self._parents: dict[str, str] = {}

    def path(self, name: object, where: str) -> Path:
        """The image `name`, which must exist.

        Raises:
            ValueError: if `name` is no file name or leads out of the folder, by ".." or by a link.
            FileNotFoundError: if there is no such file.
        """
        if not isinstance(name, str) or not name or "\0" in name:
            raise ValueError(f"{where}: image must be a file name, got {name!r}")
        path = self._join(name)
        try:
            mode = os.lstat(path).st_mode
        except OSError:
            mode = 0
        if stat.S_ISLNK(mode):
            path = os.path.realpath(path)
            mode = os.stat(path).st_mode if os.path.exists(path) else 0
        if not Path(path).is_relative_to(self.root):
            raise ValueError(f"{where}: image {name!r} leaves the folder {self.root}")
        if not stat.S_ISREG(mode):
            raise FileNotFoundError(f"{where}: image {name!r} does not exist in {self.root}")
        return Path(path)

    def relative(self, path: Path) -> str:
        """`path` as seen from the folder, in which it must lie."""
        return str(Path(self._join(str(path))).relative_to(self.root))

    def _join(self, name: str) -> str:
        head, tail = os.path.split(name)
        if tail in ("", ".", ".."):
            head, tail = name, ""
        if head not in self._parents:
            self._parents[head] = os.path.realpath(self.root / head)
        return os.path.join(self._parents[head], tail) if tail else self._parents[head]


def parse_label(value: object, where: str) -> bool:
    """A like or a dislike from any of its spellings.

    >>> parse_label("Like", "row 1"), parse_label(0, "row 2")
    (True, False)
    """
    text = str(value).strip().lower()
    if text in LIKED or text in DISLIKED:
        return text in LIKED
    raise ValueError(f"{where}: liked must be 0/1, true/false or like/dislike, got {value!r}")


def read_file(source: Path, images: ImageFolder, partition: str | None, ties: str | None) -> Columns:
    """Likes, splits or ranks from a file; see `dkto.data.feedback.read_feedback`."""
    if source.suffix.lower() == ".json":
        return _rankings(list(read_rankings(source)), images, source.name, partition, ties)
    if source.suffix.lower() not in TABLE_SUFFIXES:
        known = ", ".join(TABLE_SUFFIXES)
        raise ValueError(f"{source} must be a {known} or .json file, or a folder, got {source.suffix!r}")
    frame = _known_columns(read_table(source), source)
    verdict = next((name for name in ("liked", "split", "rank") if name in frame), "liked")
    need_columns(frame.columns, ("image", "prompt", verdict), str(source))
    _check_prompts(frame["prompt"], source.name)
    if verdict == "rank":
        return _rankings(list(group_rankings(frame, source.name)), images, source.name, partition, ties)
    refuse_unused(f"{source.name} holds no ranking", ties=ties)
    counts = {}
    if verdict == "split":
        liked, counts = _split_labels(frame["split"], source.name, partition)
    else:
        refuse_unused(f"{source.name} holds likes already", partition=partition)
        liked = _labels(frame["liked"], source.name)
    paths = [images.path(name, f"{source.name}, row {row}") for row, name in enumerate(frame["image"], 1)]
    pair_ids = _pair_ids(frame["pair_id"], source.name) if "pair_id" in frame else None
    return Columns(paths, frame["prompt"].tolist(), liked, pair_ids, read_comparisons(source, frame), counts)


def read_folder(source: Path) -> Columns:
    """The images of `liked/` and `disliked/` with their prompts; see `dkto.data.feedback.read_feedback`."""
    inside = ImageFolder(source)
    told = _metadata(source, inside)
    images, prompts, labels = [], [], []
    for name in ("liked", "disliked"):
        folder = source / name
        if not folder.is_dir():
            raise ValueError(f"{source} must hold the folders liked/ and disliked/; {name}/ is missing")
        told |= _metadata(folder, inside)
        for file in sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES):
            path, text = inside.path(str(file.relative_to(source)), str(folder)), file.with_suffix(".txt")
            if path not in told and not text.is_file():
                raise FileNotFoundError(
                    f"{file} has no prompt: expected it in {text.name} beside the image or in {METADATA_NAMES[0]}"
                )
            images.append(path)
            if path not in told:
                text = inside.path(str(text.relative_to(source)), str(folder))
            prompts.append(told[path] if path in told else text.read_text().strip())
            labels.append(name == "liked")
    return Columns(images, prompts, np.array(labels, dtype=bool))


def refuse_unused(why: str, **options: object) -> None:
    """Raise if an option was given that has nothing to act on."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}={str(value)!r} has no meaning here: {why}")


def _known_columns(frame: pd.DataFrame, source: Path) -> pd.DataFrame:
    names: dict[str, str] = {}
    for column in map(str, frame.columns):
        meaning = COLUMN_ALIASES.get(column, column)
        if meaning in names:
            raise ValueError(f"{source} has two columns for {meaning}: {names[meaning]} and {column}; keep one")
        names[meaning] = column
    return frame.set_axis(list(names), axis=1)


def _check_prompts(prompts: pd.Series, where: str) -> None:
    refuse_rows(prompts, (isinstance(prompt, str) for prompt in prompts), where, "prompt must be text")


def _labels(values: pd.Series, name: str) -> np.ndarray:
    codes, spellings = pd.factorize(values, use_na_sentinel=False)
    first_rows = np.unique(codes, return_index=True)[1]
    known = [parse_label(value, f"{name}, row {row + 1}") for value, row in zip(spellings, first_rows, strict=True)]
    return np.array(known, dtype=bool)[codes]


def _split_labels(values: pd.Series, name: str, partition: str | None) -> tuple[np.ndarray, dict]:
    partition = partition or "at_least_once"
    check_choice("partition", partition, ("at_least_once", "always"))
    refuse_rows(values, values.isin(list(AUTHORS_SPLITS)), name, f"split must be one of {', '.join(AUTHORS_SPLITS)}")
    liked = {split: rules[partition == "always"] for split, rules in AUTHORS_SPLITS.items()}
    counts = {"partition": PARTITIONS[partition]} | {split: int((values == split).sum()) for split in AUTHORS_SPLITS}
    return values.map(liked).to_numpy(bool), counts


def _pair_ids(values: pd.Series, name: str) -> np.ndarray:
    numbers = pd.to_numeric(values, errors="coerce").to_numpy(float)
    refuse_rows(values, numbers == np.floor(numbers), name, "pair_id must be an integer, -1 for none")
    return numbers.astype(np.int64)


def _metadata(folder: Path, inside: ImageFolder) -> dict[Path, str]:
    told = {}
    for path in (folder / name for name in METADATA_NAMES if (folder / name).is_file()):
        frame = _known_columns(read_table(path), path)
        need_columns(frame.columns, ("image", "prompt"), str(path))
        _check_prompts(frame["prompt"], str(path))
        below = folder.resolve().relative_to(inside.root)
        for row, (name, prompt) in enumerate(zip(frame["image"], frame["prompt"], strict=True), 1):
            told[inside.path(str(below / str(name)), f"{path.name}, row {row}")] = prompt
    return told


def _rankings(
    rankings: list[Ranking], images: ImageFolder, name: str, partition: str | None, ties: str | None
) -> Columns:
    found: dict[str, Path | None] = {}
    for number, ranking in enumerate(rankings, 1):
        for image in ranking.images:
            if image not in found:
                try:
                    found[image] = images.path(image, f"{name}, ranking {number}")
                except FileNotFoundError:
                    found[image] = None
    votes = votes_from_rankings(rankings)
    there = votes["image_0"].map(found).notna() & votes["image_1"].map(found).notna()
    absent = [image for image, path in found.items() if path is None]
    likes = likes_from_votes(votes[there], partition or "at_least_once", ties or "ignore")
    counts = {"rankings": len(rankings), "images_not_there": len(absent), **likes.counts}
    if absent and not len(likes.images):
        raise FileNotFoundError(f"{name}: none of its images exists in {images.root}, for instance {absent[0]!r}")
    paths = [found[image] for image in likes.images]
    return Columns(paths, list(likes.prompts), likes.is_desirable, comparisons=likes.pairs, counts=counts)
