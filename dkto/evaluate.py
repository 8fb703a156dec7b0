"""The paper's comparison of methods: score images, take each prompt's median image, count wins (5.1.2, A.2).

Scores are kept beside the images (`scores/<scorer>.parquet`); a second call scores only what is missing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from dkto.feedback import load_image
from dkto.generate import image_path, read_manifest
from dkto.metrics import WinRate, median_of_images, win_rate
from dkto.progress import progress
from dkto.scorers import score


def score_images(folder: str | Path, scorer: str) -> np.ndarray:
    """Scores of a folder written by `generate_images`.

    Args:
        folder: holds manifest.json and the images.
        scorer: name in `dkto.scorers.SCORERS`.

    Returns:
        (P, n): P prompts, n images each.

    Raises:
        FileNotFoundError: if the manifest or an image is missing.
        ValueError: if the scorer fails its checks; scores already on disk stay.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    prompts, n = manifest["prompts"], manifest["images_per_prompt"]
    path = folder / "scores" / f"{scorer}.parquet"
    if path.exists():
        frame = pd.read_parquet(path)
        return frame["score"].to_numpy().reshape(len(prompts), n)
    keys = [(p, i) for p in range(len(prompts)) for i in range(n)]
    values = []
    for start in progress(range(0, len(keys), 64), desc=f"{scorer} on {folder.name}", unit="batch"):
        batch = keys[start : start + 64]
        images = [load_image(image_path(folder, p, i)) for p, i in batch]
        values.append(score(scorer, images, [prompts[p] for p, _ in batch]))
    scores = np.concatenate(values)
    path.parent.mkdir(exist_ok=True)
    frame = pd.DataFrame(keys, columns=["prompt", "image"]).assign(score=scores)
    part = path.with_suffix(".part")
    frame.to_parquet(part, index=False)
    part.replace(path)
    return scores.reshape(len(prompts), n)


def compare(ours: str | Path, theirs: str | Path, scorer: str) -> WinRate:
    """Win-rate of one folder of images over another: per prompt, the higher median score wins, ties count half.

    Raises:
        ValueError: if the folders were drawn for different prompts, numbers of images or seeds.
    """
    mine, other = read_manifest(ours), read_manifest(theirs)
    differs = [key for key in ("prompts", "images_per_prompt", "seed") if mine[key] != other[key]]
    if differs:
        raise ValueError(f"{ours} and {theirs} cannot be compared: {', '.join(differs)} differ")
    medians = [median_of_images(score_images(folder, scorer))[0] for folder in (ours, theirs)]
    return win_rate(*medians)


def win_rate_table(
    folders: Mapping[str, str | Path], ours: str, opponents: Sequence[str], scorers: Sequence[str]
) -> pd.DataFrame:
    """One row per opponent and scorer: rate, interval, n, wins, ties, losses.

    Args:
        folders: image folder of each method by its name.
        ours: the method whose wins are counted.
        opponents: names of the methods it is compared with.
        scorers: names of scorers.
    """
    rows = []
    for opponent in opponents:
        for scorer in scorers:
            result = compare(folders[ours], folders[opponent], scorer)
            rows.append(
                {
                    "method": ours,
                    "opponent": opponent,
                    "scorer": scorer,
                    "win_rate": result.rate,
                    "low": result.low,
                    "high": result.high,
                    "n": result.n,
                    "wins": result.wins,
                    "ties": result.ties,
                    "losses": result.losses,
                }
            )
    return pd.DataFrame(rows)


def mean_scores(folders: Mapping[str, str | Path], scorers: Sequence[str]) -> pd.DataFrame:
    """Mean score of every method (rows) under every scorer (columns)."""
    means = {name: {s: float(score_images(folder, s).mean()) for s in scorers} for name, folder in folders.items()}
    return pd.DataFrame(means).T


def flat_metrics(table: pd.DataFrame) -> dict[str, float]:
    """A win-rate table as flat keys `win_rate/<method>_vs_<opponent>/<scorer>` with /low, /high and /n."""
    metrics: dict[str, float] = {}
    for row in table.to_dict("records"):
        key = f"win_rate/{row['method']}_vs_{row['opponent']}/{row['scorer']}"
        metrics |= {key: row["win_rate"], f"{key}/low": row["low"], f"{key}/high": row["high"], f"{key}/n": row["n"]}
    return metrics
