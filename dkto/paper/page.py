"""The page of a finished replay: what it should show and whether it does, pictures before tables, no raw data."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from dkto.common.machine import hardware, versions
from dkto.paper.pool import TASTES
from dkto.paper.report import Section, report_html
from dkto.paper.train_all import CONTROLS, UNTRAINED

MAIN = "win_rate_tables"
PREFERENCE = "world_utility"
RATE_COLUMNS = ["win_rate", "low", "high", "n", "ties", "sign_p"]
FIDELITY = "world_fidelity"
SHOWN_GAPS = 5
"""Prompts of the largest losses, and of the largest gains, that the page names; all stand in `gaps.csv`."""
FIDELITY_LOSS = 0.1
"""Loss of mean prompt fidelity against the base from which on the page names a system."""


def _rate_key(opponent: str) -> str:
    return f"win_rate/kto_vs_{opponent}/{PREFERENCE}"


def aims(metrics: Mapping[str, float]) -> pd.DataFrame:
    """What the replay should show, and whether its interval shows it: "reached", "not reached" or "not run"."""
    rows = [(f"kto wins over {opponent}", _rate_key(opponent), 0.5) for opponent in ("base", *CONTROLS)]
    rows += [
        (f"{name} raises its own reward on held-out prompts", f"reward_gain/{name}", 0.0)
        for name in ("alignprop", "d3po")
    ]
    table = []
    for what, key, line in rows:
        if key not in metrics:
            table.append({"aim": what, "found": "", "low": None, "high": None, "verdict": "not run"})
            continue
        low, high = metrics[f"{key}/low"], metrics[f"{key}/high"]
        reached = "reached" if low > line else "not reached"
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
        of = f"{least} over {seeds} seeds, the widest of theirs" if seeds > 1 else least
        parts.append(f"An interval of these win-rates is up to {100 * width:.0f} points wide, n = {of}.")
    parts.append(f"Not run in this profile: {'; '.join(absent)}." if absent else "")
    if {"orderings/yes", "orderings/no", "orderings/all"} <= metrics.keys():
        yes, no, every = (round(metrics[f"orderings/{name}"]) for name in ("yes", "no", "all"))
        parts.append(
            f"Orderings of the paper that were tried: {every}; {yes} hold, {no} do not, {every - yes - no} stay open."
        )
    return " ".join(filter(None, parts))


def make_report(folder: Path, profile: str, metrics: Mapping[str, float], lead: str) -> str:
    """The page of a finished replay.

    Args:
        folder: what the replay left.
        profile: its name.
        metrics: its numbers.
        lead: the first paragraph.
    """
    found = sorted(path for path in folder.glob(f"{MAIN}*") if path.is_dir())
    main = found[0] if found else folder
    many = len(found) > 1  # several seeds left their tables beside the page
    sections = [
        Section(
            "Aims",
            [
                "An aim is reached when the whole 95 % interval lies on its side of the line: one half, or no change. "
                "AlignProp and D3PO are held against the base at the guidance scale at which they drew while they were "
                "tuned; in the tables of win-rates every system draws at the scale that serves it best on validation "
                "prompts, but `base`, which draws at the plain one. For ablations and single users all draw at the "
                "plain scale, but `base_best_guidance`."
            ],
            [("", aims(metrics))],
        ),
        _win_rates(main, folder if many else None),
        Section(
            "Beside the paper",
            [
                "The paper's rates are of Stable Diffusion v1.5 under PickScore; ours are of the small world under "
                "its own measure. Only the side of one half can be compared."
            ],
            [
                (caption, _read((folder if many else main) / name))
                for caption, name in (("Orderings", "orderings.csv"), ("Reproduction cards", "cards.csv"))
            ],
        ),
        Section(
            "What a win-rate does not show",
            [
                "Drift from the base on the judged prompts, each system at its own guidance scale, and on neutral "
                "ones, all at the plain scale, in shares of the pixel range; spread within a prompt, in the same unit; "
                "mean scores. For systems tuned on a scorer: whether that scorer rose, and which others fell meanwhile."
                f"{' Of the first seed.' if many else ''}"
            ],
            [
                ("", _read(main / "monitors.csv", _named)),
                (
                    "Systems tuned on a scorer, at the scale at which they drew meanwhile",
                    _read(main / "own_rewards.csv", _named),
                ),
                ("How far the scorers agree on who won, Diffusion-KTO or the base", _read(main / "agreement.csv")),
            ],
        ),
    ]
    if (folder / "ablations").is_dir():
        sections.append(_ablations(folder / "ablations"))
    if (folder / "qualitative_grid").is_dir():
        sections.append(_pictures_and_failures(folder / "qualitative_grid"))
    sections += [_user(path) for path in sorted(folder.glob("user_*")) if path.is_dir()]
    about = {
        "profile": profile,
        "seconds of the last executions": metrics["seconds/total"],
        "seeds": round(metrics["seeds"]),
    }
    return report_html("Diffusion-KTO on the small world", lead, sections, about | hardware() | versions())


def _win_rates(main: Path, pooled: Path | None) -> Section:
    of = ", first seed" if pooled else ""
    pictures = {"win_rates.png": f"The base and the controls first{of}", "grid.png": f"Same prompts, same noise{of}"}
    figures = _pictures(main, pictures)
    if pooled is None:
        ours = (
            "Diffusion-KTO over every other system",
            _read(main / "win_rates.csv", lambda rows: _rates(rows, method="kto")),
        )
    else:
        caption = "Diffusion-KTO over every other system, each seed and their mean with the widest interval"
        ours = (caption, _read(pooled / "seeds.csv"))
        figures = _pictures(pooled, {"win_rates.png": "All seeds"}) + figures
    return Section(
        "Win-rates",
        [
            f"Held-out prompts, judged by {PREFERENCE}, the measure of the simulated user himself: median of n "
            "pictures, ties count half, Wilson intervals, which are too wide by about a half where most prompts tie. "
            "The two-sided sign test, `sign_p`, leaves ties out and may decide where the interval stays open. Every "
            "rate is shown as it is."
        ],
        [
            ours,
            (
                f"Every system over the base{of}",
                _read(main / "win_rates.csv", lambda rows: _rates(rows, opponent="base")),
            ),
        ],
        figures,
    )


def _ablations(folder: Path) -> Section:
    return Section(
        "Ablations",
        [
            "One setting of Diffusion-KTO moves at a time; the gap to the centre is paired by prompt. All draw at the "
            "plain guidance scale."
        ],
        [("", _read(folder / "ablations.csv"))],
        _pictures(folder, {"ablations.png": f"Mean {PREFERENCE} with its 95 % interval"}),
    )


def _pictures_and_failures(folder: Path) -> Section:
    captions = {
        "failures.png": "Where Diffusion-KTO loses most against the base, with the loss",
        "gains.png": "Where it gains most",
        "random_prompts.png": "Prompts drawn at random",
    }
    table = _read(folder / "gaps.csv", lambda frame: frame.sort_values("gap", ignore_index=True))
    text = []
    if "gap" in table:
        lost, tied = int((table["gap"] < 0).sum()), int((table["gap"] == 0).sum())
        gained = len(table) - lost - tied
        text = [f"Of {len(table)} prompts, the median picture is worse on {lost}, equal on {tied}, better on {gained}."]
        losses, gains = table[table["gap"] < 0].head(SHOWN_GAPS), table[table["gap"] > 0].tail(SHOWN_GAPS)
        table = pd.concat([losses, gains], ignore_index=True)
    caption = "Largest losses and largest gains of Diffusion-KTO over the base"
    return Section("Pictures, failures among them", text, [(caption, table)], _pictures(folder, captions))


def _user(folder: Path) -> Section:
    user = folder.name.removeprefix("user_")
    scorer = TASTES.get(user, PREFERENCE)
    captions = {
        "before_after.png": "Same prompts, same noise",
        "dose_response.png": "How many likes it takes",
        "win_rates.png": f"Judged by {scorer}",
    }
    rates = _read(folder / "win_rates.csv", lambda rows: _rates(rows, scorer))
    monitors = _read(folder / "monitors.csv", _named)
    moved = "Drift from the base, on neutral prompts too; spread within a prompt; mean scores"
    tables = [(f"Win-rates under {scorer}", rates), (moved, monitors)]
    if (folder / "noise.csv").exists():
        noise = _read(folder / "noise.csv", lambda frame: _named(frame, "method/flipped"))
        tables.insert(
            0, ("Win-rate over the base on clean answers and where a share of likes and comparisons is turned", noise)
        )
    text = [
        f"A simulated user, whose measure is {scorer}, gives the likes; the same measure judges held-out prompts. All "
        "systems draw at the plain guidance scale, but `base_best_guidance` at the one that this user likes best."
    ]
    text += fidelity_sentences(monitors, rates)
    return Section(f"A specific user: {user}", text, tables, _pictures(folder, captions))


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
    lost = tuned[tuned < fidelity["base"] - FIDELITY_LOSS].sort_values()
    winners = set(rates[(rates["opponent"] == "base") & (rates["low"] > 0.5)]["method"])
    sentences = []
    for wins, told, warning in (
        (
            True,
            "still win over the base",
            " Their win-rates say that the measure rose, not that the pictures are better.",
        ),
        (False, "do not win over the base", ""),
    ):
        named = ", ".join(f"{name} {value:.2f}" for name, value in lost.items() if (name in winners) == wins)
        about = f"These lost the prompt while they were tuned and {told} ({FIDELITY}, base {fidelity['base']:.2f})"
        sentences += [f"{about}: {named}.{warning}"] if named else []
    return sentences


def _pictures(folder: Path, captions: Mapping[str, str]) -> Sequence[tuple[str, Path]]:
    return [(caption, folder / name) for name, caption in captions.items() if (folder / name).exists()]


def _read(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame] = lambda frame: frame) -> pd.DataFrame:
    return change(pd.read_csv(path)) if path.exists() else pd.DataFrame({"": [f"{path.name} was not written"]})


def _named(frame: pd.DataFrame, first: str = "system") -> pd.DataFrame:
    return frame.rename(columns={"Unnamed: 0": first})


def _rates(frame: pd.DataFrame, scorer: str = PREFERENCE, **only: str) -> pd.DataFrame:
    """The rates under a scorer, of one `method` or over one `opponent`; the column that is one name is left out."""
    rows = frame[frame["scorer"] == scorer]
    for column, value in only.items():
        rows = rows[rows[column] == value]
    named = [column for column in ("method", "opponent") if column not in only]
    return rows[[*named, *RATE_COLUMNS]].reset_index(drop=True)
