"""The diagrams of the course: what the lessons hold is what the code draws."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from dkto.workshop.diagrams import COURSE, DIAGRAMS

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.mark.parametrize("name", DIAGRAMS)
def test_a_lesson_shows_the_diagram_that_the_code_draws_with_its_words(name):
    svg = DIAGRAMS[name]()
    assert (NOTEBOOKS / "images" / f"{name}.svg").read_text() == svg, "python -m dkto.workshop.diagrams"
    root = ElementTree.fromstring(svg)
    title, about = (root.find(f"{{http://www.w3.org/2000/svg}}{tag}").text for tag in ("title", "desc"))
    assert root.get("role") == "img" and len(about) > 60
    shown = json.dumps(f"![{title}. {about}](images/{name}.svg)", ensure_ascii=False)
    assert sum(shown in path.read_text() for path in NOTEBOOKS.glob("*.ipynb")) == 1


def test_no_word_of_a_diagram_lies_outside_of_it():
    for draw in DIAGRAMS.values():
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
