"""Tables that this program writes and reads again, as .parquet: whole or absent, with a checksum of every page."""

from collections.abc import Collection, Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dkto.common.files import refuse_other_than_file, write_atomically
from dkto.common.names import one_line

_IS = {
    "text": lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind),
    "integer": pa.types.is_integer,
    "floating": pa.types.is_floating,
    "boolean": pa.types.is_boolean,
}


def write_frame(path: Path, frame: "pd.DataFrame | pa.Table", about: Mapping[str, str] | None = None) -> None:
    """Write a table whole or not at all, with what is to be known about it."""
    table = frame if isinstance(frame, pa.Table) else pa.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata(dict(about or {}))
    write_atomically(path, lambda part: pq.write_table(table, part, write_page_checksum=True))


def read_frame(
    path: Path, what: str, kinds: Mapping[str, str], optional: Collection[str] = ()
) -> tuple[pd.DataFrame, dict[str, str]]:
    """A table that should hold a `what`, and what was written about it.

    Args:
        kinds: its columns with what they hold: "text" (gaps allowed), "integer", "floating" or "boolean".
        optional: those of them that it may lack.

    Raises:
        ValueError: if it is cut or damaged, lacks a column, or a column holds other values; the sentence names it.
    """
    refuse_other_than_file(path, what)
    try:
        there = pq.read_schema(path).names
        kinds = {name: kind for name, kind in kinds.items() if name in there or name not in optional}
        table = pq.read_table(path, columns=list(kinds), page_checksum_verification=True).select(list(kinds))
        for name, kind in kinds.items():
            found = table[name]
            if not _IS[kind](found.type):
                raise ValueError(f"{name} must be {kind}, got {found.type}")
            if kind != "text" and found.null_count:
                raise ValueError(f"{name} is empty in {found.null_count} rows")
        frame = table.to_pandas(ignore_metadata=True)
        about = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    except Exception as error:  # whatever the bytes lead a library to
        raise ValueError(f"{path} holds no {what} that can be read ({one_line(error)})") from error
    return frame, about
