"""Scores of generated images as files beside them: `<folder>/scores/<scorer>.parquet`, only missing ones computed.

A row holds prompt and image number, the score, and a hash of the image file: an image whose content has changed is
scored again, one that was deleted keeps its score. Beside them `<scorer>.json` says which model gave
them, and for which prompts, seeds and weights the images were drawn: scores of others are refused. Whatever a scorer
returned before it failed stays on disk, and what another process wrote meanwhile is kept.
"""

import fcntl
import hashlib
import json
import os
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dkto.common.files import file_sha256, read_json, write_json
from dkto.common.frames import read_frame, write_frame
from dkto.common.names import check_name, printable, shown
from dkto.common.processes import worker_pool
from dkto.common.progress import progress
from dkto.common.settings import checked_number
from dkto.data.images import load_image
from dkto.evaluation.manifest import check_comparable, image_path, read_manifest
from dkto.evaluation.scorers import (
    Scorer,
    check_finite,
    check_scorer_name,
    describe,
    get_scorer,
    raw_scores,
    scorer_name,
)

COLUMNS = {"prompt": "integer", "image": "integer", "score": "floating"}
SECONDS_BETWEEN_WRITES = 2.0


class Scores(dict[tuple[str, str], np.ndarray]):
    """(P, n) scores by (method, scorer name): P prompts, n images each, the same prompts and noise for every method."""

    @property
    def methods(self) -> list[str]:
        """Names of the methods, in the order in which they were given."""
        return list(dict.fromkeys(method for method, _ in self))

    @property
    def scorers(self) -> list[str]:
        """Names of the scorers, in the order in which they were given."""
        return list(dict.fromkeys(scorer for _, scorer in self))

    def __missing__(self, key: tuple[str, str]) -> np.ndarray:
        for what, name, known in zip(("method", "scorer"), key, (self.methods, self.scorers), strict=True):
            check_name(what, name, known, KeyError)
        raise KeyError(f"no scores of {key[0]!r} by {key[1]!r}")


def score_images(
    folder: str | Path, scorer: str | Scorer, *, num_processes: int = 1, batch_size: int = 64
) -> np.ndarray:
    """(P, n) scores of one folder by one scorer: P prompts, n images each; see `score_all`."""
    options = {"num_processes": num_processes, "batch_size": batch_size}
    return score_all({"it": folder}, [scorer], **options)["it", scorer_name(scorer)]


def score_all(
    folders: Mapping[str, str | Path],
    scorers: Sequence[str | Scorer],
    *,
    num_processes: int = 1,
    batch_size: int = 64,
) -> Scores:
    """Scores of folders written by `generate_images`, computed where they are not on disk yet.

    Args:
        folders: image folder (manifest.json and images) of each method by its name.
        scorers: names in `dkto.evaluation.scorers.SCORERS`, or scorers.
        num_processes: workers (0: this process), each with scorers of its own on one thread.
        batch_size: images handed to a scorer at once.

    Raises:
        FileNotFoundError: if a manifest or an image without a score is missing; nothing is scored then.
        KeyError: if no scorer has that name.
        ValueError: if two scorers have one name, the folders were drawn for different prompts, numbers of images or
            seeds, a scorer fails its checks (the sentence names the image of a value that is not finite), or the
            scores on disk come from another model or of other images; what was scored before stays on disk.
    """
    batch_size = checked_number("batch_size", batch_size, least=1)
    num_processes = checked_number("num_processes", num_processes, least=0)
    check_comparable(folders)
    scorers = _distinct(scorers)
    hashes: dict[Path, str | None] = {}
    tables = {
        (name, scorer_name(s)): _Table(Path(folder), s, hashes) for s in scorers for name, folder in folders.items()
    }
    tasks = [
        _Task(key, get_scorer(table.scorer), table.folder, table.prompts, table.missing[start : start + batch_size])
        for key, table in tables.items()
        for start in range(0, len(table.missing), batch_size)
    ]
    if tasks:
        bar = progress(total=sum(len(task.keys) for task in tasks), desc="scoring", unit="image")
        try:
            for task, values, of in _perform(tasks, min(num_processes, len(tasks))):
                tables[task.table].add(task.keys, values, of)
                bar.update(len(values))
        finally:
            bar.close()
            for table in tables.values():
                table.write()
    return Scores({key: table.scores() for key, table in tables.items()})


def _distinct(scorers: Sequence[str | Scorer]) -> list[str | Scorer]:
    """Each scorer once; two of one name would share a file."""
    found: dict[str, str | Scorer] = {}
    for scorer in scorers:
        name = scorer_name(scorer)
        check_scorer_name(name)
        if get_scorer(found.setdefault(name, scorer)) != get_scorer(scorer):
            raise ValueError(
                f"two scorers are named {name!r}: dkto.evaluation.scorers.register_scorer gives one another name"
            )
    return list(found.values())


@dataclass(frozen=True)
class _Task:
    table: tuple[str, str]
    scorer: str | Scorer
    folder: Path
    prompts: list[str]
    keys: list[tuple[int, int]]

    @property
    def paths(self) -> list[Path]:
        return [image_path(self.folder, *key) for key in self.keys]


class _Table:
    """The scores of one folder by one scorer: what is on disk and still holds, and what is new."""

    def __init__(self, folder: Path, scorer: str | Scorer, hashes: dict[Path, str | None]) -> None:
        self.folder, self.scorer, self.hashes = folder, scorer, hashes
        manifest = read_manifest(folder)
        self.prompts: list[str] = manifest["prompts"]
        self.shape = len(self.prompts), manifest["images_per_prompt"]
        self.keys = list(np.ndindex(self.shape))  # (prompt number, image number)
        drawn = {key: manifest.get(key) for key in ("system", "weights", "prompts", "images_per_prompt", "seed")}
        images = hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()[:16]
        self.about = {**describe(get_scorer(scorer)), "pictures": images}  # once: it may hash a model's weights
        self.path = folder / "scores" / f"{scorer_name(scorer)}.parquet"
        self.rows = self._stored()
        self.written, self.last_write = len(self.rows), time.monotonic()
        self.missing = [key for key in self.keys if key not in self.rows]
        for path in (image_path(folder, *key) for key in self.missing):
            if not path.exists():
                raise FileNotFoundError(f"image {path} does not exist")

    def _stored(self) -> dict[tuple[int, int], tuple[float, str]]:
        """Rows on disk that still hold: of images whose content is the same, or that are gone."""
        self._check_source()
        if not self.path.exists():
            return {}
        try:
            try:
                frame, _ = read_frame(self.path, "scores", COLUMNS | {"sha256": "text"})
            except ValueError:  # of version 0.1: by size and time alone
                frame = read_frame(self.path, "scores", COLUMNS | {"bytes": "integer"})[0][list(COLUMNS)].assign(of="")
            if not np.isfinite(frame["score"]).all():
                raise ValueError(f"{self.path} holds scores that are not finite")
        except ValueError as error:
            raise ValueError(f"{error}: remove that file and its .json to score again") from error
        keys = set(self.keys)
        return {
            (prompt, image): (value, of)
            for prompt, image, value, of in frame.itertuples(index=False, name=None)
            if (prompt, image) in keys and self._hash((prompt, image)) in (None, of)
        }

    def _hash(self, key: tuple[int, int]) -> str | None:
        """Of an image's content, once a call; None if it is gone."""
        path = image_path(self.folder, *key)
        if path not in self.hashes:
            self.hashes[path] = _image_hash(path) if path.exists() else None
        return self.hashes[path]

    def _check_source(self) -> None:
        """A folder's scores come from one model and are of one set of images; others are not mixed in.

        A hash of weights that is not known here is None and stands for any; one that is stored is kept.
        """
        path, name, remedy = self.path.with_suffix(".json"), scorer_name(self.scorer), "remove that file and its .json"
        if not path.exists() and not self.path.exists():
            return
        try:
            stored = read_json(path, "record of what gave scores")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.path} holds scores, but {path.name} does not say whose: {error}; {remedy}"
            ) from error
        about = dict(self.about)
        if stored.pop("pictures", None) != about.pop("pictures"):
            raise ValueError(
                f"{self.path} holds scores of other images (drawn for other prompts or seeds, or by another model) "
                f"than {self.folder / 'manifest.json'} names: {remedy} to score again"
            )
        unknown = {key for key, value in about.items() if value is None or stored.get(key) is None}
        differs = [
            f"{printable(key, 40)}: {shown(stored.get(key))} stored, {shown(about.get(key))} asked"
            for key in {**stored, **about}
            if about.get(key) != stored.get(key) and key not in unknown
        ]
        if differs:
            raise ValueError(
                f"{self.path} holds scores of another {name} ({'; '.join(differs)}): {remedy} to score again, "
                "or give the scorer another name"
            )
        self.about |= {key: stored[key] for key in unknown & stored.keys() if self.about[key] is None}

    def add(self, keys: Sequence[tuple[int, int]], values: np.ndarray, hashes: Sequence[str]) -> None:
        for key, value, of in zip(keys, values, hashes, strict=True):
            self.hashes[image_path(self.folder, *key)] = of
            if np.isfinite(value):
                self.rows[key] = (float(value), of)
        if time.monotonic() - self.last_write > SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        if len(self.rows) == self.written:
            return
        self.path.parent.mkdir(exist_ok=True)
        with _held(self.path.parent):
            self.rows = self._stored() | self.rows
            write_json(self.path.with_suffix(".json"), self.about)
            rows = [(*key, *self.rows[key]) for key in sorted(self.rows)]
            frame = pd.DataFrame(rows, columns=[*COLUMNS, "sha256"])
            write_frame(self.path, frame)
        self.written, self.last_write = len(self.rows), time.monotonic()

    def scores(self) -> np.ndarray:
        return np.array([self.rows[key][0] for key in self.keys], dtype=np.float64).reshape(self.shape)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Other processes that write scores there wait, and find what was written; the hold ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _image_hash(path: Path) -> str:
    return file_sha256(path)[:16]


def _perform(tasks: list[_Task], workers: int) -> Iterator[tuple[_Task, np.ndarray, list[str]]]:
    """Tasks with their values and what `_score_chunk` read; the first failure is raised when nothing runs any more."""
    if workers < 2:
        for task in tasks:
            values, hashes = _score_chunk(task)
            yield task, values, hashes
            check_finite(task.scorer, values, task.paths)
        return
    for scorer in {id(task.scorer): task.scorer for task in tasks}.values():
        _check_it_travels(scorer)
    with worker_pool(workers) as pool:
        waiting = {pool.submit(_score_chunk, task): task for task in tasks}
        failure = None
        for done, task in ((done, waiting[done]) for done in as_completed(waiting) if not done.cancelled()):
            try:
                values, hashes = done.result()
                yield task, values, hashes
                check_finite(task.scorer, values, task.paths)
            except Exception as error:
                if failure is None:
                    failure = error
                    for future in waiting:
                        future.cancel()
        if failure is not None:
            raise failure


def _check_it_travels(scorer: str | Scorer) -> None:
    """Workers are fresh processes: they know shipped scorers by name, and others only if they can be pickled."""
    try:
        pickle.dumps(get_scorer(scorer))
    except Exception as error:
        raise ValueError(
            f"scorer {scorer_name(scorer)} cannot be sent to another process ({error}): "
            "use num_processes=1, or define it at the top level of a module"
        ) from error


def _score_chunk(task: _Task) -> tuple[np.ndarray, list[str]]:
    """Values as the scorer returns them, also those that are not finite, and hashes of the images.

    The hash comes first: an image that is drawn again meanwhile does not match it, and is scored again.
    """
    hashes = [_image_hash(path) for path in task.paths]
    images = [load_image(path) for path in task.paths]
    return raw_scores(task.scorer, images, [task.prompts[p] for p, _ in task.keys]), hashes
