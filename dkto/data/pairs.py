"""Tables that carry their images, as Pick-a-Pic's parquet shards, to image files and a table of likes or of scores.

    likes/
      pairs.json                    what it is made from
      images/ab/abcd....jpg         each image once, named by its uid
      votes/SHARD.parquet           the comparisons of one shard, and the reasons of rows that could not be used;
                                    written when its images are, with a hash of the shard
      likes_RULE.parquet            the table, for `dkto.data.feedback.read_feedback`; RULE is the partition
      likes_RULE.json               the rules and the counts
      scores.parquet, scores.json   instead of both, where a row is one image with scores: `read_feedback(..., score=)`
      skipped.jsonl                 all rows that could not be used, with their reason
      .lock                         held by the call that writes here: a second one is refused

Shards are read a few rows at a time: memory holds the images of one row group at most, whatever the number and size of
the shards. Every file is whole or absent; a second call goes on where the first stopped and makes a damaged file again.
With another rule it only counts the votes again.
"""

import glob
import hashlib
import io
import json
import math
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from dkto.common.files import claim, force_all, write_atomically, write_json, write_records
from dkto.common.frames import read_frame, write_frame
from dkto.common.names import check_choice, one_line, shown
from dkto.common.processes import sole_writer
from dkto.common.progress import progress
from dkto.data.feedback import FeedbackTable, write_feedback
from dkto.data.folders import Folder, OutsideError
from dkto.data.images import load_image, open_image
from dkto.data.schemas import NO_LABEL, SCHEMAS, Schema, UnusableError, judged, schema_of, tar_rows
from dkto.data.tables import need_columns, open_parquet
from dkto.data.texts import clean_prompt
from dkto.data.votes import PAPER_COUNTS, PARTITIONS, TIE_RULES, likes_from_votes

VOTES = dict.fromkeys(("image_0", "image_1", "prompt"), "text") | {"label_0": "floating", "row": "integer"}
VOTES |= {"reason": "text", "scores": "text"}
"""Columns of the votes and what they hold; a row with a reason is no vote, one with scores (JSON) has one image."""
STAMP = "shard"
SUFFIXES = (".parquet", ".tar")
FORMATS = ("JPEG", "PNG", "WEBP")
IMAGE_ENDINGS = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp"}  # MPO: a JPEG with more behind it
STAMPED_BLOCKS, STAMPED_BYTES = 256, 4096  # of a shard, spread evenly, by which it is known again
ROWS_AT_ONCE = 16  # about 10 MB of Pick-a-Pic
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


def convert_pairs(
    source: str | Path,
    output_dir: str | Path,
    *,
    partition: str = "at_least_once",
    ties: str = "ignore",
    files: str = "*.parquet",
    strict: bool = False,
) -> Path:
    """Unpack judgements with their images, as Pick-a-Pic's pairs, and write the table of single likes (paper 5.1.1).

    The columns say which form it is, see `dkto.data.schemas.SCHEMAS`: comparisons (Pick-a-Pic, Rapidata's votes,
    open-image-preferences) become likes; images with scores (Rapidata Rich Human Feedback, ImageRewardDB,
    VisionRewardDB, EvalMuse, Civitai's reactions in .tar files) become a table of scores for `read_feedback`.

    Args:
        source: a parquet file, a folder of them, a pattern such as "data/train-*.parquet", or the hub id of a
            data set, whose shards are then fetched one at a time and removed after use.
        output_dir: folder for images, votes and table; what is in it already is kept.
        partition: of comparisons, which images count as liked: "at_least_once" (the paper's choice), "always" or
            "mostly", see `dkto.data.votes.PARTITIONS`.
        ties: what a tie makes of its two images: "ignore", "liked" or "disliked"; the paper does not state its own.
        files: for a folder or a hub id, the pattern that the shards' names match, for instance "data/train-*" or
            "*.tar".
        strict: raise at the first row that cannot be used, instead of setting it aside in `skipped.jsonl`.

    Returns:
        Path of the table, `likes_RULE.parquet` or `scores.parquet` in `output_dir`; its counts lie beside it as .json.

    Raises:
        FileNotFoundError: if the source is nowhere to be found or holds no shard.
        ValueError: if a shard lacks a column or cannot be read, no row of it can be used or, with `strict`, one cannot,
            or the folder holds other pairs or a shard as it was before it changed.
        BlockingIOError: if another call writes there.
    """
    check_choice("partition", partition, PARTITIONS)
    check_choice("ties", ties, TIE_RULES)
    output_dir = Path(output_dir)
    shards = list_shards(str(source), files, output_dir / "fetched")
    with sole_writer(output_dir):
        for folder in ("images", "votes"):
            (output_dir / folder).mkdir(exist_ok=True)
        claim(output_dir / "pairs.json", {"source": str(source), "files": files}, "pairs")
        parts = [
            _votes_of(shard, output_dir, strict) for shard in progress(shards, desc="unpacking pairs", unit="shard")
        ]
        shutil.rmtree(output_dir / "fetched", ignore_errors=True)
        return _write_likes(output_dir, parts, partition, ties)


@dataclass(frozen=True)
class Shard:
    """One parquet file, here or on the hub; `local` gives it as a file for the length of a `with` block.

    `stamp` is a hash of the content: of a local file's size and of blocks spread over it, or the hub's own.
    """

    name: str
    file: str
    local: Callable
    stamp: str


def _stamp(path: Path) -> str:
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        digest = hashlib.sha256(f"{size} ".encode())
        for start in np.linspace(0, max(0, size - STAMPED_BYTES), STAMPED_BLOCKS).astype(int):
            file.seek(int(start))
            digest.update(file.read(STAMPED_BYTES))
    return digest.hexdigest()


def list_shards(source: str, files: str, fetched: Path) -> list[Shard]:
    """The shards behind a path, a pattern or a hub id, sorted by name."""
    if Path(source).is_dir():
        there = (p for p in Path(source).rglob("*") if p.suffix in SUFFIXES)
        found = sorted(p for p in there if fnmatch(p.name, files) and p.name[0] != ".")
        inside = Folder(Path(source))
        try:
            paths = [path for path in found if not path.is_file() or inside.path(path, "shard")]
        except OutsideError as error:
            raise OutsideError(f"{error} by a link: name shards elsewhere by a pattern, '{source}/*.parquet'") from None
        where = f"folder {source}"
    else:
        paths = sorted(Path(p) for p in glob.glob(source))
        where = f"pattern {source}"
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} must be a parquet file, but it is none: a folder, a pipe or a link to nothing")
    if paths:
        return [Shard(_shard_name(str(path)), path.name, partial(nullcontext, path), _stamp(path)) for path in paths]
    if Path(source).is_dir() or source.count("/") != 1 or glob.has_magic(source) or source.endswith(SUFFIXES):
        raise FileNotFoundError(f"{where} holds no parquet file that matches {files!r}")
    found = _hub_files(source, files)
    return [
        Shard(_shard_name(name), Path(name).name, partial(_from_hub, source, name, fetched), found[name])
        for name in sorted(found)
    ]


def _shard_name(path: str) -> str:
    return f"{Path(path).stem}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def _hub_files(source: str, files: str) -> dict[str, str]:
    """Names of the shards, with what the hub calls their content."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    try:
        tree = HfApi().list_repo_tree(source, recursive=True, repo_type="dataset")
        names = {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in tree if isinstance(f, RepoFile)}
    except Exception as error:
        raise FileNotFoundError(
            f"pairs {source!r} are neither a parquet file, a folder, a pattern that matches something, nor a hub id "
            f"that can be reached ({type(error).__name__})"
        ) from error
    found = [n for n in names if n.endswith(SUFFIXES) and (fnmatch(n, files) or fnmatch(Path(n).name, files))]
    if not found:
        raise FileNotFoundError(f"hub data set {source} holds no parquet file that matches {files!r}")
    return {name: names[name] for name in found}


@contextmanager
def _from_hub(source: str, name: str, fetched: Path) -> Iterator[Path]:
    """One shard in `fetched`; a download that was cut short goes on, and the file is removed after use."""
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(source, name, repo_type="dataset", local_dir=fetched))
    yield path
    path.unlink()


def _votes_of(shard: Shard, output_dir: Path, strict: bool) -> pd.DataFrame:
    """The votes of a shard, unpacked now if they are not there, are damaged, or name no shard."""
    path, stamp = output_dir / "votes" / f"{shard.name}.parquet", None
    if path.exists():
        try:
            votes, about = read_frame(path, "votes", VOTES, ("scores",))
            stamp = about.get(STAMP)
        except ValueError:
            stamp = None
    if stamp is None:
        with shard.local() as source:
            write_frame(path, _unpack(source, output_dir, strict), {STAMP: shard.stamp})
        votes, _ = read_frame(path, "votes", VOTES, ("scores",))
    elif stamp != shard.stamp:
        sentence = f"{shard.name} was unpacked into {output_dir} before it changed"
        raise ValueError(f"{sentence}: choose another output_dir")
    elif strict and len(bad := votes[votes["reason"].notna() & (votes["reason"] != NO_LABEL)]):
        raise ValueError(f"{shard.file}, row {bad['row'].iloc[0]}: {bad['reason'].iloc[0]}")
    return votes.assign(shard=shard.file)


def _unpack(path: Path, output_dir: Path, strict: bool) -> pa.Table:
    """Write the images of one shard, on disk when this returns; returns its votes."""
    rows = []
    for row, (schema, given) in enumerate(_read_rows(path), 1):
        try:
            found = judged(schema, given)
            what = "caption" if "caption" in given else "prompt"
            if not (prompt := clean_prompt(_text(found.prompt, what))):
                raise UnusableError(f"{what} must be text, got {shown(found.prompt)}")
            names = [_write_image(uid, data, output_dir) for uid, data in found.images]
            label, scores = -1.0 if found.label is None else found.label, found.scores
            scores = None if scores is None else json.dumps({k: v for k, v in scores.items() if math.isfinite(v)})
            rows.append((names[0], names[-1], prompt, label, row, None, scores))
        except UnusableError as problem:
            if strict and str(problem) != NO_LABEL:
                raise ValueError(f"{path.name}, row {row}: {problem}") from problem
            rows.append((None, None, None, -1.0, row, str(problem), None))
    force_all({output_dir / name for names in rows for name in names[:2] if name})  # also those of a call that died
    kinds = {"text": pa.string(), "floating": pa.float64(), "integer": pa.int64()}
    columns = zip(*rows, strict=True) if rows else [()] * len(VOTES)
    arrays = [pa.array(values, kinds[kind]) for values, kind in zip(columns, VOTES.values(), strict=True)]
    return pa.table(arrays, names=list(VOTES))


def _read_rows(path: Path) -> Iterator[tuple[Schema, dict]]:
    """The rows of a shard, each with the form that it has."""
    if path.suffix == ".tar":
        yield from ((SCHEMAS["civitai"], row) for row in tar_rows(path))
        return
    # buffered: else every column of a row group, often a gigabyte of images, is read ahead
    with open_parquet(path, str(path), buffer_size=1 << 20, pre_buffer=False) as file:
        found = file.schema_arrow.names
        schema = schema_of(found, str(path))
        columns = [*schema.needs, *(name for name in schema.also if name in found)]
        need_columns(found, columns, str(path))
        try:
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
                texts = [i for i, kind in enumerate(batch.schema.types) if pa.types.is_string(kind)]
                for i in texts:  # as bytes: whether they are text is asked row by row
                    batch = batch.set_column(i, batch.schema.names[i], batch.column(i).cast(pa.binary()))
                yield from ((schema, row) for row in batch.to_pylist())
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as Parquet: {one_line(error)}") from error


def _text(value: object, what: str) -> str:
    try:
        text = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        text = None
    if not isinstance(text, str) or not text.strip():
        raise UnusableError(f"{what} must be text, got {shown(value)}")
    return text


def _write_image(uid: object, data: object, output_dir: Path) -> str:
    """Write an image once; returns its path within `output_dir`. Only its header is looked at here.

    Without a uid it is named by its content.
    """
    data = data.get("bytes") if isinstance(data, dict) else data  # {bytes, path}, as `datasets` writes images
    if uid is None:
        uid = f"sha256-{hashlib.sha256(data).hexdigest()[:40]}" if isinstance(data, bytes) else "of the row"
    uid = _text(uid, "image uid")
    if not isinstance(data, bytes):
        raise UnusableError(f"image {shown(uid)} must be bytes, got {type(data).__name__}")
    try:
        with open_image(io.BytesIO(data), shown(uid), FORMATS) as image:
            ending = IMAGE_ENDINGS[image.format]
    except ValueError as error:
        raise UnusableError(str(error)) from error
    stem = uid if PLAIN_NAME.fullmatch(uid) else "uid-" + hashlib.sha256(uid.encode()).hexdigest()[:40]
    path = output_dir / "images" / stem[:2].lower() / f"{stem}{ending}"
    if (there := path.read_bytes() if path.exists() else None) != data:
        if there and _is_image(path):
            raise UnusableError(f"image {shown(uid)} is another one than that of the same uid before")
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda part: part.write_bytes(data), forced=False)
    return str(path.relative_to(output_dir))


def _is_image(path: Path) -> bool:
    """False for what a power cut left of one."""
    try:
        load_image(path)
    except ValueError:
        return False
    return True


def _commonest(reasons: list[str]) -> str:
    """An example of the reason that most have, names and values in it aside."""
    kinds = [re.sub(r"'[^']*'|\(.*\)|\d+", "", reason) for reason in reasons]
    return reasons[kinds.index(Counter(kinds).most_common(1)[0][0])]


def _write_likes(output_dir: Path, parts: list[pd.DataFrame], partition: str, ties: str) -> Path:
    rows = pd.concat(parts, ignore_index=True)
    aside = rows["reason"].notna()
    skipped = rows.loc[aside, ["shard", "row", "reason"]]
    write_records(output_dir / "skipped.jsonl", skipped.to_dict("records"))
    unlabelled = int((skipped["reason"] == NO_LABEL).sum())
    why = f", most of them as: {_commonest(skipped['reason'].tolist())}" if len(skipped) else ""
    scored = rows["scores"].notna() if "scores" in rows else pd.Series(False, rows.index)
    if scored.any():
        return _write_scores(output_dir, rows[~aside], scored[~aside], f"{len(skipped)} of {len(rows)}{why}")
    likes = likes_from_votes(rows[~aside], partition, ties)
    counts = {
        "shards": len(parts),
        "rows_without_label": unlabelled,
        "rows_set_aside": len(skipped) - unlabelled,
        **likes.counts,
        "the paper's counts for all of Pick-a-Pic v2": PAPER_COUNTS,
    }
    if not len(likes.images):
        raise ValueError(
            f"{output_dir}: no image got a like or a dislike; {len(skipped)} of {len(rows)} rows were set aside{why}"
            f"{'' if len(skipped) == len(rows) else '; all others are ties'}; see {output_dir / 'skipped.jsonl'}"
        )
    if len(skipped) > unlabelled:
        text = f"{len(skipped)} of {len(rows)} rows are set aside{why}; see {output_dir / 'skipped.jsonl'}"
        warnings.warn(text, stacklevel=3)
    images = tuple(output_dir.absolute() / name for name in likes.images)
    no_ids = np.full(len(images), -1)
    table = FeedbackTable(images, tuple(likes.prompts), likes.is_desirable, no_ids, likes.pairs)
    path = write_feedback(table, output_dir / f"likes_{partition}.parquet")
    write_json(path.with_suffix(".json"), counts)
    return path


def _write_scores(output_dir: Path, rows: pd.DataFrame, scored: pd.Series, aside: str) -> Path:
    """The table of images with scores, one row each; `aside` says how many rows were set aside, and why."""
    if not scored.all():
        raise ValueError(f"{output_dir}: shards with scores and shards with comparisons need a folder each")
    scores = pd.DataFrame([json.loads(text) for text in rows["scores"]], index=rows.index)
    scores = scores.rename(columns=lambda name: f"{name}_score" if name in ("image", "prompt") else name)
    frame = pd.concat([rows["image_0"].rename("image"), rows["prompt"], scores], axis=1)
    if not aside.startswith("0 "):
        warnings.warn(f"rows set aside: {aside}; see {output_dir / 'skipped.jsonl'}", stacklevel=4)
    path = output_dir / "scores.parquet"
    write_frame(path, frame)
    counts = {"rows": len(frame), "images": frame["image"].nunique(), "rows set aside": aside}
    write_json(path.with_suffix(".json"), counts | {f"scores/{name}": int(scores[name].count()) for name in scores})
    return path
