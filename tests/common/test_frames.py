"""Tables of our own: what is read is what was written, or the file is named."""

import pandas as pd
import pytest

from dkto.common.frames import read_frame, write_frame

KINDS = {"name": "text", "value": "floating", "row": "integer", "is_liked": "boolean"}
FRAME = pd.DataFrame({"name": ["a", None, "c"], "value": [0.5, 1.5, 2.5], "row": [1, 2, 3], "is_liked": [True] * 3})


def test_no_flipped_bit_changes_a_value_in_silence(tmp_path):
    path = tmp_path / "x.parquet"
    write_frame(path, FRAME, {"of": "abc"})
    whole, about = read_frame(path, "table", KINDS)
    data, refused = path.read_bytes(), 0
    assert whole.equals(FRAME) and about == {"of": "abc"}
    for at in range(0, len(data), 5):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        try:
            assert read_frame(path, "table", KINDS)[0].equals(whole)
        except ValueError as error:
            assert str(error).startswith(f"{path} holds no table that can be read (")
            refused += 1
    assert refused > len(data) / 5 / 4


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"value": ["x", "y", "z"]}, "value must be floating, got (large_)?string"),
        ({"row": [1.5, 2.0, 3.0]}, "row must be integer, got double"),
        ({"row": pd.array([1, None, 3], "Int64")}, "row is empty in 1 rows"),
        ({"name": [1, 2, 3]}, "name must be text, got int64"),
    ],
)
def test_other_values_are_refused(tmp_path, change, sentence):
    write_frame(tmp_path / "x.parquet", FRAME.assign(**change))
    with pytest.raises(ValueError, match=rf"x\.parquet holds no table that can be read \({sentence}\)"):
        read_frame(tmp_path / "x.parquet", "table", KINDS)
    write_frame(tmp_path / "x.parquet", FRAME.drop(columns="row"))
    with pytest.raises(ValueError, match=r"x\.parquet holds no table that can be read"):
        read_frame(tmp_path / "x.parquet", "table", KINDS)
