"""How a command ends: a mistake in one sentence, an interruption within seconds, and nothing left that it started."""

import dis
import errno
import os
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from dkto.common.names import PATH_SHOWN, printable

if TYPE_CHECKING:
    import asyncio

    import psutil

PARENT_VARIABLE = "DKTO_PARENT"  # the process that a `dkto` command ends with, however deep below it
INTERRUPTED = "interrupted; the same call goes on"
GRACE = 1.0  # seconds that what was started has to end by itself; a training writes a checkpoint if it can
LONGEST = 2.0  # seconds after which an interrupted command is over, whatever it does
MISTAKES = (ValueError, OSError, ImportError, FloatingPointError, RuntimeError)
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room and call again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose another place, or change its permissions"),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY), "remove what is there, or choose another place"),
    errno.EIO: "the disk or its connection fails: choose another place",
}
_asked: list[int] = []  # signals that came
_over = threading.Event()  # once nothing that this process started is left
_wakeup: list[int] = []  # the descriptor that Python writes the number of a signal to


def guarded(call: Callable[[], object], name: str, *, own_process: bool = True) -> int:
    """Call a command and return the exit code of its process.

    A mistake of the user is one sentence and 2, an interruption one line and 130 (143 after SIGTERM), and an error of
    the program's own a line that names a file with its traceback, and 1. A warning is its sentence alone.

    Args:
        call: the command with its arguments filled in.
        name: begins each line.
        own_process: whether signals and the end of DKTO_PARENT are waited for; not inside a notebook.
    """
    plain, warnings.formatwarning = warnings.formatwarning, lambda text, *_, **__: _warning(name, text)
    try:
        if own_process:
            _take_signals()
            if parent := os.environ.get(PARENT_VARIABLE):
                end_with(int(parent))
        call()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if _asked or isinstance(error, KeyboardInterrupt):
            if os.environ.get("RANK", "0") == "0":  # of several ranks one says it
                _say(f"{name}: {INTERRUPTED}")
            if _asked:
                _over.wait(LONGEST)
            elif own_process:
                end_family()
            return 128 + (_asked[0] if _asked else signal.SIGINT)
        said = sentence_of(error)
        _say(f"{name}: {said or _kept(error)}")
        return 2 if said else 1
    finally:
        warnings.formatwarning = plain


def sentence_of(error: Exception) -> str | None:
    """The sentence about a mistake of the user, or about the disk; None for an error of the program's own.

    A KeyError or TypeError is a mistake where a line of this program raises it, and its own error elsewhere.

    >>> sentence_of(PermissionError(13, "Permission denied", "out/metrics.jsonl"))
    'out/metrics.jsonl: Permission denied; choose another place, or change its permissions'
    >>> sentence_of(KeyError("metadata"))
    """
    if isinstance(error, MemoryError):
        return f"not enough memory ({str(error) or 'none left'}): choose a smaller batch or fewer processes"
    if isinstance(error, OSError) and error.errno:
        remedy = f"; {REMEDIES[error.errno]}" if error.errno in REMEDIES else ""
        place = f"{printable(error.filename, PATH_SHOWN)}: " if error.filename else ""
        return f"{place}{error.strerror}{remedy}"
    if isinstance(error, (KeyError, TypeError)) and _is_raised_here(error):
        return str(error.args[0]) if error.args else None
    return str(error) or None if isinstance(error, MISTAKES) and not isinstance(error, RecursionError) else None


def _is_raised_here(error: Exception) -> bool:
    """Whether a `raise` of this program made it, not a slip on the way."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_globals.get("__name__", "").split(".")[0] not in ("dkto", "toy"):
        return False
    return dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def _kept(error: Exception) -> str:
    """The line about an error of the program's own; its traceback goes into a file."""
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="dkto-error-", suffix=".txt", delete=False) as file:
        file.writelines(traceback.format_exception(error))
    return f"internal error, {type(error).__name__}: {error}; please report it with {file.name}"


def _bars() -> list:
    """The progress bars that are open: nothing is to be glued to one."""
    return list(getattr(sys.modules["tqdm.std"].tqdm, "_instances", ())) if "tqdm.std" in sys.modules else []


def _warning(name: str, text: object) -> str:
    for bar in _bars():
        bar.clear()
    return f"{name}: {text}\n"


def _say(line: str) -> None:
    """A last line on stderr, below the bars."""
    for bar in _bars():
        bar.close()
    print(line, file=sys.stderr, flush=True)


def _interrupt(number: int, _: object) -> None:
    if not _asked:
        _asked.append(number)
        raise KeyboardInterrupt


def _take_signals() -> None:
    """From here on SIGINT and SIGTERM end this process within seconds, also while it is deep in a library."""
    if threading.current_thread() is not threading.main_thread():
        return
    if not _wakeup:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        _wakeup.append(writer)
        threading.Thread(target=_end_soon, args=(reader,), daemon=True).start()
    signal.set_wakeup_fd(_wakeup[0], warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def take_signals_back(loop: "asyncio.AbstractEventLoop") -> None:
    """Let signals end this command again after a library took them for a loop; outside a command nothing changes."""
    if _wakeup:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        _take_signals()


def _end_soon(reader: int) -> None:
    """Wait for a signal that ends this process, and see to it that it does."""
    while signal.getsignal(os.read(reader, 1)[0]) is not _interrupt:  # a training takes SIGTERM in its own way
        pass
    until = time.monotonic() + LONGEST
    end_family()
    _over.set()
    time.sleep(max(0.0, until - time.monotonic()))
    end_family(0.0)
    os._exit(128 + (_asked or [signal.SIGINT])[0])


def end_with(parent: int) -> None:
    """End this process within seconds when another ends, however deep below it this one was started.

    It gets SIGTERM; what is not over after `LONGEST` seconds is ended with all that it has started.

    Raises:
        SystemExit: if that process is gone already.
    """
    if not is_alive(parent):
        sys.exit(f"process {parent}, which started this, has ended")
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    _wait_for(parent)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LONGEST)
    end_family(0.0)
    os._exit(128 + signal.SIGTERM)


def _wait_for(number: int) -> None:
    """Return when a process has ended."""
    try:
        descriptor = os.pidfd_open(number)  # Linux
    except ProcessLookupError:
        return
    except (AttributeError, OSError):
        while is_alive(number):
            time.sleep(0.2)
        return
    select.select([descriptor], [], [])
    os.close(descriptor)


def is_alive(number: int) -> bool:
    """Whether a process of this number is there."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def end_family(grace: float = GRACE) -> None:
    """End all processes below this one: asked by SIGTERM, killed after `grace` seconds."""
    import psutil

    family = [each for each in psutil.Process().children(recursive=True) if not _is_tracker(each)]
    for end in ("terminate", "kill") if grace else ("kill",):
        for process in family:
            try:
                getattr(process, end)()
            except psutil.Error:  # it has just ended
                continue
        if end == "terminate":
            psutil.wait_procs(family, timeout=grace)


def _is_tracker(process: "psutil.Process") -> bool:
    """Whether it is that of multiprocessing, which tidies up and ends when this process does."""
    import psutil

    try:
        return any("resource_tracker" in word for word in process.cmdline())
    except psutil.Error:
        return True
