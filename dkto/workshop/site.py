"""The project as web pages: README, guides, the lessons as they ran, verdict cards, every public function.

Sphinx renders, nothing is executed, and nothing is fetched when a page is read: mathematics becomes MathML here,
and a page opens from disk. `python -m dkto.workshop.site` builds `papermill_runs/outputs/site`.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pandas as pd
from bs4 import BeautifulSoup

from dkto.common.ends import guarded
from dkto.web.page import SERVED, SINGLE
from dkto.widgets.explorer import Explorer
from dkto.widgets.standalone import standalone_html
from dkto.workshop.keep_lessons import CARDS

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "papermill_runs" / "outputs" / "site"
PAGE = Path("papermill_runs", "outputs", "page")  # of `make page`; without it the site is the same but for it
SCREEN = Path("notebooks", "images", "page_desktop.png")
SETTINGS = ROOT / "papermill_runs" / "site" / "conf.py"
PACKAGES = ("dkto", "toy")
ELSEWHERE = ("http", "https", "mailto")
NOT_FETCHED = {"index", "search", "next", "prev", "canonical", "author"}  # relations that a browser only notes
GUIDES = (
    *(f"notebooks/{name}.md" for name in ("README", "TEACHING", "GLOSSARY", "your_own_likes")),
    *("papermill_runs/RESULTS.md", "tests/benchmarks/README.md"),
    *("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"),
)
FOLDERS = ("guides", "lessons", "cards", "api")
TEACH_LINK = """
```{raw} html
<a class="teach" href="teach/index.html"><img src="teach/screen.png" alt="">
<strong>Teach a diffusion model your taste</strong>
<span>Draw, like, tune and judge in this browser, now. Nothing to install, nothing leaves the page.</span></a>
```
"""
CONTENTS = """
```{{toctree}}
:maxdepth: 1
{options}

{entries}
```
"""


def build_site(output: Path = OUTPUT, reference: Path | None = None, root: Path = ROOT) -> Path:
    """Build the site and check it.

    Args:
        output: its folder; `source/` below it is what Sphinx reads, `html/` the pages.
        reference: folder of the lessons' reference runs, `papermill_runs/reference` if left out.
        root: the checkout.

    Raises:
        RuntimeError: if Sphinx warns of anything.
        ValueError: if a link leads nowhere, or a page would fetch something; the sentence names each.
    """
    source, pages = output / "source", output / "html"
    for folder in (source, pages):
        shutil.rmtree(folder, ignore_errors=True)
    write_source(source, reference or root / "papermill_runs" / "reference", root)
    command = [sys.executable, "-P", "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    command += ["-c", str(SETTINGS.parent), "-d", str(output / "doctrees"), str(source), str(pages)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    if done.returncode:
        raise RuntimeError(f"Sphinx is not content with {source}:\n{done.stderr.strip()}")
    if (root / PAGE).is_dir():
        shutil.copytree(root / PAGE / SERVED, pages / "teach")
        shutil.copyfile(root / PAGE / SINGLE, pages / SINGLE)  # where a folder is no server
        shutil.copyfile(root / SCREEN, pages / "teach" / "screen.png")
    wrong = check_pages(pages)
    if wrong:
        raise ValueError(f"{len(wrong)} links of {pages} are wrong: {'; '.join(wrong[:10])}")
    return pages / "index.html"


def write_source(source: Path, reference: Path, root: Path) -> None:
    """Lay out what Sphinx reads: the README, guides, a page a lesson, the cards, a page a module."""
    for folder in FOLDERS:
        (source / folder).mkdir(parents=True)
    lessons = sorted(path.parent.name for path in reference.glob("*/notebook.ipynb"))
    origins = {name: next((root / "notebooks").glob(f"**/{name}.ipynb"), root / "notebooks" / name) for name in lessons}
    guides = {root / path: path.replace("/", "-").lower() for path in GUIDES if (root / path).is_file()}
    pages = {root / "README.md": source / "index.md"} | {path: source / "guides" / guides[path] for path in guides}
    for name, origin in origins.items():
        page = source / "lessons" / f"{name}.ipynb"
        pages |= dict.fromkeys((origin.with_suffix(".ipynb"), reference / name / "notebook.ipynb"), page)
    copy = _Copy(root, source, {path.resolve(): page for path, page in pages.items()})
    for name, origin in origins.items():
        notebook = json.loads((reference / name / "notebook.ipynb").read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = copy.rewrite("".join(cell["source"]), origin.parent, source / "lessons")
            else:
                cell["outputs"] = [_touchable(output, root) for output in cell["outputs"]]
                for data in (output.get("data", {}) for output in cell["outputs"]):
                    if text := data.get("text/markdown"):
                        text = copy.rewrite("".join(text), origin.parent, source / "lessons")
                        data["text/markdown"] = re.sub(r"\.(ipynb|md)\)", ".html)", text)  # Sphinx follows none
        notebook["metadata"].pop("widgets", None)  # a page has no kernel to show them
        (source / "lessons" / f"{name}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    for path in sorted(path for pattern in CARDS for path in reference.glob(f"*/{pattern}")):
        _write_card(source / "cards", path)
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        _write_module(source / "api", path.relative_to(root), path.read_text(encoding="utf-8"))
    for path in guides:
        text = copy.rewrite(path.read_text(encoding="utf-8"), path.parent, source / "guides")
        pages[path].write_text(text, encoding="utf-8")
    (source / "api.md").write_text(
        "# Functions\n" + CONTENTS.format(options=":glob:", entries="api/*"), encoding="utf-8"
    )
    course = parts_of_the_course((root / "notebooks" / "README.md").read_text(encoding="utf-8"))
    listed = {name for _, part in course for name, _ in part}
    course.append(("Other kept runs", [(name, "") for name in lessons if name not in listed]))
    parts = [(title, [_entry(*one) for one in part if one[0] in lessons]) for title, part in course]
    guide = [("Guides and results", [f"guides/{name}" for name in guides.values()])]
    others = [("Verdict cards", sorted(f"cards/{path.name}" for path in (source / "cards").iterdir()))]
    contents = [
        CONTENTS.format(options=f":hidden:\n:caption: {title}", entries="\n".join(entries))
        for title, entries in [*parts, *guide, *others, ("Reference", ["api"])]
        if entries
    ]
    text = copy.rewrite((root / "README.md").read_text(encoding="utf-8"), root, source)
    if (root / PAGE).is_dir():
        title, _, rest = text.partition("\n")
        text = f"{title}\n{TEACH_LINK}{rest}"
    (source / "index.md").write_text("\n".join([text, *contents]), encoding="utf-8")


def parts_of_the_course(text: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """The course's parts in reading order, each with its lessons and their questions, from notebooks/README.md.

    >>> parts_of_the_course("### Part 1: likes\\n| [10_one](10_one.ipynb) | Why? | 4.2 |")
    [('Part 1: likes', [('10_one', 'Why?')])]
    """
    parts: list[tuple[str, list[tuple[str, str]]]] = []
    for line in text.splitlines():
        if line.startswith("| experiment |"):
            parts.append(("Experiments", []))
        elif found := re.match(r"### (.+)", line):
            parts.append((found[1], []))
        elif found := re.match(r"\| \[(\w+)\]\([^)]*\) \| (.+?) \|", line):
            parts[-1][1].append((found[1], found[2]))
    return parts


def _entry(lesson: str, question: str) -> str:
    """A line of the navigation: number and title."""
    number = re.match(r"\d*", lesson)[0]
    return f"{number} {question} <lessons/{lesson}>" if question else f"lessons/{lesson}"


def live_explorer() -> str:
    """The explorer with rewards made up as in lesson 60, as HTML."""
    rng = np.random.default_rng(0)
    liked = rng.random(400) < 0.5
    rewards = np.where(liked, 1.0, -1.0) + rng.normal(0, 1.5, 400)
    explorer = Explorer(rewards, liked, source="rewards made up for this page", reference_point=0.5)
    return standalone_html(explorer, "Files are read by Python: open lesson 60 on your machine.", explorer.figure())


def live_playground(**sizes) -> str:
    """The playground with the clouds of its grid, as HTML: it trains them now, a minute or less."""
    from toy.playground import RECIPE, Playground  # the laboratory stands on this package

    playground = Playground(RECIPE.replace(**sizes))
    reason = "This page shows models that are trained already. To train one now, open lesson 64 on your machine."
    return standalone_html(playground, reason, playground.figure(["base", "sft flip=0", "dpo beta=10 flip=0"]))


INSTRUMENTS = {"Explorer": live_explorer, "Playground": live_playground}
SCREENSHOTS = {"Likes": "likes", "Tuner": "tuning", "Judge": "judge", "TrainingView": "training_view"}
_INSTRUMENT = re.compile(rf"<?[\w.]*\b({'|'.join([*INSTRUMENTS, *SCREENSHOTS])})(?: object at |\()")


def _touchable(output: dict, root: Path) -> dict:
    """An output of a lesson; where that is an instrument, one that runs in a page, or an image of it in use."""
    data = output.get("data", {})
    if "font-awesome" in (text := "".join(data.get("text/html", ""))):  # an animation, whose icons are elsewhere
        text = re.sub(r'<link rel="stylesheet"\s+href="https:[^"]*font-awesome[^"]*">', "", text)
        text = re.sub(r'(<button title="([^"]*)"[^>]*>)\s*<i class="fa [^"]*"></i>', r"\1\2", text)
        return output | {"data": data | {"text/html": text}}
    found = _INSTRUMENT.match("".join(data.get("text/plain", "")))
    if not found or "image/png" in data:
        return output
    if found[1] in INSTRUMENTS:
        return output | {"data": {"text/html": INSTRUMENTS[found[1]]()}}
    image = root / "notebooks" / "images" / f"{SCREENSHOTS[found[1]]}.png"
    still = base64.b64encode(image.read_bytes()).decode()
    return output | {"data": {"image/png": still, "text/plain": f"{found[1]}, which lives in JupyterLab"}}


@dataclass(frozen=True)
class _Copy:
    """Texts of the checkout as pages: a link to what has a page leads there, an image comes along, others are words."""

    root: Path
    source: Path
    pages: dict[Path, Path]  # by the file in the checkout

    def rewrite(self, text: str, place: Path, folder: Path) -> str:
        """A text that lay in `place` of the checkout as a page of `folder`."""

        def replace(match: re.Match) -> str:
            image, words, target = match.groups()
            if urlsplit(target).scheme in ELSEWHERE or target.startswith("#"):
                return match.group()
            path = (place / urlsplit(target).path).resolve()
            if image:
                page = self.source / path.relative_to(self.root.resolve())
                page.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, page)
            elif path in self.pages:
                page = self.pages[path]
            else:
                return words
            return f"{image}[{words}]({os.path.relpath(page, folder)})"

        return re.sub(r'(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)(?: "[^"]*")?\)', replace, text)


def _write_card(folder: Path, path: Path) -> None:
    """A page for a table of a kept run that says paper value, ours and verdict."""
    lesson, title = path.parent.name, path.stem.replace("_", " ").capitalize()
    table = pd.read_csv(path, dtype=str, keep_default_na=False).to_html(index=False, border=0)
    table = table.replace("`", "&#96;")  # no cell ends the block
    page = f"lessons/{lesson}.ipynb"
    origin = f"the lesson [{lesson}](../{page})" if (folder.parent / page).exists() else f"`{lesson}`"
    text = f"# {title} of {lesson}\n\nFrom {origin}.\n\n```{{raw}} html\n{table}\n```\n"
    (folder / f"{lesson}-{path.stem}.md").write_text(text, encoding="utf-8")


def _write_module(folder: Path, path: Path, text: str) -> None:
    """A page for a module with something public in it."""
    parts = path.with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    if "__main__" not in parts and re.search(r"^(def|class) [^_]", text, re.MULTILINE):
        page = f"# {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n"
        (folder / f"{name}.md").write_text(page, encoding="utf-8")


def check_pages(folder: Path) -> list[str]:
    """What is wrong with a folder of pages: links to no file or anchor, what is fetched from elsewhere, local places.

    Links to other sites are not followed: that would need a network.
    """
    pages = {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in folder.rglob("*.html")}
    keys = ("id", "name")
    anchors = {path: {tag.get(key) for tag in page.find_all() for key in keys} for path, page in pages.items()}
    wrong, here = [], [f"{place}/" for place in (ROOT, Path.home()) if place.parts[1:]]
    for path in sorted(pages):
        where = path.relative_to(folder)
        text = path.read_text(encoding="utf-8")
        wrong += [f"{where} holds {place}, a place of this machine" for place in here if place in text]
        links = [tag["href"] for tag in pages[path].find_all("a", href=True)]
        fetched = [tag["href"] for tag in pages[path].find_all("link", href=True) if not NOT_FETCHED & {*tag["rel"]}]
        fetched += [tag["src"] for tag in pages[path].find_all(src=True)]
        wrong += [f"{where} fetches {url}" for url in fetched if urlsplit(url).netloc]
        for url in [*links, *fetched]:
            parts = urlsplit(url)
            if parts.scheme in (*ELSEWHERE, "data") or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                wrong.append(f"{where} links to {url}, which does not exist")
            elif parts.fragment and unquote(parts.fragment) not in anchors.get(target, {unquote(parts.fragment)}):
                wrong.append(f"{where} links to {url}, which has no such place")
    for path in sorted(folder.rglob("*.css")):
        if re.search(r"""(?:url\(|@import\s+)['"]?(https?:)?//[^'")]+""", path.read_text(encoding="utf-8")):
            wrong.append(f"{path.relative_to(folder)} fetches from another site")
    return wrong


def mathml(formula: str, display: bool) -> str:
    """A formula of LaTeX as MathML, which browsers draw by themselves.

    Raises:
        ValueError: if it has a command that is not known; the sentence quotes the formula.

    >>> mathml("r = 1", display=False)[:46]
    '<math xmlns="http://www.w3.org/1998/Math/MathM'
    """
    from docutils.utils.math import MathError
    from docutils.utils.math.latex2mathml import tex2mathml

    plain = re.sub(r"\\[bB]igg?[lrm]?(?![a-zA-Z])", "", formula)  # a size by hand; MathML stretches by itself
    try:
        return tex2mathml(plain.strip(), as_block=display)
    except MathError as error:
        raise ValueError(f"formula {formula!r} cannot be shown: {error}") from error


def literal_formulas(lines: Iterable[str]) -> list[str]:
    """A docstring of this project as Sphinx reads one: indented formulas stay as typed, stars and bars are themselves.

    >>> literal_formulas(["Reward of *one* sample:", "", "    r = beta * gap", "", "Args:", "    beta: scale."])
    ['Reward of \\\\*one\\\\* sample:', '', '::', '', '    r = beta * gap', '', 'Args:', '    beta: scale.']
    """
    found, in_section, previous_blank, in_formula = [], False, True, False
    for line in lines:
        indented = line.startswith("    ")
        if re.match(r"(Args|Returns|Raises|Yields|Attributes|Args of the call):$", line):
            in_section = True
        elif line and not indented:
            in_section = False
        if line and not indented:
            in_formula = False
        if indented and previous_blank and not in_section and not in_formula:
            found += ["::", ""]
            in_formula = True
        plain = in_formula or line.lstrip().startswith(">>>") or line.startswith(">>>")
        found.append(line if plain else _escaped(line))
        previous_blank = not line.strip()
    return found


def _escaped(line: str) -> str:
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(p if p.startswith("`") else re.sub(r"([*|\\])|(?<=\w)(_)(?!\w)", r"\\\1\2", p) for p in parts)


if __name__ == "__main__":
    sys.exit(guarded(lambda: print(f"the site is in {build_site()}"), "dkto"))
