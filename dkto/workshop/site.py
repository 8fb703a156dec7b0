"""The project as web pages: README, the lessons as they ran, reproduction cards, every public function.

Sphinx renders, nothing is executed, and nothing is fetched when a page is read: mathematics becomes MathML here,
and a page opens from disk. `python -m dkto.workshop.site` builds `papermill_runs/outputs/site`.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pandas as pd

from dkto.workshop.keep_lessons import CARDS

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "papermill_runs" / "outputs" / "site"
SETTINGS = ROOT / "papermill_runs" / "site" / "conf.py"
PACKAGES = ("dkto", "toy")
ELSEWHERE = ("http", "https", "mailto")


def build_site(output: Path = OUTPUT, reference: Path | None = None, root: Path = ROOT) -> Path:
    """Build the site and check it.

    Args:
        output: its folder; `source/` below it is what Sphinx reads, `html/` the pages.
        reference: folder of the lessons' reference runs, `papermill_runs/reference` if left out.
        root: the checkout.

    Returns:
        The first page.

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
    wrong = check_pages(pages)
    if wrong:
        raise ValueError(f"{len(wrong)} links of {pages} are wrong: {'; '.join(wrong[:10])}")
    return pages / "index.html"


def write_source(source: Path, reference: Path, root: Path) -> None:
    """Lay out what Sphinx reads: the README, a page a lesson, the cards, a page a module."""
    (source / "lessons").mkdir(parents=True)
    lessons = sorted(path.parent.name for path in reference.glob("*/notebook.ipynb"))
    for name in lessons:
        notebook = json.loads((reference / name / "notebook.ipynb").read_text(encoding="utf-8"))
        notebook["cells"] = [_with_links(cell, lessons) for cell in notebook["cells"]]
        notebook["metadata"].pop("widgets", None)  # a page has no kernel to show them
        (source / "lessons" / f"{name}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    cards = _write_cards(source, reference)
    modules = _write_modules(source, root)
    text = (root / "README.md").read_text(encoding="utf-8")
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    for image in images:
        target = source / image
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / image, target)
    text = _rewrite(text, lessons, keep=set(images), folder="")
    (source / "index.md").write_text(f"{text}\n{_contents(lessons, cards, modules)}", encoding="utf-8")


def _contents(lessons: list[str], cards: list[str], modules: list[str]) -> str:
    parts = {
        "Lessons, as they ran": [f"lessons/{name}" for name in lessons],
        "Reproduction cards": [f"cards/{name}" for name in cards],
        "Functions": [f"api/{name}" for name in modules],
    }
    trees = []
    for caption, pages in parts.items():
        if pages:
            names = "\n".join(pages)
            trees.append(f"```{{toctree}}\n:hidden:\n:maxdepth: 1\n:caption: {caption}\n\n{names}\n```\n")
    return "\n".join(trees)


def _with_links(cell: dict, lessons: list[str]) -> dict:
    if cell["cell_type"] != "markdown":
        return cell
    return cell | {"source": _rewrite("".join(cell["source"]), lessons, keep=set(), folder="lessons/")}


def _rewrite(text: str, lessons: list[str], keep: set[str], folder: str) -> str:
    """Links to a lesson become links to its page; a link into the checkout, which a site has not, becomes its words."""

    def replace(match: re.Match) -> str:
        words, target = match.groups()
        scheme, name = urlsplit(target).scheme, Path(urlsplit(target).path)
        if scheme in ELSEWHERE or target.startswith("#") or target in keep:
            return match.group()
        lesson = name.parent.name if name.name == "notebook.ipynb" else name.stem  # the former: of a kept run
        if name.suffix == ".ipynb" and lesson in lessons and "solutions" not in name.parts:
            return f"[{words}]({'' if folder else 'lessons/'}{lesson}.ipynb)"
        return words

    return re.sub(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)(?: \"[^\"]*\")?\)", replace, text)


def _write_cards(source: Path, reference: Path) -> list[str]:
    """A page for every table of a reference run that says paper value, ours and verdict."""
    names = []
    for path in sorted(path for pattern in CARDS for path in reference.glob(f"*/{pattern}")):
        name = f"{path.parent.name}-{path.stem}"
        title = path.stem.replace("_", " ")
        table = pd.read_csv(path, dtype=str, keep_default_na=False).to_html(index=False, border=0)
        (source / "cards").mkdir(exist_ok=True)
        text = f"# {title.capitalize()}\n\nFrom the lesson {path.parent.name}.\n\n```{{raw}} html\n{table}\n```\n"
        (source / "cards" / f"{name}.md").write_text(text, encoding="utf-8")
        names.append(name)
    return names


def _write_modules(source: Path, root: Path) -> list[str]:
    """A page for every module with something public in it."""
    (source / "api").mkdir()
    names = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if any(part.startswith("__") for part in parts) or not _has_public(path):
                continue
            name = ".".join(parts)
            text = f"# {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n"
            (source / "api" / f"{name}.md").write_text(text, encoding="utf-8")
            names.append(name)
    return names


def _has_public(path: Path) -> bool:
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    defined = (ast.FunctionDef, ast.ClassDef)
    return any(isinstance(node, defined) and not node.name.startswith("_") for node in nodes)


class _Page(HTMLParser):
    """Anchors, links, and whatever a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors, self.links, self.fetched = set(), [], []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") not in ("index", "search", "next", "prev", "canonical", "author"):
            self.fetched.append(values.get("href", ""))
        elif tag in ("script", "img", "iframe", "source", "video", "audio") and "src" in values:
            self.fetched.append(values["src"])


def check_pages(folder: Path) -> list[str]:
    """What is wrong with a folder of pages: links to no file or no anchor, and anything fetched from elsewhere.

    Links to other sites are not followed: that would need a network.
    """
    pages = {path: _read_page(path) for path in sorted(folder.rglob("*.html"))}
    wrong = []
    for path, page in pages.items():
        where = path.relative_to(folder)
        wrong += [f"{where} fetches {url}" for url in page.fetched if urlsplit(url).netloc]
        for url in [*page.links, *(url for url in page.fetched if not urlsplit(url).netloc)]:
            parts = urlsplit(url)
            if parts.scheme in (*ELSEWHERE, "data") or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                wrong.append(f"{where} links to {url}, which does not exist")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                wrong.append(f"{where} links to {url}, which has no such place")
    for path in sorted(folder.rglob("*.css")):
        urls = re.findall(r"""(?:url\(|@import\s+)['"]?(https?:)?//[^'")]+""", path.read_text(encoding="utf-8"))
        wrong += [f"{path.relative_to(folder)} fetches from another site"] if urls else []
    return wrong


def _read_page(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


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
    print(f"the site is in {build_site()}")
