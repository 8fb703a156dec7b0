"""The paper's published numbers, to stand beside ours, and the orderings that it claims.

Tables 1-3: win-rates of Diffusion-KTO over each opponent in per cent, by prompt set and scorer. Nothing here is
measured by this project.
"""

from collections.abc import Mapping

import pandas as pd

from dkto.common.names import check_choice
from dkto.evaluation.metrics import WinRate

SCORER_ORDER = ("aesthetic", "pickscore", "hps", "clip", "imagereward")
PUBLISHED_WIN_RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "Pick-a-Pic test (Table 1)": {
        "base": (82.8, 84.0, 86.4, 56.4, 60.6),
        "sft": (56.0, 73.0, 60.6, 57.6, 57.2),
        "csft": (45.8, 68.6, 57.4, 56.8, 58.2),
        "alignprop": (86.2, 96.8, 82.2, 96.0, 90.6),
        "dpo": (70.4, 59.6, 74.2, 48.4, 49.2),
    },
    "HPS v2 (Table 2)": {
        "base": (70.0, 74.5, 72.0, 53.7, 54.2),
        "sft": (54.1, 62.0, 54.0, 54.6, 52.3),
        "csft": (49.5, 60.5, 52.7, 53.0, 53.4),
        "alignprop": (83.3, 96.7, 78.4, 91.1, 86.4),
        "dpo": (58.8, 58.6, 63.9, 48.7, 48.8),
    },
    "PartiPrompts (Table 3)": {
        "base": (68.3, 60.2, 66.9, 52.3, 52.8),
        "sft": (50.3, 58.6, 54.7, 54.2, 51.4),
        "csft": (47.3, 57.0, 54.2, 51.6, 53.1),
        "alignprop": (74.3, 93.1, 76.7, 88.0, 82.8),
        "dpo": (59.5, 48.3, 59.3, 48.6, 48.2),
    },
}
USER_STUDY = {"base": 75.0, "dpo": 69.0}
"""Share of judges who preferred Diffusion-KTO on 100 HPS v2 prompts, in per cent (paper 5.2)."""
HOLM = "Holm's p"
PAPER_OPPONENTS = ("base", "sft", "csft", "alignprop", "dpo")


def published_table(scorer: str = "pickscore") -> pd.DataFrame:
    """The published win-rates of KTO under one scorer: opponents as rows, prompt sets as columns, in per cent.

    Raises:
        ValueError: if the paper has no such scorer.

    >>> float(published_table("hps").loc["dpo", "HPS v2 (Table 2)"])
    63.9
    """
    check_choice("scorer", scorer, SCORER_ORDER)
    place = SCORER_ORDER.index(scorer)
    return pd.DataFrame({name: {o: v[place] for o, v in rows.items()} for name, rows in PUBLISHED_WIN_RATES.items()})


def verdict(result: WinRate) -> str:
    """What an interval says about one half: "above", "below" or "open".

    >>> from dkto.evaluation.metrics import win_rate
    >>> verdict(win_rate([1.0] * 20, [0.0] * 20))
    'above'
    """
    return "above" if result.low > 0.5 else "below" if result.high < 0.5 else "open"


def orderings(
    results: Mapping[str, WinRate], scorer: str = "pickscore", *, corrected: Mapping[str, float] | None = None
) -> pd.DataFrame:
    """Which of the paper's orderings hold here: KTO over each opponent, on the paper's side of one half or not.

    Args:
        results: our win-rate of KTO over each opponent that was trained.
        scorer: the paper's column to hold against it; its learned preference by default.
        corrected: p-values of one half, corrected for the number of comparisons; where they are given they decide what
            stays open, and not each interval on its own.

    Returns:
        A row per opponent: the paper's rate (Table 1, per cent), ours with its interval, and `holds`
        ("yes", "no", or "open" where our interval contains one half or `corrected` is 0.05 or more).
    """
    paper = published_table(scorer)["Pick-a-Pic test (Table 1)"]
    rows = []
    for opponent in PAPER_OPPONENTS:
        if opponent not in results:
            continue
        ours, theirs = results[opponent], float(paper[opponent])
        side = verdict(ours) if corrected is None or corrected[opponent] < 0.05 else "open"
        holds = "open" if side == "open" else "yes" if (side == "above") == (theirs > 50) else "no"
        rates = {"ours, %": 100 * ours.rate, "low, %": 100 * ours.low, "high, %": 100 * ours.high}
        rates |= {"n": ours.n} | ({} if corrected is None else {HOLM: corrected[opponent]})
        rows.append({"ordering": f"kto over {opponent}", "paper, %": theirs, **rates, "holds": holds})
    return pd.DataFrame(rows)


def ordering_cards(order: pd.DataFrame, *, measured: str, seeds: str, cost: str) -> pd.DataFrame:
    """A reproduction card for each of the `orderings` under PickScore; how it was measured is that of all."""
    made, cards = {"measured": measured, "seeds": seeds, "cost": cost}, []
    for row in order.to_dict("records"):
        paper = f"{row['paper, %']:.1f} % (PickScore, Table 1)"
        ours = f"{row['ours, %']:.0f} % [{row['low, %']:.0f}, {row['high, %']:.0f}], n = {row['n']}"
        if HOLM in row:
            ours += f", {HOLM} {row[HOLM]:.3f}"
        cards.append(reproduction_card(claim=row["ordering"], paper=paper, ours=ours, verdict=row["holds"], **made))
    return pd.DataFrame(cards)


def reproduction_card(
    *, claim: str, paper: str, ours: str, measured: str, seeds: str, cost: str, verdict: str
) -> dict[str, str]:
    """One claim of the paper and what became of it here, as a row of a table."""
    found = {"claim": claim, "paper": paper, "ours": ours, "how measured": measured}
    return found | {"seeds": seeds, "cost": cost, "verdict": verdict}
