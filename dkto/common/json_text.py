"""JSON as data from anywhere: an object names a field once, and what cannot be read is a ValueError."""

import json

from dkto.common.names import shown


def parse_json(text: str | bytes) -> object:
    """The value in a text, refused where an object names a field twice: one of the two would be lost in silence.

    Raises:
        ValueError: if it is no JSON, is nested too deeply, or a field comes twice.

    >>> parse_json('{"liked": true, "liked": false}')
    Traceback (most recent call last):
    ValueError: an object names 'liked' more than once
    """
    try:
        return _DECODER.decode(text) if isinstance(text, str) else json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object names {shown(next(n for n in names if names.count(n) > 1))} more than once")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # made once: for short lines that is a third of the time
