"""Published data of judgements whose images lie in files beside them, in forms of their own.

    Simulacra Aesthetic Captions   a SQLite file with ratings from 1 to 10, read as a table of scores
    open-image-preferences         .parquet of the results, with up to three judgements of each pair

The columns of Simulacra are those that its readers name (`ratings(sid, iid, rating)`, `images(id, gid)`,
`generations(id, prompt)`, `paths(iid, path)`); the file itself was not at hand. Those of open-image-preferences are
printed in the notebook that made its binarised form.
"""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pandas as pd

from dkto.common.files import refuse_other_than_file
from dkto.common.names import one_line, shown
from dkto.data.tables import need_columns, open_parquet
from dkto.data.texts import clean_prompt

SQLITE_SUFFIXES = (".sqlite", ".sqlite3", ".db")
LARGEST_DATABASE = 8 << 30  # bytes; Simulacra's is far smaller
MOST_ROWS = 20_000_000  # of a table
LONGEST_VALUE = 1 << 20  # bytes of one field
SIMULACRA = {
    "ratings": ("sid", "iid", "rating"),
    "images": ("id", "gid"),
    "generations": ("id", "prompt"),
    "paths": ("iid", "path"),
}
RESPONSES = {"image_1": (1.0, 0.0), "image_2": (0.0, 1.0), "both_good": (1.0, 1.0), "both_bad": (0.0, 0.0)}
PREFERENCES = ("images", "preference.responses", "preference.responses.status")


def simulacra_ratings(path: Path) -> pd.DataFrame:
    """The ratings of Simulacra Aesthetic Captions: image, prompt, rating, and as user the survey of who gave it.

    The file is opened read-only and only plain tables are read, one after another: what it may hold beside them (views,
    triggers, virtual tables, extensions) is never run.

    Raises:
        ValueError: if it is no SQLite database, lacks a table or a column, or is larger than Simulacra could be.
    """
    refuse_other_than_file(path, "database")
    if (size := path.stat().st_size) > LARGEST_DATABASE:
        raise ValueError(f"{path} must have at most {LARGEST_DATABASE:,} bytes to be read, got {size:,}")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            database.text_factory = lambda data: data.decode(errors="surrogateescape")
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE)
            database.execute("PRAGMA trusted_schema = OFF")
            tables = {name: _table(database, path, name) for name in SIMULACRA}
    except sqlite3.Error as error:
        raise ValueError(f"{path} cannot be read as a SQLite database: {one_line(error)}") from error
    first = {name: tables[name].drop_duplicates(key) for name, key in (("images", "id"), ("generations", "id"))}
    paths = tables["paths"].drop_duplicates("iid")
    rated = tables["ratings"][tables["ratings"]["rating"].notna()]
    rated = rated.merge(first["images"], left_on="iid", right_on="id", how="left")
    rated = rated.merge(first["generations"], left_on="gid", right_on="id", how="left", suffixes=("", "_of_prompt"))
    rated = rated.merge(paths, on="iid", how="left")
    found = {"image": rated["path"], "prompt": rated["prompt"], "rating": rated["rating"], "user": rated["sid"]}
    return pd.DataFrame(found, dtype=object)


def _table(database: sqlite3.Connection, path: Path, name: str) -> pd.DataFrame:
    made = database.execute("SELECT sql FROM sqlite_master WHERE type = 'table' AND name = ?", (name,)).fetchone()
    if made is None or not re.match(r"\s*CREATE\s+TABLE\b", str(made[0]), re.IGNORECASE):
        raise ValueError(f"{path} must hold the tables {', '.join(SIMULACRA)}, as Simulacra's does; {name} is missing")
    columns = SIMULACRA[name]
    need_columns([row[1] for row in database.execute(f"PRAGMA table_info({name})")], columns, f"{path}, table {name},")
    rows = database.execute(f"SELECT {', '.join(columns)} FROM {name} LIMIT {MOST_ROWS + 1}").fetchall()
    if len(rows) > MOST_ROWS:
        raise ValueError(f"{path}, table {name}, must have at most {MOST_ROWS:,} rows to be read")
    return pd.DataFrame(rows, columns=list(columns), dtype=object)


def holds_preferences(path: Path) -> bool:
    """Whether a .parquet file has the columns of open-image-preferences' results."""
    with open_parquet(path, str(path)) as file:
        return {"images", "preference.responses"} <= set(file.schema_arrow.names)


def preference_votes(path: Path) -> Iterator[tuple[int, list[tuple] | str]]:
    """Of each row of open-image-preferences' results its number and votes, or why it has none.

    A vote is (image_0, image_1, prompt, label_0, label_1): "both_good" is two likes, "both_bad" two dislikes. The
    images are addresses on the hub; their files are looked for by the path within the repository that they name.
    """
    row = 0
    with open_parquet(path, str(path)) as file:
        names = [name for name in PREFERENCES if name in file.schema_arrow.names]
        try:
            for batch in file.iter_batches(1024, columns=names):
                for entry in batch.select(names).to_pylist():
                    row += 1
                    try:
                        yield row, _votes_of(entry)
                    except ValueError as error:
                        yield row, str(error)
        except Exception as error:  # pyarrow raises whatever the bytes lead it to
            raise ValueError(f"{path} cannot be read as Parquet: {one_line(error)}") from error


def _votes_of(entry: dict) -> list[tuple]:
    images, responses = entry["images"], entry["preference.responses"]
    if not isinstance(images, dict) or not (prompt := clean_prompt(images.get("prompt"))):
        raise ValueError(f"images must hold image_1, image_2 and a prompt, got {shown(images)}")
    sides = [_file_of(images.get(name)) for name in ("image_1", "image_2")]
    if not isinstance(responses, list) or not responses:
        raise ValueError("nobody judged the pair")
    status = entry.get("preference.responses.status") or ["submitted"] * len(responses)
    unknown = [each for each in responses if each not in RESPONSES]
    if unknown or len(status) != len(responses) or sides[0] == sides[1]:
        raise ValueError(f"a response must be one of {', '.join(RESPONSES)} on two images, got {shown(responses)}")
    submitted = [response for response, state in zip(responses, status, strict=True) if state == "submitted"]
    if not submitted:
        raise ValueError(f"no judgement of the pair was submitted, got {shown(status)}")
    return [(*sides, prompt, *RESPONSES[response]) for response in submitted]


def _file_of(address: object) -> str:
    """The file of an image by its address on the hub, as it lies in a copy of the repository.

    >>> _file_of("https://hub.example/datasets/a/b/resolve/main/image_quality_dev/33%2068.jpg?download=true")
    'image_quality_dev/33 68.jpg'
    """
    if not isinstance(address, str) or not address.strip():
        raise ValueError(f"an image must be an address or a file name, got {shown(address)}")
    if "://" not in address:
        return address
    path = unquote(urlsplit(address).path)
    within = re.search(r"/resolve/[^/]+/(.+)", path)
    return within[1] if within else path.rpartition("/")[2]
