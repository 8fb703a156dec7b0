"""Files that are whole or absent, JSON that is what it should be, records line by line."""

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dkto.common.json_text import parse_json
from dkto.common.names import shown

if TYPE_CHECKING:
    from PIL import Image

PART = ".part"  # ends the name of what is not complete yet
_CLEARED: set[Path] = set()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a neighbour of `path`, a file or a folder, and `publish` it.

    `path` is whole or absent, whoever else writes it, and whether the process is killed or the power fails. What
    processes of this machine that are gone left unfinished in that folder is removed.
    """
    clear_parts(path.parent)
    part = path.with_name(f"{path.name}.{os.getpid()}@{_node()}{PART}")
    try:
        write(part)
        publish(part, path)
    except BaseException:
        remove(part)
        raise


def publish(part: Path, path: Path) -> None:
    """Rename a file or folder that is complete, with modes as the umask says, when all of it is on disk.

    A folder takes the place of none: the caller removes a former one.
    """
    mask = _umask()
    for each in [*part.rglob("*"), part] if part.is_dir() else [part]:
        each.chmod((0o777 if each.is_dir() else 0o666) & ~mask)
        force_to_disk(each)
    part.replace(path)
    force_to_disk(path.parent)


def force_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_parts(folder: Path) -> None:
    """Remove what processes of this machine that are gone left unfinished; each process looks once into a folder."""
    if folder in _CLEARED or not folder.is_dir():
        return
    _CLEARED.add(folder)
    for found in folder.glob(f"*@{glob.escape(_node())}{PART}"):
        number = found.name.removesuffix(f"@{_node()}{PART}").rpartition(".")[2]
        if number.isdecimal() and not _is_alive(int(number)):
            remove(found)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _node() -> str:
    return re.sub(r"[^\w-]", "-", os.uname().nodename)


def _umask() -> int:
    """What the process's umask takes away; Linux tells it without changing it for other threads."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"^Umask:\s*([0-7]+)", status, re.M)[1], 8)
    except (OSError, TypeError):
        mask = os.umask(0o022)
        os.umask(mask)
        return mask


def _is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


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
        found = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no {what}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no {what}: expected an object, got {shown(found)}")
    for key in keys:
        if key not in found:
            raise ValueError(f"{path} is no {what}: {key} is missing")
    return found


Fields = dict[str, tuple[Callable[[object], bool], str]]  # by name: whether a value is right, and what is


def check_fields(values: dict, fields: Fields, where: str) -> None:
    """Refuse an object of which a field is missing or not what it should be.

    >>> check_fields({"seed": "x"}, {"seed": (lambda value: type(value) is int, "a whole number")}, "run.json")
    Traceback (most recent call last):
    ValueError: run.json: seed must be a whole number, got 'x'
    """
    for name, (is_right, expected) in fields.items():
        if name not in values or not is_right(values[name]):
            got = shown(values[name]) if name in values else "nothing"
            raise ValueError(f"{where}: {name} must be {expected}, got {got}")


def stays_inside(path: Path, folder: Path) -> bool:
    """Whether a file that is in a folder by its name is there by its links too."""
    return path.resolve().is_relative_to(folder.resolve())


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
