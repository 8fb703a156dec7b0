"""The numbers of a replay as one table, several training seeds of its main tables as one.

A seed changes pool, answers, training, test prompts and noise, so seeds are the independent units. A rate over seeds is
their mean with the interval of a mixed model over comparisons and seeds (`pool`); each seed's own rate stays beside it.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

from dkto.common.files import write_atomically
from dkto.evaluation.metrics import WinRate
from dkto.paper.tables import ordering_cards, orderings
from dkto.paper.train_all import controls_first
from dkto.plotting import plot_win_rates
from dkto.runs.runner import results_of

MAIN = "win_rate_tables"  # run of the main tables; `-<seed>` follows where there are several
PREFERENCE = "world_utility"
COUNTS = ("n", "wins", "ties", "losses")


def pool_replay(folder: str | Path, runs: Sequence[str] = ()) -> dict[str, float]:
    """The numbers of a finished replay as one flat table; of several seeds, tables and figure too (`write_pooled`).

    Args:
        folder: of the sweep, a folder for each run.
        runs: names of its runs; none takes all that finished.
    """
    folder, (results, seconds) = Path(folder), results_of(folder, runs)
    metrics = combine(results, seconds)
    seeds = seeds_of(results).get(MAIN, [])
    if len(seeds) > 1:
        read = {name.partition("-")[2]: read_seed(folder / name, PREFERENCE) for name in seeds}
        holds = write_pooled(folder, read, PREFERENCE, pd.read_csv(folder / seeds[0] / "cards.csv")["cost"][0])["holds"]
        metrics |= {f"orderings/{name}": int((holds == name).sum()) for name in ("yes", "no")}
    return metrics


def combine(results: Mapping[str, Mapping[str, float]], seconds: Mapping[str, float]) -> dict[str, float]:
    """One flat table: the main tables' numbers as they are, those of other runs under their name.

    Runs whose names differ by a number at the end ("ablations-0", "ablations-1") are seeds of one run: their numbers
    are pooled (`pool_metrics`), and each seed's are under `seed-<n>/`, but for those by style: they are many, and the
    run's `win_rates_by_style.csv` has them. `seconds/` are those of each run's last execution, which reads what an
    earlier one left on disk.
    """
    metrics: dict[str, float] = {}
    runs = seeds_of(results)
    for run, seeds in runs.items():
        under = "" if run == MAIN else f"{run}/"
        metrics |= {f"{under}{key}": value for key, value in pool_metrics([results[name] for name in seeds]).items()}
        for name in seeds if len(seeds) > 1 else ():
            seed = f"seed-{name.rpartition('-')[2]}"
            own = {key: value for key, value in results[name].items() if not key.startswith("style_win_rate/")}
            metrics |= {f"{seed}/{under}{key}": value for key, value in own.items()}
    metrics["seeds"] = len(runs.get(MAIN, ()))
    metrics |= {f"seconds/{name}": value for name, value in seconds.items()}
    return metrics | {"seconds/total": round(sum(seconds.values()), 1)}


def seeds_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of runs by what they are without the number of a seed at the end.

    >>> seeds_of(["ablations", "user_likes_red-0", "user_likes_red-1"])
    {'ablations': ['ablations'], 'user_likes_red': ['user_likes_red-0', 'user_likes_red-1']}
    """
    found: dict[str, list[str]] = {}
    for name in names:
        stem, _, number = name.rpartition("-")
        found.setdefault(stem if number.isdigit() else name, []).append(name)
    return found


def read_seed(folder: str | Path, scorer: str, method: str = "kto") -> dict[str, WinRate]:
    """Win-rates of a method over each opponent by one scorer, from the `win_rates.csv` of one seed's tables."""
    table = pd.read_csv(Path(folder) / "win_rates.csv")
    return {
        row.opponent: WinRate(row.win_rate, row.low, row.high, row.n, row.wins, row.ties, row.losses)
        for row in table[(table["scorer"] == scorer) & (table["method"] == method)].itertuples()
    }


def pool(rates: pd.DataFrame, prompt_errors: np.ndarray, bounds: tuple[float, float] = (0.0, 1.0)) -> pd.DataFrame:
    """Means over training seeds of several comparisons, by a two-way mixed model with random seeds.

        rate[c, s] = mean[c] + seed[s] + residual[c, s]

    A comparison alone has three seeds or so, too few to know their spread. The comparisons of one table share it: a
    mean's variance is (seed variance + residual variance) / seeds, both from the mean squares of the table, with
    Satterthwaite's degrees of freedom. With a single comparison this is Student's interval.

    Args:
        rates: a row for each comparison, a column for each seed, at least two.
        prompt_errors: standard error of each comparison's mean from its prompts alone; the error is never below it,
            as it would be where all seeds happen to agree.
        bounds: between which the numbers lie.

    Returns:
        A row for each comparison: rate, low, high (95 %), p (two-sided, of one half), holm (that p with Holm's
        correction over the rows), t_low, t_high (Student's interval of its seeds alone: no spread is shared).

    >>> rates = pd.DataFrame({"0": [0.7, 0.4], "1": [0.6, 0.5], "2": [0.8, 0.6]}, index=["base", "sft"])
    >>> pool(rates, np.zeros(2))[["rate", "low", "high", "holm"]].round(2).to_numpy().tolist()
    [[0.7, 0.52, 0.88, 0.07], [0.5, 0.32, 0.68, 1.0]]
    """
    table = rates.to_numpy(dtype=np.float64)
    count, seeds = table.shape
    if seeds < 2:
        raise ValueError(f"rates must have at least 2 seeds, got {seeds}")
    means, shared = table.mean(1), table.mean(0)
    residual = table - means[:, None] - shared + table.mean()
    freedom = np.array([seeds - 1, max(1, (count - 1) * (seeds - 1))])
    # the seeds' and the residuals' part of a rate's variance, from their mean squares
    parts = np.array([shared.var(ddof=1), (residual**2).sum() / freedom[1] * (count - 1) / count])
    parts[parts < 1e-12] = 0.0  # rounding
    df = parts.sum() ** 2 / (parts**2 / freedom).sum() if parts.any() else np.inf
    error = np.maximum((parts.sum() / seeds) ** 0.5, prompt_errors)
    half = stats.t.ppf(0.975, df) * error
    distance = np.divide(np.abs(means - 0.5), error, out=np.full(count, np.inf), where=error > 0)
    alone = stats.t.ppf(0.975, seeds - 1) * table.std(1, ddof=1) / seeds**0.5
    p = np.where(means == 0.5, 1.0, 2 * stats.t.sf(distance, df))
    found = {"rate": means, "low": means - half, "high": means + half, "p": p, "holm": holm(p)}
    found |= {"t_low": means - alone, "t_high": means + alone}
    ends = ["low", "high", "t_low", "t_high"]
    pooled = pd.DataFrame(found, index=rates.index)
    return pooled.assign(**pooled[ends].clip(*bounds))


def holm(p: Sequence[float]) -> np.ndarray:
    """p-values with Holm's correction: the chance of one false claim among all of them stays below the level.

    >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return corrected


def pool_metrics(seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The flat metrics of several seeds as one: means with intervals by `pool`, and sums of /n and /ties.

    Win-rates of KTO over the others are one table of `pool` for each scorer (and style), those of the others over the
    base another; they get /holm, /t_low and /t_high too. Any other number with an interval stands alone. What not every
    seed has, and what is chosen and not measured, the best guidance scale, is left out. A single seed stays as it is.
    """
    if len(seeds) < 2:
        return dict(seeds[0]) if seeds else {}
    keys = [key for key in seeds[0] if all(key in other for other in seeds) and key != "best_guidance"]
    found = {key: sum(seed[key] for seed in seeds) for key in keys}
    found |= {key: value / len(seeds) for key, value in found.items() if not key.endswith(("/n", "/ties"))}
    tables: dict[tuple, list[str]] = {}
    for key in (key for key in keys if f"{key}/low" in found):
        tables.setdefault(_table_of(key), []).append(key)
    for (kind, *_), rows in tables.items():
        values = pd.DataFrame([[seed[key] for seed in seeds] for key in rows], index=rows)
        widths = np.array([[seed[f"{key}/high"] - seed[f"{key}/low"] for seed in seeds] for key in rows])
        pooled = pool(values, prompt_error(widths), (0.0, 1.0) if "win_rate" in kind else (-np.inf, np.inf))
        names = ["low", "high", *(["holm", "t_low", "t_high"] if kind == "win_rate" else [])]
        found |= {f"{key}/{name}": float(pooled.loc[key, name]) for key in rows for name in names}
    return found


def prompt_error(widths: np.ndarray) -> np.ndarray:
    """Standard error (C,) of means over seeds, from prompts alone: `widths` (C, S) are of the seeds' 95 % intervals."""
    return (widths**2).sum(1) ** 0.5 / widths.shape[1] / (2 * stats.norm.ppf(0.975))


def _table_of(key: str) -> tuple:
    kind, name, *about = key.split("/")
    method, versus, opponent = name.partition("_vs_")
    return (kind, method if method == "kto" else f"over {opponent}", *about) if versus else (key,)


def write_pooled(
    folder: str | Path, seeds: Mapping[str, Mapping[str, WinRate]], scorer: str, cost: str
) -> pd.DataFrame:
    """Leave `seeds.csv`, `orderings.csv`, `cards.csv` and `win_rates.png` of all seeds in a folder.

    Args:
        folder: where they land.
        seeds: win-rates by opponent of each seed; those that all seeds have are pooled.
        scorer: names the titles.
        cost: what one seed took.

    Returns:
        The paper's orderings, see `dkto.paper.tables`.
    """
    folder, (first, *others) = Path(folder), seeds.values()
    each = {opponent: [seed[opponent] for seed in seeds.values()] for opponent in first}
    each = {opponent: each[opponent] for opponent in first if all(opponent in other for other in others)}
    rates = pd.DataFrame([[one.rate for one in each[name]] for name in each], index=list(each))
    rates.columns = [f"seed {name}" for name in seeds]
    widths = np.array([[one.high - one.low for one in found] for found in each.values()])
    table = pool(rates, prompt_error(widths))
    counts = {name: [sum(getattr(one, count) for one in each[name]) for count in COUNTS] for name in each}
    pooled = {name: WinRate(*table.loc[name, ["rate", "low", "high"]], *counts[name]) for name in each}
    counts = pd.DataFrame.from_dict(counts, orient="index", columns=COUNTS)
    table = rates.join(table.rename(columns={"rate": "win_rate"})).join(counts[["n", "ties"]]).rename_axis("opponent")
    order = orderings(pooled, corrected=table["holm"])
    measured = f"{scorer}, mean over seeds, mixed model over opponents and seeds, Holm's correction over {len(each)}"
    cards = ordering_cards(
        order, measured=measured, seeds=f"{len(seeds)} ({', '.join(seeds)})", cost=f"{cost}, each seed"
    )
    for name, frame in (("seeds", table.reset_index()), ("orderings", order), ("cards", cards)):
        write_atomically(folder / f"{name}.csv", lambda part, frame=frame: frame.to_csv(part, index=False))
    plot_seeds(folder / "win_rates.png", pooled, rates, scorer)
    return order


def plot_seeds(path: str | Path, pooled: Mapping[str, WinRate], rates: pd.DataFrame, scorer: str) -> None:
    """KTO over every opponent as a PNG file: the mean over seeds with its interval, and each seed's rate as a dot."""
    names = controls_first(pooled)
    axes = plot_win_rates([(f"kto vs {name}", pooled[name]) for name in names], dots=rates.loc[names].to_numpy())
    axes.set_title(f"{scorer}, {rates.shape[1]} training seeds as dots\nmean, mixed model over opponents and seeds")
    judged = sorted({round(one.n / rates.shape[1]) for one in pooled.values()})
    axes.set_xlabel(f"win-rate (%) with its 95 % interval\nn = {' or '.join(map(str, judged))} prompts for each seed")
    write_atomically(path, lambda part: axes.figure.savefig(part, format="png", dpi=150, bbox_inches="tight"))
    plt.close(axes.figure)
