"""Fields of configurations: each with its type and range, checked in one place, from a command line and from Python."""

import math
import operator
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from dkto.common.names import check_choice, shown

LARGEST = 2**63 - 1  # what a whole number may be: files and random generators hold no larger ones


def setting(
    default: Any,
    least: float | None = None,
    *,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """A field with its range: at least `least` or above `above`, and at most `most` or below `below`."""
    return field(default=default, metadata={"least": least, "above": above, "most": most, "below": below})


def check_settings(config: object) -> None:
    """Refuse a field of a frozen dataclass that is not of its type or out of its range.

    Numbers of numpy become Python's, a text that should be a path one.

    Raises:
        ValueError: the sentence names the field, what was expected and what came.
    """
    for each in fields(config):
        value = getattr(config, each.name)
        if get_origin(each.type) is Literal:
            check_choice(each.name, value, get_args(each.type))
        elif each.type in (int, float):
            object.__setattr__(config, each.name, checked_number(each.name, value, each.type, **each.metadata))
        elif each.type is Path and isinstance(value, str | Path) and str(value) and "\0" not in str(value):
            object.__setattr__(config, each.name, Path(value))
        elif each.type in (bool, str, Path) and (not isinstance(value, each.type) or "\0" in str(value)):
            what = {bool: "True or False", str: "text without NUL", Path: "a path"}[each.type]
            raise ValueError(f"{each.name} must be {what}, got {shown(value)}")


def checked_number(
    name: str,
    value: object,
    kind: type = int,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> int | float:
    """A whole or a finite number within its range, as Python's own.

    >>> checked_number("steps", 1.5, int, least=1)
    Traceback (most recent call last):
    ValueError: steps must be a whole number, got 1.5
    >>> checked_number("rate", -1.0, float, above=0)
    Traceback (most recent call last):
    ValueError: rate must be above 0, got -1.0
    """
    try:
        number = operator.index(value) if kind is int else float(value)
        right = not isinstance(value, bool | str | bytes) and math.isfinite(number)
    except (TypeError, ValueError, OverflowError):
        right = False
    most = LARGEST if most is None and below is None else most
    low = f"[{least:g}" if least is not None else f"({above:g}" if above is not None else f"[-{LARGEST}"
    if not right:
        expected = "a whole number" if kind is int else "a finite number"
    elif (least is not None and number < least) or (above is not None and number <= above):
        expected = f"{least:g} or above" if least is not None else f"above {above:g}"
        expected = expected if most == LARGEST else f"in {low}, {f'{most:g}]' if below is None else f'{below:g})'}"
    elif (most is not None and number > most) or (below is not None and number >= below):
        expected = f"in {low}, {f'{most}]' if below is None else f'{below:g})'}"
    else:
        return value if isinstance(value, int) else number  # whole numbers stay, whatever hashes them
    raise ValueError(f"{name} must be {expected}, got {shown(value)}")
