import re

import nbformat
import pytest

from dkto.workshop.slides import ROOT, slides_of, write_slides

KEPT = sorted((ROOT / "papermill_runs" / "reference").glob("[0-46]*_*/notebook.ipynb"))


@pytest.mark.parametrize("path", KEPT[::6], ids=lambda path: path.parent.name)
def test_slides_are_question_predictions_figures_and_findings_and_fetch_nothing(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    slides = list(slides_of(notebook))
    figures = sum("image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", []))
    assert slides[0].startswith("# ") and sum("<img " in slide for slide in slides) == figures
    page = write_slides(path, tmp_path).read_text()
    assert page.count("<section>") == page.count("</section>") == len(slides)
    assert page.count("<img ") == figures and not re.findall(r"<(?:script|link|iframe)|(?:src|href)=.http", page)
    prose = "\n".join("".join(cell.source) for cell in notebook.cells if cell.cell_type == "markdown")
    assert sum(slide.startswith(("**Predict", "**Before you")) for slide in slides) == len(
        re.findall(r"^\*\*(?:Predict|Before you)", prose, flags=re.M)
    ) - prose.split("\n\n")[0].count("**Predict")


def test_what_a_run_wrote_is_text_in_its_attributes():
    image = {"data": {"image/png": "AAAA"}, "metadata": {"image/png": {"alt": '"><script>alert(1)</script>'}}}
    cells = [
        {"cell_type": "markdown", "source": "# Why?\n\nBecause."},
        {"cell_type": "code", "source": "x", "outputs": [image]},
    ]
    first, second = slides_of({"cells": cells})
    assert first == "# Why?\n\nBecause." and "<script>" not in second
