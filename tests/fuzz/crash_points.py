"""Kill a program before each of its file operations, cut its power, or kill it at random: the next call must end.

An operation runs in a fork of this process, which has imported everything, and dies there by SIGKILL. A power cut is
simulated: of each file that was written since the start, what was never forced to disk is gone.
"""

import csv
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from dkto.common import files

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
TIMED = {"seconds", "hours", "samples_per_second", "peak_memory_mb", "began"}  # what no two runs have alike


def crash_points(
    operation: Callable[[], object],
    folder: Path,
    points: Callable[[int], Iterable[int]] = lambda count: range(1, count + 1),
    *,
    power_cut: bool = False,
    begin: Callable[[], object] = lambda: None,
    elsewhere: Collection[str] = (),
) -> tuple[int, list[str]]:
    """Kill an operation before its k-th change of a folder, call it again, and compare with one that was not killed.

    Args:
        operation: writes into `folder` and nowhere else; it may be called again and again.
        points: of the number of changes, which of them to kill before.
        power_cut: whether what was not forced to disk is gone too.
        begin: what is in the folder before, on disk.
        elsewhere: names of files that another process writes, and forces to disk unseen.

    Returns:
        How many points were tried, and a sentence for each that failed.
    """
    expected, count = _whole(operation, folder, begin)
    failures, tried = [], sorted(set(points(count)))
    for point in tried:
        _cleared(folder, begin)
        _in_a_fork(operation, folder, point, power_cut, elsewhere=elsewhere)
        failures += _called_again(operation, folder, expected, f"point {point} of {count}")
    return len(tried), failures


def random_kills(
    operation: Callable[[], object], folder: Path, kills: int, seed: int, begin: Callable[[], object] = lambda: None
) -> tuple[int, list[str]]:
    """The same with kills at random moments, one to three before each call to the end; returns trials and failures."""
    began = time.monotonic()
    expected, _ = _whole(operation, folder, begin)
    longest, moments, failures, trials = time.monotonic() - began, random.Random(seed), [], 0
    while kills > 0:
        _cleared(folder, begin)
        trials, row = trials + 1, min(kills, moments.randint(1, 3))
        kills -= row
        for _ in range(row):
            _in_a_fork(operation, folder, after=moments.uniform(0, longest))
        failures += _called_again(operation, folder, expected, f"trial {trials} of seed {seed}")
    return trials, failures


def _cleared(folder: Path, begin: Callable) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    begin()


def _whole(operation: Callable, folder: Path, begin: Callable) -> tuple[dict[str, str], int]:
    _cleared(folder, begin)
    code, count, said = _in_a_fork(operation, folder)
    assert code == 0, f"the operation fails by itself: {said}"
    return contents(folder), count


def _called_again(operation: Callable, folder: Path, expected: dict[str, str], what: str) -> list:
    code, _, said = _in_a_fork(operation, folder)
    if code:
        return [f"{what}: the next call fails: {said}"]
    found = contents(folder)
    differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return [f"{what}: {', '.join(differ)} differ"] if differ else []


def contents(folder: Path) -> dict[str, str]:
    """Hash by name of all files in a folder, times left out; `.part` files are among them, locks are not."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.endswith(".lock"):
            found[str(path.relative_to(folder))] = hashlib.sha256(_timeless(path)).hexdigest()
    return found


def _timeless(path: Path) -> bytes:
    """What a file holds but for times; of a page only whether it has an end."""
    data = path.read_bytes()
    match path.suffix:
        case ".json":
            return json.dumps(_without_times(json.loads(data))).encode()
        case ".jsonl":
            return json.dumps([_without_times(json.loads(line)) for line in data.splitlines()]).encode()
        case ".ipynb":
            return json.dumps([(cell["source"], cell.get("outputs")) for cell in json.loads(data)["cells"]]).encode()
        case ".csv":
            header, *rows = csv.reader(io.StringIO(data.decode()))
            kept = [at for at, name in enumerate(header) if name.rpartition(".")[2] not in TIMED]
            return json.dumps([[row[at] for at in kept] for row in [header, *rows]]).encode()
        case ".html":
            return data.rstrip()[-7:]
        case ".md":
            return b"\n".join(line for line in data.splitlines() if b"hours" not in line)
    return data


def _without_times(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_times(each) for key, each in value.items() if key not in TIMED}
    return [_without_times(each) for each in value] if isinstance(value, list) else value


def _in_a_fork(
    operation: Callable,
    folder: Path,
    point: int = 0,
    power_cut: bool = False,
    after: float | None = None,
    elsewhere: Collection[str] = (),
) -> tuple[int, int, str]:
    """Exit code or minus the signal, how many changes were made, and the last line of what went wrong."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code, said = 1, ""
        files._CLEARED.clear()  # as a process of its own
        changes = _watch(folder, point, power_cut, elsewhere)
        try:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
                os.dup2(nothing.fileno(), 2)
            operation()
            code = 0
        except BaseException as error:
            said = "".join(traceback.format_exception_only(error)).strip()[:500]
        os.write(writer, json.dumps([changes[0], said]).encode())
        os._exit(code)
    os.close(writer)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader) as pipe:
        count, said = json.loads(pipe.read() or '[0, ""]')
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), count, said


def _watch(folder: Path, point: int, power_cut: bool, elsewhere: Collection[str]) -> list[int]:
    """Count the changes of a folder from here on, and die before one of them."""
    changes, forced, before = [0], {}, _inodes(folder)
    fsync, place = os.fsync, str(folder)

    def remembered(descriptor: int) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        forced[status.st_ino] = status.st_size

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            if not isinstance(arguments[2], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in CHANGES:
            return
        if not any(
            isinstance(each, (str, bytes, os.PathLike)) and os.fsdecode(each).startswith(place) for each in arguments
        ):
            return
        changes[0] += 1
        if changes[0] == point:
            if power_cut:
                for inode, path in _inodes(folder).items():
                    if (inode not in before or inode in forced) and path.name not in elsewhere:
                        os.truncate(path, min(forced.get(inode, 0), path.stat().st_size))
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = remembered
    sys.addaudithook(hook)
    return changes


def _inodes(folder: Path) -> dict[int, Path]:
    return {path.stat().st_ino: path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
