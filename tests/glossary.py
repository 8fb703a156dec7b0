"""Where a lesson first uses a word of the glossary."""

import re
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "notebooks"
TERMS = re.findall(r"^### (.+)$", (FOLDER / "GLOSSARY.md").read_text(), flags=re.M)
# what is no prose: code, formulas, headings, rows of tables, links, HTML, and the line of parts and runtimes
NOT_PROSE = "|".join(
    (
        *(r"```.*?```", r"`[^`]*`", r"\$\$.*?\$\$", r"\$[^$\n]*\$", r"^#[^\n]*$", r"^\|[^\n]*$"),
        *(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\([^)]*\)", r"<[^>\n]*>"),
        r"^[^\n]*\*\*(?:Next|Before this|Paper)\*\*[^\n]*$",
    )
)


def anchor(term):
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w -]", "", term.lower()).replace(" ", "-")


def first_uses(notebook, term):
    """Cell, place and whether it is a link to the glossary, of the first use of a word in prose; None without one."""
    for cell in notebook["cells"]:
        if cell["cell_type"] != "markdown":
            continue
        text = "".join(cell["source"])
        link = re.search(rf"GLOSSARY\.md#{anchor(term)}\)", text)
        prose = re.sub(NOT_PROSE, lambda found: " " * len(found.group()), text, flags=re.S | re.M)
        use = re.search(rf"(?<![\w-]){re.escape(term)}s?(?![\w-])", prose, flags=0 if term.isupper() else re.I)
        if link and (not use or link.start() < use.start()):
            return cell, link.span(), True
        if use:
            return cell, use.span(), False
    return None
