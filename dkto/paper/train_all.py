"""Every method that the paper compares, and its controls, trained alike: the same images for the same steps.

Settings (learning rate, beta ...) come by method from a search with the same number of tries for each
(`dkto.paper.search`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dkto.common.files import check_fields, read_json, write_atomically
from dkto.common.names import check_name, not_known, shown
from dkto.data.encode import prepare_feedback
from dkto.data.feedback import FeedbackTable, make_feedback
from dkto.evaluation.generate import generate_all
from dkto.evaluation.scoring import score_all
from dkto.models import SMALL_WORLD
from dkto.models.system import System
from dkto.objective.methods import CSFT_PREFIXES, METHODS, ONLINE
from dkto.training import OnlineConfig, RunConfig, TrainConfig, run_training, run_trainings


@dataclass(frozen=True)
class Compared:
    """A row of the comparison."""

    method: str = ""  # what trains it, a name in `dkto.objective.METHODS`; "" if nothing is trained
    fixed: Mapping[str, object] = field(default_factory=dict)  # settings that make it a variant
    shuffled: bool = False  # whether it is trained on shuffled likes
    like: str = ""  # whose settings it takes: a variant or control with its own would not isolate one thing
    control: bool = False  # whether a win over it, and not over the base alone, is needed
    balanced: bool = False  # whether liked and disliked samples count the same in all, whatever gamma is


COMPARED: dict[str, Compared] = {
    "base": Compared(),  # the model as it is
    "base_best_guidance": Compared(control=True),  # at the guidance scale that the user likes best
    "sft": Compared("sft"),  # liked images only (eq. 3)
    "sft_all": Compared("sft_all", like="sft", control=True),  # every image, no preference
    "csft": Compared("csft"),  # every image, the like written into the prompt (5.1.2)
    "dpo": Compared("dpo"),  # on the comparisons (eq. 8)
    "kto": Compared("kto"),
    "kto_loss_averse": Compared("kto", {"utility": "loss_averse"}, like="kto"),  # 4.2
    "kto_risk_seeking": Compared("kto", {"utility": "risk_seeking"}, like="kto"),
    "kto_shuffled": Compared("kto", shuffled=True, like="kto", control=True),
    "kto_shuffled_balanced": Compared("kto", shuffled=True, like="kto", control=True, balanced=True),
    "alignprop": Compared("alignprop"),  # the last two draw their own images while they train, for fewer steps
    "d3po": Compared("d3po"),
}
BALANCED = 0.4
"""Chance of a class times its weight, in a balanced training: at gamma 0.8 the weights are 0.5 and 2. At rest the step
of KTO on shuffled likes is (2 gamma - 1) times that of SFT on all images; balanced, it is none."""
UNTRAINED = tuple(name for name, row in COMPARED.items() if not row.method)
CONTROLS = tuple(name for name, row in COMPARED.items() if row.control)


def controls_first(names: Iterable[str]) -> list[str]:
    """The base and the controls before all others, which keep their order.

    >>> controls_first(["sft", "kto_shuffled", "base"])
    ['base', 'kto_shuffled', 'sft']
    """
    names = list(names)
    first = [name for name in ("base", *CONTROLS) if name in names]
    return [*first, *(name for name in names if name not in first)]


def check_methods(names: Sequence[str], needed: Sequence[str] = ()) -> list[str]:
    """The names of `COMPARED`, each known and once, those that are needed among them; a ValueError says what is not."""
    for name in names:
        check_name("method", name, COMPARED)
    if len(set(names)) < len(names):
        raise ValueError(f"systems must be named once each, got {', '.join(names)}")
    for name in needed:
        if name not in names:
            raise ValueError(f"systems must hold {' and '.join(needed)}, got {', '.join(names)}")
    return list(names)


def share_data(
    table: FeedbackTable, folder: str | Path, model: str, names: Sequence[str] = tuple(COMPARED), *, seed: int = 0
) -> Path:
    """Encode one user's feedback for some methods; what is on disk is kept.

    Args:
        table: likes, and comparisons or pair numbers if "dpo" is among the names.
        folder: prepared data (`likes`, `pairs`, `shuffled`) and `prompts.txt` land here, see `source_of`.
        model: "small-world", a pipeline folder, or a hub id.
        names: of `COMPARED`, those that will be trained; for "csft" every style of `CSFT_PREFIXES` is encoded,
            so that the settings of a training may choose.
        seed: of the shuffled likes.

    Raises:
        ValueError: if "dpo" is asked for without comparisons, or an online method with a prompt of several lines.
    """
    folder, names = Path(folder), check_methods(names)
    folder.mkdir(parents=True, exist_ok=True)
    prompts = list(dict.fromkeys(table.prompts))
    broken = [prompt for prompt in prompts if not prompt.strip() or set(prompt) & {"\n", "\r"}]
    if broken and set(names) & set(ONLINE):
        raise ValueError(
            f"methods that draw while they train take one prompt a line, but {broken[0]!r} is empty or has a line break"
        )
    for style in CSFT_PREFIXES if "csft" in names else [None]:
        prepare_feedback(table, folder / "likes", model, csft=style)
    if "dpo" in names:
        prepare_feedback(pairs_of(table), folder / "pairs", model)
    if any(COMPARED[name].shuffled for name in names):
        prepare_feedback(table.shuffled_likes(seed), folder / "shuffled", model)
    text = "\n".join(prompts) + "\n"  # last: a folder of other feedback was refused before anything in it changes
    write_atomically(folder / "prompts.txt", lambda part: part.write_text(text, encoding="utf-8"))
    return folder


def source_of(name: str, data: Path) -> Path:
    """What one of `COMPARED` is trained on, in the folder of `share_data`: encoded feedback, or the prompts."""
    draws = METHODS[COMPARED[name].method].draws
    if draws in ("own", "pairs"):
        return data / {"own": "prompts.txt", "pairs": "pairs"}[draws]
    return data / ("shuffled" if COMPARED[name].shuffled else "likes")


def pairs_of(table: FeedbackTable) -> FeedbackTable:
    """Two rows for each comparison, the chosen image liked and the other disliked, with a number of its own.

    An image that is liked in one comparison and disliked in another is in both, as Diffusion-DPO needs it.

    Raises:
        ValueError: if the table holds no comparison.
    """
    rows = table.pairs.reshape(-1)
    if not len(rows):
        raise ValueError("method 'dpo' needs comparisons, but no two of the images were compared")
    images, prompts = [table.images[row] for row in rows], [table.prompts[row] for row in rows]
    return make_feedback(images, prompts, [True, False] * (len(rows) // 2), np.repeat(np.arange(len(rows) // 2), 2))


def common_settings(model: str, train_steps: int, batch_size: int, seed: int) -> dict[str, object]:
    """What every training of an experiment has: short ones warm up over at most 10 steps."""
    steps = {"max_train_steps": train_steps, "warmup_steps": min(10, train_steps)}
    return {"model": model, "batch_size": batch_size, "seed": seed, **steps}


def settings_of(name: str, own: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """The settings of one of `COMPARED`: those of the method whose variant it is, then its own.

    >>> settings_of("kto_shuffled", {"kto": {"beta": 5.0}})
    {'beta': 5.0}
    """
    return {**own.get(COMPARED[name].like, {}), **own.get(name, {})}


def make_config(name: str, data: Path, output_dir: Path, settings: Mapping[str, object]) -> RunConfig:
    """The training of one of `COMPARED`.

    Args:
        name: of one that is trained.
        data: folder of `share_data`.
        output_dir: its run's folder.
        settings: fields of `TrainConfig` or `OnlineConfig`; those of the other are left out, so that one set
            (seed, batch size, steps) serves all.

    Raises:
        ValueError: if a setting is a field of neither, or nothing is trained under that name.
    """
    row = COMPARED[name]
    if not row.method:
        trained = [each for each in COMPARED if each not in UNTRAINED]
        raise ValueError(f"{name!r} is not trained; trained are: {', '.join(trained)}")
    known = {kind: {field.name for field in fields(kind)} for kind in (TrainConfig, OnlineConfig)}
    for key in settings:
        if not any(key in names for names in known.values()):
            raise ValueError(f"settings of {name}: {key!r} is no setting of a training")
    kind = OnlineConfig if row.method in ONLINE else TrainConfig
    used = {key: value for key, value in settings.items() if key in known[kind]}
    used |= row.fixed
    if row.balanced:
        gamma = used.get("desirable_fraction", 0.8)
        used |= {"desirable_weight": BALANCED / gamma, "undesirable_weight": BALANCED / (1 - gamma)}
    return kind(source_of(name, data), output_dir, **{**used, "objective": row.method})


def method_configs(
    names: Sequence[str],
    likes: FeedbackTable,
    folder: str | Path,
    own: Mapping[str, Mapping[str, object]],
    *,
    part: str = "",
    model: str = SMALL_WORLD,
    train_steps: int,
    batch_size: int,
    seed: int = 0,
) -> dict[str, RunConfig]:
    """Encode one user's feedback and plan the trainings on it, by name, for `run_configs`.

    Args:
        names: of `COMPARED`; those that have nothing to train are left out.
        likes: that all share, see `share_data`.
        folder: data land in `folder/data/part`, run `name` in `folder/runs/part/name`.
        own: settings by method.
        part: name of this feedback, where an experiment has several.
        model, train_steps, batch_size, seed: of all, see `common_settings`.

    Raises:
        ValueError: if `own` has settings of an unknown method, or as `share_data` and `make_config`.
    """
    for name in own:
        if name not in COMPARED:
            raise ValueError(not_known(f"settings are given for {name!r}, which is no method", name, COMPARED))
    data = share_data(likes, Path(folder) / "data" / part, model, names, seed=seed)
    common, place = common_settings(model, train_steps, batch_size, seed), Path(folder) / "runs" / part
    trained = [name for name in names if COMPARED[name].method]
    return {name: make_config(name, data, place / name, {**common, **settings_of(name, own)}) for name in trained}


def run_configs(configs: Mapping[str, RunConfig], processes: int) -> dict[str, Path]:
    """Run trainings, `processes` at a time on one thread each; 0 runs one after the other in this process.

    Finished runs are kept, and one that comes under two names runs once. Those that draw while they train take
    longest and begin first, so that none is left to run alone at the end.
    """
    once = {config.output_dir: config for config in configs.values()}.values()
    costly_first = sorted(once, key=lambda config: not isinstance(config, OnlineConfig))
    if processes:
        run_trainings(costly_first, processes=processes)
    else:
        for config in costly_first:
            run_training(config)
    return {name: config.output_dir for name, config in configs.items()}


def systems_of(runs: Mapping[str, Path], base: System) -> dict[str, System]:
    """How the base and every method trained in a folder of `runs` draw, with the base's settings of the sampler.

    CSFT asks for a good image in the form it was trained with.
    """
    sampling = {"guidance": base.guidance, "steps": base.steps, "precision": base.precision}
    return {"base": base, **{name: System.of_run(run, **sampling) for name, run in runs.items()}}


def at_best_guidance(systems: Mapping[str, System], sweep: pd.DataFrame) -> dict[str, System]:
    """Every method at the scale where its mean is highest; the base stays, and its best is `base_best_guidance`.

    Methods without a row in the sweep stay as they are.
    """
    best = {name: replace(systems[name], guidance=float(scale)) for name, scale in sweep.idxmax(axis=1).items()}
    found = {"base": systems["base"], "base_best_guidance": best.pop("base")}
    return found | {name: best.get(name, system) for name, system in systems.items() if name != "base"}


def sweep_guidance(
    systems: Mapping[str, System],
    scales: Sequence[float],
    prompts: Sequence[str],
    scorer: str,
    output_dir: str | Path,
    *,
    images_per_prompt: int = 1,
    seed: int = 0,
    num_processes: int = 1,
) -> pd.DataFrame:
    """Mean score of every system (rows) at every guidance scale (columns), on validation prompts.

    Args:
        systems: how each draws; its own guidance is replaced.
        scales: guidance scales to try, the same for all.
        scorer: name of the user's measure.
        prompts, output_dir, images_per_prompt, seed, num_processes: as in `generate_images`.

    Raises:
        ValueError: if no scale is given.
    """
    if not scales:
        raise ValueError("guidance scales must hold at least one, got none")
    tried = {f"{name}-{s:g}": replace(system, guidance=s) for name, system in systems.items() for s in scales}
    options = {"images_per_prompt": images_per_prompt, "seed": seed, "num_processes": num_processes}
    folders = generate_all(tried, prompts, output_dir, **options)
    scores = score_all(folders, [scorer], num_processes=num_processes)
    rows = {name: {scale: float(scores[f"{name}-{scale:g}", scorer].mean()) for scale in scales} for name in systems}
    return pd.DataFrame.from_dict(rows, orient="index")


def read_settings(path: str | Path) -> dict:
    """A committed search result (`dkto.paper.search`): `settings` by method, `guidance`, and how they were found.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else; the sentence names file and field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"settings file {path} does not exist: `dkto paper-search` writes one")
    found = read_json(path, "search result", _RESULT)
    check_fields(found, _RESULT, str(path))
    search = found["search"]
    counted = {name: _WHOLE for name in ("tries", "validation_prompts", "seed") if "tries" in search}
    stated = {name: _TEXT for name in ("model", "ranges", "by_hand") if name in search}
    check_fields(search, counted | stated, f"{path}, search")
    tried = search.get("tried", [])
    check_fields({"tried": tried}, {"tried": (lambda value: isinstance(value, list), "a list of tries")}, str(path))
    for number, row in enumerate(tried, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, try {number}: expected an object, got {shown(row)}")
        check_fields(row, _TRY, f"{path}, try {number}")
    return found


_WHOLE = (lambda value: type(value) is int, "a whole number")
_TEXT = (lambda value: isinstance(value, str), "text")
_PLAIN = str | int | float | bool | None
_KNOBS = (lambda value: _by_name(value, _PLAIN), "an object of plain values by name")
_RESULT = {
    "settings": (
        lambda value: _by_name(value, dict) and all(_KNOBS[0](v) for v in value.values()),
        "objects by method",
    ),
    "guidance": (lambda value: type(value) in (int, float) and 0 < value < float("inf"), "a number above 0"),
    "search": (lambda value: isinstance(value, dict), "an object"),
}
_TRY = {"method": _TEXT, "chosen": (lambda value: isinstance(value, bool), "true or false"), "settings": _KNOBS}


def _by_name(value: object, kind: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, kind) for each in value.values())


def settings_origin(found: Mapping, model: str = SMALL_WORLD) -> str:
    """How settings were found, in a sentence for a table or a page.

    Args:
        found: as `read_settings` gives it.
        model: the one that is trained with them.

    >>> settings_origin({"search": {"tries": 2, "validation_prompts": 40, "seed": 100}})
    'Settings: the best of 2 tries for every method on 40 validation prompts, seed 100.'
    """
    search = found["search"]
    if (searched := search.get("model", SMALL_WORLD)) != model:
        return f"Settings: found on the model {searched}, not on {model}, which may need others: give a settings_file."
    if "tries" in search:
        tries, prompts, seed = (search[name] for name in ("tries", "validation_prompts", "seed"))
        found_by = f"Settings: the best of {tries} tries for every method on {prompts} validation prompts, seed {seed}."
        return " ".join(filter(None, [found_by, search.get("ranges", ""), _at_ends(search.get("tried", []))]))
    how = search.get("by_hand", "how is not recorded")
    return f"Settings: not from a search with equal budgets ({how}); `dkto paper-search` makes one."


def _at_ends(tried: Sequence[Mapping]) -> str:
    """Which chosen settings lie at an end of three or more values that were tried: the best may lie beyond."""
    frame = pd.DataFrame([{**row["settings"], "method": row["method"], "chosen": row["chosen"]} for row in tried])
    found: dict[str, list[str]] = {}
    for method, rows in frame.groupby("method", sort=False) if len(frame) else ():
        for knob in rows.columns.drop(["method", "chosen"]):
            values = rows[knob].dropna()
            chosen = values[rows.loc[values.index, "chosen"]]
            ranged = pd.api.types.is_numeric_dtype(values) and values.nunique() > 2
            if ranged and chosen.isin([values.min(), values.max()]).any():
                found.setdefault(knob, []).append(str(method))
    told = "; ".join(f"{knob} of {', '.join(methods)}" for knob, methods in found.items())
    return f"Chosen at an end of the values tried, so that better ones may lie beyond: {told}." if told else ""
