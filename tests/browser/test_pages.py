"""Pages that open from disk: words from strangers stay words, in reports, pages of sweeps and what notebooks show."""

import nbformat
import pandas as pd
import pytest
from finished_runs import leave
from PIL import Image

from dkto.runs.page import figure_html, table_html, text_html, write_notebook_page, write_page

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
    parts = [text_html(ATTACK), table_html(table, ATTACK), figure_html(tmp_path / "one.png", ATTACK)]
    outputs = [nbformat.v4.new_output("display_data", {"text/html": part}) for part in parts]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=outputs)])
    nbformat.write(notebook, tmp_path / "report.ipynb")
    text = shown(write_notebook_page(tmp_path / "report.ipynb", tmp_path / "report.html", ATTACK))
    assert text.count(ATTACK) == 6  # every place that takes words


@pytest.mark.browser
def test_a_page_of_a_sweep_shows_markup_as_text(shown, tmp_path):
    states = {"runs/good": "done", "runs/bad": f"failed: ValueError: {ATTACK}"}
    for name in states:
        leave(tmp_path / name, beta=1.0, likes=f"{name} {ATTACK}", seed=0)
    text = shown(write_page(tmp_path, ATTACK, states))
    assert f"ValueError: {ATTACK}" in text and f"runs/good {ATTACK}" in text and text.startswith(ATTACK)
