"""Published data whose tables carry their images: which columns each has, and how a row becomes likes.

A row is a comparison of two images, which a partition makes likes of (`dkto.data.votes`), or one image with scores,
which a rule makes likes of (`dkto.data.scores`). `dkto.data.pairs.convert_pairs` unpacks both. Names of columns are
those of the data cards. For Civitai the card names jpg, json and `meta` only: where the reactions lie (`stats`, under
the names of Civitai's interface) is taken from there and could not be checked.
"""

import json
import tarfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from dkto.common.json_text import parse_json
from dkto.common.names import one_line, shown
from dkto.data.tables import need_columns
from dkto.data.votes import rank_of

NO_LABEL = "no label"
LABEL_FLAG = "has_label"  # false where nobody judged the pair; may be absent
REACTIONS = ("like", "dislike", "heart", "laugh", "cry", "comment")
LARGEST_MEMBER = {"json": 1 << 20, "jpg": 64 << 20}  # bytes of a file within a .tar
MOST_MEMBERS = 10_000_000


class UnusableError(Exception):
    """Why a row is set aside."""


@dataclass(frozen=True)
class Judged:
    """The judgement in a row.

    Attributes:
        prompt: as the row has it.
        images: one or two, each with its name, or None where it has none but its bytes.
        label: of two images 1, 0 or 0.5, for the first, the second or neither; None of one image.
        scores: of one image, by their names; what is no number is NaN.
    """

    prompt: object
    images: tuple[tuple[object, object], ...]
    label: float | None = None
    scores: dict[str, float] | None = None


@dataclass(frozen=True)
class Schema:
    """A published form: the columns that it must have, those that are read where they are there, and their meaning."""

    title: str
    rule: str  # how a row becomes likes, in words
    needs: tuple[str, ...]
    judge: Callable[[dict], Judged]
    also: tuple[str, ...] = ()


def _pick_a_pic(row: dict) -> Judged:
    if not row.get(LABEL_FLAG, True):
        raise UnusableError(NO_LABEL)
    labels = (row["label_0"], row["label_1"])
    if labels not in ((1, 0), (0, 1), (0.5, 0.5)):
        text = f"label_0 and label_1 must be 1 and 0, 0 and 1, or 0.5 and 0.5, got {shown(labels)}"
        raise UnusableError(text)
    sides = tuple((_named(row[f"image_{i}_uid"]), row[f"jpg_{i}"]) for i in (0, 1))
    return Judged(row["caption"], sides, float(labels[0]))


def _named(uid: object) -> object:
    if uid is None:
        raise UnusableError("image uid must be text, got None")
    return uid


def _votes(row: dict) -> Judged:
    votes = [row[f"votes_image{i}"] for i in (1, 2)]
    if not all(type(count) is int and count >= 0 for count in votes) or not any(votes):
        raise UnusableError(f"votes_image1 and votes_image2 must be whole numbers, not both 0, got {shown(votes)}")
    sides = ((row.get("image1_path"), row["image1"]), (row.get("image2_path"), row["image2"]))
    return Judged(row["prompt"], sides, 0.5 * (1 + (votes[0] > votes[1]) - (votes[0] < votes[1])))


def _chosen(row: dict) -> Judged:
    return Judged(row["prompt"], ((None, row["chosen"]), (None, row["rejected"])), 1.0)


def _scored(image: str, prompt: str, *names: str) -> Callable[[dict], Judged]:
    def judge(row: dict) -> Judged:
        values = {name: row[name] for name in names if name in row}
        values |= {name: value.decode(errors="replace") for name, value in values.items() if isinstance(value, bytes)}
        scores = {name: rank_of(value) for name, value in values.items()}
        return Judged(row[prompt], ((None, row[image]),), scores=scores)

    return judge


def _vision_reward(row: dict) -> Judged:
    marks = row["annotation"]
    if not isinstance(marks, dict):
        raise UnusableError(f"annotation must hold a mark for each dimension, got {shown(marks)}")
    scores = {name: rank_of(mark) for name, mark in marks.items()}
    return Judged(row["prompt"], ((row.get("internal_id"), row["image"]),), scores=scores)


def _civitai(row: dict) -> Judged:
    about, counts = row["json"], row["json"].get("stats")
    prompt = about["meta"].get("prompt") if isinstance(about.get("meta"), dict) else None
    if not isinstance(counts, dict):
        raise UnusableError(f"stats must hold the counts of reactions, got {shown(counts)}")
    scores = {name: rank_of(counts.get(f"{name}Count", counts.get(f"{name}CountAllTime"))) for name in REACTIONS}
    return Judged(prompt, ((f"civitai-{row['__key__']}", row["jpg"]),), scores=scores)


RICH = ("alignment_score", "coherence_score", "style_score")
RICH_MORE = tuple(f"{name}_norm" for name in RICH)
RATINGS = ("overall_rating", "image_text_alignment_rating", "fidelity_rating")
SCHEMAS: dict[str, Schema] = {
    "pick_a_pic": Schema(
        "Pick-a-Pic v1 and v2",
        "which of two images was preferred",
        ("jpg_0", "jpg_1", "label_0", "label_1", "caption", "image_0_uid", "image_1_uid"),
        _pick_a_pic,
        (LABEL_FLAG,),
    ),
    "rapidata_votes": Schema(
        "Rapidata's human preferences, open-image-preferences more results",
        "the image with more votes was preferred",
        ("prompt", "image1", "image2", "votes_image1", "votes_image2"),
        _votes,
        ("image1_path", "image2_path"),
    ),
    "open_image_preferences": Schema(
        "open-image-preferences, binarised", "chosen was preferred", ("prompt", "chosen", "rejected"), _chosen
    ),
    "rapidata_rich": Schema(
        "Rapidata Rich Human Feedback",
        "scores from 1 to 5, or in [0, 1] under names that end in _norm",
        ("image", "prompt", *RICH),
        _scored("image", "prompt", *RICH, *RICH_MORE),
        RICH_MORE,
    ),
    "rapidata_rich_32k": Schema(
        "Rapidata Rich Human Feedback 32k",
        "scores from 1 to 5, or in [0, 1] under names that end in _norm",
        ("image_name", "sentence", *RICH),
        _scored("image_name", "sentence", *RICH, *RICH_MORE),
        RICH_MORE,
    ),
    "image_reward_db": Schema(
        "ImageRewardDB with its images",
        "ratings from 1 to 7",
        ("image", "prompt", *RATINGS),
        _scored("image", "prompt", *RATINGS),
    ),
    "vision_reward_db": Schema(
        "VisionRewardDB-Image",
        "a mark for each dimension",
        ("image", "prompt", "annotation"),
        _vision_reward,
        ("internal_id",),
    ),
    "evalmuse": Schema(
        "EvalMuse (T2IEval) with its images",
        "total_score",
        ("image", "prompt", "total_score"),
        _scored("image", "prompt", "total_score"),
    ),
    "civitai": Schema("Civitai, .tar of jpg and json", "counts of reactions", ("__key__", "jpg", "json"), _civitai),
}
"""Every form that is known by its columns; the first whose columns are all there is taken."""


def schema_of(columns: Collection[str], where: str) -> Schema:
    """The form that a table of these columns has.

    Raises:
        ValueError: if it is none; the sentence names what the nearest form lacks.
    """
    for schema in SCHEMAS.values():
        if set(schema.needs) <= set(columns):
            return schema
    nearest = max(SCHEMAS.values(), key=lambda schema: len(set(schema.needs) & set(columns)) / len(schema.needs))
    need_columns(columns, nearest.needs, f"{where} is no form that is known; to be {nearest.title} it")
    raise AssertionError("a nearest form lacks a column")


def tar_rows(path: Path) -> Iterator[dict]:
    """The samples of an uncompressed .tar in the manner of WebDataset: files in a row that share a name, by ending.

    Nothing is unpacked under a name that the archive gives, and links and devices in it are passed over.
    """
    sample: dict = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for number, member in enumerate(archive):
                if number > MOST_MEMBERS:
                    raise tarfile.TarError(f"it has more than {MOST_MEMBERS:,} files")
                key, _, ending = member.name.rpartition("/")[2].partition(".")
                ending = {"jpeg": "jpg"}.get(ending.lower(), ending.lower())
                if not member.isreg() or ending not in LARGEST_MEMBER:
                    continue
                if member.size > LARGEST_MEMBER[ending]:
                    raise tarfile.TarError(f"{shown(member.name)} has {member.size:,} bytes")
                if sample.get("__key__") != key:
                    yield from [sample] if sample else []
                    sample = {"__key__": key}
                sample[ending] = archive.extractfile(member).read()
            yield from [sample] if sample else []
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an uncompressed .tar: {one_line(error)}") from error


def judged(schema: Schema, row: dict) -> Judged:
    """What a row says; an `UnusableError` says why it says nothing."""
    if "json" in schema.needs:
        if missing := [name for name in schema.needs if name not in row]:
            raise UnusableError(f"the sample needs a .jpg and a .json file, {missing[0]} is missing")
        try:
            row = {**row, "json": parse_json(row["json"].decode())}
        except (ValueError, RecursionError, json.JSONDecodeError) as error:
            raise UnusableError(f"its .json file cannot be read: {one_line(error)}") from error
        if not isinstance(row["json"], dict):
            raise UnusableError(f"its .json file must hold an object, got {shown(row['json'])}")
    return schema.judge(row)
