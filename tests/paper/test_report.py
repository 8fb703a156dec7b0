import html.parser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dkto.paper.report import Section, picture_html, report_html, table_html, write_report


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen, self.sources = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(page):
    parser = Tags()
    parser.feed(page)
    assert not parser.open
    return parser


def test_a_page_is_well_formed_whole_and_fetches_nothing(tmp_path):
    picture = tmp_path / "grid.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(picture)
    table = pd.DataFrame({"opponent": ["base"], "win_rate": [0.75]})
    section = Section("Win-rates", ["words"], [("over the base", table)], [("same noise", picture)])
    page = report_html("Title", "Not reached: nothing.", [section], {"profile": "tiny"})
    found = parsed(page)
    assert "script" not in found.seen
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in found.sources)
    first = page.index("<p ")
    assert page[first:].startswith('<p class="lead">Not reached: nothing.')
    assert write_report(tmp_path / "deep" / "report.html", page).read_text() == page


def test_text_from_prompts_and_files_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>"
    picture = tmp_path / "a.png"
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(picture)
    frame = pd.DataFrame({evil: [evil]}, index=[evil])
    page = report_html(evil, evil, [Section(evil, [evil], [(evil, frame)], [(evil, picture)])], {evil: evil})
    assert "script" not in parsed(page).seen and "<script" not in page


def test_numbers_are_short_and_missing_ones_empty():
    text = table_html(pd.DataFrame({"a": [0.123456, np.nan]}))
    assert "0.1235" in text and "nan" not in text.lower()


def test_only_png_goes_in(tmp_path):
    (tmp_path / "a.png").write_text("<svg onload=x>")
    with pytest.raises(ValueError, match=r"a\.png is no PNG"):
        picture_html(tmp_path / "a.png", "x")
