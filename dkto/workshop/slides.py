"""Slides of the lessons, `make slides`: question, predictions, figures and findings of the kept runs, a screen each.

Nothing in the lessons is marked by hand: their form says what is what. The pages open from disk; Page Down turns.
"""

import html
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dkto.common.ends import guarded
from dkto.common.quick_nbformat import nbformat
from dkto.runs.page import write_notebook_page

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "papermill_runs" / "outputs" / "slides"
QUESTION = r"^\*\*(?:Predict|Before you)\b.*"
LOOK = """<style>
html { scroll-snap-type: y mandatory; }
body { max-width: 74rem; padding: 0 2rem; font-size: 1.7rem; }
section { min-height: 96vh; scroll-snap-align: start; display: flex; flex-direction: column; justify-content: center; }
section h1 { font-size: 3rem; } section h2 { border: 0; font-size: 1.9rem; }
section p, section li { max-width: none; } section img { max-height: 78vh; max-width: 100%; object-fit: contain; }
</style>"""


def slides_of(notebook: dict) -> Iterator[str]:
    """The slides of an executed lesson as markdown, in its order."""
    heading, seen = "", False
    for number, cell in enumerate(notebook["cells"]):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            if number == 0:
                yield "\n\n".join(text.split("\n\n")[:2])
            headings = re.findall(r"^## .*", text, flags=re.M)
            heading, seen = (headings[-1], "What we saw" in headings[-1]) if headings else (heading, seen)
            yield from (found for found in re.findall(QUESTION, text, flags=re.M) if number)
            continue
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                words = html.escape(output.get("metadata", {}).get("image/png", {}).get("alt", ""))
                png = "".join("".join(data["image/png"]).split())
                yield f'{heading}\n\n<img alt="{words}" src="data:image/png;base64,{png}">'
            elif seen and "text/markdown" in data:
                yield f"{heading}\n\n{''.join(data['text/markdown'])}"


def write_slides(executed: Path, folder: Path = OUTPUT) -> Path:
    """One page of a lesson's kept run; returns it.

    Args:
        executed: an executed notebook.
        folder: where the page goes, under the name of the notebook's folder.
    """
    slides = list(slides_of(nbformat.read(executed, as_version=4)))
    cells = [nbformat.v4.new_markdown_cell(f"<section>\n\n{slide}\n\n</section>") for slide in slides]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(LOOK), *cells])
    title = slides[0].splitlines()[0].removeprefix("# ")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "slides.ipynb")
        nbformat.write(notebook, path)
        return write_notebook_page(path, folder / f"{executed.parent.name}.html", title)


def _main() -> None:
    lessons = sorted((ROOT / "notebooks").glob("*.ipynb"))
    kept = [ROOT / "papermill_runs" / "reference" / lesson.stem / "notebook.ipynb" for lesson in lessons]
    written = [write_slides(path) for path in kept if path.is_file()]
    print(f"{len(written)} lessons as slides: {OUTPUT.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(guarded(_main, "dkto"))
