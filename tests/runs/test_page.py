"""The page of a sweep: every planned run is on it, text is text, and nothing is fetched."""

import re

import numpy as np
import pandas as pd
import pytest
from finished_runs import leave
from PIL import Image

from dkto.runs.page import figure_html, table_html, text_html, write_page


@pytest.fixture
def folder(tmp_path):
    leave(tmp_path / "runs" / "a", beta=0.1, likes="<b>few</b>", seed=0)
    (tmp_path / "runs" / "a" / "notebook.ipynb").touch()
    leave(tmp_path / "runs" / "b", beta=0.2, likes="many", seed=12)
    (tmp_path / "engine.log").touch()
    return tmp_path


def test_every_planned_run_is_in_table_and_page(folder):
    states = {"runs/a": "done", "runs/b": "failed: <img src=x onerror=alert(1)>", "runs/c": "missing"}
    page = write_page(folder, "a <sweep>", states)
    table = pd.read_csv(folder / "table.csv")
    assert list(table["run"]) == ["runs/a", "runs/b", "runs/c"] and list(table["state"]) == list(states.values())
    assert list(table["parameter.seed"].dropna()) == [0, 12]
    text = page.read_text()
    assert "1 of 3 runs are done" in text and "<title>a &lt;sweep&gt;</title>" in text
    assert "<img" not in text and "&lt;img src=x" in text and "<b>few" not in text
    assert re.findall(r'href="([^"]+)"', text) == ["table.csv", "engine.log", "runs/a/notebook.ipynb"]
    assert not re.search(r"https?://|<script", text)


def test_before_any_run_there_is_a_page_too(tmp_path):
    text = write_page(tmp_path, "none yet", {"runs/a": "missing"}).read_text()
    assert "0 of 1 runs are done" in text and "runs/a" in text
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["index.html", "table.csv"]


def test_numbers_are_short_missing_ones_empty_and_text_is_escaped():
    text = table_html(pd.DataFrame({"a": [0.123456, np.nan], "<b>": ["<i>", "x" * 80]}, index=["<u>", "v"]), "<s>")
    assert "0.1235" in text and "nan" not in text.lower() and "x" * 80 in text
    assert not any(tag in text for tag in ("<b>", "<i>", "<u>", "<s>")) and text_html("<b>") == "<p>&lt;b&gt;</p>"


def test_only_png_goes_in(tmp_path):
    (tmp_path / "a.png").write_text("<svg onload=x>")
    with pytest.raises(ValueError, match=r"a\.png is no PNG"):
        figure_html(tmp_path / "a.png", "x")
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "b.png")
    assert "<s>" not in figure_html(tmp_path / "b.png", "<s>")
