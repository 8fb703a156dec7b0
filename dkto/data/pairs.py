"""Pairs that carry their images, as Pick-a-Pic v2's parquet shards, to image files and a table of single likes.

    likes/
      pairs.json                    what it is made from
      images/ab/abcd....jpg         each image once, named by its uid
      votes/SHARD.parquet           the comparisons of one shard, written when its images are
      votes/SHARD.skipped.jsonl     its rows that could not be used, with their reason
      likes_RULE.parquet            the table, for `dkto.data.feedback.read_feedback`; RULE is the partition
      likes_RULE.json               the rules and the counts
      skipped.jsonl                 all rows that could not be used

Shards are read a few rows at a time: memory holds the images of one row group at most, whatever the number and size of
the shards. Every file is whole or absent; a second call goes on where the first stopped, and with another rule it only
counts the votes again.
"""

import glob
import hashlib
import io
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image

from dkto.common.files import claim, read_records, write_atomically, write_json, write_records
from dkto.common.names import check_choice
from dkto.common.progress import progress
from dkto.data.feedback import FeedbackTable, write_feedback
from dkto.data.images import MAX_PIXELS
from dkto.data.tables import need_columns, open_parquet
from dkto.data.votes import PAPER_COUNTS, PARTITIONS, TIE_RULES, likes_from_votes

COLUMNS = ("jpg_0", "jpg_1", "label_0", "label_1", "caption", "image_0_uid", "image_1_uid")
VOTES = ["image_0", "image_1", "prompt", "label_0"]
LABEL_FLAG = "has_label"  # false where nobody judged the pair; may be absent
IMAGE_ENDINGS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}
STAMPED = 65_536  # bytes at the end of a shard by which it is known again
ROWS_AT_ONCE = 16  # about 10 MB of Pick-a-Pic
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


def convert_pairs(
    source: str | Path,
    output_dir: str | Path,
    *,
    partition: str = "at_least_once",
    ties: str = "ignore",
    files: str = "*.parquet",
) -> Path:
    """Unpack pairs in the Pick-a-Pic v2 schema and write the table of single likes (paper 5.1.1).

    Args:
        source: a parquet file, a folder of them, a pattern such as "data/train-*.parquet", or the hub id of a
            data set, whose shards are then fetched one at a time and removed after use.
        output_dir: folder for images, votes and table; what is in it already is kept.
        partition: which images count as liked: "at_least_once" (the paper's choice), "always" or "mostly", see
            `dkto.data.votes.PARTITIONS`.
        ties: what a tie makes of its two images: "ignore", "liked" or "disliked"; the paper does not state its own.
        files: for a folder or a hub id, the pattern that the shards' names match, for instance "data/train-*".

    Returns:
        Path of the table, `likes_RULE.parquet` in `output_dir`; its counts lie beside it as .json.

    Raises:
        FileNotFoundError: if the source is nowhere to be found or holds no shard.
        ValueError: if a shard lacks a column or has a label that is none, or the folder holds other pairs or a shard
            as it was before it changed.
    """
    check_choice("partition", partition, PARTITIONS)
    check_choice("ties", ties, TIE_RULES)
    output_dir = Path(output_dir)
    shards = list_shards(str(source), files, output_dir / "fetched")
    for folder in ("images", "votes"):
        (output_dir / folder).mkdir(parents=True, exist_ok=True)
    claim(output_dir / "pairs.json", {"source": str(source), "files": files}, "pairs")
    for shard in progress(shards, desc="unpacking pairs", unit="shard"):
        votes, stamp = output_dir / "votes" / f"{shard.name}.parquet", output_dir / "votes" / f"{shard.name}.sha256"
        if not votes.exists():
            with shard.local() as path:
                _unpack(path, shard.name, output_dir)
            write_atomically(stamp, lambda part, text=shard.stamp: part.write_text(text))
        elif stamp.exists() and stamp.read_text() != shard.stamp:
            sentence = f"{shard.name} was unpacked into {output_dir} before it changed"
            raise ValueError(f"{sentence}: choose another output_dir")
    shutil.rmtree(output_dir / "fetched", ignore_errors=True)
    return _write_likes(output_dir, shards, partition, ties)


@dataclass(frozen=True)
class Shard:
    """One parquet file, here or on the hub; `local` gives it as a file for the length of a `with` block.

    `stamp` is a hash of a local file's end, where parquet keeps its table of contents; "" on the hub.
    """

    name: str
    local: Callable
    stamp: str = ""


def _stamp(path: Path) -> str:
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - STAMPED))
        return hashlib.sha256(f"{size} ".encode() + file.read()).hexdigest()


def list_shards(source: str, files: str, fetched: Path) -> list[Shard]:
    """The shards behind a path, a pattern or a hub id, sorted by name."""
    if Path(source).is_dir():
        paths = sorted(p for p in Path(source).rglob("*.parquet") if fnmatch(p.name, files))
        where = f"folder {source}"
    else:
        paths = sorted(Path(p) for p in glob.glob(source))
        where = f"pattern {source}"
    if paths:
        return [Shard(_shard_name(str(path)), partial(nullcontext, path), _stamp(path)) for path in paths]
    if Path(source).is_dir() or source.count("/") != 1 or glob.has_magic(source) or source.endswith(".parquet"):
        raise FileNotFoundError(f"{where} holds no parquet file that matches {files!r}")
    names = _hub_files(source, files)
    return [Shard(_shard_name(name), partial(_from_hub, source, name, fetched)) for name in names]


def _shard_name(path: str) -> str:
    return f"{Path(path).stem}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def _hub_files(source: str, files: str) -> list[str]:
    from huggingface_hub import HfApi

    try:
        names = sorted(HfApi().list_repo_files(source, repo_type="dataset"))
    except Exception as error:
        raise FileNotFoundError(
            f"pairs {source!r} are neither a parquet file, a folder, a pattern that matches something, nor a hub id "
            f"that can be reached ({type(error).__name__})"
        ) from error
    found = [n for n in names if n.endswith(".parquet") and (fnmatch(n, files) or fnmatch(Path(n).name, files))]
    if not found:
        raise FileNotFoundError(f"hub data set {source} holds no parquet file that matches {files!r}")
    return found


@contextmanager
def _from_hub(source: str, name: str, fetched: Path) -> Iterator[Path]:
    """One shard in `fetched`; a download that was cut short goes on, and the file is removed after use."""
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(source, name, repo_type="dataset", local_dir=fetched))
    yield path
    path.unlink()


def _unpack(path: Path, name: str, output_dir: Path) -> None:
    """Write the images of one shard, then its votes."""
    votes, skipped = [], []
    pairs = (pair for batch in _read_rows(path) for pair in batch.to_pylist())
    for row, pair in enumerate(pairs, 1):
        try:
            if not pair.get(LABEL_FLAG, True):
                raise _Unusable("no label")
            label = _label(pair, f"{path.name}, row {row}")
            names = [_write_image(pair[f"image_{i}_uid"], pair[f"jpg_{i}"], output_dir) for i in (0, 1)]
            votes.append((*names, pair["caption"], label))
        except _Unusable as problem:
            skipped.append({"shard": path.name, "row": row, "reason": str(problem)})
    write_records(output_dir / "votes" / f"{name}.skipped.jsonl", skipped)
    table = pd.DataFrame(votes, columns=VOTES)
    write_atomically(output_dir / "votes" / f"{name}.parquet", lambda path: table.to_parquet(path, index=False))


def _read_rows(path: Path) -> Iterator[pa.RecordBatch]:
    # buffered: else every column of a row group, often a gigabyte of images, is read ahead
    with open_parquet(path, str(path), buffer_size=1 << 20, pre_buffer=False) as file:
        found = file.schema_arrow.names
        need_columns(found, COLUMNS, str(path))
        columns = [*COLUMNS, *([LABEL_FLAG] if LABEL_FLAG in found else [])]
        yield from file.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False)


def _label(pair: dict, where: str) -> float:
    label = (pair["label_0"], pair["label_1"])
    if label not in ((1, 0), (0, 1), (0.5, 0.5)):
        raise ValueError(f"{where}: label_0 and label_1 must be 1 and 0, 0 and 1, or 0.5 and 0.5, got {label}")
    if not isinstance(pair["caption"], str):
        raise ValueError(f"{where}: caption must be text, got {pair['caption']!r}")
    return float(label[0])


class _Unusable(Exception):
    """Why a row is set aside."""


def _write_image(uid: object, data: object, output_dir: Path) -> str:
    """Write an image once; returns its path within `output_dir`. Only its header is looked at here."""
    if not isinstance(uid, str) or not uid:
        raise _Unusable(f"image uid must be text, got {uid!r}")
    if not isinstance(data, bytes):
        raise _Unusable(f"image {uid!r} must be bytes, got {type(data).__name__}")
    try:
        with Image.open(io.BytesIO(data), formats=tuple(IMAGE_ENDINGS)) as image:
            size, ending = image.size, IMAGE_ENDINGS[image.format]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _Unusable(f"image {uid!r} is no {', '.join(IMAGE_ENDINGS)}: {error}") from error
    if size[0] * size[1] > MAX_PIXELS:
        raise _Unusable(f"image {uid!r} has {size[0]} x {size[1]} pixels, more than {MAX_PIXELS:,}")
    stem = uid if PLAIN_NAME.fullmatch(uid) else "uid-" + hashlib.sha256(uid.encode()).hexdigest()[:40]
    path = output_dir / "images" / stem[:2].lower() / f"{stem}{ending}"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda part: part.write_bytes(data))
    return str(path.relative_to(output_dir))


def _write_likes(output_dir: Path, shards: list[Shard], partition: str, ties: str) -> Path:
    folder = output_dir / "votes"
    parts = [pd.read_parquet(folder / f"{shard.name}.parquet") for shard in shards]
    parts = [part for part in parts if len(part)] or parts[:1]
    skipped = [line for shard in shards for line in read_records(folder / f"{shard.name}.skipped.jsonl")]
    write_records(output_dir / "skipped.jsonl", skipped)
    reasons = [line["reason"] for line in skipped]
    likes = likes_from_votes(pd.concat(parts, ignore_index=True), partition, ties)
    counts = {
        "shards": len(shards),
        "rows_without_label": reasons.count("no label"),
        "rows_set_aside": len(reasons) - reasons.count("no label"),
        **likes.counts,
        "the paper's counts for all of Pick-a-Pic v2": PAPER_COUNTS,
    }
    if not len(likes.images):
        raise ValueError(
            f"{output_dir}: no image got a like or a dislike; {len(reasons)} rows were set aside, all others are ties"
        )
    images = tuple(output_dir.absolute() / name for name in likes.images)
    no_ids = np.full(len(images), -1)
    table = FeedbackTable(images, tuple(likes.prompts), likes.is_desirable, no_ids, likes.pairs)
    path = write_feedback(table, output_dir / f"likes_{partition}.parquet")
    write_json(path.with_suffix(".json"), counts)
    return path
