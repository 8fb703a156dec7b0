"""Scores of generated images as files beside them: `<folder>/scores/<scorer>.parquet`, only missing ones computed.

A row holds prompt and image number, the score, and the size and time of change of the image file: a picture
that was drawn again is scored again, one that was deleted keeps its score. Beside them `<scorer>.json` says which model
gave them, and for which prompts, seeds and weights the pictures were drawn: scores of others are refused. Whatever a
scorer returned before it failed stays on disk, and what another process wrote meanwhile is kept.
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

from dkto.common.files import read_json, write_atomically, write_json
from dkto.common.processes import worker_pool
from dkto.common.progress import progress
from dkto.data.images import load_image
from dkto.evaluation.generate import image_path, read_manifest
from dkto.evaluation.scorers import (
    Scorer,
    check_finite,
    check_scorer_name,
    describe,
    get_scorer,
    raw_scores,
    scorer_name,
)

COLUMNS = ("prompt", "image", "score", "bytes", "changed")
SECONDS_BETWEEN_WRITES = 2.0


def score_images(
    folder: str | Path, scorer: str | Scorer, *, num_processes: int = 1, batch_size: int = 64
) -> np.ndarray:
    """Scores of a folder written by `generate_images`, computed where they are not on disk yet.

    Args:
        folder: holds manifest.json and the images.
        scorer: a name in `dkto.evaluation.scorers.SCORERS`, or a scorer.
        num_processes: workers, each with a scorer of its own on one thread.
        batch_size: images handed to the scorer at once.

    Returns:
        (P, n): P prompts, n images each.

    Raises:
        FileNotFoundError: if the manifest or an image without a score is missing; nothing is scored then.
        KeyError: if no scorer has that name.
        ValueError: if the scorer fails its checks (the sentence names the image of a value that is not finite), or the
            scores on disk come from another model or of other pictures; what was scored before stays on disk.
    """
    folder = Path(folder)
    options = {"num_processes": num_processes, "batch_size": batch_size}
    return score_all({folder.name: folder}, [scorer], **options)[folder.name, scorer_name(scorer)]


def score_all(
    folders: Mapping[str, str | Path],
    scorers: Sequence[str | Scorer],
    *,
    num_processes: int = 1,
    batch_size: int = 64,
) -> dict[tuple[str, str], np.ndarray]:
    """`score_images` for several methods and scorers with one set of workers.

    Args:
        folders: image folder of each method by its name.
        scorers: names of scorers, or scorers.
        num_processes, batch_size: as in `score_images`.

    Returns:
        (P, n) scores by (method, scorer name).

    Raises:
        FileNotFoundError, KeyError, ValueError: as `score_images`; also if two scorers have one name.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    scorers = _distinct(scorers)
    tables = [_Table.open(name, Path(folder), scorer) for scorer in scorers for name, folder in folders.items()]
    tasks = []
    for index, table in enumerate(tables):
        missing, scorer = table.missing, get_scorer(table.scorer)
        for start in range(0, len(missing), batch_size):
            tasks.append(_Task(index, scorer, table.folder, table.prompts, missing[start : start + batch_size]))
    if tasks:
        bar = progress(total=sum(len(task.keys) for task in tasks), desc="scoring", unit="image")
        try:
            for task, values in _perform(tasks, min(num_processes, len(tasks))):
                tables[task.table].add(task.keys, values)
                bar.update(len(values))
        finally:
            bar.close()
            for table in tables:
                table.write()
    return {(table.method, scorer_name(table.scorer)): table.scores() for table in tables}


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
    table: int
    scorer: str | Scorer
    folder: Path
    prompts: list[str]
    keys: list[tuple[int, int]]


class _Table:
    """The scores of one folder by one scorer: what is on disk and still holds, and what is new."""

    def __init__(self, method: str, folder: Path, scorer: str | Scorer) -> None:
        self.method, self.folder, self.scorer = method, folder, scorer
        manifest = read_manifest(folder)
        self.prompts: list[str] = manifest["prompts"]
        self.images_per_prompt: int = manifest["images_per_prompt"]
        drawn = {key: manifest.get(key) for key in ("system", "weights", "prompts", "images_per_prompt", "seed")}
        pictures = hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()[:16]
        self.about = {**describe(get_scorer(scorer)), "pictures": pictures}  # once: it may hash a model's weights
        self.path = folder / "scores" / f"{scorer_name(scorer)}.parquet"
        self.rows: dict[tuple[int, int], tuple[float, int, int]] = {}
        self.written, self.last_write = 0, time.monotonic()

    @classmethod
    def open(cls, method: str, folder: Path, scorer: str | Scorer) -> "_Table":
        table = cls(method, folder, scorer)
        table.rows = table._stored()
        for key in table.missing:
            path = image_path(folder, *key)
            if not path.exists():
                raise FileNotFoundError(f"image {path} does not exist")
        table.written = len(table.rows)
        return table

    def _stored(self) -> dict[tuple[int, int], tuple[float, int, int]]:
        """Rows on disk that still hold: of pictures that have not changed, or are gone."""
        self._check_source()
        if not self.path.exists():
            return {}
        frame = pd.read_parquet(self.path)[list(COLUMNS)]
        stamps = {key: _stamp(image_path(self.folder, *key)) for key in self._keys()}
        return {
            (prompt, image): (value, *stamp)
            for prompt, image, value, *stamp in frame.itertuples(index=False, name=None)
            if (prompt, image) in stamps and stamps[prompt, image] in (None, tuple(stamp))
        }

    def _keys(self) -> list[tuple[int, int]]:
        return [(p, i) for p in range(len(self.prompts)) for i in range(self.images_per_prompt)]

    def _check_source(self) -> None:
        """A folder's scores come from one model and are of one set of pictures; others are not mixed in.

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
                f"{self.path} holds scores of other pictures (drawn for other prompts or seeds, or by another model) "
                f"than {self.folder / 'manifest.json'} names: {remedy} to score anew"
            )
        unknown = {key for key, value in about.items() if value is None or stored.get(key) is None}
        differs = [
            f"{key}: {stored.get(key)!r} stored, {about.get(key)!r} asked"
            for key in {**stored, **about}
            if about.get(key) != stored.get(key) and key not in unknown
        ]
        if differs:
            raise ValueError(
                f"{self.path} holds scores of another {name} ({'; '.join(differs)}): {remedy} to score anew, "
                "or give the scorer another name"
            )
        self.about |= {key: stored[key] for key in unknown & stored.keys() if self.about[key] is None}

    @property
    def missing(self) -> list[tuple[int, int]]:
        return [key for key in self._keys() if key not in self.rows]

    def add(self, keys: Sequence[tuple[int, int]], values: np.ndarray) -> None:
        for key, value in zip(keys, values, strict=True):
            if np.isfinite(value):
                self.rows[key] = (float(value), *(_stamp(image_path(self.folder, *key)) or (0, 0)))
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
            frame = pd.DataFrame(rows, columns=list(COLUMNS))
            write_atomically(self.path, lambda part: frame.to_parquet(part, index=False))
        self.written, self.last_write = len(self.rows), time.monotonic()

    def scores(self) -> np.ndarray:
        values = np.array([self.rows[key][0] for key in self._keys()], dtype=np.float64)
        return values.reshape(len(self.prompts), self.images_per_prompt)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Other processes that write scores there wait, and find what was written; the hold ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time of change in ns; None if there is no such file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


def _perform(tasks: list[_Task], workers: int) -> Iterator[tuple[_Task, np.ndarray]]:
    """Tasks with their values as they come; the first failure is raised when nothing runs any more."""
    if workers < 2:
        for task in tasks:
            values = _score_chunk(task)
            yield task, values
            _check(task, values)
        return
    for scorer in {id(task.scorer): task.scorer for task in tasks}.values():
        _check_it_travels(scorer)
    with worker_pool(workers) as pool:
        waiting = {pool.submit(_score_chunk, task): task for task in tasks}
        failure = None
        for done in as_completed(waiting):
            if done.cancelled():
                continue
            try:
                values = done.result()
                yield waiting[done], values
                _check(waiting[done], values)
            except Exception as error:
                if failure is None:
                    failure = error
                    for future in waiting:
                        future.cancel()
        if failure is not None:
            raise failure


def _check(task: _Task, values: np.ndarray) -> None:
    check_finite(task.scorer, values, [image_path(task.folder, *key) for key in task.keys])


def _check_it_travels(scorer: str | Scorer) -> None:
    """Workers are fresh processes: they know shipped scorers by name, and others only if they can be pickled."""
    try:
        pickle.dumps(get_scorer(scorer))
    except Exception as error:
        raise ValueError(
            f"scorer {scorer_name(scorer)} cannot be sent to another process ({error}): "
            "use num_processes=1, or define it at the top level of a module"
        ) from error


def _score_chunk(task: _Task) -> np.ndarray:
    """Values as the scorer returns them, those that are not finite among them."""
    images = [load_image(image_path(task.folder, *key)) for key in task.keys]
    return raw_scores(task.scorer, images, [task.prompts[p] for p, _ in task.keys])
