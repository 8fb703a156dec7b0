"""The numbers of a replay as one table, several training seeds of its main tables as one.

A rate over seeds is their mean; its interval reaches from the lowest to the highest bound of the seeds' own, so that
it is never narrower than that of one seed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from dkto.common.files import write_atomically
from dkto.evaluation.metrics import WinRate
from dkto.paper.tables import ordering_cards, orderings
from dkto.paper.train_all import controls_first
from dkto.plotting import plot_win_rates
from dkto.runs.runner import results_of

MAIN = "win_rate_tables"  # run of the main tables; `-<seed>` follows where there are several
PREFERENCE = "world_utility"


def pool_replay(folder: str | Path, runs: Sequence[str] = ()) -> dict[str, float]:
    """The numbers of a finished replay as one flat table; of several seeds, tables and figure too (`write_pooled`).

    Args:
        folder: of the sweep, a folder for each run.
        runs: names of its runs; none takes all that finished.
    """
    folder, (results, seconds) = Path(folder), results_of(folder, runs)
    metrics = combine(results, seconds)
    seeds = [name for name in results if name.startswith(f"{MAIN}-")]
    if len(seeds) > 1:
        read = {name.partition("-")[2]: read_seed(folder / name, PREFERENCE) for name in seeds}
        holds = write_pooled(folder, read, PREFERENCE, pd.read_csv(folder / seeds[0] / "cards.csv")["cost"][0])["holds"]
        metrics |= {f"orderings/{name}": int((holds == name).sum()) for name in ("yes", "no")}
    return metrics


def combine(results: Mapping[str, Mapping[str, float]], seconds: Mapping[str, float]) -> dict[str, float]:
    """One flat table: the main tables' numbers as they are, those of other runs under their name.

    `seconds/` are those of each run's last execution, which reads what an earlier one left on disk.

    Where the main tables ran with several seeds, a rate is the mean over seeds, its interval reaches from the
    lowest to the highest bound, its n is the sum, and each seed's numbers are under `seed-<n>/`; what is chosen and
    not measured, the best guidance scale, is there alone.
    """
    tables = {name: values for name, values in results.items() if name.partition("-")[0] == MAIN}
    metrics: dict[str, float] = {}
    for name, values in results.items():
        if name not in tables:
            metrics |= {f"{name}/{key}": value for key, value in values.items()}
        elif len(tables) > 1:
            metrics |= {f"seed-{name.partition('-')[2]}/{key}": value for key, value in values.items()}
    for key in next(iter(tables.values()), {}):
        found = [values[key] for values in tables.values() if key in values]
        if len(found) == 1 or key != "best_guidance":
            metrics[key] = pool_values(key.rpartition("/")[2], found)
    metrics["seeds"] = len(tables)
    metrics |= {f"seconds/{name}": value for name, value in seconds.items()}
    return metrics | {"seconds/total": round(sum(seconds.values()), 1)}


def read_seed(folder: str | Path, scorer: str, method: str = "kto") -> dict[str, WinRate]:
    """Win-rates of a method over each opponent by one scorer, from the `win_rates.csv` of one seed's tables."""
    table = pd.read_csv(Path(folder) / "win_rates.csv")
    return {
        row.opponent: WinRate(row.win_rate, row.low, row.high, row.n, row.wins, row.ties, row.losses)
        for row in table[(table["scorer"] == scorer) & (table["method"] == method)].itertuples()
    }


def pool_values(kind: str, values: Sequence[float]) -> float:
    """One number of several seeds as one: lowest of a "low", highest of a "high", sum of an "n", else the mean.

    >>> pool_values("low", [0.4, 0.6]), pool_values("high", [0.4, 0.6]), pool_values("rate", [0.25, 0.75])
    (0.4, 0.6, 0.5)
    >>> pool_values("n", [500, 500])
    1000
    """
    pick = {"low": min, "high": max, "n": sum}.get(kind, lambda found: sum(found) / len(found))
    return pick(values)


def pool_seeds(seeds: Mapping[str, Mapping[str, WinRate]]) -> dict[str, WinRate]:
    """The mean over seeds with the widest interval, for every opponent that all seeds met; `seeds` is by seed.

    Raises:
        ValueError: if there is no seed.

    >>> from dkto.evaluation.metrics import win_rate
    >>> one, other = win_rate([1.0] * 30, [0.0] * 30), win_rate([1.0, 0.0] * 15, [0.0, 1.0] * 15)
    >>> print(pool_seeds({"0": {"base": one}, "1": {"base": other}})["base"])
    75 % [33, 100] n=60
    """
    if not seeds:
        raise ValueError("seeds must hold at least one, got none")
    first, *others = seeds.values()
    pooled = {}
    for opponent in first:
        if all(opponent in other for other in others):
            found = [seed[opponent] for seed in seeds.values()]
            counts = {name: sum(getattr(one, name) for one in found) for name in ("n", "wins", "ties", "losses")}
            ends = {name: pool_values(name, [getattr(one, name) for one in found]) for name in ("rate", "low", "high")}
            pooled[opponent] = WinRate(**ends, **counts)
    return pooled


def write_pooled(
    folder: str | Path, seeds: Mapping[str, Mapping[str, WinRate]], scorer: str, cost: str
) -> pd.DataFrame:
    """Leave `seeds.csv`, `orderings.csv`, `cards.csv` and `win_rates.png` of all seeds in a folder.

    `scorer` names the titles, `cost` is what one seed took. Returns the paper's orderings, see `dkto.paper.tables`.
    """
    folder, pooled = Path(folder), pool_seeds(seeds)
    rows = []
    for opponent, result in pooled.items():
        each = {f"seed {name}": found[opponent].rate for name, found in seeds.items()}
        whole = {name: getattr(result, name) for name in ("low", "high", "n", "ties")}
        rows.append({"opponent": opponent, **each, "win_rate": result.rate, **whole})
    order = orderings(pooled)
    measured = f"{scorer}, mean over seeds, the widest interval"
    cards = ordering_cards(
        order, measured=measured, seeds=f"{len(seeds)} ({', '.join(seeds)})", cost=f"{cost}, each seed"
    )
    for name, frame in (("seeds", pd.DataFrame(rows)), ("orderings", order), ("cards", cards)):
        write_atomically(folder / f"{name}.csv", lambda part, frame=frame: frame.to_csv(part, index=False))
    axes = plot_win_rates([(f"kto vs {opponent}", pooled[opponent]) for opponent in controls_first(pooled)])
    judged = sorted({found[opponent].n for found in seeds.values() for opponent in pooled})
    axes.set_title(f"{scorer}, {len(seeds)} training seeds\nmean and widest interval")
    axes.set_xlabel(f"win-rate (%) with its interval\nn = {' or '.join(map(str, judged))} prompts for each seed")
    write_atomically(
        folder / "win_rates.png", lambda part: axes.figure.savefig(part, format="png", dpi=150, bbox_inches="tight")
    )
    plt.close(axes.figure)
    return order
