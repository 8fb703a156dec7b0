"""What any reader of people's tables promises: text stays text, and what does not fit is refused by its row."""

import os

import pandas as pd
import pytest

from dkto.data.tables import read_table, read_values

ROWS = [["a dog, running", "NA"], ['says "hi"', ""], ["0012", "1e5"]]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", 'prompt,style\r\n"a dog, running",NA\r\n\r\n"says ""hi""",\r\n0012,1e5\r\n'),
        ("x.TSV", 'prompt\tstyle\r\na dog, running\tNA\r\n"says ""hi"""\t\r\n\r\n0012\t1e5'),
        (
            "x.jsonl",
            '{"prompt": "a dog, running", "style": "NA"}\n\n{"prompt": "says \\"hi\\"", "style": ""}\n'
            '{"prompt": "0012", "style": "1e5"}\n',
        ),
    ],
)
def test_one_table_is_the_same_in_every_format_and_text_stays_text(tmp_path, name, text, mark):
    (tmp_path / name).write_bytes((mark + text).encode())
    table = read_table(tmp_path / name)
    assert list(table.columns) == ["prompt", "style"] and table.to_numpy().tolist() == ROWS
    table.to_parquet(tmp_path / "x.parquet")
    assert read_table(tmp_path / "x.parquet").to_numpy().tolist() == ROWS


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("x.csv", b"a,b\n1,2\n1\n", r"x\.csv, row 2: expected 2 fields as in the header, got 1"),
        ("x.tsv", b"a\tb\n1\t2\t3\n", r"x\.tsv, row 1: expected 2 fields as in the header, got 3"),
        ("x.csv", b"a,a\n1,2\n", r"x\.csv names the column 'a' more than once"),
        ("x.csv", b"a\n\xff\n", r"x\.csv cannot be read as UTF-8 text"),
        ("x.jsonl", b'{"a": 1}\n[2]\n', r"x\.jsonl, row 2: expected an object, got \[2\]"),
        ("x.jsonl", b'{"a": 1}\n{\n', r"x\.jsonl, line 2, cannot be read as JSON"),
        ("x.parquet", b"PAR1 no", r"x\.parquet cannot be read as Parquet"),
        ("x.xlsx", b"", r"must be a \.csv, \.tsv, \.jsonl, \.parquet file, got '\.xlsx'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(tmp_path, name, data, sentence):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=sentence) as refusal:
        read_table(tmp_path / name)
    assert "\n" not in str(refusal.value)


def test_of_a_parquet_file_only_the_columns_asked_for_are_read(tmp_path):
    pd.DataFrame({"Prompt": ["a"], "jpg": [b"1"]}).to_parquet(tmp_path / "x.parquet")
    assert list(read_table(tmp_path / "x.parquet", ("prompt", "style")).columns) == ["Prompt"]
    none = read_table(tmp_path / "x.parquet", ("caption",))
    assert list(none.columns) == ["Prompt", "jpg"] and none.empty


def test_empty_files_hold_no_row(tmp_path):
    for name in ("x.csv", "x.tsv", "x.jsonl"):
        (tmp_path / name).write_text("\n")
        assert read_table(tmp_path / name).empty
    assert read_values(tmp_path / "x.jsonl") == []


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_pipe_or_a_folder_is_no_table(suffix, tmp_path):
    """A pipe without a writer would wait, in a library that no alarm reaches."""
    os.mkfifo(tmp_path / f"likes{suffix}")
    (tmp_path / f"other{suffix}").mkdir()
    for name in ("likes", "other"):
        with pytest.raises(ValueError, match=rf"{name}\{suffix} is no .*: expected a file, got a folder or a pipe"):
            read_table(tmp_path / f"{name}{suffix}")
