"""Processes that cannot outlive who started them, folders with one writer, graphics cards with one user."""

import fcntl
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from dkto.common import follow

PARENT_VARIABLE = "DKTO_PARENT"  # process that a run of a sweep dies with; set by papermill_runs/Snakefile
LOCK_NAME = ".lock"
FAMILY_VARIABLE = "DKTO_ENDS_WITH_PARENT"  # the process that started a training, read by `dkto train`


def join_family() -> None:
    """In a process started below a launcher (accelerate, torchrun) by `start_training`: end when the launcher does.

    The kernel's request is not handed on to children, so each training process makes it itself.
    """
    if started := os.environ.get(FAMILY_VARIABLE):
        follow.die_with_parent()
        if os.getppid() == 1 != int(started):  # the launcher was gone before the request
            sys.exit(f"{FAMILY_VARIABLE} is set, but what started this training has ended")


def start_worker(threads: int = 1) -> None:
    """In each process of a pool: its threads, and an end with the pool's own process, or it would wait indefinitely."""
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def worker_pool(count: int) -> ProcessPoolExecutor:
    """`count` fresh processes of one thread each, which end with this one."""
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), start_worker)


def following(command: Sequence[str], number: int = signal.SIGTERM) -> list[str]:
    """The command for `subprocess` with which a child gets a signal when this process ends (Linux; others: unchanged).

    >>> following(["/bin/true"])[-1]  # the program by its whole path
    '/bin/true'
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", follow.__file__, str(os.getpid()), str(int(number)), *command]


def die_with_engine() -> None:
    """In a run of a sweep: end when the engine ends, also if it ended before this line."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is not None:
        follow.die_with_parent(signal.SIGKILL)
        if str(os.getppid()) != parent:
            sys.exit(f"process {parent}, which started this run, has ended")


@contextmanager
def sole_writer(folder: Path, *, patience: float = 0.0) -> Iterator[int]:
    """Hold a folder, made if need be, against other writers; the hold ends with the process, however that ends.

    Yields the descriptor of the lock file: a child that inherits it holds the folder too.

    Raises:
        BlockingIOError: if another process writes there after `patience` seconds; the sentence names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with (folder / LOCK_NAME).open("a+") as file:
        while not _locked(file):
            if time.monotonic() >= deadline:
                file.seek(0)
                other = file.read().strip() or "another process"
                raise BlockingIOError(f"{folder} is being written by {other}: wait for it, or choose another folder")
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield file.fileno()


def has_writer(folder: Path) -> bool:
    """Whether a process holds the folder just now."""
    try:
        with (folder / LOCK_NAME).open("a+") as file:
            return not _locked(file)
    except FileNotFoundError:
        return False


def _locked(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def graphics_cards(count: int, cards: Sequence[str], folder: Path | None = None) -> Iterator[list[str]]:
    """Hold `count` of this machine's GPUs against other runs, waiting for free ones; yields those held.

    Only one run at a time picks GPUs, so that two runs never wait for each other with one GPU each.

    Args:
        count: GPUs to hold; 0 holds none.
        cards: numbers or identifiers of those that runs may take, as CUDA_VISIBLE_DEVICES has them.
        folder: of the lock files, one a GPU; a folder of this user and machine if left out.

    Raises:
        ValueError: if `count` is more than there are.
        PermissionError: if the folder of the locks is another user's.
    """
    if not 0 <= count <= len(cards):
        raise ValueError(f"gpus must be between 0 and {len(cards)}, the number of cards here, got {count}")
    if count == 0:
        yield []
        return
    folder = folder or Path(tempfile.gettempdir()) / f"dkto-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder}, where graphics cards are held, belongs to another user: remove it")
    held = {}
    try:
        with (folder / "turn").open("a") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            while not _hold_free_cards(held, count, cards, folder):
                time.sleep(0.2)
        yield list(held)
    finally:
        for file in held.values():
            file.close()


def _hold_free_cards(held: dict, count: int, cards: Sequence[str], folder: Path) -> bool:
    """Add free cards to those held; whether they are enough."""
    for card in cards:
        if card not in held and len(held) < count:
            file = (folder / card).open("a")
            if _locked(file):
                held[card] = file
            else:
                file.close()
    return len(held) == count
