"""Settings from a search with equal budgets: every method gets the same number of tries, judged on validation prompts.

    dkto paper-search --output-dir papermill_runs/outputs/search --keep papermill_runs/paper_settings.json

The grids hold the same number of settings for each method. A try that was trained is kept; the winner has the highest
mean of the user's own measure on validation prompts, none of them a test prompt. Every try is judged at its own best
guidance scale, as the tables judge every method: what does best at one scale may not do best where it counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from dkto.common.files import write_json
from dkto.common.names import check_choice
from dkto.evaluation.scorers import WORLD_SCORERS
from dkto.models import SMALL_WORLD
from dkto.models.system import System
from dkto.paper.pool import TASTES, compare_pool, likes_of, make_pool
from dkto.paper.search_config import SearchConfig
from dkto.paper.train_all import common_settings, make_config, run_configs, share_data, sweep_guidance, systems_of
from dkto.world.scenes import prompts_for

GUIDANCE_SCALES = (1.5, 2.0, 3.0, 4.0, 5.0, 7.5)
CHECKPOINT_EVERY = 20
_DROPPED = {"prompt_dropout": 0.2}
_RATES, _ADAPTER_RATES = (3e-5, 1e-4, 3e-4), (3e-4, 1e-3, 3e-3)


def _crossed(rates: Sequence[float], knob: str, values: Sequence[object], **fixed: object) -> list[dict[str, object]]:
    return [{"learning_rate": rate, knob: value, **fixed} for value in values for rate in rates]


GRIDS: dict[str, list[dict[str, object]]] = {
    "sft": _crossed(_RATES, "prompt_dropout", (0.2, 0.0)),
    "csft": _crossed(_RATES, "csft_style", ("negative", "prefix"), **_DROPPED),
    "dpo": _crossed(_RATES, "beta", (20.0, 200.0), **_DROPPED),
    "kto": _crossed(_RATES, "beta", (20.0, 200.0), **_DROPPED),
    "alignprop": _crossed(_ADAPTER_RATES, "backprop_steps", (1, 3)),
    "d3po": _crossed(_ADAPTER_RATES, "beta", (100.0, 10.0)),
}
"""Tries by method; variants and controls take the settings of their method (`dkto.paper.train_all.COMPARED`).

One rule makes them all: three learning rates about a factor of three apart, the same three for every method that trains
the whole network and ten times as much for those that train LoRA, crossed with two values of the one other setting
that is the method's own. KTO's gamma is not tried: it is the paper's 0.8. SFT has no setting of its own and tries the
prompt dropout instead, which is 0.2 for all others that train on a fixed set, as in the authors' code.
"""

RANGES = (
    "One rule made the tries of every method before this search began: three learning rates a factor of three apart, "
    "crossed with two values of one other setting; gamma as in the paper. The centres and the pool's design "
    "(finish shares, who is compared with whom) come from earlier work by hand on validation prompts: 34 trainings of "
    "KTO, 8 of SFT, 7 of SFT on all images, 3 of DPO, 2 of CSFT, none of AlignProp and D3PO. The judge and its "
    "range of guidance scales come from a study with one setting each of KTO, SFT, SFT on all images and DPO."
)
"""What equal budgets do not cover; stands beside them in every table and page."""


def equal_budgets(grids: Mapping[str, Sequence[Mapping]]) -> int:
    """The number of tries that every method gets; a ValueError if one gets more than another."""
    counts = {name: len(tries) for name, tries in grids.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"every method must get the same number of tries, at least one; got {counts}")
    return next(iter(counts.values()))


def online_settings(
    online_steps: int, reward: str, model: str = SMALL_WORLD, found: Mapping[str, Mapping[str, object]] | None = None
) -> dict[str, dict[str, object]]:
    """What AlignProp and D3PO always get: how many steps, the reward, and on the small world short chains.

    Batches, guidance and chains of the small world are not those of another model, which keeps the defaults of
    `dkto.training.OnlineConfig` where its own settings file says nothing.

    AlignProp needs a reward with a gradient: the user's measure if it has one. Of the small world's rules those that
    have none (fidelity, utility) give way to the part that has, `world_aesthetics`.

    Args:
        online_steps: of each.
        reward: scorer of what the user likes.
        model: the one that is trained.
        found: settings by method from a search, which come on top; those of other methods are handed on.
    """
    without = reward in WORLD_SCORERS and not hasattr(WORLD_SCORERS[reward], "score_pixels")
    differentiable = "world_aesthetics" if without else reward
    shared = {"max_train_steps": online_steps, "warmup_steps": 0}
    own = {"alignprop": {**shared, "reward": differentiable}, "d3po": {**shared, "reward": reward}}
    if model == SMALL_WORLD:
        both = {"sampling_steps": 8, "gradient_checkpointing": False}  # its memory is small, its time is not
        own["alignprop"] |= {**both, "batch_size": 16}
        own["d3po"] |= {**both, "batch_size": 48, "guidance": 1.0, "chain_steps": 4}
    found = found or {}
    return {name: {**own.get(name, {}), **found.get(name, {})} for name in {**own, **found}}


def search_settings(
    config: SearchConfig, keep: str | Path, grids: Mapping[str, Sequence[Mapping[str, object]]] = GRIDS
) -> pd.DataFrame:
    """Try every setting of every method and keep the best of each.

    Args:
        config: sizes.
        keep: JSON file for the result, read by `dkto.paper.train_all.read_settings`.
        grids: tries by method, the same number for each.

    Returns:
        One row per try: method, settings, mean of the user's measure on validation prompts at the guidance scale
        where it is highest, that scale, chosen.

    Raises:
        ValueError: if the budgets are not equal, or the user is unknown.
    """
    known = equal_budgets(grids)
    if not 1 <= config.tries <= known:
        raise ValueError(f"tries must be in [1, {known}], the length of the grids, got {config.tries}")
    about = {"ranges": RANGES} if grids is GRIDS else {}
    grids = {method: list(settings)[: config.tries] for method, settings in grids.items()}
    check_choice("user", config.user, TASTES)
    scorer, folder, seed = TASTES[config.user], Path(config.output_dir), config.seed
    base = System(steps=config.sampling_steps)
    validation = prompts_for("validation", config.validation_prompts, seed)
    drawing = {"seed": seed, "num_processes": config.processes}
    shown = {"pictures_per_prompt": config.pictures_per_prompt, "base": replace(base, guidance=1.0), **drawing}
    pool = make_pool(prompts_for("train", config.pool_prompts, seed), folder / "pool", **shown)
    table = likes_of(compare_pool(pool, scorer, seed=seed))
    data = share_data(table, folder / "data", SMALL_WORLD, list(grids), seed=seed)
    common = common_settings(SMALL_WORLD, config.train_steps, config.batch_size, seed)
    online = online_settings(config.online_steps, scorer)
    tries = {f"{method}-{number}": (method, tried) for method in grids for number, tried in enumerate(grids[method])}
    configs = {}
    for name, (method, tried) in tries.items():
        given = {**common, "checkpoint_every": CHECKPOINT_EVERY, **online.get(method, {}), **tried}
        configs[name] = make_config(method, data, folder / "tries" / name, given)
    systems = systems_of(run_configs(configs, config.processes), base)
    scored = {"images_per_prompt": config.images_per_prompt, **drawing}
    swept = sweep_guidance(systems, GUIDANCE_SCALES, validation, scorer, folder / "guidance", **scored)
    rows = []
    for name, (method, tried) in tries.items():
        at_best = {"score": float(swept.loc[name].max()), "guidance": float(swept.loc[name].idxmax())}
        rows.append({"method": method, "settings": dict(tried), **at_best})
    table = pd.DataFrame(rows)
    best = table.loc[table.groupby("method")["score"].idxmax()].set_index("method")
    table["chosen"] = [row.settings is best.loc[row.method, "settings"] for row in table.itertuples()]
    about |= {**asdict(config), "output_dir": str(config.output_dir), "scorer": scorer, "model": SMALL_WORLD}
    about["tried"] = table.to_dict("records")
    about["guidance_scores"] = {f"{scale:g}": float(value) for scale, value in swept.loc["base"].items()}
    chosen = {name: best.loc[name, "settings"] for name in grids}
    Path(keep).parent.mkdir(parents=True, exist_ok=True)
    found = {"settings": chosen, "guidance": float(swept.loc["base"].idxmax()), "search": about}
    write_json(Path(keep), found)
    return table
