"""The paper's comparison of methods: take each prompt's median image under a scorer and count wins (5.1.2, A.2).

    scores = score_all(folders, ["world_utility"])
    win_rate_table(scores, [("kto", "base")])

Scores are read once, into the table that every function here takes (`dkto.evaluation.scoring.Scores`).
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from dkto.evaluation.metrics import WinRate, agreement, gaps, median_of_images, paired_bootstrap, sign_test, win_rate
from dkto.evaluation.scoring import Scores

ALL = "all"  # the row of a table that counts every style


def medians(scores: Scores, method: str, scorer: str) -> np.ndarray:
    """(P,) score of each prompt's median image (paper 5.1.2)."""
    return median_of_images(scores[method, scorer])[0]


def compare(scores: Scores, ours: str, theirs: str, scorer: str) -> WinRate:
    """Win-rate of one method over another: per prompt, the higher median score wins, ties count half."""
    return win_rate(medians(scores, ours, scorer), medians(scores, theirs, scorer))


def outcomes(scores: Scores, ours: str, theirs: str, scorer: str) -> np.ndarray:
    """(P,) what each prompt counts in `compare`: 1 for a win of the median image, a half for a tie, 0 for a loss."""
    return (np.sign(_gap(scores, ours, theirs, scorer)) + 1) / 2


def _gap(scores: Scores, ours: str, theirs: str, scorer: str) -> np.ndarray:
    return gaps(medians(scores, ours, scorer), medians(scores, theirs, scorer))


def win_rate_table(
    scores: Scores,
    pairs: Sequence[tuple[str, str]],
    scorers: Sequence[str] | None = None,
    styles: Sequence[str] | None = None,
) -> pd.DataFrame:
    """One row per pair of methods and scorer, and per style if styles are given.

    Columns: method, opponent, scorer; win_rate, low, high (Tango's score interval over prompts, 95 %), n, wins, ties,
    losses; sign_p (two-sided sign test); mean_difference, mean_low, mean_high (of median scores, paired bootstrap over
    prompts, 95 %; the interval is missing for a single prompt).

    Args:
        scores: of all methods, from `score_all`.
        pairs: (method whose wins are counted, opponent).
        scorers: names; all of the table if left out.
        styles: (P,) style of each prompt, "" for none; adds a column `style`, whose "all" rows count every prompt.

    Raises:
        KeyError: if a method has no scores; the sentence lists those that have.
        ValueError: if there is not one style per prompt, or one is named "all".
    """
    rows = []
    for ours, opponent in pairs:
        for scorer in scores.scorers if scorers is None else scorers:
            mine, other = medians(scores, ours, scorer), medians(scores, opponent, scorer)
            for style, chosen in _by_style(styles, len(mine)).items():
                about = {"method": ours, "opponent": opponent, "scorer": scorer}
                if styles is not None:
                    about["style"] = style
                rows.append(about | _comparison(mine[chosen], other[chosen]))
    return pd.DataFrame(rows)


def _by_style(styles: Sequence[str] | None, count: int) -> dict[str, np.ndarray]:
    every = {ALL: np.ones(count, bool)}
    if styles is None:
        return every
    if len(styles) != count:
        raise ValueError(f"styles must name one style for each of {count} prompts, got {len(styles)}")
    if ALL in styles:
        place = list(styles).index(ALL)
        raise ValueError(f"no style may be named {ALL!r}, the row of all prompts; prompt {place} has it")
    return every | {style: np.array([s == style for s in styles]) for style in dict.fromkeys(styles) if style}


def _comparison(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    result = win_rate(ours, theirs)
    difference = paired_bootstrap(ours, theirs) if len(ours) > 1 else (float(ours[0] - theirs[0]), np.nan, np.nan)
    found = vars(result).copy()
    found = {"win_rate": found.pop("rate"), **found, "sign_p": sign_test(ours, theirs)}
    return found | dict(zip(("mean_difference", "mean_low", "mean_high"), difference, strict=True))


def scorer_agreement(scores: Scores, ours: str, opponent: str, scorers: Sequence[str] | None = None) -> pd.DataFrame:
    """How far the scorers agree on one comparison: a row for every two of them.

    Columns: scorer, other; same_winner (share of prompts on which both name the same winner) with low, high and n
    (ties left out); rank_correlation (Spearman's, of the prompts' median score differences; missing if one of the
    scorers always sees the same difference).

    Raises:
        ValueError: if there are fewer than two scorers.
    """
    names = scores.scorers if scorers is None else list(scorers)
    if len(names) < 2:
        raise ValueError(f"scorer_agreement needs at least 2 scorers, got {len(names)}")
    rows = []
    for (name, gap), (other, its) in combinations([(n, _gap(scores, ours, opponent, n)) for n in names], 2):
        same = agreement(gap, its)
        flat = np.ptp(gap) == 0 or np.ptp(its) == 0
        about = {"scorer": name, "other": other, "same_winner": same.rate, "low": same.low, "high": same.high}
        correlation = np.nan if flat else float(stats.spearmanr(gap, its).statistic)
        rows.append(about | {"n": same.n, "rank_correlation": correlation})
    return pd.DataFrame(rows)


def mean_scores(scores: Scores) -> pd.DataFrame:
    """Mean score of every method (rows) under every scorer (columns)."""
    means = {name: {scorer: float(scores[name, scorer].mean()) for scorer in scores.scorers} for name in scores.methods}
    return pd.DataFrame(means).T


def flat_metrics(table: pd.DataFrame) -> dict[str, float]:
    """A win-rate table as flat keys `win_rate/<method>_vs_<opponent>/<scorer>` with /low, /high, /n and /ties.

    Rows of a style get `style_win_rate/<method>_vs_<opponent>/<scorer>/<style>`.
    """
    metrics: dict[str, float] = {}
    for row in table.to_dict("records"):
        key = f"win_rate/{row['method']}_vs_{row['opponent']}/{row['scorer']}"
        if row.get("style", ALL) != ALL:
            key = f"style_{key}/{row['style']}"
        metrics |= {key: row["win_rate"]} | {f"{key}/{name}": row[name] for name in ("low", "high", "n", "ties")}
    return metrics
