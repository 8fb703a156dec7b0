"""What a win-rate does not show: drift from the base, spread within a prompt, and scorers that were hacked.

A method that only learned to please the scorer it was tuned on moves far from the base on prompts that ask for
nothing of the kind, draws every prompt the same way, and loses on the scorers it was not tuned on.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from dkto.data.images import load_image
from dkto.evaluation.generate import image_path, read_manifest
from dkto.evaluation.metrics import diversity, drift, paired_bootstrap
from dkto.evaluation.scorers import Scorer, scorer_name
from dkto.evaluation.scoring import score_images
from dkto.evaluation.win_rates import check_comparable, medians


def monitor_table(
    folders: Mapping[str, str | Path],
    base: str,
    scorers: Sequence[str | Scorer],
    *,
    optimised: Mapping[str, str] | None = None,
    neutral: Mapping[str, str | Path] | None = None,
) -> pd.DataFrame:
    """One row per method, to stand beside its win-rates.

    Columns: `drift` (mean absolute pixel distance from the base's picture of the same noise, share of the pixel
    range), `neutral_drift` (the same on neutral prompts), `diversity` (distance between pictures of one prompt,
    same unit), `mean/<scorer>`, and for methods tuned on a scorer `rose` (the change of that scorer's median
    score against the base is above 0 with its 95 % interval), `fell` (the other scorers whose change is
    below 0 with its interval) and `reward_hacking` (rose while at least one fell).

    Args:
        folders: image folder of each method by its name, the base among them.
        base: its name.
        scorers: names of scorers, or scorers.
        optimised: scorer name by method, for the methods that were tuned on one.
        neutral: folders of the same methods drawn for neutral prompts.

    Raises:
        KeyError: if the base or a neutral folder is missing, or `optimised` names an unknown scorer.
        ValueError: if the methods drew different prompts, numbers of images or seeds.
    """
    if base not in folders:
        raise KeyError(f"base {base!r} is not among the methods: {', '.join(folders)}")
    names = [scorer_name(scorer) for scorer in scorers]
    for method, scorer in (optimised or {}).items():
        if scorer not in names:
            raise KeyError(f"optimised[{method!r}] is {scorer!r}, which is not among the scorers: {', '.join(names)}")
    check_comparable(folders)
    if neutral is not None:
        absent = [name for name in folders if name not in neutral]
        if absent:
            raise KeyError(f"neutral has no folder for {', '.join(absent)}")
        check_comparable({name: neutral[name] for name in folders})
    rows = {}
    for method, folder in folders.items():
        row: dict[str, object] = {"drift": folder_drift(folder, folders[base])}
        if neutral is not None:
            row["neutral_drift"] = folder_drift(neutral[method], neutral[base])
        row["diversity"] = folder_diversity(folder)
        row |= {f"mean/{scorer_name(s)}": float(score_images(folder, s).mean()) for s in scorers}
        if method in (optimised or {}):
            row |= _hacking(folder, folders[base], scorers, optimised[method])
        rows[method] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def _hacking(folder: str | Path, base: str | Path, scorers: Sequence[str | Scorer], optimised: str) -> dict:
    rose, fell = False, []
    for scorer in scorers:
        change = paired_bootstrap(medians(folder, scorer), medians(base, scorer))
        if scorer_name(scorer) == optimised:
            rose = change.low > 0
        elif change.high < 0:
            fell.append(scorer_name(scorer))
    return {"rose": rose, "fell": ", ".join(fell), "reward_hacking": rose and bool(fell)}


def folder_drift(folder: str | Path, base: str | Path) -> float:
    """Mean absolute pixel distance between two folders' pictures of the same prompt and noise, in [0, 1].

    Raises:
        ValueError: if the folders were drawn for different prompts, numbers of images or seeds.
    """
    check_comparable({"base": base, "method": folder})
    pairs = zip(_prompts_pictures(folder), _prompts_pictures(base), strict=True)
    return float(np.mean([drift(ours, theirs) for ours, theirs in pairs]))


def folder_diversity(folder: str | Path) -> float:
    """Mean absolute pixel distance between a folder's pictures of one prompt, in [0, 1]; NaN for one each."""
    if read_manifest(folder)["images_per_prompt"] < 2:
        return float("nan")
    return float(np.mean([diversity(pictures[None]) for pictures in _prompts_pictures(folder)]))


def _prompts_pictures(folder: str | Path) -> Iterator[np.ndarray]:
    """(n, H, W, 3) of one prompt after the other."""
    folder, manifest = Path(folder), read_manifest(folder)
    for prompt in range(len(manifest["prompts"])):
        paths = [image_path(folder, prompt, image) for image in range(manifest["images_per_prompt"])]
        yield np.stack([np.asarray(load_image(path)) for path in paths])
