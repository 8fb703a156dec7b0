"""The readers behind `dkto.data.feedback.read_feedback`: files and folders of likes, each to the same five columns.

A row that cannot be used is set aside with its reason: its image does not exist, its prompt is empty, its label is
blank or a word that is neither a like nor a dislike. What shows that the whole file means something else is refused: a
column that is missing, is there twice or holds images; a label that is another number than 0 or 1, as of a rating;
labels of which only one side is known; a `pair_id` that is no whole number; an image that leaves its folder.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from dkto.common.names import check_choice, shown
from dkto.data.comparisons import read_comparisons
from dkto.data.folders import Folder, OutsideError, listed_images, prompt_beside, warn_unread
from dkto.data.images import IMAGE_SUFFIXES
from dkto.data.published import SQLITE_SUFFIXES, holds_preferences, preference_votes
from dkto.data.tables import (
    TABLE_SUFFIXES,
    UNPACK,
    columns_by_meaning,
    need_columns,
    plain_name,
    read_table,
    read_values,
    table_of_objects,
    whole_numbers,
)
from dkto.data.texts import NO_VALUE, clean_prompt
from dkto.data.votes import (
    AUTHORS_SPLITS,
    IMAGE_KEYS,
    PARTITIONS,
    Ranking,
    group_rankings,
    likes_from_votes,
    numbers_of,
    ranking_of,
    votes_from_rankings,
)

COLUMN_ALIASES = {"file_name": "image", "image_path": "image", "caption": "prompt", "text": "prompt"}
COLUMN_ALIASES |= {"img_path": "image", "is_desirable": "liked", "label": "liked"}
COLUMNS = frozenset({*COLUMN_ALIASES, *COLUMN_ALIASES.values(), "split", "rank", "prompt_id", "pair_id", "weight"})
VERDICTS = ("liked", "split", "rank")
# the last words of each are what spreadsheets of other languages write
LIKED = frozenset({"1", "1.0", "true", "like", "liked", "yes", "wahr", "vrai", "vero", "verdadero", "waar"})
DISLIKED = frozenset({"0", "0.0", "false", "dislike", "disliked", "no", "falsch", "faux", "falso", "onwaar"})
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
LARGEST_WEIGHT = 1e20  # training takes them as float32
SAID = 3  # how many reasons a sentence names


@dataclass(frozen=True)
class Columns:
    """What a reader found; see `dkto.data.feedback.FeedbackTable` for the meaning of each column."""

    images: list[Path]
    prompts: list[str]
    is_desirable: np.ndarray
    pair_ids: np.ndarray | None = None
    comparisons: np.ndarray | None = None
    counts: dict = field(default_factory=dict)
    weights: np.ndarray | None = None


class SetAside:
    """Rows of a source that cannot be used, with their reasons; the first one is raised if the reading is strict."""

    def __init__(self, where: str, strict: bool) -> None:
        self.where, self.strict = where, strict
        self.errors: dict[object, Exception] = {}  # by the row
        self._images: dict[object, object] = {}

    def add(self, row: object, image: object, error: Exception) -> None:
        """Note a row by its number or name, with the image that it names."""
        if self.strict:
            raise error
        self.errors.setdefault(row, error)
        self._images.setdefault(row, image)

    def check(self, frame: pd.DataFrame, column: str, good: Iterable[bool], expected: str) -> None:
        """Note the rows of a frame whose value in a column is not good."""
        for at in np.flatnonzero(~np.fromiter(good, bool)):
            row, value = int(frame.index[at]) + 1, frame[column].iloc[at]
            self.add(row, frame["image"].iloc[at], _sentence(self.where, row, f"{expected}, got {shown(value)}"))

    def kept(self, frame: pd.DataFrame) -> np.ndarray:
        """(N,) bool, which rows of a frame were not noted."""
        return ~np.isin(np.asarray(frame.index) + 1, [row for row in self.errors if isinstance(row, int)])

    def records(self) -> tuple[dict, ...]:
        """As lines for `skipped.jsonl`."""
        return tuple(
            {"source_row": row, "image": str(self._images[row])[:200], "reason": str(error)}
            for row, error in self.errors.items()
        )


def commonest_reasons(reasons: Iterable[str]) -> str:
    """The commonest reasons, each by its first; those that differ in a quoted value, a path or a number are one.

    >>> commonest_reasons(["row 2: image 'b.png' does not exist", "row 3: image 'c.png' does not exist"])
    "row 2: image 'b.png' does not exist (and 1 more like it)"
    """
    first: dict[str, str] = {}
    counts: Counter = Counter()
    for reason in reasons:
        kind = re.sub(r"""(['"]).*?\1|/\S+|\d+""", "", reason)
        first.setdefault(kind, reason)
        counts[kind] += 1
    more = {kind: f" (and {count - 1} more like it)" if count > 1 else "" for kind, count in counts.items()}
    text = "; ".join(first[kind] + more[kind] for kind, _ in counts.most_common(SAID))
    return text + (f"; other reasons: {len(counts) - SAID}" if len(counts) > SAID else "")


def parse_label(value: object, where: str) -> bool:
    """A like or a dislike from any of its spellings.

    >>> parse_label("Like", "row 1"), parse_label(0, "row 2"), parse_label("FALSCH", "row 3")
    (True, False, False)
    """
    text = str(value).strip().lower()
    if text in LIKED or text in DISLIKED:
        return text in LIKED
    raise ValueError(f"{where}: {_LABEL}, got {shown(value)}")


_LABEL = "liked must be 0/1, true/false or like/dislike"


def read_file(source: Path, images: Folder, partition: str | None, ties: str | None, aside: SetAside) -> Columns:
    """Likes, splits or ranks from a file; see `dkto.data.feedback.read_feedback`."""
    suffix = source.suffix.lower()
    if suffix in SQLITE_SUFFIXES:
        raise ValueError(f"{source} holds ratings, not likes: name them by score='rating', and a rule")
    if suffix not in (*TABLE_SUFFIXES, ".json"):
        known = ", ".join(TABLE_SUFFIXES)
        raise ValueError(f"{source} must be a {known} or .json file, or a folder, got {source.suffix!r}")
    if suffix == ".json":
        values = read_values(source)
        if not _are_rows(values):
            return _rankings(_entries(values, source, aside), images, partition, ties, aside)
        frame = table_of_objects(values, str(source), COLUMNS)
    elif suffix == ".parquet" and holds_preferences(source):
        return _preferences(source, images, partition, ties, aside)
    else:
        frame = read_table(source, COLUMNS)
    named = frame.attrs.get("columns", ())
    frame = _known_columns(frame, source)
    verdict = next((name for name in VERDICTS if name in frame), "liked")
    need_columns(frame.columns, ("image", "prompt", verdict), str(source), named)
    frame["prompt"] = checked_prompts(frame, aside)
    if verdict == "rank":
        return _rankings(_ranked(frame, aside), images, partition, ties, aside)
    refuse_unused(f"{source.name} holds no ranking", ties=ties)
    counts = {}
    if verdict == "split":
        liked, counts = _split_labels(frame, partition, aside)
    else:
        refuse_unused(f"{source.name} holds likes already", partition=partition)
        liked = _labels(frame, aside)
    weights = _weights(frame, aside) if "weight" in frame else None
    paths = find_images(frame, images, aside)
    pair_ids = None
    if "pair_id" in frame:
        pair_ids = whole_numbers(frame["pair_id"], source.name, "pair_id", least=-1, blank=-1)
    kept = aside.kept(frame)
    comparisons = read_comparisons(source, frame)
    if not kept.all():
        rows = np.flatnonzero(kept)
        paths, liked = [paths[row] for row in rows], liked[rows]
        pair_ids = None if pair_ids is None else pair_ids[rows]
        weights = None if weights is None else weights[rows]
        if comparisons is not None:
            comparisons = np.where(kept, np.cumsum(kept) - 1, -1)[comparisons]
            comparisons = comparisons[(comparisons >= 0).all(1)]
        frame = frame.iloc[rows]
    prompts = frame["prompt"].tolist()
    if pair_ids is not None:
        _warn_of_mixed_pairs(pair_ids, prompts, source.name)
    return Columns(paths, prompts, liked, pair_ids, comparisons, counts, weights)


def read_folder(source: Path, aside: SetAside) -> Columns:
    """The images of `liked/` and `disliked/` with their prompts; see `dkto.data.feedback.read_feedback`."""
    inside = Folder(source)
    told: dict[Path, str | None] = {}  # the prompts that metadata files name; None where a row is set aside
    _read_metadata(source, inside, aside, told)
    images, prompts, labels, names = [], [], [], ("liked", "disliked")
    unread = listed_images(source, METADATA_NAMES)
    unread = [path for path in (*unread[0], *unread[1]) if path.name not in names]
    for name in names:
        folder = source / name
        if not folder.is_dir():
            raise ValueError(f"{source} must hold the folders liked/ and disliked/; {name}/ is missing")
        _read_metadata(folder, inside, aside, told)
        found, others = listed_images(folder, METADATA_NAMES)
        unread += others
        for file in found:
            path = inside.path(file)
            if told.get(path, "") is None:
                continue  # its row was set aside
            try:
                prompt = told.get(path) or prompt_beside(file, inside, f" or in {METADATA_NAMES[0]}")
            except OutsideError:
                raise
            except (ValueError, FileNotFoundError) as error:
                aside.add(f"{name}/{file.name}", file, error)
                continue
            images.append(path)
            prompts.append(prompt)
            labels.append(name == "liked")
    warn_unread(source, unread, IMAGE_SUFFIXES)
    return Columns(images, prompts, np.array(labels, dtype=bool))


def refuse_unused(why: str, **options: object) -> None:
    """Raise if an option was given that has nothing to act on."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}={str(value)!r} has no meaning here: {why}")


def _sentence(where: str, row: object, text: object, kind: type = ValueError) -> Exception:
    return kind(f"{where}, row {row}: {text}")


def _known_columns(frame: pd.DataFrame, source: Path) -> pd.DataFrame:
    names = columns_by_meaning(frame.columns, COLUMN_ALIASES, str(source))
    return frame.set_axis(list(names), axis=1)


def checked_prompts(frame: pd.DataFrame, aside: SetAside) -> pd.Series:
    """The prompt of each row; rows without one are set aside."""
    texts = {value for value in frame["prompt"] if isinstance(value, str)}  # of a million rows few differ
    cleaned = {text: clean_prompt(text) for text in texts}
    prompts = [cleaned[value] if isinstance(value, str) else "" for value in frame["prompt"]]
    aside.check(frame, "prompt", map(bool, prompts), "prompt must be text")
    return pd.Series(prompts, frame.index, dtype=object)


def _labels(frame: pd.DataFrame, aside: SetAside) -> np.ndarray:
    """(N,) bool; rows without a label are set aside."""
    meaning = dict.fromkeys(LIKED, 1) | dict.fromkeys(DISLIKED, 0)
    texts = [str(value).strip().lower() for value in frame["liked"]]
    codes = np.fromiter((meaning.get(text, -1) for text in texts), np.int8, len(texts))
    unknown = [at for at in np.flatnonzero(codes < 0) if texts[at] not in NO_VALUE]
    words = [at for at in unknown if not _is_number(texts[at])]
    if len(words) < len(unknown) or (words and len(set(codes[codes >= 0].tolist())) < 2):
        at = next((at for at in unknown if _is_number(texts[at])), words[0] if words else 0)
        parse_label(frame["liked"].iloc[at], f"{aside.where}, row {frame.index[at] + 1}")
    aside.check(frame, "liked", codes >= 0, _LABEL)
    return codes == 1


def _weights(frame: pd.DataFrame, aside: SetAside) -> np.ndarray:
    """(N,) float; rows without a weight are set aside."""
    weights = numbers_of(frame["weight"])
    good = (weights >= 0) & (weights <= LARGEST_WEIGHT)
    aside.check(frame, "weight", good, f"weight must be a number from 0 to {LARGEST_WEIGHT:g}")
    return weights


def _is_number(text: str) -> bool:
    try:
        return float(text.replace(",", ".")) is not None
    except ValueError:
        return False


def _split_labels(frame: pd.DataFrame, partition: str | None, aside: SetAside) -> tuple[np.ndarray, dict]:
    partition = partition or "at_least_once"
    check_choice("partition", partition, ("at_least_once", "always"))
    values = frame["split"]
    known = [isinstance(value, str) and value in AUTHORS_SPLITS for value in values]
    aside.check(frame, "split", known, f"split must be one of {', '.join(AUTHORS_SPLITS)}")
    liked = [good and AUTHORS_SPLITS[value][partition == "always"] for value, good in zip(values, known, strict=True)]
    counts = {"partition": PARTITIONS[partition]} | {split: int((values == split).sum()) for split in AUTHORS_SPLITS}
    return np.array(liked, dtype=bool), counts


def find_images(frame: pd.DataFrame, images: Folder, aside: SetAside) -> list[Path | None]:
    """The image of each row; None where the row is set aside."""
    found: dict[str, Path | FileNotFoundError] = {}
    paths: list[Path | None] = []
    for at, name in enumerate(frame["image"]):
        path = found.get(name) if type(name) is str else None
        if path is None:
            path = _found(name, images, aside.where, frame.index[at] + 1)
            if type(name) is str:
                found[name] = path
        if isinstance(path, Exception):
            row = int(frame.index[at]) + 1
            aside.add(row, name, _sentence(aside.where, row, path, type(path)))
            path = None
        paths.append(path)
    return paths


def _found(name: object, images: Folder, where: str, row: int) -> Path | Exception:
    """The image of a row, or why there is none; a ValueError is raised where no image could be meant."""
    if isinstance(name, bytes | dict):
        raise _sentence(where, row, f"image must be a file name, got {shown(name)}; {UNPACK}")
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        return ValueError(f"image must be a file name, got {shown(name)}")
    try:
        return images.path(name)
    except FileNotFoundError as error:
        return error
    except ValueError as error:
        raise _sentence(where, row, error) from None


def _warn_of_mixed_pairs(pair_ids: np.ndarray, prompts: list[str], where: str) -> None:
    has_id = pair_ids >= 0
    pairs = pd.DataFrame({"pair_id": pair_ids, "prompt": pd.factorize(np.array(prompts, dtype=object))[0]})[has_id]
    bounds = pairs.groupby("pair_id")["prompt"].agg(["min", "max"])
    mixed = bounds.index[bounds["min"] != bounds["max"]]
    if len(mixed):
        text = f"{where}: {len(mixed)} pair ids join images of different prompts, the first {mixed[0]}"
        warnings.warn(f"{text}: Diffusion-DPO would compare them", stacklevel=2)


def _read_metadata(folder: Path, inside: Folder, aside: SetAside, told: dict[Path, str | None]) -> None:
    """Note the prompt of each image that a metadata file of a folder names; an image with two of them has none."""
    for path in (folder / name for name in METADATA_NAMES if (folder / name).is_file()):
        path = inside.path(path, "file")
        frame = _known_columns(read_table(path, COLUMNS), path)
        need_columns(frame.columns, ("image", "prompt"), str(path), frame.attrs.get("columns", ()))
        below = SetAside(path.name, aside.strict)
        prompts = checked_prompts(frame, below)
        at = folder.resolve().relative_to(inside.root)
        names = [str(at / name) if isinstance(name, str) and name else name for name in frame["image"]]
        paths = find_images(frame.assign(image=names), inside, below)
        for row, error in below.errors.items():
            aside.add(f"{path.relative_to(inside.root)}, row {row}", below._images[row], error)
        for row, (image, prompt) in enumerate(zip(paths, prompts, strict=True), 1):
            if image is None or told.setdefault(image, prompt or None) == (prompt or None):
                continue
            told[image] = None
            if prompt:
                place = f"{path.relative_to(inside.root)}, row {row}"
                about = f"{shown(image.name)} has another prompt in an earlier row: keep one of them"
                aside.add(place, image, ValueError(f"{place}: {about}"))


def _are_rows(values: object) -> bool:
    """Whether a .json file holds one object per image, not one per ranking."""
    rows = isinstance(values, list) and all(isinstance(each, dict) for each in values)
    if not rows or any(isinstance(each.get(key), list) for each in values for key in IMAGE_KEYS):
        return False
    names = {COLUMN_ALIASES.get(plain_name(name), plain_name(name)) for each in values for name in each}
    return "image" in names and not names.isdisjoint(VERDICTS)


def _entries(values: object, source: Path, aside: SetAside) -> list[Ranking]:
    if not isinstance(values, list):
        raise ValueError(f"{source} must hold a list of rankings, got {type(values).__name__}")
    rankings = []
    for number, entry in enumerate(values, 1):
        try:
            rankings.append(ranking_of(entry, f"{source.name}, entry {number}"))
        except ValueError as error:
            aside.add(f"entry {number}", "", error)
    return rankings


def _ranked(frame: pd.DataFrame, aside: SetAside) -> list[Ranking]:
    ranks = numbers_of(frame["rank"])
    aside.check(frame, "rank", np.isfinite(ranks), "rank must be a number, 1 for the best")
    names = (isinstance(name, str) and bool(name.strip()) for name in frame["image"])
    aside.check(frame, "image", names, "image must be a file name")
    kept = aside.kept(frame)
    return list(group_rankings(frame.assign(rank=ranks)[kept], aside.where)) if kept.any() else []


def _rankings(
    rankings: list[Ranking], images: Folder, partition: str | None, ties: str | None, aside: SetAside
) -> Columns:
    places: dict[str, str] = {}
    for number, ranking in enumerate(rankings, 1):
        for image in ranking.images:
            places.setdefault(image, f"ranking {number}")
    counts = {"rankings": len(rankings)}
    return _voted(votes_from_rankings(rankings), places, images, partition, ties, aside, counts)


def _preferences(source: Path, images: Folder, partition: str | None, ties: str | None, aside: SetAside) -> Columns:
    votes, places = [], {}
    for row, found in preference_votes(source):
        if isinstance(found, str):
            aside.add(row, "", _sentence(aside.where, row, found))
            continue
        votes += found
        for image_0, image_1, *_ in found[:1]:
            places.setdefault(image_0, f"row {row}")
            places.setdefault(image_1, f"row {row}")
    frame = pd.DataFrame(votes, columns=["image_0", "image_1", "prompt", "label_0", "label_1"])
    return _voted(frame, places, images, partition, ties, aside, {})


def _voted(
    votes: pd.DataFrame,
    places: dict[str, str],
    images: Folder,
    partition: str | None,
    ties: str | None,
    aside: SetAside,
    counts: dict,
) -> Columns:
    """Likes of votes on images, each of which has its place in the source."""
    found: dict[str, Path | None] = {}
    for image, place in places.items():
        where = f"{aside.where}, {place}"
        try:
            found[image] = images.path(image)
        except FileNotFoundError as error:
            aside.add(f"{place}, {image}", image, FileNotFoundError(f"{where}: {error}"))
            found[image] = None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    there = votes["image_0"].map(found).notna() & votes["image_1"].map(found).notna()
    absent = [image for image, path in found.items() if path is None]
    likes = likes_from_votes(votes[there], partition or "at_least_once", ties or "ignore")
    if absent and not len(likes.images):
        text = f"{aside.where}: none of its images exists in {images.root}, for instance {shown(absent[0])}"
        raise FileNotFoundError(text)
    counts = {**counts, "images_not_there": len(absent), **likes.counts}
    paths = [found[image] for image in likes.images]
    return Columns(paths, list(likes.prompts), likes.is_desirable, comparisons=likes.pairs, counts=counts)
