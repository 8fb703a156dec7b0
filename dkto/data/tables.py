"""Tables that people bring, read in one way: .csv, .tsv, .jsonl and .parquet, and the values of a .json file.

Text is UTF-8, with or without a byte order mark. Fields of a .csv or .tsv stay text, "NA" too; a .csv quotes a field
that holds a comma, a .tsv takes fields as they stand, as spreadsheets write them. Rows count from 1, the header aside.
"""

import csv
import io
import json
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


def read_table(path: Path, columns: Collection[str] = ()) -> pd.DataFrame:
    """A table file as it stands.

    Args:
        path: the file; its ending says the format.
        columns: the only ones to read of a .parquet file, lower case; all if empty.

    Raises:
        ValueError: if the file is not what its ending says, has another ending, names a column twice, or has a row
            with other fields than the header; the sentence names the file and the row.
    """
    match path.suffix.lower():
        case ".csv" | ".tsv" as suffix:
            return table_of_text(read_text(path), str(path), suffix)
        case ".jsonl":
            rows = read_values(path)
            good = [isinstance(row, dict) for row in rows]
            refuse_rows(pd.Series(rows, dtype=object), good, str(path), "expected an object")
            return pd.DataFrame(rows)
        case ".parquet":
            return read_parquet(path, str(path), columns)
    raise ValueError(f"{path} must be a {', '.join(TABLE_SUFFIXES)} file, got {path.suffix!r}")


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from error


def read_values(path: Path) -> object:
    """The value that a .json file holds, or the list of those that the lines of a .jsonl file hold."""
    text = read_text(path)
    if path.suffix.lower() == ".json":
        return _parsed(text, str(path))
    return [_parsed(line, f"{path}, line {row},") for row, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} cannot be read as JSON: {error}") from error


def table_of_text(text: str, where: str, suffix: str) -> pd.DataFrame:
    """The table in the text of a .csv or a .tsv file; a row with other fields than the header is refused.

    >>> table_of_text("prompt,style\\na dog, running,photo\\n", "x.csv", ".csv")
    Traceback (most recent call last):
    ValueError: x.csv, row 1: expected 2 fields as in the header, got 3; a field that holds a separator must be quoted
    """
    if suffix == ".tsv":
        lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
        rows = [[_unquoted(field) for field in line.split("\t")] for line in lines]
    else:
        try:
            rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
        except csv.Error as error:
            raise ValueError(f"{where} cannot be read as CSV: {error}") from error
    header, *rows = rows or [[]]
    for name in header:
        if header.count(name) > 1:
            raise ValueError(f"{where} names the column {name!r} more than once")
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise ValueError(
                f"{where}, row {number}: expected {len(header)} fields as in the header, got {len(row)}; "
                "a field that holds a separator must be quoted"
            )
    return pd.DataFrame(rows, columns=header)


def _unquoted(field: str) -> str:
    inner = field[1:-1]
    quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else field


def open_parquet(file: object, where: str, **options) -> pq.ParquetFile:
    """A .parquet file for reading; `options` are those of `pyarrow.parquet.ParquetFile`."""
    try:
        return pq.ParquetFile(file, **options)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{where} cannot be read as Parquet: {error}") from error


def read_parquet(file: object, where: str, columns: Collection[str] = ()) -> pd.DataFrame:
    """A .parquet file or stream; with `columns` those alone, beside which there may be gigabytes of images.

    Where none of them is in the file, all its columns come without a row.
    """
    table = open_parquet(file, where)
    names = table.schema_arrow.names
    wanted = [name for name in names if not columns or name.lower() in columns]
    try:
        return (table.read(wanted) if wanted else table.schema_arrow.empty_table()).to_pandas()
    except pa.ArrowException as error:
        raise ValueError(f"{where} cannot be read as Parquet: {error}") from error


def need_columns(found: Iterable[object], needed: Collection[str], where: str) -> None:
    """Refuse a table that lacks a column."""
    found = list(map(str, found))
    if missing := [name for name in needed if name not in found]:
        text = f"{where} needs the columns {', '.join(needed)}; missing: {', '.join(missing)}"
        raise ValueError(f"{text}; found: {', '.join(found) or 'none'}")


def refuse_rows(values: pd.Series, good: Iterable[bool], where: str, expected: str) -> None:
    """Refuse the first row whose value is not good, by its number.

    >>> refuse_rows(pd.Series(["1", "x"]), [True, False], "likes.csv", "rank must be a number")
    Traceback (most recent call last):
    ValueError: likes.csv, row 2: rank must be a number, got 'x'
    """
    bad = np.flatnonzero(~np.fromiter(good, bool))
    if len(bad):
        raise ValueError(f"{where}, row {bad[0] + 1}: {expected}, got {values.iloc[bad[0]]!r}")
