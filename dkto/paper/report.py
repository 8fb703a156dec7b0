"""One HTML page from what a replay of the paper left: no other file, no script, nothing fetched."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from dkto.common.files import write_atomically

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #667078; --line: #d9dee2; --back: #fcfcfb; --mark: #0b6fa4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #9aa4ad; --line: #363c42; --back: #16181b; --mark: #6cb6e0; }
}
body { background: var(--back); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; margin: 0 auto;
  max-width: 62rem; padding: 2.5rem 1.5rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { border-top: 1px solid var(--line); font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: 1.4rem; }
p { max-width: 46rem; }
.lead { font-size: 1.1rem; }
.note, caption, figcaption { color: var(--soft); font-size: .88rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .8rem 0; }
.wide { overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: left; vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; }
figure { margin: 1rem 0; }
figure img { background: white; border-radius: 4px; max-width: 100%; }
nav a { color: var(--mark); margin-right: 1rem; }
"""


@dataclass(frozen=True)
class Section:
    """One part of a report: words, then pictures, then tables.

    Attributes:
        title: its heading.
        text: paragraphs, plain text.
        tables: caption and table.
        pictures: caption and PNG file.
    """

    title: str
    text: Sequence[str] = ()
    tables: Sequence[tuple[str, pd.DataFrame]] = ()
    pictures: Sequence[tuple[str, Path]] = field(default=())


def table_html(frame: pd.DataFrame, caption: str = "") -> str:
    """A data frame as an HTML table; every text in it is escaped.

    >>> "<script>" in table_html(pd.DataFrame({"prompt": ["<script>"]}))
    False
    """
    shown = frame.copy()
    for name in shown.select_dtypes("number"):
        shown[name] = shown[name].map(lambda value: "" if pd.isna(value) else f"{value:.4g}")
    plain = isinstance(frame.index, pd.RangeIndex)
    body = shown.to_html(index=not plain, escape=True, border=0, na_rep="")
    note = f'<p class="note">{html.escape(caption)}</p>' if caption else ""
    return f'{note}<div class="wide">{body}</div>'


def picture_html(path: Path, caption: str) -> str:
    """A PNG, its bytes in the page.

    Raises:
        ValueError: if the file is no PNG.
    """
    data = path.read_bytes()
    if not data.startswith(b"\x89PNG"):
        raise ValueError(f"{path} is no PNG")
    words = html.escape(caption)
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<figure><img alt="{words}" src="{source}"><figcaption>{words}</figcaption></figure>'


def report_html(title: str, lead: str, sections: Sequence[Section], about: Mapping[str, object]) -> str:
    """The whole page.

    Args:
        title: of the page.
        lead: its first paragraph, plain text.
        sections: in order.
        about: name and value of what the run was, shown last.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="lead">{html.escape(lead)}</p>', "<nav>"]
    parts += [f'<a href="#part-{i}">{html.escape(section.title)}</a>' for i, section in enumerate(sections)]
    parts.append("</nav>")
    for i, section in enumerate(sections):
        parts.append(f'<h2 id="part-{i}">{html.escape(section.title)}</h2>')
        parts += [f"<p>{html.escape(text)}</p>" for text in section.text]
        parts += [picture_html(Path(path), caption) for caption, path in section.pictures]
        parts += [table_html(frame, caption) for caption, frame in section.tables]
    rows = pd.DataFrame({"": {key: str(value) for key, value in about.items()}})
    parts += ["<h2>This run</h2>", table_html(rows)]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title>'
    head += f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def write_report(path: str | Path, page: str) -> Path:
    """Write the page whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda part: part.write_text(page, encoding="utf-8"))
    return path
