"""Pages that open from disk, without a script and without anything fetched: of a sweep, and of an executed notebook."""

import base64
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import pandas as pd

from dkto.common.files import write_atomically
from dkto.runs.table import read_runs, varying_parameters

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

STYLE = """
:root { color-scheme: light dark; --soft: light-dark(#667078, #9aa4ad); --line: #8884; }
body { font: 16px/1.55 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; }
h2 { border-top: 1px solid var(--line); font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: 1.4rem; }
p { max-width: 46rem; }
.lead { font-size: 1.1rem; }
.note, figcaption { color: var(--soft); font-size: .88rem; }
.error { white-space: pre-wrap; font-family: ui-monospace, monospace; font-size: .8rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .8rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: left; vertical-align: top; }
figure { margin: 1rem 0; }
figure img { background: white; border-radius: 4px; max-width: 100%; }
"""


def html_page(title: str, body: str) -> str:
    """A whole page; `body` is HTML, the title is text."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title>'
    head += f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def text_html(text: str, tag: str = "p", kind: str = "") -> str:
    """Text as a paragraph, or another element, of a class of `STYLE`.

    >>> text_html("a < b", "h2")
    '<h2>a &lt; b</h2>'
    """
    kind = f' class="{kind}"' if kind else ""
    return f"<{tag}{kind}>{html.escape(text)}</{tag}>"


def table_html(frame: pd.DataFrame, caption: str = "") -> str:
    """A data frame as an HTML table; every text in it is escaped.

    >>> "<script>" in table_html(pd.DataFrame({"prompt": ["<script>"]}))
    False
    """
    body = frame.map(_shown).to_html(index=not isinstance(frame.index, pd.RangeIndex), escape=True, border=0)
    return f'{text_html(caption, kind="note") if caption else ""}<div class="wide">{body}</div>'


def styled(frame: pd.DataFrame, formats: str | Mapping[str, str] | None = None, *, precision: int = 6) -> "Styler":
    """A data frame as a notebook shows it, with formats, and every text in it escaped: a Styler by itself escapes none.

    Args:
        frame: the table; its texts may come from files of others.
        formats: of all values, or by column, such as "{:.3f}".
        precision: digits after the point of other numbers.

    >>> found = styled(pd.DataFrame({"<i>": ["<b>"], "x": [["<b>"]]}, index=["<b>"]).rename_axis("<u>")).to_html()
    >>> any(tag in found for tag in ("<b>", "<i>", "<u>"))
    False
    """
    names = {
        axis: [html.escape(name) if isinstance(name, str) else name for name in getattr(frame, axis).names]
        for axis in ("index", "columns")
    }
    plain = frame.map(lambda value: _shown(value) if isinstance(value, list | tuple | dict | set) else value)
    found = plain.rename_axis(**names).style.format(formats, precision=precision, escape="html")
    return found.format_index(escape="html", axis=0).format_index(escape="html", axis=1)


def figure_html(path: Path, caption: str) -> str:
    """A PNG, its bytes in the page; ValueError if the file is none."""
    data = path.read_bytes()
    if not data.startswith(b"\x89PNG"):
        raise ValueError(f"{path} is no PNG")
    words, source = html.escape(caption), base64.b64encode(data).decode()
    return f'<figure><img alt="{words}" src="data:image/png;base64,{source}"><figcaption>{words}</figcaption></figure>'


def write_notebook_page(executed: str | Path, path: str | Path, title: str) -> Path:
    """Write an executed notebook as a page: prose and outputs, no code, no cells tagged `notebook-only`."""
    from dkto.common.quick_nbformat import nbformat  # noqa: F401  # isort: skip
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    tags = {"enabled": True, "remove_cell_tags": ["notebook-only"]}
    preprocessors = {"preprocessors": ["nbconvert.preprocessors.TagRemovePreprocessor"]}
    exporter = HTMLExporter(
        template_name="basic",  # no frame: that of the others fetches scripts
        exclude_input=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
        config=Config({"TagRemovePreprocessor": tags, "HTMLExporter": preprocessors}),
    )
    page = html_page(title, exporter.from_filename(str(executed))[0])
    write_atomically(Path(path), lambda part: part.write_text(page, encoding="utf-8"))
    return Path(path)


def write_page(folder: Path, name: str, states: dict[str, str]) -> Path:
    """Write a sweep's `table.csv`, one row a run, and `index.html`, which it returns; each whole or not at all.

    `states` says how each run of the plan stands, by name: `done`, or the reason why not. A text that a spreadsheet
    would run as a formula begins with an apostrophe in `table.csv`.
    """
    table = _complete(folder, states)
    harmless = table.map(_no_formula).set_axis(map(_no_formula, table.columns), axis=1)
    write_atomically(folder / "table.csv", lambda part: part.write_text(harmless.to_csv(index=False), encoding="utf-8"))
    undone = {run: state for run, state in states.items() if not state.startswith("done")}
    log = ', the engine\'s words are in <a href="engine.log">engine.log</a>' if (folder / "engine.log").exists() else ""
    parts = [text_html(name, "h1"), f"<p>{len(states) - len(undone)} of {len(states)} runs are done."]
    parts.append(f'The table below is in <a href="table.csv">table.csv</a>{log}.</p>')
    parts += ["<h2>Not done</h2>"] if undone else []
    parts += [f"<p>{_link(folder, run)}</p>{text_html(state, kind='error')}" for run, state in undone.items()]
    metrics = [title for title in table.columns if title.startswith("metric.")]
    varying = [f"parameter.{title}" for title in varying_parameters(table)]
    shown = table[["run", "state", *varying, "seconds", "peak_memory_mb", *metrics]]
    shown = shown.assign(state=table["state"].str.partition(":")[0]).map(lambda value: html.escape(_shown(value)))
    shown["run"] = [_link(folder, run) for run in table["run"]]
    titles = [title.removeprefix("parameter.").removeprefix("metric.") for title in shown.columns]
    rows = shown.set_axis(map(html.escape, titles), axis=1).to_html(index=False, escape=False, border=0)
    page = html_page(name, "\n".join([*parts, f'<h2>Runs</h2><div class="wide">{rows}</div>']))
    write_atomically(folder / "index.html", lambda part: part.write_text(page, encoding="utf-8"))
    return folder / "index.html"


def _complete(folder: Path, states: dict[str, str]) -> pd.DataFrame:
    """The table of all planned runs, those that never started too."""
    planned = pd.DataFrame({"run": list(states), "state": list(states.values())})
    try:
        found = read_runs(folder)
    except ValueError:  # nothing has run yet
        return planned.assign(seconds=None, peak_memory_mb=None)
    return planned.merge(found, on="run", how="left")


def _no_formula(value: object) -> object:
    """A value for a table that a spreadsheet may open: text that begins as a formula gets an apostrophe.

    >>> _no_formula("=1+1"), _no_formula("-0.5"), _no_formula(-0.5)
    ("'=1+1", '-0.5', -0.5)
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("=", "+", "-", "@")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def _link(folder: Path, run: str) -> str:
    """The name of a run, which leads to its executed notebook if there is one."""
    path = f"{run}/notebook.ipynb"
    return f'<a href="{quote(path)}">{html.escape(run)}</a>' if (folder / path).is_file() else html.escape(run)


def _shown(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | dict | set):
        return json.dumps(value, default=str)
    return "" if pd.isna(value) else f"{value:.4g}" if isinstance(value, float) else str(value)
