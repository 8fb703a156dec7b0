"""Tables that people bring, read in one way: .csv, .tsv, .jsonl and .parquet, and the values of a .json file.

Text is decoded by `dkto.data.texts`. The header's line says by which sign the fields of a .csv or .tsv are separated:
comma, semicolon or tab. Fields stay text, "NA" too; a .csv quotes a field that holds the separator, a .tsv takes fields
as they stand, as spreadsheets write them. Rows that are wholly empty are passed over. Rows count from 1, the header
aside and empty ones with them; lines of a .jsonl are its rows. Names of columns may differ in case and in blanks.
"""

import csv
import io
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dkto.common.files import refuse_other_than_file
from dkto.common.json_text import parse_json
from dkto.common.names import one_line, shown
from dkto.data.texts import NO_VALUE, open_text, read_text

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
SEPARATORS = ",;\t"
ROWS_AT_ONCE = 1 << 14
KEPT_TEXTS = 1 << 17  # how many texts of a column are compared with, so that equal ones share their memory
LARGEST_ID = 2**63 - 1
EXACT_FLOAT = 2**53  # from here on a float may be the neighbour of the whole number that was meant

Chunk = tuple[Iterable[int], dict[str, list]]  # numbers of rows, and their values by the name of the column


def read_table(path: Path, columns: Collection[str] = ()) -> pd.DataFrame:
    """A table file as it stands: values as objects, names of columns as in the file, rows numbered by its index from 0.

    Args:
        path: the file; its ending says the format.
        columns: the only ones to read, lower case; all if empty. `frame.attrs["columns"]` names all of the file.

    Raises:
        ValueError: if the file is not what its ending says, has another ending, names a column twice, or has a row
            with other fields than the header; the sentence names the file and the row.
    """
    match path.suffix.lower():
        case ".csv" | ".tsv" as suffix:
            return _table_of_lines(open_text(path, spreadsheet=True), str(path), suffix, columns)
        case ".jsonl":
            return _gathered(_object_chunks(_json_lines(path), str(path), columns), str(path), columns)
        case ".parquet":
            return read_parquet(path, str(path), columns)
    raise ValueError(f"{path} must be a {', '.join(TABLE_SUFFIXES)} file, got {path.suffix!r}")


def read_objects(path: Path, columns: Collection[str] = ()) -> pd.DataFrame:
    """`read_table`, which takes a .json file with a list of objects too."""
    if path.suffix.lower() == ".json":
        return table_of_objects(read_values(path), str(path), columns)
    return read_table(path, columns)


def read_values(path: Path) -> object:
    """The value that a .json file holds, or the list of those that the lines of a .jsonl file hold."""
    if path.suffix.lower() == ".json":
        return _parsed(read_text(path), str(path))
    return [value for _, value in _json_lines(path)]


def table_of_objects(rows: object, where: str, columns: Collection[str] = ()) -> pd.DataFrame:
    """The table of a list of objects, as JSON has them."""
    if not isinstance(rows, list):
        raise ValueError(f"{where} must hold a list of rows, got {shown(rows)}")
    return _gathered(_object_chunks(enumerate(rows), where, columns), where, columns)


def _json_lines(path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(open_text(path)):
        if line.strip():
            yield number, _parsed(line, f"{path}, line {number + 1},")


def _parsed(text: str, where: str) -> object:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where} cannot be read as JSON: {error}") from error


def _object_chunks(rows: Iterable[tuple[int, object]], where: str, columns: Collection[str]) -> Iterator[Chunk]:
    rows = iter(rows)
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        numbers, objects = zip(*chunk, strict=True)
        for number, each in chunk:
            if not isinstance(each, dict):
                raise ValueError(f"{where}, row {number + 1}: expected an object, got {shown(each)}")
        names = dict.fromkeys(chain(*objects))
        wanted = {name: not columns or plain_name(name) in columns for name in names}
        yield numbers, {name: [each.get(name) for each in objects] if wanted[name] else [] for name in names}


def _gathered(chunks: Iterable[Chunk], where: str, columns: Collection[str] = ()) -> pd.DataFrame:
    """One frame of chunks whose columns may differ; what a row lacks is None."""
    numbers: list[np.ndarray] = []
    values: dict[str, list] = {}
    wanted: dict[str, bool] = {}
    texts: dict[str, dict] = {}
    done = 0
    for rows, found in chunks:
        for name in found:
            if name not in wanted:
                wanted[name] = not columns or plain_name(name) in columns
                if wanted[name]:
                    values[name], texts[name] = [None] * done, {}
        numbers.append(np.fromiter(rows, np.int64))
        for name, column in values.items():
            column += _shared(found[name], texts[name]) if name in found else [None] * len(numbers[-1])
        done += len(numbers[-1])
    column_names(wanted, where)
    index = np.concatenate(numbers) if numbers else np.arange(0)
    frame = pd.DataFrame({name: pd.Series(column, dtype=object) for name, column in values.items()})
    frame.index = pd.RangeIndex(done) if not done or index[-1] == done - 1 else pd.Index(index)
    frame.attrs["columns"] = list(wanted)
    return frame


def _shared(values: list, texts: dict) -> list:
    if len(texts) > KEPT_TEXTS:
        texts.clear()
    return [texts.setdefault(value, value) if type(value) is str else value for value in values]


def table_of_text(text: str, where: str, suffix: str) -> pd.DataFrame:
    """The table in the text of a .csv or a .tsv file; a row with other fields than the header is refused.

    >>> table_of_text("prompt,style\\na dog, running,photo\\n", "x.csv", ".csv")
    Traceback (most recent call last):
    ValueError: x.csv, row 1: expected 2 fields as in the header, got 3; a field that holds a separator must be quoted
    """
    return _table_of_lines(io.StringIO(text, newline=None), where, suffix)


def _table_of_lines(lines: Iterable[str], where: str, suffix: str, columns: Collection[str] = ()) -> pd.DataFrame:
    lines = iter(lines)
    first = next((line for line in lines if line.strip(f'"{SEPARATORS} \n')), "")
    if told := re.fullmatch(r'"?sep=(.)"?\s*', first):  # as Excel writes and reads it
        separator, first = told[1], next(lines, "")
    else:
        separator = max(SEPARATORS, key=lambda sign: len(_fields(first, sign)))
    if suffix == ".tsv" and separator == "\t":
        split = (line.rstrip("\n").split("\t") for line in chain([first], lines))
        rows = (list(map(_unquoted, fields)) for fields in split)
    else:
        rows = _csv_rows(chain([first], lines), separator, where)
    header = next(rows, [])
    frame = _gathered(_row_chunks(header, rows, where), where, columns)
    if not len(frame):
        column_names(named := [name for name in header if name.strip()], where)
        return pd.DataFrame(columns=named)
    return frame


def _fields(line: str, separator: str) -> list[str]:
    return next(csv.reader([line], delimiter=separator), [])


def _csv_rows(lines: Iterable[str], separator: str, where: str) -> Iterator[list[str]]:
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        yield from reader
    except csv.Error as error:
        raise ValueError(f"{where} cannot be read as CSV: {error}, in line {reader.line_num}") from error


def _row_chunks(header: list[str], rows: Iterator[list[str]], where: str) -> Iterator[Chunk]:
    column_names([name for name in header if name.strip()], where)
    start = 0
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        kept = [n for n, row in enumerate(chunk) if row and (row[0].strip() or "".join(row).strip())]
        filled = chunk if len(kept) == len(chunk) else [chunk[n] for n in kept]
        if set(map(len, filled)) - {len(header)}:
            at = next(n for n in kept if len(chunk[n]) != len(header))
            raise ValueError(
                f"{where}, row {start + at + 1}: expected {len(header)} fields as in the header, "
                f"got {len(chunk[at])}; a field that holds a separator must be quoted"
            )
        if kept:  # a column without a name has no meaning here
            columns = zip(header, zip(*filled, strict=True), strict=True)
            yield [start + n for n in kept], {name: list(column) for name, column in columns if name.strip()}
        start += len(chunk)


def _unquoted(field: str) -> str:
    inner = field[1:-1]
    quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else field


def open_parquet(file: object, where: str, **options) -> pq.ParquetFile:
    """A .parquet file for reading; `options` are those of `pyarrow.parquet.ParquetFile`."""
    if isinstance(file, str | Path):
        refuse_other_than_file(Path(file), "table")
    try:
        return pq.ParquetFile(file, **options)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{where} cannot be read as Parquet: {one_line(error)}") from error


def read_parquet(file: object, where: str, columns: Collection[str] = ()) -> pd.DataFrame:
    """A .parquet file or stream; with `columns` those alone, beside which there may be gigabytes of images.

    Where none of them is in the file, all its columns come without a row.
    """
    table = open_parquet(file, where)
    schema = table.schema_arrow
    named = [name for name in schema.names if not re.fullmatch(r"__index_level_\d+__", name)]  # pandas' own
    column_names(named, where)
    wanted = [name for name in named if not columns or plain_name(name) in columns]
    if not wanted:
        frame = pd.DataFrame(columns=named)
    else:
        for name in wanted if columns else ():
            if pa.types.is_nested(kind := schema.field(name).type) or "binary" in str(kind):
                raise ValueError(f"{where}: column {name!r} holds {shown(str(kind))}, expected text; {UNPACK}")
        try:
            frame = _gathered(_parquet_chunks(table, wanted), where)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{where} cannot be read as Parquet: {one_line(error)}") from error
        frame = frame if len(frame) else pd.DataFrame(columns=wanted)
    frame.attrs["columns"] = named
    return frame


UNPACK = "images inside a table are unpacked first: save each as a file and name it in the table"


def _parquet_chunks(table: pq.ParquetFile, wanted: list[str]) -> Iterator[Chunk]:
    start = 0
    for batch in table.iter_batches(ROWS_AT_ONCE, columns=wanted):
        columns = (column.dictionary_decode() if pa.types.is_dictionary(column.type) else column for column in batch)
        yield range(start, start + len(batch)), dict(zip(batch.schema.names, map(_listed, columns), strict=True))
        start += len(batch)


def _listed(column: pa.Array) -> list:
    texts = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    return column.to_numpy(zero_copy_only=False).tolist() if texts else column.to_pylist()


def plain_name(column: object) -> str:
    """A column's name without blanks around it and in lower case."""
    return str(column).strip().strip("\ufeff").lower()


def column_names(found: Iterable[object], where: str) -> dict[str, str]:
    """The names of a table's columns by their `plain_name`, which must differ.

    >>> column_names(["Liked", "liked "], "x.csv")
    Traceback (most recent call last):
    ValueError: x.csv names the column 'liked' more than once: 'Liked' and 'liked '; keep one
    """
    names: dict[str, str] = {}
    for name in map(str, found):
        plain = plain_name(name)
        if plain in names:
            raise ValueError(
                f"{where} names the column {shown(plain)} more than once: {shown(names[plain])} and {shown(name)}; "
                "keep one"
            )
        names[plain] = name
    return names


def columns_by_meaning(found: Iterable[object], synonyms: Mapping[str, str], where: str) -> dict[str, str]:
    """The names of a table's columns by what they mean, which must differ.

    >>> columns_by_meaning(["Prompt", "caption"], {"caption": "prompt"}, "x.csv")
    Traceback (most recent call last):
    ValueError: x.csv has two columns for prompt: Prompt and caption; keep one
    """
    names: dict[str, str] = {}
    for plain, column in column_names(found, where).items():
        meaning = synonyms.get(plain, plain)
        if meaning in names:
            raise ValueError(
                f"{where} has two columns for {meaning}: {said(names[meaning])} and {said(column)}; keep one"
            )
        names[meaning] = column
    return names


def need_columns(found: Iterable[object], needed: Collection[str], where: str, named: Iterable[object] = ()) -> None:
    """Refuse a table that lacks a column or has it twice; `named`: the file's, where `found` have other names."""
    found = list(map(str, found))
    if missing := [name for name in needed if name not in found]:
        text = f"{where} needs the columns {', '.join(needed)}; missing: {', '.join(missing)}"
        raise ValueError(f"{text}; found: {said(', '.join(list(map(str, named)) or found) or 'none', 160)}")
    column_names([name for name in found if name in needed], where)


def said(name: str, limit: int = 80) -> str:
    """A name as a sentence says it: as it is, unless it is long or holds signs that cannot be printed."""
    return name if name.isprintable() and len(name) <= limit else shown(name, limit)


def refuse_rows(values: pd.Series, good: Iterable[bool], where: str, expected: str) -> None:
    """Refuse the first row whose value is not good, by its number.

    >>> refuse_rows(pd.Series(["1", "x"]), [True, False], "likes.csv", "rank must be a number")
    Traceback (most recent call last):
    ValueError: likes.csv, row 2: rank must be a number, got 'x'
    """
    bad = np.flatnonzero(~np.fromiter(good, bool))
    if len(bad):
        raise ValueError(f"{where}, row {values.index[bad[0]] + 1}: {expected}, got {shown(values.iloc[bad[0]])}")


def is_blank(value: object) -> bool:
    """Whether a field says nothing: blanks, None, or what programs write for it.

    >>> [is_blank(value) for value in (None, float("nan"), " ", "nan", 0, "NA")]
    [True, True, True, True, False, False]
    """
    if isinstance(value, str):
        return value.strip().lower() in NO_VALUE
    return value is None or value is pd.NA or (isinstance(value, float) and value != value)


def whole_numbers(values: pd.Series, where: str, name: str, *, least: int, blank: int | None = None) -> np.ndarray:
    """Whole numbers, exactly as they are written; one that int64 or a float cannot hold exactly is refused by its row.

    Args:
        values: texts or numbers.
        where: the file, for the sentence.
        name: what is read, for the sentence.
        least: the smallest number there may be.
        blank: what an empty field means; None refuses one.

    >>> whole_numbers(pd.Series(["9007199254740993", ""]), "x.csv", "pair_id", least=-1, blank=-1).tolist()
    [9007199254740993, -1]
    """
    found = [_whole(value, blank) for value in values]
    good = (number is not None and least <= number <= LARGEST_ID for number in found)
    hint = f", {blank} or nothing for none" if blank is not None else ""
    refuse_rows(values, good, where, f"{name} must be an integer from {least} to 2^63 - 1, written out{hint}")
    return np.array(found, dtype=np.int64)


def _whole(value: object, blank: int | None) -> int | None:
    if type(value) is str and len(value) < 19 and value.isascii() and value.isdecimal():
        return int(value)
    if is_blank(value):
        return blank
    if isinstance(value, str):
        match = re.fullmatch(r"([+-]?[0-9]{1,25})(?:[.]0)?", value.strip())
        return int(match[1]) if match else None
    if isinstance(value, bool | np.bool_):
        return None
    if isinstance(value, float | np.floating):
        return int(value) if abs(value) < EXACT_FLOAT and value == int(value) else None
    return int(value) if isinstance(value, int | np.integer) else None
