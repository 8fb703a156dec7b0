"""Files that are whole or absent, JSON that is what it should be, records line by line."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a neighbour of `path`, then rename it: `path` is whole or absent, whoever else writes it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    write(part)
    part.replace(path)


def write_png(path: Path, image: "Image.Image") -> None:
    """Write an image whole or not at all."""
    write_atomically(path, lambda part: image.save(part, format="PNG"))


def write_json(path: Path, values: dict) -> None:
    """Write JSON whole or not at all."""
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda part: part.write_text(text))


def read_json(path: Path, what: str, keys: Iterable[str] = ()) -> dict:
    """The object in a JSON file that should be a `what` and hold `keys`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no JSON, no object, or lacks a key; the sentence names the file.

    >>> read_json(Path(__file__), "record of a run")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ...files.py is no record of a run: Extra data: line 1 column 3 (char 2)
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no {what}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no {what}: expected an object, got {found!r:.80}")
    for key in keys:
        if key not in found:
            raise ValueError(f"{path} is no {what}: {key} is missing")
    return found


def claim(path: Path, about: dict, what: str) -> None:
    """Mark a folder by a JSON file that says what it holds, or check that it holds just that.

    Raises:
        ValueError: if the folder was claimed for something else, or the file cannot be read.
    """
    if not path.exists():
        write_json(path, about)
        return
    stored = read_json(path, f"record of what {path.parent} holds")
    differs = [key for key in about if stored.get(key) != about[key]]
    if differs:
        raise ValueError(
            f"{path.parent} holds {what} of another run ({', '.join(differs)} differ): choose another folder"
        )


def read_records(path: str | Path) -> list[dict]:
    """The records of a file of JSON lines, as `metrics.jsonl`; a last line that a kill cut short is left out."""
    records = []
    for line in Path(path).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def write_records(path: Path, records: Iterable[dict]) -> None:
    """Write records, one line of JSON each, whole or not at all."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(path, lambda part: part.write_text(text))


def append_record(path: Path, record: dict) -> None:
    """Append one JSON line, which is on disk when this returns; a line that a crash cut short spoils no other.

    Several processes may append to one file, which is made with its folder.
    """
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a crash cut the last line
                line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def file_sha256(path: Path) -> str:
    """sha256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def keep_records(path: Path, last_step: int) -> None:
    """Drop the records after `last_step`: a resumed run writes them again."""
    if path.exists():
        write_records(path, [record for record in read_records(path) if record["global_step"] <= last_step])
