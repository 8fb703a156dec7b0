"""What users read is plain English: no retired words, no sentence over 35 words."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES += [*(ROOT / "papermill_runs").glob("*.md"), *(ROOT / "notebooks").glob("*.md")]
PAGES += [ROOT / "tests" / "benchmarks" / "README.md", *(ROOT / "dkto" / "world").rglob("README.md")]
NOTEBOOKS = [path for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts]
# their prose is rewritten with their code; one that has become plain is struck from the list
NOT_YET: set[str] = set()
LONGEST = 35
# what is retired, and what to say instead
RETIRED = {
    r"(is|are|was|were|been) told": "gets, takes",
    r"hangs? on": "depends on",
    r"anew": "again; rerun",
    r"stands? in": "is in",
    r"dealt out": "shuffled",
    r"learnt": "learned; of a user: the model learns",
    r"for ever": "indefinitely",
    r"turned (likes|labels|answers|comparisons)": "flipped",
    r"bears?": "tolerates",
    r"(he|him|his|himself)": "they, their, or the user's name",
    r"says? of": "of",
    r"an end of what was tried": "the edge of the range",
    r"pictures?": "image (what a model draws) or figure (a plot)",
}


def prose(markdown):
    """The paragraphs and list items of a text as plain words: no code, formulas, addresses or comments.

    A cell of a table is a part of its own.
    """
    text = re.sub(r"^---\n.*?\n---\n", "", markdown, flags=re.S)  # a model card's front matter
    text = re.sub(r"```.*?```|\$\$.*?\$\$|<!--.*?-->|^    [^\n]*$", "\n", text, flags=re.S | re.M)
    text = re.sub(r"`[^`]*`|\$[^$]*\$", "x", text)
    text = re.sub(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^\|[-:| ]+\|$", "", text, flags=re.M)
    text = re.sub(r"^\|.*\|$", lambda row: row.group().replace("|", "\n\n"), text, flags=re.M)
    text = re.sub(r"^(#.*)$", r"\n\1\n", text, flags=re.M)
    parts = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)", text)
    parts = [" ".join(re.sub(r"^\s*(#+|[-*]|\d+\.)\s", "", part).split()) for part in parts]
    return [part for part in parts if part]


def texts():
    for page in sorted(PAGES):
        yield page.relative_to(ROOT).as_posix(), page.read_text()
    for path in sorted(NOTEBOOKS):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"]
        yield path.relative_to(ROOT).as_posix(), "\n\n".join("".join(cell["source"]) for cell in cells)


def case(name, text):
    marks = pytest.mark.xfail(reason="NOT_YET") if Path(name).stem in NOT_YET else ()
    return pytest.param(name, text, id=name, marks=marks)


@pytest.mark.parametrize(("name", "text"), [case(*found) for found in texts()])
def test_what_users_read_is_plain(name, text):
    wrong = []
    for part in prose(text):
        for pattern, better in RETIRED.items():
            wrong += [f"{m.group()!r} ({better}) in: {part}" for m in re.finditer(rf"\b{pattern}\b", part, flags=re.I)]
        for sentence in re.split(r"(?<=[.!?])[*\"')]*\s+", part):
            words = [word for word in sentence.split() if re.search(r"\w", word)]
            if len(words) > LONGEST:
                wrong.append(f"{len(words)} words: {sentence}")
    assert not wrong, f"{name}:\n" + "\n".join(wrong)


def docstrings(path):
    """What `help`, the site and `--help` show of a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield text


@pytest.mark.parametrize("folder", ["dkto", "toy"])
def test_docstrings_hold_no_retired_word(folder):
    """All but "picture", which a painted scene may be called."""
    retired = {pattern: better for pattern, better in RETIRED.items() if pattern != "pictures?"}
    wrong, read = [], 0
    for path in sorted((ROOT / folder).rglob("*.py")):
        for text in docstrings(path):
            read += 1
            for pattern, better in retired.items():
                found = re.findall(rf"\b{pattern}\b", re.sub(r"`[^`]*`", "x", text), flags=re.I)
                wrong += [f"{path.relative_to(ROOT)}: {pattern} ({better})" for _ in found]
    assert read > 100 and not wrong, "\n".join(wrong)


def test_the_checker_sees_what_it_is_for():
    assert prose(
        "# Title\n\nOne `code` $x$.\n\n| a | b |\n|---|---|\n\n1. [two](x.md)\n2. three\n\n```\nbears\n```\n"
    ) == [
        "Title",
        "One x x.",
        "a",
        "b",
        "two",
        "three",
    ]
    with pytest.raises(AssertionError, match="'pictures'"):
        test_what_users_read_is_plain("a page", "Look at the pictures.")
    with pytest.raises(AssertionError, match="36 words"):
        test_what_users_read_is_plain("a page", "word " * 36)
