"""Which image was preferred to which, beside the table whose rows it names: NAME.pairs.parquet.

The file holds a hash of the table: row numbers mean nothing once the table is sorted, filtered or edited.
"""

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from dkto.common.frames import write_frame
from dkto.data.tables import need_columns, open_parquet, read_table, refuse_rows

COLUMNS = ["chosen_row", "rejected_row"]
TABLE_KEY = "table"


def write_comparisons(path: Path, frame: pd.DataFrame, comparisons: np.ndarray | None) -> None:
    """Write the comparisons of a table that is to lie at `path`; None removes those of a former one.

    Args:
        frame: the table, with the columns image, prompt and liked.
        comparisons: (P, 2) int64, rows of the chosen and the rejected image.
    """
    beside = path.with_suffix(".pairs.parquet")
    if comparisons is None:
        beside.unlink(missing_ok=True)
        return
    write_frame(beside, pd.DataFrame(comparisons, columns=COLUMNS), {TABLE_KEY: _table_hash(frame)})


def read_comparisons(path: Path, frame: pd.DataFrame) -> np.ndarray | None:
    """The comparisons beside the table at `path`, (P, 2) int64; None if there are none.

    Raises:
        ValueError: if they belong to the table as it was before it changed, or name a row that is none.
    """
    beside = path.with_suffix(".pairs.parquet")
    if not beside.exists():
        return None
    pairs = read_table(beside)
    need_columns(pairs.columns, COLUMNS, str(beside))
    with open_parquet(beside, str(beside)) as file:
        belongs = (file.schema_arrow.metadata or {}).get(TABLE_KEY.encode(), b"").decode()
    if not belongs:
        warnings.warn(
            f"{beside} does not say to which rows it belongs; {path.name} is taken as it is now", stacklevel=2
        )
    elif belongs != _table_hash(frame):
        raise ValueError(
            f"{beside} names rows of {path.name} as it was before it was sorted, filtered or edited: write both again, "
            f"or remove {beside.name} to do without comparisons"
        )
    for name in COLUMNS:
        rows = pd.to_numeric(pairs[name], errors="coerce")
        good = (rows == np.floor(rows)) & (rows >= 0) & (rows < len(frame))
        refuse_rows(
            pairs[name].astype(object),
            good,
            str(beside),
            f"{name} must be a row of {path.name}, from 0 to {len(frame) - 1}",
        )
    return pairs[COLUMNS].to_numpy(np.int64)


def _table_hash(frame: pd.DataFrame) -> str:
    liked = frame["liked" if "liked" in frame else "split"]
    rows = zip(frame["image"], frame["prompt"], liked, strict=True)
    text = "\n".join(json.dumps([str(image), *str(prompt).split(), str(liked)]) for image, prompt, liked in rows)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
