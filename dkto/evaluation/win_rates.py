"""The paper's comparison of methods: score images, take each prompt's median image, count wins (5.1.2, A.2).

Scores are kept beside the images (`dkto.evaluation.scoring`); a second call scores only what is missing. The
images of a prompt have the same starting noise under every method (`dkto.evaluation.generate`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from dkto.common.names import check_name
from dkto.evaluation.generate import read_manifest
from dkto.evaluation.metrics import WinRate, agreement, median_of_images, paired_bootstrap, sign_test, win_rate
from dkto.evaluation.scorers import Scorer, scorer_name
from dkto.evaluation.scoring import score_images

ALL = "all"  # the row of a table that counts every style


def medians(folder: str | Path, scorer: str | Scorer) -> np.ndarray:
    """(P,) score of each prompt's median image (paper 5.1.2)."""
    return median_of_images(score_images(folder, scorer))[0]


def check_comparable(folders: Mapping[str, str | Path]) -> dict:
    """Check that all methods drew the same prompts, number of images and seeds.

    Returns:
        The manifest of the first.

    Raises:
        FileNotFoundError: if a folder holds no images.
        ValueError: if one of the three differs (the sentence names it, and the first prompt that differs), or there is
            no method.
    """
    if not folders:
        raise ValueError("folders must hold at least one method, got none")
    manifests = {name: read_manifest(folder) for name, folder in folders.items()}
    first_name, first = next(iter(manifests.items()))
    for name, other in manifests.items():
        differs = [key for key in ("prompts", "images_per_prompt", "seed") if first[key] != other[key]]
        if differs:
            raise ValueError(
                f"{folders[first_name]} and {folders[name]} cannot be compared: {', '.join(differs)} differ"
                + (_first_difference(first["prompts"], other["prompts"]) if differs[0] == "prompts" else "")
            )
    return first


def _first_difference(ours: list[str], theirs: list[str]) -> str:
    if len(ours) != len(theirs):
        return f" ({len(ours)} and {len(theirs)} prompts)"
    row = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
    return f" (first at prompt {row}: {ours[row]!r} and {theirs[row]!r})"


def compare(ours: str | Path, theirs: str | Path, scorer: str | Scorer) -> WinRate:
    """Win-rate of one folder of images over another: per prompt, the higher median score wins, ties count half.

    Raises:
        ValueError: if the folders were drawn for different prompts, numbers of images or seeds.
    """
    check_comparable({"ours": ours, "theirs": theirs})
    return win_rate(medians(ours, scorer), medians(theirs, scorer))


def outcomes(ours: str | Path, theirs: str | Path, scorer: str | Scorer) -> np.ndarray:
    """(P,) what each prompt counts in `compare`: 1 for a win of the median picture, a half for a tie, 0 for a loss.

    Raises:
        ValueError: as `compare`.
    """
    check_comparable({"ours": ours, "theirs": theirs})
    gap = medians(ours, scorer) - medians(theirs, scorer)
    return (np.sign(gap) + 1) / 2


def win_rate_table(
    folders: Mapping[str, str | Path],
    ours: str,
    opponents: Sequence[str],
    scorers: Sequence[str | Scorer],
    styles: Sequence[str] | None = None,
) -> pd.DataFrame:
    """One row per opponent and scorer, and per style if styles are given.

    Columns: method, opponent, scorer; win_rate, low, high (Wilson, 95 %), n, wins, ties, losses; sign_p (two-sided
    sign test); mean_difference, mean_low, mean_high (of median scores, paired bootstrap over prompts, 95 %; the
    interval is missing for a single prompt).

    Args:
        folders: image folder of each method by its name.
        ours: the method whose wins are counted.
        opponents: names of the methods it is compared with.
        scorers: names of scorers, or scorers.
        styles: (P,) style of each prompt, "" for none; adds a column `style`, whose "all" rows count every prompt.

    Raises:
        KeyError: if a method has no folder; the sentence lists those that have.
        ValueError: as `compare`, or if there is not one style per prompt, or one is named "all".
    """
    for name in (ours, *opponents):
        check_name("method", name, folders, KeyError)
    used = {name: folders[name] for name in (ours, *opponents)}
    manifest = check_comparable(used)
    groups = {ALL: np.ones(len(manifest["prompts"]), bool), **_by_style(styles, len(manifest["prompts"]))}
    rows = []
    ours_by_scorer = [medians(folders[ours], scorer) for scorer in scorers]
    for opponent in opponents:
        for scorer, mine in zip(scorers, ours_by_scorer, strict=True):
            other = medians(folders[opponent], scorer)
            for style, chosen in groups.items():
                about = {"method": ours, "opponent": opponent, "scorer": scorer_name(scorer)}
                if styles is not None:
                    about["style"] = style
                rows.append(about | _comparison(mine[chosen], other[chosen]))
    return pd.DataFrame(rows)


def _by_style(styles: Sequence[str] | None, count: int) -> dict[str, np.ndarray]:
    if styles is None:
        return {}
    if len(styles) != count:
        raise ValueError(f"styles must name one style for each of {count} prompts, got {len(styles)}")
    if ALL in styles:
        raise ValueError(
            f"no style may be named {ALL!r}, the row of all prompts; prompt {list(styles).index(ALL)} has it"
        )
    return {style: np.array([s == style for s in styles]) for style in dict.fromkeys(styles) if style}


def _comparison(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    result = win_rate(ours, theirs)
    difference = paired_bootstrap(ours, theirs) if len(ours) > 1 else (float(ours[0] - theirs[0]), np.nan, np.nan)
    return {
        "win_rate": result.rate,
        "low": result.low,
        "high": result.high,
        "n": result.n,
        "wins": result.wins,
        "ties": result.ties,
        "losses": result.losses,
        "sign_p": sign_test(ours, theirs),
        "mean_difference": difference[0],
        "mean_low": difference[1],
        "mean_high": difference[2],
    }


def scorer_agreement(
    folders: Mapping[str, str | Path], ours: str, opponent: str, scorers: Sequence[str | Scorer]
) -> pd.DataFrame:
    """How far the scorers agree on one comparison: a row for every two of them.

    Columns: scorer, other; same_winner (share of prompts on which both name the same winner) with low, high and n
    (ties left out); rank_correlation (Spearman's, of the prompts' median score differences; missing if one of the
    scorers always sees the same difference).

    Raises:
        ValueError: if there are fewer than two scorers, or as `compare`.
    """
    names = [scorer_name(scorer) for scorer in scorers]
    if len(names) < 2:
        raise ValueError(f"scorer_agreement needs at least 2 scorers, got {len(names)}")
    check_comparable({ours: folders[ours], opponent: folders[opponent]})
    gaps = [medians(folders[ours], scorer) - medians(folders[opponent], scorer) for scorer in scorers]
    rows = []
    for i, name in enumerate(names):
        for j in range(i + 1, len(names)):
            same = agreement(gaps[i], gaps[j])
            flat = np.ptp(gaps[i]) == 0 or np.ptp(gaps[j]) == 0
            correlation = np.nan if flat else float(stats.spearmanr(gaps[i], gaps[j]).statistic)
            about = {"scorer": name, "other": names[j], "same_winner": same.rate, "low": same.low, "high": same.high}
            rows.append(about | {"n": same.n, "rank_correlation": correlation})
    return pd.DataFrame(rows)


def mean_scores(folders: Mapping[str, str | Path], scorers: Sequence[str | Scorer]) -> pd.DataFrame:
    """Mean score of every method (rows) under every scorer (columns).

    Raises:
        ValueError: if the folders were drawn for different prompts, numbers of images or seeds.
    """
    check_comparable(folders)
    means = {
        name: {scorer_name(s): float(score_images(folder, s).mean()) for s in scorers}
        for name, folder in folders.items()
    }
    return pd.DataFrame(means).T


def flat_metrics(table: pd.DataFrame) -> dict[str, float]:
    """A win-rate table as flat keys `win_rate/<method>_vs_<opponent>/<scorer>` with /low, /high and /n.

    Rows of a style get `style_win_rate/<method>_vs_<opponent>/<scorer>/<style>`.
    """
    metrics: dict[str, float] = {}
    for row in table.to_dict("records"):
        key = f"win_rate/{row['method']}_vs_{row['opponent']}/{row['scorer']}"
        if row.get("style", ALL) != ALL:
            key = f"style_{key}/{row['style']}"
        metrics |= {key: row["win_rate"], f"{key}/low": row["low"], f"{key}/high": row["high"], f"{key}/n": row["n"]}
    return metrics
