"""Processes that cannot outlive who started them, folders with one writer, graphics cards with one user."""

import fcntl
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from dkto.common import follow
from dkto.common.ends import end_with

QUIET_TRACKER = "ignore:resource_tracker"  # of semaphores, which multiprocessing starts beside a pool
LOCK_NAME = ".lock"


def _start_worker(threads: int, payload: bytes) -> None:
    end_with(multiprocessing.parent_process().pid)  # before the imports that unpickling brings, which take long
    warnings.formatwarning = lambda text, *_, **__: f"{text}\n"
    initializer, arguments = pickle.loads(payload)
    import torch

    torch.set_num_threads(threads)
    initializer(*arguments)


@contextmanager
def worker_pool(
    count: int, initializer: Callable[..., object] = int, arguments: Sequence = (), threads: int = 1
) -> Iterator[ProcessPoolExecutor]:
    """`count` fresh processes of some threads each, which end with this one; an interruption ends them at once.

    Ctrl-C reaches all processes of a terminal: here only this one takes it.
    """
    if QUIET_TRACKER not in sys.warnoptions:  # it gets them too, and tidies up without a word where we were killed
        sys.warnoptions.append(QUIET_TRACKER)
    context, payload = multiprocessing.get_context("spawn"), pickle.dumps((initializer, arguments))
    pool = ProcessPoolExecutor(count, context, _start_worker, (threads, payload))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit the mask
    try:
        pool.submit(int)  # starts all of them
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield pool
    except BaseException as error:
        if not isinstance(error, Exception):
            for process in list(pool._processes.values()):
                process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def following(command: Sequence[str], number: int = signal.SIGTERM) -> list[str]:
    """The command for `subprocess` with which a child gets a signal when this process ends (Linux; others: unchanged).

    >>> following(["/bin/true"])[-1]  # the program by its whole path
    '/bin/true'
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", follow.__file__, str(os.getpid()), str(int(number)), *command]


@contextmanager
def sole_writer(folder: Path, *, patience: float = 0.0) -> Iterator[int]:
    """Hold a folder, made if need be, against other writers; the hold ends with the process, however that ends.

    Yields the descriptor of the lock file: a child that inherits it holds the folder too.

    Raises:
        BlockingIOError: if another process writes there after `patience` seconds; the sentence names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / LOCK_NAME).is_symlink():  # what it leads to would be written over
        raise ValueError(f"{folder / LOCK_NAME} is a link: remove it")
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
