"""The diagrams of the course: what the lessons hold is what the code draws."""

import base64
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from dkto.workshop.diagrams import COURSE, DIAGRAMS, attach, description

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.mark.parametrize("stem", DIAGRAMS)
def test_a_lesson_holds_the_diagram_that_the_code_draws_with_its_words(stem):
    name, draw = DIAGRAMS[stem]
    svg = draw()
    root = ElementTree.fromstring(svg)
    title, about = (root.find(f"{{http://www.w3.org/2000/svg}}{tag}").text for tag in ("title", "desc"))
    assert root.get("role") == "img" and title == description(svg) and len(about) > 60
    (cell,) = [c for c in json.loads((NOTEBOOKS / f"{stem}.ipynb").read_text())["cells"] if c.get("attachments")]
    assert base64.b64decode(cell["attachments"][f"{name}.svg"]["image/svg+xml"]).decode() == svg, "make the diagrams"
    assert f"![{title}. {about}](attachment:{name}.svg)" in "".join(cell["source"])


def test_no_word_of_a_diagram_lies_outside_of_it():
    for _, draw in DIAGRAMS.values():
        root = ElementTree.fromstring(draw())
        width, height = (float(root.get(side)) for side in ("width", "height"))
        for text in root.iter("{http://www.w3.org/2000/svg}text"):
            half = 0.3 * float(text.get("font-size")) * len(text.text)  # 0.6 of the size is a wide letter
            assert half <= float(text.get("x")) <= width - half and 0 < float(text.get("y")) < height, text.text


def test_the_course_names_every_lesson():
    named = {number for _, lessons in COURSE for part in lessons.split() for number in _numbers(part)}
    assert named == {path.name[:2] for path in NOTEBOOKS.glob("*.ipynb")}


def _numbers(part):
    first, _, last = part.partition("-")
    return [f"{number:02d}" for number in range(int(first), int(last or first) + 1)]


def test_a_lesson_without_a_place_for_the_diagram_is_refused():
    with pytest.raises(ValueError, match=r"must show attachment:course\.svg in one cell, got 0"):
        attach({"cells": []}, "course", "<svg/>")
