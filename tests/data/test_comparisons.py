"""Comparisons beside a table: bound to its rows, and refused in a sentence where they are not what they should be."""

import numpy as np
import pandas as pd
import pytest

from dkto.data.comparisons import read_comparisons, write_comparisons

TABLE = pd.DataFrame({"image": ["a.png", "b.png", "c.png"], "prompt": ["x y", "x y", "z"], "liked": ["like"] * 3})


def test_comparisons_come_back_and_none_removes_those_of_a_former_table(tmp_path):
    write_comparisons(tmp_path / "t.csv", TABLE, np.array([[0, 1], [2, 1]]))
    found = read_comparisons(tmp_path / "t.csv", TABLE.assign(prompt=["x y ", "x  y", "z"]))
    assert found.tolist() == [[0, 1], [2, 1]] and found.dtype == np.int64, "blanks are no other prompt"
    write_comparisons(tmp_path / "t.csv", TABLE, None)
    assert read_comparisons(tmp_path / "t.csv", TABLE) is None


@pytest.mark.parametrize(
    "other",
    [
        TABLE.sort_values("image", ascending=False),
        TABLE[:2],
        TABLE.assign(prompt=["x y", "z", "x y"]),
        TABLE.assign(liked=["like", "dislike", "like"]),
    ],
    ids=["sorted", "filtered", "other prompts", "other labels"],
)
def test_a_table_that_changed_is_noticed(tmp_path, other):
    write_comparisons(tmp_path / "t.csv", TABLE, np.array([[0, 1], [2, 1]]))
    with pytest.raises(ValueError, match=r"t\.pairs\.parquet names rows of t\.csv as it was before it was sorted, fil"):
        read_comparisons(tmp_path / "t.csv", other)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ({"chosen_row": [0, 1.5]}, "needs the columns .*; missing: rejected_row"),
        ({"chosen_row": [0, 1.5], "rejected_row": [1, 2]}, r"row 2: chosen_row must be a row of t\.csv, .*2, got 1\.5"),
        ({"chosen_row": [0, 1], "rejected_row": [1, 3]}, r"row 2: rejected_row must be a row of t\.csv, .*2, got 3"),
        ({"chosen_row": [0, 1], "rejected_row": [1, None]}, r"row 2: rejected_row must be a row of t\.csv, .*got None"),
        ({"chosen_row": ["a", "1"], "rejected_row": [1, 2]}, r"row 1: chosen_row must be a row of t\.csv, .*got 'a'"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not say to which rows it belongs")
def test_rows_that_are_none_are_named(tmp_path, rows, sentence):
    pd.DataFrame(rows).to_parquet(tmp_path / "t.pairs.parquet")
    with pytest.raises(ValueError, match=rf"t\.pairs\.parquet.*({sentence})"):
        read_comparisons(tmp_path / "t.csv", TABLE)


def test_a_file_that_does_not_say_what_it_belongs_to_is_taken_with_a_warning(tmp_path):
    pd.DataFrame({"chosen_row": [0], "rejected_row": [1]}).to_parquet(tmp_path / "t.pairs.parquet")
    with pytest.warns(UserWarning, match=r"t\.pairs\.parquet does not say to which rows it belongs"):
        assert read_comparisons(tmp_path / "t.csv", TABLE).tolist() == [[0, 1]]


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "t.pairs.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"t\.pairs\.parquet cannot be read as Parquet"):
        read_comparisons(tmp_path / "t.csv", TABLE)
