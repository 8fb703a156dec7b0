"""Read runs back: any set of folders becomes one tidy table; pivots, intervals over seeds, the difference of two runs.

A run is a folder with the `run.json` that every run of a notebook leaves (`dkto.runs.record`), and `metrics.json`
beside it if the run went well. The columns of the table say where a value comes from: `parameter.beta`,
`metric.kl/kto`, `versions.torch`; functions take the bare name where it is clear.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from dkto.common.files import read_json, refuse_leaving
from dkto.common.names import not_known, shown
from dkto.runs.record import RECORD_NAME, check_record, is_of_notebook, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIRST_COLUMNS = ("run", "status", "error", "notebook", "seconds", "peak_memory_mb")
FIRST_COLUMNS += ("began", "git_commit", "source_hash")
KINDS = ("parameter", "metric", "versions", "hardware")


def read_runs(*folders: str | Path) -> pd.DataFrame:
    """One row for each run below the given folders, failed and unfinished ones included, in the order of their names.

    Args:
        folders: each a run's own folder or any folder above; a run found twice counts once.

    Returns:
        Columns `run` (its folder below the one given), `status` (finished, failed, or running, which a killed run
        stays), `error`, `notebook`, `seconds`, `peak_memory_mb`, `began`, `git_commit`, `source_hash`, then
        `parameter.*`, `metric.*`, `versions.*`, `hardware.*`; what a run does not have is missing there.

    Raises:
        FileNotFoundError: if a folder does not exist.
        ValueError: if there is no run in any of them, a record or its metrics are damaged, or one of these files is a
            link that leads out of the folder.
    """
    rows = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"folder of runs {folder} does not exist")
        for path in sorted(folder.rglob(RECORD_NAME)):
            record = read_json(_inside(path, folder), "record of a run")
            if is_of_notebook(record):
                name = path.parent.relative_to(folder)
                check_record(record, path)
                rows.setdefault(path.parent.resolve(), _row(str(name) if name.parts else folder.name, path, record))
    if not rows:
        places = ", ".join(str(folder) for folder in folders) or "no folder"
        raise ValueError(f"no run in {places}: a run's folder holds {RECORD_NAME}, written by dkto run or dkto sweep")
    table = pd.DataFrame(rows.values())
    for name in table.columns:
        held = [row.get(name) for row in rows.values()]
        if all(_is_whole(value) for value in held if value is not None):
            table[name] = pd.array(held, "Int64")  # whole numbers stay whole where some are missing
        elif any(type(value) is int and abs(value) > 2**53 for value in held):
            table[name] = pd.Series(held, dtype=object)  # a float might be the neighbour
    kinds = [name for kind in KINDS for name in table.columns if name.startswith(f"{kind}.")]
    return table[[*FIRST_COLUMNS, *kinds]]


def _is_whole(value: object) -> bool:
    return type(value) is int and abs(value) < 2**63


def _inside(path: Path, folder: Path) -> Path:
    if path.is_symlink():
        refuse_leaving(path, folder)
    return path


def _row(name: str, path: Path, record: dict) -> dict:
    row = {key: record.get(key) for key in FIRST_COLUMNS} | {"run": name}
    result, metrics = path.with_name("metrics.json"), {}
    if record["status"] == "finished" and result.is_file():
        metrics = read_metrics(_inside(result, path.parent))
    parts = {"parameter": record["parameters"], "metric": metrics}
    parts |= {kind: record.get(kind, {}) for kind in ("versions", "hardware")}
    return row | {f"{kind}.{key}": value for kind, values in parts.items() for key, value in values.items()}


def column(table: pd.DataFrame, name: str) -> str:
    """The full name of a column: as it is, or a bare name that one parameter or metric has.

    Raises:
        KeyError: for a name that no column has, with the nearest; or that several have, with all of them.
    """
    found = [full for full in (name, f"parameter.{name}", f"metric.{name}") if full in table.columns]
    if len(found) == 1:
        return found[0]
    if found:
        raise KeyError(f"{shown(name)} is the name of {' and of '.join(found)}: give it in full")
    known = [full.partition(".")[2] or full for full in table.columns if not full.startswith(("versions", "hardware"))]
    raise KeyError(not_known(f"no column {shown(name)} in the table", name, known))


def varying_parameters(table: pd.DataFrame) -> list[str]:
    """Bare names of the parameters that differ between runs; folders, which always do, are left out."""
    names = [name for name in table.columns if name.startswith("parameter.") and not name.endswith("_dir")]
    return [name.removeprefix("parameter.") for name in names if table[name].map(_text).nunique(dropna=False) > 1]


def _text(value: object) -> str:
    return json.dumps(value, default=str)


def pivot_runs(table: pd.DataFrame, metric: str, rows: str, columns: str) -> pd.DataFrame:
    """The mean of a metric for each value of two parameters, all by name (see `column`), over the runs that have it."""
    metric, rows, columns = (column(table, name) for name in (metric, rows, columns))
    result = table.pivot_table(values=metric, index=rows, columns=columns, aggfunc="mean", observed=True)
    return result.rename_axis(index=_bare(rows), columns=_bare(columns))


def over_seeds(table: pd.DataFrame, metric: str, by: str | Sequence[str], *, confidence: float = 0.95) -> pd.DataFrame:
    """Mean of a metric over the runs that agree in the parameters `by`, with Student's interval of that mean.

        mean +- t(n - 1) * s / sqrt(n)

    Args:
        table: from `read_runs`; runs without the metric do not count.
        metric, by: names of columns; `by` tells the groups apart; all other parameters but seeds should agree.
        confidence: of the interval, in (0, 1).

    Returns:
        One row a group: the parameters, `n`, `mean`, `low`, `high`; the ends are NaN with fewer than two runs.

    Raises:
        ValueError: if runs of one group differ in another parameter than a seed: their spread is no noise.

    >>> rows = {"run": ["a", "b"], "parameter.beta": [1, 1], "parameter.seed": [0, 1], "metric.kl": [0.2, 0.4]}
    >>> over_seeds(pd.DataFrame(rows), "kl", "beta").round(3).to_dict("records")
    [{'beta': 1, 'n': 2, 'mean': 0.3, 'low': -0.971, 'high': 1.571}]
    """
    from scipy import stats

    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    metric = column(table, metric)
    groups = [column(table, name) for name in ([by] if isinstance(by, str) else by)]
    table = table[table[metric].notna()]
    found = []
    for values, group in table.groupby(groups, observed=True):
        names = [_bare(name) for name in groups]
        others = [name for name in varying_parameters(group) if "seed" not in name and name not in names]
        if others:
            where = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
            raise ValueError(f"runs with {where} differ in {', '.join(others)} too: add them to by, or choose runs")
        numbers = group[metric].to_numpy(float)
        half = np.nan
        if len(numbers) > 1:
            half = stats.t.ppf((1 + confidence) / 2, len(numbers) - 1) * numbers.std(ddof=1) / np.sqrt(len(numbers))
        mean = numbers.mean()
        row = dict(zip(names, values, strict=True))
        found.append(row | {"n": len(numbers), "mean": mean, "low": mean - half, "high": mean + half})
    return pd.DataFrame(found)


def _bare(name: str) -> str:
    return name.removeprefix("parameter.").removeprefix("metric.")


def plot_over_seeds(
    summary: pd.DataFrame, x: str, *, lines: str | None = None, ylabel: str = "", ax: "Axes | None" = None
) -> "Axes":
    """Means with their intervals along one parameter, one line for each value of another.

    Args:
        summary: from `over_seeds`.
        x: the parameter along the axis, numbers or names.
        lines: the parameter that tells the lines apart, or none.
        ylabel: name and unit of the metric.
        ax: axes to draw on, made if left out.

    Raises:
        KeyError: if the summary has no such parameter.
    """
    import matplotlib.pyplot as plt
    import seaborn as sns

    for name in [x] if lines is None else [x, lines]:
        if name not in summary.columns:
            raise KeyError(not_known(f"no column {shown(name)} in the summary", name, summary.columns))
    if ax is None:
        ax = plt.subplots(figsize=(4.6, 3.2), layout="constrained")[1]
    groups = [("", summary)] if lines is None else list(summary.groupby(lines, sort=False))
    colours = sns.color_palette("colorblind", len(groups))
    numbers = pd.api.types.is_numeric_dtype(summary[x])
    places = {value: value if numbers else place for place, value in enumerate(summary[x].unique())}
    logarithmic = numbers and summary[x].min() > 0 and summary[x].max() / summary[x].min() >= 10
    ends = np.log([*places.values()]) if logarithmic else np.array([*places.values()], float)
    for number, ((value, group), colour) in enumerate(zip(groups, colours, strict=True)):
        group = group.sort_values(x, kind="stable") if numbers else group
        aside = 0.015 * np.ptp(ends) * (number - (len(groups) - 1) / 2)  # so that no interval hides another
        at = group[x].map(places).to_numpy(float)
        at = at * np.exp(aside) if logarithmic else at + aside
        error = np.nan_to_num([group["mean"] - group["low"], group["high"] - group["mean"]])
        label = None if lines is None else f"{lines} = {value}"
        ax.errorbar(at, group["mean"], error, fmt="o-", color=colour, capsize=3, ms=4, label=label)
    if logarithmic:
        ax.set_xscale("log")
        ax.set_xticks(sorted(places.values()), [f"{value:g}" for value in sorted(places.values())])
        ax.minorticks_off()
    if not numbers:
        ax.set_xticks(range(len(places)), list(places))
    ax.set_xlabel(x)
    ax.set_ylabel(ylabel)
    if lines is not None:
        ax.legend(fontsize="x-small", edgecolor="none")
    counts = sorted(set(summary["n"]))
    ax.set_title(f"95 % intervals over n = {'-'.join(map(str, counts))} seeds", fontsize="small")
    return ax


def diff_runs(first: str | Path, second: str | Path) -> pd.DataFrame:
    """Everything in which the runs of two folders differ: parameters, versions, hardware, commit, source, metrics.

    Returns:
        One row a difference: `what` (parameter, metric, ...), `name`, and a column for each run; for metrics that
        both have, `change` is second - first.
    """
    table = read_runs(first, second)
    if len(table) != 2:
        raise ValueError(f"two runs are compared, but {first} and {second} hold {len(table)}")
    found = []
    for full in table.columns:
        if full in ("run", "began", "seconds", "peak_memory_mb") or full.endswith("_dir"):
            continue
        one, other = table[full]
        if _text(one) != _text(other) and not (pd.isna([one, other]).all() if np.isscalar(one) else False):
            kind, _, name = full.partition(".") if "." in full else ("run", "", full)
            change = other - one if kind == "metric" and not pd.isna([one, other]).any() else np.nan
            found.append({"what": kind, "name": name, "first": one, "second": other, "change": change})
    table = pd.DataFrame(found, columns=["what", "name", "first", "second", "change"], dtype=object)
    return table.astype({"change": float})
