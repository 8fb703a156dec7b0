"""What a reader made of a damaged input: one word, and why."""

import dis
import re
import signal
import time
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

KINDS = ("clear", "unclear sentence", "internal error", "uncaught", "hang", "memory", "wrong", "warned", "accepted")
REFUSED = KINDS[:4]
BAD = KINDS[1:7]
FATAL = ("uncaught", "hang", "memory", "wrong")  # of which there may be none
LONGEST = 400  # signs of a sentence, folders aside
MOST_MB = 500
MOST_SECONDS = 5.0  # of computing; of waiting with a machine that others use as well, see `_Alarm`
PLACE = re.compile(r"\b(row|line|entry|ranking|question|cell|formula|record|picture|image) \S", re.I)


class Hang(BaseException):
    """The alarm: no reader catches it."""


class Shown(Exception):
    """A refusal that a page shows, and does not raise."""


@dataclass(frozen=True)
class Outcome:
    """A word of `KINDS` and what was said."""

    kind: str
    said: str = ""


def observe(read: Callable[[], object], check: Callable[[object, bool], str | None], places: list[str]) -> Outcome:
    """Call a reader and judge what happens.

    Args:
        read: the call.
        check: an independent look at what was accepted; says what is wrong with it, or returns None.
        places: names of files and fields, one of which a refusal must hold.
    """
    before = _reset_peak()
    try:
        with warnings.catch_warnings(record=True) as said, _Alarm():
            warnings.simplefilter("always")
            found = read()
    except Hang:
        return Outcome("hang", f"over {MOST_SECONDS:g} s")
    except Shown as error:
        problem = _problem(str(error), places)
        outcome = Outcome("unclear sentence" if problem else "clear", f"{problem or 'shown'}: {error}")
    except Exception as error:
        outcome = refusal(error, places)
    else:
        ours = [
            str(w.message) for w in said if "/dkto/" in w.filename or not issubclass(w.category, DeprecationWarning)
        ]
        try:
            with _Alarm():
                wrong = check(found, bool(ours))
        except Hang:
            wrong = "accepted, but a second reader hangs"
        except Exception as error:
            wrong = f"accepted, but {type(error).__name__}: {error}"[:300]
        outcome = (
            Outcome("warned" if ours else "accepted", " | ".join(ours)) if wrong is None else Outcome("wrong", wrong)
        )
    grown = (_status("VmHWM") - before) / 1024
    return Outcome("memory", f"{grown:.0f} MB more; {outcome}") if grown > MOST_MB else outcome


def refusal(error: Exception, places: list[str]) -> Outcome:
    """How clear an error is: a sentence of dkto's own with its place, another sentence, or none."""
    from dkto.common.ends import MISTAKES

    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    about = f"{type(error).__name__}: {text}"
    if not isinstance(error, (*MISTAKES, KeyError, TypeError)):
        return Outcome("uncaught", about)
    ours = _raised_by_dkto(error)
    if not ours and not isinstance(error, ValueError | OSError):
        return Outcome("internal error", about)
    problem = _problem(text, places)
    if ours and problem is None:
        return Outcome("clear", about)
    return Outcome("unclear sentence", f"{problem or 'from a library'}: {about}")


def _problem(text: str, places: list[str]) -> str | None:
    """What keeps a text from being one sentence with its place."""
    shown = re.sub(r"/[^\s'\"]*/", "/", text)  # folders may be long
    if len(shown) > LONGEST:
        return f"{len(shown)} signs"
    if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in text):
        return "a control sign"
    if len(text.split()) < 4:
        return "no sentence"
    if not PLACE.search(text) and not any(place in text for place in places):
        return "no place"
    return None


def _raised_by_dkto(error: Exception) -> bool:
    """Whether it was a `raise` of dkto that made the error, and no operation that failed."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    ours = "dkto" in Path(code.co_filename).parts and "site-packages" not in code.co_filename
    return ours and dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


class _Alarm:
    """Raises `Hang` when 5 s of computing are over, or nothing moves: a pipe without a writer, a lock."""

    def __enter__(self) -> None:
        self._wall, self._busy = time.monotonic(), time.process_time()
        signal.signal(signal.SIGALRM, self._look)
        signal.setitimer(signal.ITIMER_REAL, 1, 1)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _look(self, *_: object) -> None:
        wall, busy = time.monotonic() - self._wall, time.process_time() - self._busy
        if busy > MOST_SECONDS or wall > 6 * MOST_SECONDS or (wall > MOST_SECONDS and busy < 0.05 * wall):
            raise Hang


def _reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> float:
    return float(re.search(rf"^{name}:\s+(\d+)", Path("/proc/self/status").read_text(), re.M)[1])
