"""Our win-rates beside the paper's published ones, and the orderings that it claims."""

from collections.abc import Mapping

import pandas as pd

from dkto.evaluation.metrics import WinRate
from dkto.evaluation.published import TABLES, USER_STUDY, published_table

__all__ = ["USER_STUDY", "ordering_cards", "orderings", "published_table", "reproduction_card", "verdict"]

HOLM = "Holm's p"
PAPER_OPPONENTS = ("base", "sft", "csft", "alignprop", "dpo")


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
        A row per opponent: both versions' rates (Table 1, per cent), ours with its interval, and `holds`
        ("yes", "no", or "open" where our interval contains one half, `corrected` is 0.05 or more, or the two versions
        lie on two sides of one half).
    """
    first, second = (published_table(scorer)[f"{TABLES[0]}, {version}"] for version in ("first version", "NeurIPS"))
    rows = []
    for opponent in PAPER_OPPONENTS:
        if opponent not in results:
            continue
        ours, theirs = results[opponent], float(first[opponent])
        again = float(second[opponent])
        side = verdict(ours) if corrected is None or corrected[opponent] < 0.05 else "open"
        claimed = "open" if (theirs > 50) != (again > 50) else "above" if theirs > 50 else "below"
        holds = "open" if "open" in (side, claimed) else "yes" if side == claimed else "no"
        rates = {"ours, %": 100 * ours.rate, "low, %": 100 * ours.low, "high, %": 100 * ours.high}
        rates |= {"n": ours.n} | ({} if corrected is None else {HOLM: corrected[opponent]})
        paper = {"paper, %": theirs, "NeurIPS version, %": again}
        rows.append({"ordering": f"kto over {opponent}", **paper, **rates, "holds": holds})
    return pd.DataFrame(rows)


def ordering_cards(order: pd.DataFrame, *, measured: str, seeds: str, cost: str) -> pd.DataFrame:
    """A reproduction card for each of the `orderings` under PickScore; how it was measured is that of all."""
    made, cards = {"measured": measured, "seeds": seeds, "cost": cost}, []
    for row in order.to_dict("records"):
        paper = f"{row['paper, %']:.1f} %, NeurIPS version {row['NeurIPS version, %']:.1f} % (PickScore, Table 1)"
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
