"""The page of a sweep: every planned run is on it, text is text, and nothing is fetched."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup, Comment
from finished_runs import leave
from PIL import Image

from dkto.runs.page import figure_html, styled, table_html, text_html, write_page

ROOT = Path(__file__).parents[2]


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


PAYLOADS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</td></tr></table><svg onload=alert(1)>",
    '"><iframe src="javascript:alert(1)"></iframe>',
    "' onmouseover='alert(1)",
    '" autofocus onfocus="alert(1)',
    "</style></title><script>alert(1)</script>",
    "<a href='javascript:alert(1)'>x</a>",
    "<!-- <script>alert(1)</script> -->",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "``` <base href=//evil.example> ```",
    "\x00<object data=x>{{7*7}}{% raw %}",
)
HARMLESS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "a", "div", "table", "thead", "tbody"}
HARMLESS |= {"tr", "th", "td", "figure", "figcaption", "img", "caption"}


def check_inert(text, payload, times=1):
    """Parsed as a browser does: nothing but tables and text, and the payload is in it as text."""
    page = BeautifulSoup(text, "html.parser")
    for tag in page.find_all():
        assert tag.name in HARMLESS and not any(name.startswith("on") or name == "autofocus" for name in tag.attrs)
        assert not str(tag.get("href", "")).lower().startswith(("javascript:", "//"))
        assert tag.name != "img" or tag["src"].startswith("data:image/png;base64,")
    assert not page.find_all(string=lambda found: isinstance(found, Comment))
    words = [*map(str, page.find_all(string=True)), *(str(tag.get("alt")) for tag in page.find_all())]
    assert sum(payload.replace("\x00", "") in each.replace("\x00", "") for each in words) >= times


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_page_table_or_figure_takes_a_text_for_html(tmp_path, payload):
    name = payload.replace("/", "|").replace("\x00", "")
    folder = leave(tmp_path / "runs" / name, beta=0.1, likes=payload, seed=0)
    leave(tmp_path / "runs" / "b", beta=0.2, likes="many", seed=12)
    record = json.loads((folder / "run.json").read_text())
    for key in (payload, f"{payload} dict"):
        record["parameters"] |= {key: [payload]}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.json").write_text(json.dumps({"metrics": {payload: 1.0}}))
    (folder / "notebook.ipynb").touch()
    page = write_page(tmp_path, payload, {f"runs/{name}": "done", "runs/b": f"failed: {payload}"})
    check_inert(page.read_text(), payload, times=5)
    frame = pd.DataFrame(
        {payload: [payload, 0.5], "list": [[payload], 1]}, index=pd.Index([payload, "b"], name=payload)
    )
    check_inert(table_html(frame, payload), payload, times=4)
    for table in (frame, frame.T, frame.set_index(frame.index.rename("second"), append=True)):
        check_inert(re.sub(r"<style.*?</style>", "", styled(table).to_html(), flags=re.S), payload, times=4)
    check_inert(text_html(payload, "h2"), payload)
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    check_inert(figure_html(tmp_path / "a.png", payload), payload, times=2)
    check_inert(frame.to_html(), payload, times=3)


def test_formats_of_a_styled_table_are_of_its_numbers():
    frame = pd.DataFrame({"rate": [0.5, 0.25], "n": [1200, 3]})
    text = styled(frame, {"rate": "{:.1%}", "n": "{:,}"}).hide().to_html()
    assert (
        all(f">{each}<" in text for each in ("50.0%", "25.0%", "1,200"))
        and ">0.333<" in styled(frame / 1.5, precision=3).to_html()
    )


def test_lessons_show_no_table_that_does_not_escape():
    notebooks = [path for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts]
    cells = {path.stem: json.loads(path.read_text())["cells"] for path in notebooks}
    plain = {
        name for name, found in cells.items() for cell in found if re.search(r"\.style\b", "".join(cell["source"]))
    }
    assert len(notebooks) >= 50 and not plain


def test_what_a_spreadsheet_would_run_is_text_in_table_csv(tmp_path):
    for number, text in enumerate(("=HYPERLINK(1)", "+1+1", "-2+3", "@SUM(1)", "\t=1", "-0.5")):
        leave(tmp_path / str(number), beta=-0.5, likes=text, seed=0)
    (tmp_path / "6").mkdir()
    write_page(tmp_path, "x", {str(number): "done" for number in range(6)} | {"=9": "missing"})
    table = pd.read_csv(tmp_path / "table.csv", dtype=str)
    likes = table["parameter.likes"].tolist()[:6]
    assert likes == ["'=HYPERLINK(1)", "'+1+1", "'-2+3", "'@SUM(1)", "'\t=1", "-0.5"]
    assert table["run"].tolist()[-1] == "'=9" and set(table["parameter.beta"].dropna()) == {"-0.5"}


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
