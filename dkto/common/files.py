"""Files that are whole or absent, JSON that is what it should be, records line by line."""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dkto.common.ends import REMEDIES, is_alive
from dkto.common.json_text import parse_json
from dkto.common.names import shown

if TYPE_CHECKING:
    from PIL import Image

PART = ".part"  # ends the name of what is not complete yet
HALF_SIGN = re.compile(r"\\u[dD][89a-fA-F]")  # in JSON: a sign of two parts, or one of them alone
_CLEARED: set[Path] = set()


def write_atomically(path: Path, write: Callable[[Path], object], *, forced: bool = True) -> None:
    """Let `write` fill a neighbour of `path`, a file or a folder, and `publish` it.

    `path` is whole or absent, whoever else writes it, and whether the process is killed or the power fails. What
    processes of this machine that are gone left unfinished in that folder is removed. Without `forced` a power cut may
    leave a file empty: the caller forces many at once (`force_all`) before it writes that they are there.
    """
    clear_parts(path.parent)
    part = part_of(path)
    try:
        with writing(path):
            write(part)
            if forced:
                publish(part, path)
            else:
                part.replace(path)
    except BaseException:
        remove(part)
        raise


def part_of(path: Path) -> Path:
    """Where this thread writes what becomes `path`."""
    thread = "" if threading.current_thread() is threading.main_thread() else f".{threading.get_native_id()}"
    return path.with_name(f"{path.name}{thread}.{os.getpid()}@{_node()}{PART}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """While a file is written: a full disk and the like is a sentence with its place and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        text = f"{path} could not be written: {error.strerror}; {REMEDIES[error.errno]}"
        raise type(error)(text) from error


def discard(folder: Path) -> None:
    """Remove a folder so that a kill leaves it whole, or under the name of what is not complete."""
    part = part_of(folder)
    remove(part)
    folder.replace(part)
    remove(part)


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


def force_all(paths: Iterable[Path]) -> None:
    """`force_to_disk` for many files and their folders, which a disk does ten times as fast side by side."""
    paths = list(paths)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(force_to_disk, [*paths, *{path.parent for path in paths}]))


def clear_parts(folder: Path) -> None:
    """Remove what processes of this machine that are gone left unfinished; each process looks once into a folder."""
    if folder in _CLEARED or not folder.is_dir():
        return
    _CLEARED.add(folder)
    for found in folder.glob(f"*@{glob.escape(_node())}{PART}"):
        number = found.name.removesuffix(f"@{_node()}{PART}").rpartition(".")[2]
        if number.isdecimal() and not is_alive(int(number)):
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
        ValueError: if it is no JSON, no object, lacks a key, or holds what cannot be written again; the sentence names
            the file.

    >>> read_json(Path(__file__), "record of a run")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ...files.py is no record of a run: Extra data: line 1 column 3 (char 2)
    """
    refuse_other_than_file(path, what)
    try:
        found = parse_json(text := path.read_text(encoding="utf-8-sig"))
        if HALF_SIGN.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{path} is no {what}: {half!r} in it is half a sign: remove it") from None
    except ValueError as error:
        raise ValueError(f"{path} is no {what}: {error}") from error
    except OSError as error:
        if error.filename is None:  # the disk failed while it was read
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
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
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return False


def refuse_leaving(path: Path, folder: Path, named: str = "") -> None:
    """Refuse a file that a link takes out of the folder it is in by its name; `named` is the folder in the sentence."""
    if not stays_inside(path, folder):
        named = named or f"the folder {folder}"
        raise ValueError(f"{path} is a link that leaves {named}: put the file itself there")


def refuse_other_than_file(path: Path, what: str) -> None:
    """Refuse a folder, or a pipe, which would be waited for, where a file should be; what is not there is no matter."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is no {what}: its link leads nowhere ({error.strerror})") from error
        return  # opening it says why
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is no {what}: expected a file, got a folder or a pipe: put the file there")


def claim(path: Path, about: dict, what: str, notes: dict | None = None) -> None:
    """Mark a folder by a JSON file that says what it holds, or check that it holds just that.

    `notes` are written too, and not compared. Of two processes that claim at the same instant one makes the file, and
    the other checks it.

    Raises:
        ValueError: if the folder was claimed for something else, or the file cannot be read.
    """
    if not path.exists():
        clear_parts(path.parent)
        part = part_of(path)
        try:
            part.write_text(json.dumps(about | (notes or {}), indent=2, allow_nan=False) + "\n")
            publish(part, part)
            _link(part, path)
        finally:
            remove(part)
    stored = read_json(path, f"record of what {path.parent} holds")
    differs = [key for key in about if stored.get(key) != json.loads(json.dumps(about[key]))]
    if differs:
        raise ValueError(
            f"{path.parent} holds {what} of another run ({', '.join(differs)} differ): choose another folder"
        )


def _link(part: Path, path: Path) -> None:
    """Make a complete file known as `path`, unless that is there by now."""
    try:
        os.link(part, path)
    except FileExistsError:
        pass
    except OSError:  # no links on this file system: the name is taken first, and filled at once
        with suppress(FileExistsError), path.open("x") as file:
            file.write(part.read_text())
    force_to_disk(path.parent)


def records_of(path: str | Path) -> Iterator[dict]:
    """The records of a file of JSON lines one by one; a last line that a kill cut short, no JSON yet, is left out.

    Raises:
        ValueError: for another line that is no record; the sentence names file and line.
    """
    refuse_other_than_file(Path(path), "file of records")
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = parse_json(line)
                if not isinstance(record, dict):
                    raise ValueError("expected an object")
            except ValueError as error:
                if not line.endswith(b"\n") and isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
                    return
                text = shown(line.decode(errors="replace").strip())
                raise ValueError(
                    f"{path}, line {number} is no record ({error}), got {text}: remove this line, or restore the file"
                ) from error
            yield record


def read_records(path: str | Path) -> list[dict]:
    """All records of a file of JSON lines, as `metrics.jsonl`, see `records_of`."""
    return list(records_of(path))


def last_record(path: Path) -> dict | None:
    """The last record of a file of JSON lines that has an end, None if there is none; the rest is not read."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        for length in (2**14, size):  # a record is shorter, as a rule
            file.seek(max(0, size - length))
            for line in reversed(file.read().split(b"\n")[1 if length < size else 0 : -1]):
                try:
                    return json.loads(line)
                except ValueError:
                    continue
    return None


def write_records(path: Path, records: Iterable[dict]) -> None:
    """Write records, one line of JSON each, whole or not at all."""

    def write(part: Path) -> None:
        with part.open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    write_atomically(path, write)


def append_record(path: Path, record: dict) -> None:
    """Append one JSON line, which is on disk when this returns; a line that a crash cut short spoils no other.

    Several processes may append to one file, which is made with its folder.
    """
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        refuse_leaving(path, path.parent, "its folder")
    with writing(path), path.open("ab+") as file:
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


def keep_records(path: Path, last_step: int) -> list[int]:
    """Drop the records after `last_step`, which a resumed run writes again; returns the steps of those before it.

    Raises:
        ValueError: if one before it is damaged, or its step does not follow; nothing is rewritten then.
    """
    steps: list[int] = []

    def kept() -> Iterator[dict]:
        for number, record in enumerate(records_of(path), 1):
            step, before = record.get("global_step"), steps[-1] if steps else 0
            if type(step) is not int or step <= before:
                raise ValueError(
                    f"{path}, line {number}: global_step must be a whole number above {before}, got {shown(step)}: "
                    "remove this line, or restore the file"
                )
            if step > last_step:
                return
            steps.append(step)
            yield record

    refuse_other_than_file(path, "file of records")
    if path.exists():
        write_records(path, kept())
    return steps
