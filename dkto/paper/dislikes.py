"""Tastes that need dislikes: answers whose likes say nothing of the taste, and prompts that put it to the test."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from dkto.common.names import check_choice
from dkto.data.feedback import FeedbackTable
from dkto.data.prompts import check_disjoint
from dkto.evaluation.metrics import WinRate, paired_bootstrap
from dkto.evaluation.scoring import Scores
from dkto.evaluation.win_rates import medians
from dkto.models.system import System
from dkto.paper.experiment import likes_grid
from dkto.paper.pool import TASTES, ask, draw_pool
from dkto.paper.seeds import pool_metrics
from dkto.runs.runner import results_of
from dkto.runs.sweeps import ONLY_STAGE
from dkto.world.scenes import Scene, prompts_for
from dkto.world.users import USERS

CONTRASTS = ("base_best_guidance", "sft", "sft_all", "kto", "kto_shuffled", "kto_shuffled_balanced")
"""Names of `dkto.paper.train_all.COMPARED` that a taste is tried with, beside the base."""
NEED_DISLIKES = tuple(name for name, user in USERS.items() if user.provokes)


@dataclass(frozen=True)
class Dislikes:
    """One user's likes and dislikes, and the prompts that they are judged on; no two of these share a prompt."""

    likes: FeedbackTable
    judged: tuple[str, ...]  # test prompts for which the base draws what the user dislikes
    beside: tuple[str, ...]  # test prompts for which it does not: what the taste must not cost
    validation: tuple[str, ...]  # prompts like the judged ones, to choose a guidance scale on

    def grid(self, count: int = 8) -> Axes:
        """The first liked images above the first disliked ones."""
        return likes_grid(self.likes, count)


def ask_for_dislikes(
    folder: str | Path,
    base: System,
    user: str,
    *,
    judged: int = 60,
    beside: int = 40,
    validation: int = 16,
    pool_prompts: int = 400,
    likes_each: int = 0,
    flip_rate: float = 0.0,
    seed: int = 0,
    num_processes: int = 1,
) -> Dislikes:
    """Let the base draw one image of each training prompt, and ask a user about each.

    Args:
        folder: the images land in `folder/pool`, which users of one base and seed may share.
        base: how the base draws.
        user: one of `NEED_DISLIKES`.
        judged, beside, validation: how many prompts of each kind.
        pool_prompts: images that the user sees.
        likes_each: how many liked and how many disliked images are kept, at most; 0 keeps all.
        flip_rate: share of likes that contradict what the user meant, in [0, 0.5].
        seed: of prompts, images and mistakes.
        num_processes: workers that draw.

    Raises:
        ValueError: if the user is another, or dislikes none of the images.
    """
    check_choice("user", user, NEED_DISLIKES)
    provokes = USERS[user].provokes

    def spared(scene: Scene) -> bool:
        return not provokes(scene)

    texts = prompts_for("train", pool_prompts, seed)
    pool = draw_pool(texts, Path(folder) / "pool", base=base, seed=seed, num_processes=num_processes)
    likes = ask(pool, user, flip_rate=flip_rate, seed=seed)
    if likes.is_desirable.all() or not likes.is_desirable.any():
        raise ValueError(f"{user} must dislike some of {pool_prompts} images and like some, raise pool_prompts")
    if likes_each:
        likes = some_of_each(likes, likes_each, seed)
    found = Dislikes(
        likes,
        tuple(prompts_for("test", judged, seed, where=provokes)),
        tuple(prompts_for("test", beside, seed, where=spared)),
        tuple(prompts_for("validation", validation, seed, where=provokes)),
    )
    check_disjoint(judged=found.judged, beside=found.beside, validation=found.validation, training=likes.prompts)
    return found


def some_of_each(table: FeedbackTable, count: int, seed: int = 0) -> FeedbackTable:
    """At most `count` liked and `count` disliked images, drawn at random; smaller counts are parts of larger ones."""
    order = np.random.default_rng(seed).permutation(len(table))
    sides: Sequence[np.ndarray] = [order[table.is_desirable[order] == side][:count] for side in (True, False)]
    return table.subset(np.sort(np.concatenate(sides)))


def costs(judged: Scores, beside: Scores, scorers: Sequence[str], base: str = "base") -> pd.DataFrame:
    """What each method changed against the base in other measures, paired by prompt.

    Args:
        judged: scores on the prompts of the taste.
        beside: scores of the same methods on prompts that it does not touch.
        scorers: names of measures that both have.
        base: the method that the others are held against.

    Returns:
        A row for each method, kind of prompts and scorer ("kto/beside/world_craft"): mean, low, high (95 %) of the
        difference, base (its mean) and n.
    """
    rows = {}
    for kind, scores in (("judged", judged), ("beside", beside)):
        for name in (name for name in judged.methods if name != base):
            for scorer in scorers:
                ours, theirs = (medians(scores, each, scorer) for each in (name, base))
                gap = paired_bootstrap(ours, theirs)
                about = {"mean": gap.mean, "low": gap.low, "high": gap.high, "base": theirs.mean(), "n": len(ours)}
                rows[f"{name}/{kind}/{scorer}"] = about
    return pd.DataFrame.from_dict(rows, orient="index")


class OverSeeds(NamedTuple):
    """One user's win-rates of KTO, by opponent."""

    rates: pd.DataFrame  # a row for each opponent, a column for each seed
    pooled: dict[str, WinRate]  # of all seeds, with the interval of the mixed model


def pool_users(folder: str | Path) -> tuple[dict[str, float], dict[str, OverSeeds]]:
    """The numbers of a sweep over users and seeds (`small_world_dislikes.yaml`): each user's seeds as one.

    Returns:
        Flat metrics, `<user>/win_rate/kto_vs_base/<scorer>` and so on by `dkto.paper.seeds.pool_metrics`, those of one
        seed under `seed-<n>/`; and by user a table of KTO's rates, a row for each opponent, a column for each seed.

    Raises:
        ValueError: if fewer than two seeds of a user are finished, or users have not the same seeds.
    """
    results, seconds = results_of(Path(folder) / ONLY_STAGE)
    by_user: dict[str, dict[int, dict[str, float]]] = {}
    for name, metrics in results.items():
        about = dict(part.split("=", 1) for part in name.split(","))
        by_user.setdefault(about["user"], {})[int(about["seed"])] = metrics
    seeds = {user: sorted(found) for user, found in by_user.items()}
    if not seeds or min(map(len, seeds.values())) < 2 or len(set(map(tuple, seeds.values()))) > 1:
        raise ValueError(f"{folder} must hold the same seeds of every user, at least two, got {seeds}")
    pooled: dict[str, float] = {"seeds": len(next(iter(seeds.values()))), "seconds/total": sum(seconds.values())}
    rates = {}
    for user, found in by_user.items():
        pooled |= {f"{user}/{key}": value for key, value in pool_metrics([found[s] for s in seeds[user]]).items()}
        for seed in seeds[user]:
            pooled |= {f"seed-{seed}/{user}/{key}": value for key, value in found[seed].items()}
        pattern = f"win_rate/kto_vs_([^/]+)/{TASTES[user]}"
        keys = {match[1]: key for key in found[seeds[user][0]] if (match := re.fullmatch(pattern, key))}
        table = pd.DataFrame([[found[s][key] for s in seeds[user]] for key in keys.values()], list(keys), seeds[user])
        rates[user] = OverSeeds(table, {name: _win_rate(pooled, f"{user}/{key}") for name, key in keys.items()})
    return pooled, rates


def _win_rate(metrics: dict[str, float], key: str) -> WinRate:
    rate, low, high, n, ties = (metrics[f"{key}{end}"] for end in ("", "/low", "/high", "/n", "/ties"))
    wins = round(rate * n - ties / 2)
    return WinRate(rate, low, high, int(n), wins, int(ties), int(n) - int(ties) - wins)
