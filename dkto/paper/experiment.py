"""What the experiments share: one user's feedback with held-out prompts, and every method judged on equal noise."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from dkto.common.names import check_choice
from dkto.data.feedback import FeedbackTable, read_feedback
from dkto.data.images import load_image
from dkto.data.prompts import PromptSet, check_disjoint, load_prompts
from dkto.evaluation.generate import generate_all
from dkto.evaluation.manifest import image_path, read_manifest
from dkto.evaluation.metrics import paired_bootstrap
from dkto.evaluation.monitors import monitor_table
from dkto.evaluation.scorers import check_scorers
from dkto.evaluation.scoring import Scores, score_all
from dkto.evaluation.win_rates import flat_metrics, medians, outcomes
from dkto.models.system import System
from dkto.paper.pool import TASTES, ask, compare_pool, draw_pool, likes_of, make_pool, shares
from dkto.paper.train_all import systems_of
from dkto.plotting import image_grid
from dkto.training import OnlineConfig, RunConfig
from dkto.world.users import RED_TINT, USERS

LOOKS_AT_PAINTINGS = tuple(name for name, user in USERS.items() if not user.provokes and not user.open_prompts)
NUMBERS = ("mean/", "drift", "neutral_drift", "diversity")  # columns of the monitors that are measures


@dataclass(frozen=True)
class Feedback:
    """One user's feedback and the prompts that nothing is trained on."""

    likes: dict[str | float, FeedbackTable]  # by the rule that made them of comparisons, or the share of contradictions
    liked: dict[str, float]  # share of liked images by kind, to see what the user likes; empty for likes of a file
    judged: PromptSet  # test prompts
    validation: tuple[str, ...]  # prompts to choose a guidance scale on

    def grid(self, count: int = 8) -> Axes:
        """The first liked images above the first disliked ones."""
        return likes_grid(next(iter(self.likes.values())), count)


def likes_grid(table: FeedbackTable, count: int = 8) -> Axes:
    """The first liked images above the first disliked ones."""
    sides = [[i for i, liked in enumerate(table.is_desirable) if bool(liked) is side] for side in (True, False)]
    count = min(count, *map(len, sides))
    return image_grid(
        [[load_image(table.images[i]) for i in side[:count]] for side in sides], row_labels=["liked", "disliked"]
    )


def held_out_prompts(
    judged: tuple[str, int], scorers: Sequence[str], validation: tuple[str, int] | None = None, *, seed: int = 0
) -> tuple[PromptSet, tuple[str, ...]]:
    """Test and validation prompts, with what could stop their judgement said before anything is drawn.

    Args:
        judged: name of the test prompts' set, and how many.
        scorers: that will judge them.
        validation: the same of prompts to choose a guidance scale on.
        seed: of the draw.

    Raises:
        KeyError, FileNotFoundError, ValueError: as `load_prompts`, `check_scorers` and `check_disjoint`.
    """
    test = load_prompts(judged[0], count=judged[1], seed=seed)
    other = load_prompts(validation[0], count=validation[1], seed=seed).prompts if validation else ()
    check_scorers(scorers, [*test.prompts, *other])
    check_disjoint(judged=test.prompts, validation=other)
    return test, other


def simulated_feedback(
    folder: str | Path,
    base: System,
    user: str,
    *,
    judged: tuple[str, int],
    scorers: Sequence[str],
    validation: tuple[str, int] | None = None,
    feedback: str = "",
    partitions: Sequence[str] = (),
    flip_rates: Sequence[float] = (0.0,),
    pool_set: str = "world_train",
    pool_prompts: int = 200,
    pictures_per_prompt: int = 4,
    seed: int = 0,
    num_processes: int = 1,
) -> Feedback:
    """Show a pool of images to a simulated user, who compares them or likes single ones; or read a file of likes.

    Args:
        folder: the pool lands in `folder/pool`.
        base: its images are tinted for the user who likes red, and join the pool, unguided, for the others.
        user: a name in `TASTES` for comparisons, in `LOOKS_AT_PAINTINGS` for single likes.
        judged, scorers, validation: see `held_out_prompts`.
        feedback: file or folder of likes to take instead.
        partitions: rules of `dkto.data.votes.PARTITIONS` that make likes of comparisons; none for single likes.
        flip_rates: shares of single likes, and of their comparisons, that contradict what the user meant.
        pool_set, pool_prompts: prompts of the pool, and how many.
        pictures_per_prompt: images of each.
        seed: of prompts, pool and answers.
        num_processes: workers that draw.

    Raises:
        ValueError: if the user is unknown, prompts of training and test are shared, or as `held_out_prompts`.
    """
    test, other = held_out_prompts(judged, scorers, validation, seed=seed)
    liked, likes = {}, {}
    if feedback and partitions:  # a plain table of likes has no comparisons left to divide: name one rule for it
        rules = partitions if len(partitions) > 1 else [None]
        likes = {name: read_feedback(feedback, partition=rule) for name, rule in zip(partitions, rules, strict=True)}
    elif feedback:
        given = read_feedback(feedback)
        likes = {rate: given.flipped(rate, seed) for rate in flip_rates}
    else:
        check_choice("user", user, TASTES if partitions else LOOKS_AT_PAINTINGS)
        texts, place = load_prompts(pool_set, count=pool_prompts, seed=seed).prompts, Path(folder) / "pool"
        drawing = {"seed": seed, "num_processes": num_processes}
        if user == "likes_red" and not partitions:
            pool = draw_pool(texts, place, base=base, tint=RED_TINT, **drawing)
        else:
            unguided = System(model=base.model, guidance=1.0, steps=base.steps)
            pool = make_pool(texts, place, pictures_per_prompt=pictures_per_prompt, base=unguided, **drawing)
        if partitions:
            votes = compare_pool(pool, TASTES[user], seed=seed)
            likes = {rule: likes_of(votes, rule) for rule in partitions}
        else:
            likes = {rate: ask(pool, user, flip_rate=rate, seed=seed) for rate in flip_rates}
        liked = shares(pool, next(iter(likes.values())))
    check_disjoint(judged=test.prompts, validation=other, training=next(iter(likes.values())).prompts)
    return Feedback(likes, liked, test, other)


@dataclass(frozen=True)
class Judged:
    """What every method drew from the same prompts and noise, and its scores, read once."""

    folders: dict[str, Path]  # images by method
    scores: Scores
    neutral: dict[str, Path] | None  # images on neutral prompts, all at one guidance scale; None if none were drawn

    def monitors(self, base: str = "base", optimised: Mapping[str, str] | None = None) -> pd.DataFrame:
        """Drift, spread and means, see `dkto.evaluation.monitors.monitor_table`."""
        return monitor_table(self.folders, self.scores, base, optimised=optimised, neutral=self.neutral)

    def grid(self, names: Iterable[str] = (), count: int = 7) -> Axes:
        """The first prompts' first images, a row a method."""
        return side_by_side({name: self.folders[name] for name in names or self.folders}, range(count))


def judge_all(
    systems: Mapping[str, System],
    prompts: Sequence[str],
    scorers: Sequence[str],
    folder: str | Path,
    *,
    images_per_prompt: int = 5,
    neutral: Sequence[str] = (),
    guidance: float = 7.5,
    seed: int = 0,
    num_processes: int = 1,
) -> Judged:
    """Draw with every method on equal noise and score once; what is on disk is kept.

    Args:
        systems: how each method draws.
        folder: images land in `folder/images` and `folder/neutral`.
        images_per_prompt: n, of test prompts; neutral ones get one each.
        neutral: prompts that ask for nothing the user likes; their images show how far tuning alone moved a model.
        guidance: scale of all on neutral prompts.
        prompts, scorers, seed, num_processes: as in `generate_images` and `score_all`.
    """
    drawing = {"seed": seed, "num_processes": num_processes}
    folders = generate_all(systems, prompts, Path(folder) / "images", images_per_prompt=images_per_prompt, **drawing)
    scores = score_all(folders, scorers, num_processes=num_processes)
    plain = {name: replace(system, guidance=guidance) for name, system in systems.items()}
    moved = generate_all(plain, neutral, Path(folder) / "neutral", images_per_prompt=1, **drawing) if neutral else None
    return Judged(folders, scores, moved)


def side_by_side(
    folders: Mapping[str, Path],
    rows: Iterable[int],
    labels: Sequence[str] = (),
    numbers: Mapping[str, np.ndarray] | None = None,
) -> Axes:
    """Images of some prompts, a row a method, a column a prompt.

    Args:
        folders: images by method, all of the same prompts.
        rows: numbers of the prompts; those that there are not are left out.
        labels: of the columns; the prompts if left out.
        numbers: (P,) which image of each prompt is shown, by method; the first if left out.
    """
    prompts = read_manifest(next(iter(folders.values())))["prompts"]
    rows = [int(row) for row in rows if row < len(prompts)]
    images = [
        [load_image(image_path(folder, row, int(numbers[name][row]) if numbers else 0)) for row in rows]
        for name, folder in folders.items()
    ]
    return image_grid(images, row_labels=list(folders), column_labels=labels or [prompts[row] for row in rows])


def own_rewards(
    configs: Mapping[str, RunConfig],
    base: System,
    prompts: Sequence[str],
    scorers: Sequence[str],
    folder: str | Path,
    **drawing: int,
) -> pd.DataFrame:
    """Whether methods tuned on a scorer raised it, at the guidance scale at which they drew while they were tuned.

    Args:
        configs: the trainings by name; those that draw their own images count.
        base: how the base draws.
        prompts: test prompts.
        scorers: all that are watched, the rewards among them.
        folder: images land in `folder/tuned_at_<scale>`.
        drawing: images_per_prompt, seed and num_processes of `judge_all`.

    Returns:
        A row a method: reward, guidance, gain, low, high (of the median scores, against the base), and `fell` and
        `reward_hacking` of `monitor_table`.
    """
    rows = {}
    for name, config in ((name, config) for name, config in configs.items() if isinstance(config, OnlineConfig)):
        systems = systems_of({name: config.output_dir}, replace(base, guidance=config.guidance))
        judged = judge_all(systems, prompts, scorers, Path(folder) / f"tuned_at_{config.guidance:g}", **drawing)
        change = paired_bootstrap(*(medians(judged.scores, n, config.reward) for n in (name, "base")))
        rows[name] = {"reward": config.reward, "guidance": config.guidance, "gain": change.mean}
        rows[name] |= {"low": change.low, "high": change.high}
        rows[name] |= judged.monitors(optimised={name: config.reward}).loc[name, ["fell", "reward_hacking"]]
    return pd.DataFrame.from_dict(rows, orient="index")


def flip_costs(scores: Scores, pairs: Mapping[str, tuple[str, str]], scorer: str) -> pd.DataFrame:
    """What contradictory likes cost, paired by prompt.

    Args:
        scores: from `judge_all`, the base's among them.
        pairs: by the name of a row, the method trained on clean likes and the same one on flipped likes.
        scorer: of what the user likes.

    Returns:
        Columns clean and flipped (win-rates over the base), lost, low, high (their difference), score_lost, score_low,
        score_high (that of the median scores).
    """
    rows = {}
    for row, names in pairs.items():
        won, won_less = (outcomes(scores, name, "base", scorer) for name in names)
        lost, worse = paired_bootstrap(won, won_less), paired_bootstrap(*(medians(scores, n, scorer) for n in names))
        rows[row] = {"clean": won.mean(), "flipped": won_less.mean()}
        rows[row] |= {"lost": lost.mean, "low": lost.low, "high": lost.high}
        rows[row] |= {"score_lost": worse.mean, "score_low": worse.low, "score_high": worse.high}
    return pd.DataFrame.from_dict(rows, orient="index")


def measures_of(rates: pd.DataFrame, monitors: pd.DataFrame, **tables: pd.DataFrame) -> dict[str, float]:
    """Tables as the flat metrics of an experiment: `win_rate/...`, `drift/<method>` and so on.

    Others have three columns, a number and its interval, and become `<keyword>/<row>` with /low and /high.
    """
    found = flat_metrics(rates)
    for name, row in monitors.iterrows():
        numbers = {key: row[key] for key in monitors if key.startswith(NUMBERS)}
        found |= {f"{key}/{name}": float(value) for key, value in numbers.items() if pd.notna(value)}
    for keyword, table in tables.items():
        for name, *values in table.itertuples(name=None):
            found |= with_interval(f"{keyword}/{name}", *values)
    return found


def with_interval(key: str, value: float, low: float, high: float) -> dict[str, float]:
    """A number and its interval as flat metrics.

    >>> with_interval("dose/10", 0.5, 0.4, 0.6)
    {'dose/10': 0.5, 'dose/10/low': 0.4, 'dose/10/high': 0.6}
    """
    return {key: float(value), f"{key}/low": float(low), f"{key}/high": float(high)}
