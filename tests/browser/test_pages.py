"""Pages that open from disk: words from strangers stay words, in reports, pages of sweeps and what notebooks show."""

import pandas as pd
import pytest
from finished_runs import leave
from PIL import Image

from dkto.paper.report import Section, report_html, write_report
from dkto.runs.page import write_page

ATTACK = "<img src=x onerror=alert(1)>"


@pytest.fixture
def shown(lab):
    """`shown(path)`: the text of a page from disk, after its scripts could have run; an alert or the image fails."""
    page = lab.browser.new_page()
    alerts = []
    page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))

    def show(path):
        page.goto(path.as_uri())
        page.wait_for_timeout(300)
        assert page.locator("img[src='x']").count() == 0 and alerts == []
        return page.locator("body").inner_text()

    yield show
    page.close()


@pytest.mark.browser
def test_a_report_of_the_paper_shows_markup_as_text(shown, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    table = pd.DataFrame({ATTACK: [ATTACK], "n": [1.0]}, index=[ATTACK])
    section = Section(ATTACK, [ATTACK], [(ATTACK, table)], [(ATTACK, tmp_path / "one.png")])
    text = shown(write_report(tmp_path / "report.html", report_html(ATTACK, ATTACK, [section], {ATTACK: ATTACK})))
    assert text.count(ATTACK) == 12  # every place that takes words


@pytest.mark.browser
def test_a_page_of_a_sweep_shows_markup_as_text(shown, tmp_path):
    states = {"runs/good": "done", "runs/bad": f"failed: ValueError: {ATTACK}"}
    for name in states:
        leave(tmp_path / name, beta=1.0, likes=f"{name} {ATTACK}", seed=0)
    text = shown(write_page(tmp_path, ATTACK, states))
    assert f"ValueError: {ATTACK}" in text and f"runs/good {ATTACK}" in text and text.startswith(ATTACK)
