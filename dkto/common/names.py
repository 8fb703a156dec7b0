"""Names that people type: one that is unknown is refused together with the nearest and with all that are known."""

from collections.abc import Iterable
from difflib import get_close_matches

SHOWN = 80  # signs of a value that a sentence repeats
PATH_SHOWN = 300  # of a path
MOST_NAMES = 40  # known names that a sentence lists


def shown(value: object, limit: int = SHOWN) -> str:
    """A value as a sentence repeats it: its `repr`, cut where it is long, so that no escape code reaches a terminal.

    >>> shown("a red star"), shown("x" * 200, 12)
    ("'a red star'", "'xxxxxxxx...")
    """
    try:
        text = repr(value[: limit + 1] if isinstance(value, (str, bytes)) else value)
    except RecursionError:
        text = f"a {type(value).__name__} of lists in lists"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def printable(text: object, limit: int = 500) -> str:
    """A text as a terminal may get it: on one line, cut where it is long, its escape codes spelled out.

    >>> printable("no likes\\x1b[2J in\\na.csv")
    'no likes\\\\x1b[2J in\\\\na.csv'
    """
    text = str(text)
    text = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return text if text.isprintable() else "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def one_line(error: Exception) -> str:
    """A library's message without its line ends."""
    return printable(" ".join(str(error).split()), 200)


def not_known(said: str, name: object, known: Iterable[object], label: str = "known") -> str:
    """The sentence about a name that is not known: what is said of it, the nearest name, and all that are known.

    >>> not_known("no column 'bet' in the table", "bet", ["beta", "steps"])
    "no column 'bet' in the table; did you mean 'beta'? known: beta, steps"
    """
    names = [str(each) for each in known]
    near = get_close_matches(str(name)[:SHOWN], names, 1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    listed = ", ".join(printable(each, SHOWN) for each in names[:MOST_NAMES])
    return f"{said}; {guess}{label}: {listed or 'none'}{more}"


def check_name(what: str, name: object, known: Iterable[str], error: type[Exception] = ValueError) -> None:
    """Refuse the name of a `what` that is not known.

    >>> check_name("utility", "loss_avers", ["linear", "loss_averse"])
    Traceback (most recent call last):
    ValueError: unknown utility 'loss_avers'; did you mean 'loss_averse'? known: linear, loss_averse
    """
    known = list(known)
    if name not in known:
        raise error(not_known(f"unknown {what} {shown(name)}", name, known))


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse the value of a parameter that is not among its choices.

    >>> check_choice("ties", "drop", ["ignore", "liked"])
    Traceback (most recent call last):
    ValueError: ties must be one of ignore, liked, got 'drop'
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")
