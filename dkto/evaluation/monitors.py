"""What a win-rate does not show: drift from the base, spread within a prompt, and scorers that were hacked.

A method that only learned to please the scorer it was tuned on moves far from the base on prompts that ask for
nothing of the kind, draws every prompt the same way, and loses on the scorers it was not tuned on.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from dkto.data.images import load_image
from dkto.evaluation.manifest import check_comparable, image_path, read_manifest
from dkto.evaluation.metrics import MeanDifference, diversity, drift, paired_bootstrap
from dkto.evaluation.scoring import Scores
from dkto.evaluation.win_rates import medians


def monitor_table(
    folders: Mapping[str, str | Path],
    scores: Scores,
    base: str,
    *,
    optimised: Mapping[str, str] | None = None,
    neutral: Mapping[str, str | Path] | None = None,
) -> pd.DataFrame:
    """One row per method, to stand beside its win-rates.

    Columns: `drift` (mean absolute pixel distance from the base's image of the same noise, share of the pixel
    range), `neutral_drift` (the same on neutral prompts), `diversity` (distance between images of one prompt,
    same unit), `mean/<scorer>`, and for methods tuned on a scorer `rose` (the change of that scorer's median
    score against the base is above 0 with its 95 % interval), `fell` (the other scorers whose change is below 0
    with an interval of Bonferroni's level, so that all of them together raise a false alarm in 5 % of cases at most)
    and `reward_hacking` (rose while at least one fell).

    Args:
        folders: image folder of each method by its name, the base among them.
        scores: of these folders, from `score_all`.
        base: its name.
        optimised: scorer name by method, for the methods that were tuned on one.
        neutral: folders of the same methods drawn for neutral prompts.

    Raises:
        KeyError: if the base or a neutral folder is missing, or `optimised` names an unknown scorer.
        ValueError: if the methods drew different prompts, numbers of images or seeds.
    """
    optimised = optimised or {}
    if base not in folders:
        raise KeyError(f"base {base!r} is not among the methods: {', '.join(folders)}")
    for method, scorer in optimised.items():
        if scorer not in scores.scorers:
            known = ", ".join(scores.scorers)
            raise KeyError(f"optimised[{method!r}] is {scorer!r}, which is not among the scorers: {known}")
    if absent := [name for name in folders if neutral is not None and name not in neutral]:
        raise KeyError(f"neutral has no folder for {', '.join(absent)}")
    rows = {}
    for method, folder in folders.items():
        row: dict[str, object] = {"drift": folder_drift(folder, folders[base])}
        if neutral is not None:
            row["neutral_drift"] = folder_drift(neutral[method], neutral[base])
        row["diversity"] = folder_diversity(folder)
        row |= {f"mean/{scorer}": float(scores[method, scorer].mean()) for scorer in scores.scorers}
        if method in optimised:
            row |= _hacking(scores, method, base, optimised[method])
        rows[method] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def _hacking(scores: Scores, method: str, base: str, optimised: str) -> dict:
    def change(scorer: str, **options: float) -> MeanDifference:
        return paired_bootstrap(medians(scores, method, scorer), medians(scores, base, scorer), **options)

    others = [scorer for scorer in scores.scorers if scorer != optimised]
    shared = {"confidence": 1 - 0.05 / max(1, len(others)), "resamples": 2000 * len(others)}  # tails need as many draws
    rose = change(optimised).low > 0
    fell = [scorer for scorer in others if change(scorer, **shared).high < 0]
    return {"rose": rose, "fell": ", ".join(fell), "reward_hacking": rose and bool(fell)}


def folder_drift(folder: str | Path, base: str | Path) -> float:
    """Mean absolute pixel distance between two folders' images of the same prompt and noise, in [0, 1]."""
    check_comparable({"base": base, "method": folder})
    pairs = zip(_prompts_images(folder), _prompts_images(base), strict=True)
    return float(np.mean([drift(ours, theirs) for ours, theirs in pairs]))


def folder_diversity(folder: str | Path) -> float:
    """Mean absolute pixel distance between a folder's images of one prompt, in [0, 1]; NaN for one each."""
    if read_manifest(folder)["images_per_prompt"] < 2:
        return float("nan")
    return float(np.mean([diversity(images[None]) for images in _prompts_images(folder)]))


def _prompts_images(folder: str | Path) -> Iterator[np.ndarray]:
    """(n, H, W, 3) of one prompt after the other."""
    folder, manifest = Path(folder), read_manifest(folder)
    for prompt in range(len(manifest["prompts"])):
        paths = [image_path(folder, prompt, image) for image in range(manifest["images_per_prompt"])]
        yield np.stack([np.asarray(load_image(path)) for path in paths])
