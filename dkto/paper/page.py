"""The sentences of a replay's page, and how the notebook *What did the replay show?* shows it."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from IPython.display import HTML, display

from dkto.paper.seeds import PREFERENCE
from dkto.paper.train_all import CONTROLS, UNTRAINED, read_settings, settings_origin
from dkto.runs.page import figure_html

RATE_COLUMNS = ["win_rate", "low", "high", "n", "ties", "sign_p"]
FIDELITY = "world_fidelity"
SHOWN_GAPS = 5
"""Prompts of the largest losses, and of the largest gains, that the page names; all are in `gaps.csv`."""
FIDELITY_LOSS = 0.1
"""Loss of mean prompt fidelity against the base from which on the page names a system."""


def _rate_key(opponent: str) -> str:
    return f"win_rate/kto_vs_{opponent}/{PREFERENCE}"


def aims(metrics: Mapping[str, float]) -> pd.DataFrame:
    """What the replay should show, and whether its interval shows it: "reached", "not reached" or "not run".

    Over several seeds a win-rate needs Holm's p below 0.05 too, since it is one of many comparisons.
    """
    rows = [(f"kto wins over {opponent}", _rate_key(opponent), 0.5) for opponent in ("base", *CONTROLS)]
    raises = "raises its own reward on held-out prompts"
    rows += [(f"{name} {raises}", f"reward_gain/{name}", 0.0) for name in ("alignprop", "d3po")]
    table = []
    for what, key, line in rows:
        if key not in metrics:
            table.append({"aim": what, "found": "", "low": None, "high": None, "verdict": "not run"})
            continue
        low, high = metrics[f"{key}/low"], metrics[f"{key}/high"]
        reached = "reached" if low > line and metrics.get(f"{key}/holm", 0.0) < 0.05 else "not reached"
        table.append({"aim": what, "found": f"{metrics[key]:.3f}", "low": low, "high": high, "verdict": reached})
    return pd.DataFrame(table)


def aims_sentence(metrics: Mapping[str, float]) -> str:
    """The first paragraph of the report: the aims that were not reached, by name, before anything else."""
    table = aims(metrics)
    missed = table[table["verdict"] == "not reached"]["aim"].tolist()
    absent = table[table["verdict"] == "not run"]["aim"].tolist()
    reached = int((table["verdict"] == "reached").sum())
    parts = [f"Not reached, with its 95 % interval: {'; '.join(missed)}." if missed else ""]
    parts.append(f"Reached: {reached} of {len(table)} aims.")
    ran = [key for key in map(_rate_key, ("base", *CONTROLS)) if key in metrics]
    if missed and ran:
        width = max(metrics[f"{key}/high"] - metrics[f"{key}/low"] for key in ran)
        least = round(min(metrics[f"{key}/n"] for key in ran))
        seeds = round(metrics.get("seeds", 1))
        of = f"{least} over {seeds} seeds" if seeds > 1 else f"{least}, of one training each"
        parts.append(f"An interval of these win-rates is up to {100 * width:.0f} points wide, n = {of}.")
    parts.append(f"Not run in this profile: {'; '.join(absent)}." if absent else "")
    if {"orderings/yes", "orderings/no", "orderings/all"} <= metrics.keys():
        yes, no, every = (round(metrics[f"orderings/{name}"]) for name in ("yes", "no", "all"))
        held = f"{yes} hold, {no} do not, {every - yes - no} stay open"
        parts.append(f"Orderings of the paper that were tried: {every}; {held}.")
    return " ".join(filter(None, parts))


def fidelity_sentences(monitors: pd.DataFrame, rates: pd.DataFrame) -> list[str]:
    """Which systems lost the prompt while they were tuned, those that win over the base all the same apart.

    Args:
        monitors: a row per system, the base among them, with `system` and `mean/world_fidelity`.
        rates: win-rates with `method`, `opponent` and `low`, under the user's own measure.

    >>> monitors = pd.DataFrame({"system": ["base", "kto"], "mean/world_fidelity": [0.99, 0.8]})
    >>> print(*fidelity_sentences(monitors, pd.DataFrame({"method": ["kto"], "opponent": ["base"], "low": [0.4]})))
    These lost the prompt while they were tuned and do not win over the base (world_fidelity, base 0.99): kto 0.80.
    """
    column = f"mean/{FIDELITY}"
    if column not in monitors or "base" not in set(monitors["system"]) or "low" not in rates:
        return []
    fidelity = monitors.set_index("system")[column]
    tuned = fidelity.drop(list(UNTRAINED), errors="ignore")
    lost = tuned[tuned < fidelity["base"] - FIDELITY_LOSS].sort_values(kind="stable")
    winners = set(rates[(rates["opponent"] == "base") & (rates["low"] > 0.5)]["method"])
    sentences = []
    caution = " Their win-rates say that the measure rose, not that the images are better."
    for wins, told, warning in ((True, "still win", caution), (False, "do not win", "")):
        named = ", ".join(f"{name} {value:.2f}" for name, value in lost.items() if (name in winners) == wins)
        about = f"These lost the prompt while they were tuned and {told} over the base "
        about += f"({FIDELITY}, base {fidelity['base']:.2f})"
        sentences += [f"{about}: {named}.{warning}"] if named else []
    return sentences


def lead(metrics: Mapping[str, float], settings_file: str | Path) -> str:
    """The first paragraph of the page: what was not reached, then where the settings come from."""
    return f"{aims_sentence(metrics)} {settings_origin(read_settings(settings_file))}"


def show(*parts: str) -> None:
    """Show pieces of HTML, which `dkto.runs.page` makes of texts, tables and figures, below a notebook's cell."""
    display(HTML("\n".join(parts)))


def figures(folder: Path, captions: Mapping[str, str]) -> list[str]:
    """Those PNGs of a folder that are there, each with its caption, as HTML."""
    return [figure_html(folder / name, caption) for name, caption in captions.items() if (folder / name).exists()]


def read_table(path: Path, first: str = "system") -> pd.DataFrame:
    """A table that a run left, or one row that says that it did not; a column without a name is called `first`."""
    if not path.exists():
        return pd.DataFrame({"": [f"{path.name} was not written"]})
    return pd.read_csv(path).rename(columns={"Unnamed: 0": first})


def under(metrics: Mapping[str, float], begin: str, end: str = "") -> pd.DataFrame:
    """The numbers with an interval whose keys begin and end so, a row for each.

    >>> under({"lost/kto/0.3": 0.1, "lost/kto/0.3/low": 0.0, "lost/kto/0.3/high": 0.2}, "lost/").to_dict("records")
    [{'what': 'kto/0.3', 'mean': 0.1, 'low': 0.0, 'high': 0.2}]
    """
    keys = [key for key in metrics if key.startswith(begin) and key.endswith(end) and f"{key}/low" in metrics]
    rows = [{"mean": metrics[key], "low": metrics[f"{key}/low"], "high": metrics[f"{key}/high"]} for key in keys]
    return pd.DataFrame(
        [{"what": key.removeprefix(begin).removesuffix(end)} | row for key, row in zip(keys, rows, strict=True)]
    )


def rates(path: Path, scorer: str = PREFERENCE, **only: str) -> pd.DataFrame:
    """Win-rates under a scorer, of one `method` or over one `opponent`; the column that is one name is left out."""
    rows = read_table(path)
    if "scorer" not in rows:
        return rows
    rows = rows[rows["scorer"] == scorer]
    for column, value in only.items():
        rows = rows[rows[column] == value]
    named = [column for column in ("method", "opponent") if column not in only]
    return rows[[*named, *RATE_COLUMNS]].reset_index(drop=True)


def extremes(gaps: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """How many prompts lost, tied and gained, and the rows of the largest losses and the largest gains.

    Args:
        gaps: a row per prompt, with its `gap`, ours minus the opponent's.

    >>> extremes(pd.DataFrame({"prompt": ["a", "b", "c"], "gap": [0.0, -1.0, 2.0]}))[0]
    'Of 3 prompts, the median image is worse on 1, equal on 1, better on 1.'
    """
    gaps = gaps.sort_values("gap", kind="stable", ignore_index=True)
    lost, gained = gaps[gaps["gap"] < 0], gaps[gaps["gap"] > 0]
    counts = f"worse on {len(lost)}, equal on {len(gaps) - len(lost) - len(gained)}, better on {len(gained)}"
    rows = pd.concat([lost.head(SHOWN_GAPS), gained.tail(SHOWN_GAPS)], ignore_index=True)
    return f"Of {len(gaps)} prompts, the median image is {counts}.", rows
