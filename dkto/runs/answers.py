"""What a lesson says back: whether a typed answer is right, and findings that are filled from the run's own numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dkto.common.names import shown

if TYPE_CHECKING:
    from IPython.display import Markdown

UNANSWERED = "Not answered yet: put your answer in the place of the three dots."


@dataclass(frozen=True)
class Checked:
    """What `check` found; a cell shows its sentence, and it counts as true where the answer is right."""

    right: bool
    sentence: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return self.sentence


def check(answer: object, right: object, *, tolerance: float = 0.01, on: Sequence[tuple] = ()) -> Checked:
    """Whether an answer that a reader typed is right; a wrong one is a sentence and no error.

    Args:
        answer: a number, several of them, a text, or a function; three dots, or a function that gives them, is none.
        right: of the same kind.
        tolerance: how far a number may lie off, as a share of the right one, or in its unit where that is below 1.
        on: for functions: arguments of each call on which both must agree.

    >>> check(..., 0.25)
    Not answered yet: put your answer in the place of the three dots.
    >>> check(0.3, 0.25)
    Not yet: 0.3 is too large.
    >>> check(0.25, 0.25), bool(check(lambda x: 2 * x, lambda x: x + x, on=[(1,), (3,)]))
    (Right., True)
    >>> check(lambda x: x, lambda x: x * x, on=[(1,), (3,)])
    Not yet, for (3,): 3 is too small.
    """
    if callable(right):
        return _check_function(answer, right, tolerance, on)
    if answer is ... or answer is None:
        return Checked(False, UNANSWERED)
    if isinstance(right, str):
        same = isinstance(answer, str) and answer.strip().casefold() == right.casefold()
        return Checked(same, "Right." if same else f"Not yet: {shown(answer)} is not it.")
    try:
        given, wanted = (np.asarray(value, dtype=float) for value in (answer, right))
    except (TypeError, ValueError):
        return Checked(False, f"Not yet: a number was expected, got {shown(answer)}.")
    if given.shape != wanted.shape:
        return Checked(False, f"Not yet: {_many(wanted)} expected, got {_many(given)}.")
    off = ~(np.abs(given - wanted) <= tolerance * np.maximum(1, np.abs(wanted)))
    if not off.any():
        return Checked(True, "Right.")
    first = tuple(np.argwhere(off)[0])
    value, place = given[first], f", at place {', '.join(map(str, first))}" if first else ""
    side = "too large" if value > wanted[first] else "too small" if value < wanted[first] else "no number"
    return Checked(False, f"Not yet{place}: {value:g} is {side}.")


def _check_function(answer: object, right: Callable, tolerance: float, on: Sequence[tuple]) -> Checked:
    if answer is ...:
        return Checked(False, UNANSWERED)
    if not callable(answer):
        return Checked(False, f"Not yet: a function was expected, got {shown(answer)}.")
    for arguments in on:
        try:
            given = answer(*arguments)
        except Exception as error:  # the reader's own code
            return Checked(False, f"Not yet, for {shown(arguments)}: it raises {type(error).__name__}: {error}")
        found = check(given, right(*arguments), tolerance=tolerance)
        if not found:
            return Checked(False, found.sentence.replace("Not yet", f"Not yet, for {shown(arguments)}", 1))
    return Checked(True, "Right.")


def _many(values: np.ndarray) -> str:
    return f"an array of shape {values.shape}" if values.ndim else "one number"


def findings(*sentences: str) -> "Markdown":
    """What a lesson saw, as a numbered list; its sentences hold the numbers of the run, and so cannot drift from them.

    >>> findings("The loss fell.", "The margin is 2.").data
    '1. The loss fell.\\n2. The margin is 2.'
    """
    from IPython.display import Markdown

    return Markdown("\n".join(f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1)))
