"""The page of a sweep: what was done, what failed and why, on one screen that opens from disk."""

import json
from pathlib import Path
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment

from dkto.common.files import write_atomically
from dkto.runs.table import read_runs, varying_parameters

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ name }}</title>
<style>
  :root { color-scheme: light dark; }
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
  th:first-child, td:first-child, td.text { text-align: left; }
  .scroll { overflow-x: auto; }
  .error { white-space: pre-wrap; font-family: ui-monospace, monospace; font-size: 13px; }
  .bad { color: light-dark(#b34700, #ff9d5c); font-weight: 600; }
</style>
<h1>{{ name }}</h1>
<p>{{ done }} of {{ states | length }} runs are done. The table below is in <a href="table.csv">table.csv</a>, the
engine's words are in <a href="engine.log">engine.log</a>.</p>
{% if errors %}
<h2>Not done</h2>
{% for run, state, notebook in errors %}
<p><span class="bad">{{ run }}</span>{% if notebook %}, <a href="{{ notebook }}">executed notebook</a>{% endif %}</p>
<p class="error">{{ state }}</p>
{% endfor %}
{% endif %}
{% if rows %}
<h2>Runs</h2>
<div class="scroll"><table>
<tr>{% for title in titles %}<th>{{ title }}</th>{% endfor %}</tr>
{% for link, row in rows %}
<tr><td>{% if link %}<a href="{{ link }}">{{ row[0] }}</a>{% else %}{{ row[0] }}{% endif %}</td>
{% for value in row[1:] %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}
</html>
"""


def write_page(folder: Path, name: str, states: dict[str, str]) -> Path:
    """Write `table.csv`, one row for every run of the plan, and `index.html`; each whole or not at all.

    Args:
        folder: of the sweep.
        name: of the sweep.
        states: how each run stands, `done` or the reason why not, by name.

    Returns:
        The page.
    """
    table = _complete(folder, states)
    write_atomically(folder / "table.csv", lambda part: part.write_text(table.to_csv(index=False)))
    varying = varying_parameters(table)
    metrics = [title for title in table.columns if title.startswith("metric.")]
    table["word"] = table["state"].str.partition(":")[0]
    shown = ["run", "word", *(f"parameter.{title}" for title in varying), "seconds", "peak_memory_mb", *metrics]
    rows = [(_link(folder, row["run"]), [_shown(value) for value in row[shown]]) for _, row in table.iterrows()]
    errors = [(run, state, _link(folder, run)) for run, state in states.items() if not state.startswith("done")]
    titles = [title.removeprefix("parameter.").removeprefix("metric.") for title in shown]
    titles[1] = "state"
    done = len(states) - len(errors)
    template = Environment(autoescape=True).from_string(PAGE)
    page = template.render(name=name, states=states, done=done, errors=errors, titles=titles, rows=rows)
    write_atomically(folder / "index.html", lambda part: part.write_text(page))
    return folder / "index.html"


def _complete(folder: Path, states: dict[str, str]) -> pd.DataFrame:
    """The table of all planned runs, those that never started too."""
    planned = pd.DataFrame({"run": list(states), "state": list(states.values())})
    try:
        found = read_runs(folder)
    except ValueError:  # nothing has run yet
        return planned.assign(seconds=None, peak_memory_mb=None)
    return planned.merge(found, on="run", how="left")


def _link(folder: Path, run: str) -> str:
    path = f"{run}/notebook.ipynb"
    return quote(path) if (folder / path).is_file() else ""


def _shown(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return json.dumps(value)
    return "" if pd.isna(value) else f"{value:.4g}" if isinstance(value, float) else str(value)
