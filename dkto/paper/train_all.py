"""Every system that the paper compares, and its controls: offline ones on the same pictures for the same steps.

    base, base_best_guidance      the model as it is; at the guidance scale that the user likes best
    sft, sft_all                  liked pictures only (eq. 3); every picture, no preference: a control
    csft                          every picture, the like written into the prompt (5.1.2)
    dpo                           Diffusion-DPO on the comparisons (eq. 8)
    kto, kto_loss_averse, kto_risk_seeking    Diffusion-KTO with each utility (4.2)
    kto_shuffled                  kto on likes dealt out at random: a control
    alignprop, d3po               draw their own pictures while they train, for fewer steps (`dkto.training.online`)

Settings (learning rate, beta ...) come per system from a search with the same number of tries for each
(`dkto.paper.search`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd

from dkto.common.files import read_json, write_atomically, write_json
from dkto.common.names import check_name, not_known
from dkto.data.encode import prepare_feedback
from dkto.data.feedback import FeedbackTable, make_feedback
from dkto.evaluation.generate import generate_all
from dkto.evaluation.scoring import score_all
from dkto.models import SMALL_WORLD
from dkto.models.system import System
from dkto.objective.methods import CSFT_PREFIXES
from dkto.training.config import OnlineConfig, RunConfig, TrainConfig
from dkto.training.launch import run_trainings
from dkto.training.loop import run_training

OFFLINE = {
    "sft": {"objective": "sft"},
    "sft_all": {"objective": "sft_all"},
    "csft": {"objective": "csft"},
    "dpo": {"objective": "dpo"},
    "kto": {"objective": "kto"},
    "kto_loss_averse": {"objective": "kto", "utility": "loss_averse"},
    "kto_risk_seeking": {"objective": "kto", "utility": "risk_seeking"},
    "kto_shuffled": {"objective": "kto"},
}
ONLINE = ("alignprop", "d3po")
UNTRAINED = ("base", "base_best_guidance")
SYSTEMS = (*UNTRAINED, *OFFLINE, *ONLINE)
CONTROLS = ("base_best_guidance", "sft_all", "kto_shuffled")
SHARES_SETTINGS = {"kto_loss_averse": "kto", "kto_risk_seeking": "kto", "kto_shuffled": "kto", "sft_all": "sft"}
"""Variants of a method and controls are trained with that method's settings, else they would not isolate one thing."""


def controls_first(names: Iterable[str]) -> list[str]:
    """The base and the controls before all other systems, which keep their order.

    >>> controls_first(["sft", "kto_shuffled", "base"])
    ['base', 'kto_shuffled', 'sft']
    """
    names = list(names)
    first = [name for name in ("base", *CONTROLS) if name in names]
    return [*first, *(name for name in names if name not in first)]


def check_systems(names: Sequence[str], needed: Sequence[str] = ()) -> list[str]:
    """The names, each known and once.

    Args:
        names: of `SYSTEMS`.
        needed: those that must be among them.

    Raises:
        ValueError: for another name (the sentence names the nearest), one that comes twice, or one that is lacking.
    """
    for name in names:
        check_name("system", name, SYSTEMS)
    if len(set(names)) < len(names):
        raise ValueError(f"systems must be named once each, got {', '.join(names)}")
    for name in needed:
        if name not in names:
            raise ValueError(f"systems must hold {' and '.join(needed)}, got {', '.join(names)}")
    return list(names)


@dataclass(frozen=True)
class SharedData:
    """One user's feedback, encoded for every system.

    Attributes:
        likes, pairs, shuffled: prepared folders of single likes, of comparisons, and of likes dealt out at random.
        prompts_file: the training prompts, for systems that sample while they train.
    """

    likes: Path
    pairs: Path
    shuffled: Path
    prompts_file: Path

    def folder(self, system: str) -> Path:
        """The prepared folder that a system is trained on."""
        return {"dpo": self.pairs, "kto_shuffled": self.shuffled}.get(system, self.likes)


def share_data(
    table: FeedbackTable,
    folder: str | Path,
    model: str,
    names: Sequence[str] = SYSTEMS,
    *,
    seed: int = 0,
) -> SharedData:
    """Encode one user's feedback for some systems; what is on disk is kept.

    Args:
        table: likes, and comparisons or pair numbers if "dpo" is among the names.
        folder: prepared data land here.
        model: "small-world", a pipeline folder, or a hub id.
        names: the systems that will be trained; for "csft" every style of `CSFT_PREFIXES` is encoded,
            so that the settings of a training may choose.
        seed: of the shuffled likes.

    Raises:
        ValueError: if "dpo" is asked for without comparisons, or an online system with a prompt of several lines.
    """
    folder, names = Path(folder), check_systems(names)
    folder.mkdir(parents=True, exist_ok=True)
    prompts = list(dict.fromkeys(table.prompts))
    broken = [prompt for prompt in prompts if not prompt.strip() or set(prompt) & {"\n", "\r"}]
    if broken and set(names) & set(ONLINE):
        raise ValueError(
            f"systems that draw while they learn take one prompt a line, but {broken[0]!r} is empty or has a line break"
        )
    data = SharedData(folder / "likes", folder / "pairs", folder / "shuffled", folder / "prompts.txt")
    for style in CSFT_PREFIXES if "csft" in names else [None]:
        prepare_feedback(table, data.likes, model, csft=style)
    if "dpo" in names:
        prepare_feedback(pairs_of(table), data.pairs, model)
    if "kto_shuffled" in names:
        prepare_feedback(table.shuffled_likes(seed), data.shuffled, model)
    text = "\n".join(prompts) + "\n"  # last: a folder of other feedback was refused before anything in it changes
    write_atomically(data.prompts_file, lambda part: part.write_text(text, encoding="utf-8"))
    return data


def pairs_of(table: FeedbackTable) -> FeedbackTable:
    """Two rows for each comparison, the chosen picture liked and the other disliked, with a number of its own.

    A picture that is liked in one comparison and disliked in another stands in both, as Diffusion-DPO needs it.

    Raises:
        ValueError: if the table holds no comparison.
    """
    rows = table.pairs.reshape(-1)
    if not len(rows):
        raise ValueError("system 'dpo' needs comparisons, but no two of the pictures were compared")
    images, prompts = [table.images[row] for row in rows], [table.prompts[row] for row in rows]
    return make_feedback(images, prompts, [True, False] * (len(rows) // 2), np.repeat(np.arange(len(rows) // 2), 2))


def make_config(name: str, data: SharedData, output_dir: Path, settings: Mapping[str, object]) -> RunConfig:
    """The training of one system.

    Args:
        name: a trained one of `SYSTEMS`.
        data: what it is trained on.
        output_dir: its run's folder.
        settings: fields of `TrainConfig` or `OnlineConfig`; those of the other are left out, so that one set
            (seed, batch size, steps) serves all.

    Raises:
        ValueError: if a setting is a field of neither, or the system is not trained.
    """
    known = {kind: {field.name for field in fields(kind)} for kind in (TrainConfig, OnlineConfig)}
    for key in settings:
        if key not in known[TrainConfig] | known[OnlineConfig]:
            raise ValueError(f"settings of {name}: {key!r} is no setting of a training")
    if name in ONLINE:
        used = {key: value for key, value in settings.items() if key in known[OnlineConfig]}
        return OnlineConfig(data.prompts_file, output_dir, **{**used, "objective": name})
    if name not in OFFLINE:
        raise ValueError(f"system {name!r} is not trained; trained are: {', '.join((*OFFLINE, *ONLINE))}")
    used = {key: value for key, value in settings.items() if key in known[TrainConfig]}
    return TrainConfig(data.folder(name), output_dir, **{**used, **OFFLINE[name]})


def run_configs(configs: Sequence[RunConfig], processes: int) -> None:
    """Run trainings, `processes` at a time on one thread each; 0 runs one after the other in this process.

    Those that draw while they learn take longest and begin first, so that none is left to run alone at the end.
    """
    costly_first = sorted(configs, key=lambda config: not isinstance(config, OnlineConfig))
    if processes:
        run_trainings(costly_first, processes=processes)
        return
    for config in costly_first:
        run_training(config)


def system_configs(
    names: Sequence[str],
    data: SharedData,
    output_dir: str | Path,
    common: Mapping[str, object],
    own: Mapping[str, Mapping[str, object]],
) -> dict[str, RunConfig]:
    """The trainings of systems, by name, for `run_configs`; those that have nothing to train are left out.

    Args:
        names: of `SYSTEMS`.
        data: the pictures and likes that all share.
        output_dir: run `name` lands in `output_dir/name`.
        common: settings of all (steps, batch size, seed).
        own: settings by system, or by the method whose variant it is (`SHARES_SETTINGS`).

    Raises:
        ValueError: if `own` has settings of a system that there is none of, or as `make_config`.
    """
    for name in own:
        if name not in SYSTEMS:
            raise ValueError(not_known(f"settings are given for {name!r}, which is no system", name, SYSTEMS))
    configs = {}
    for name in check_systems(names):
        if name not in UNTRAINED:
            mine = {**common, **settings_of(name, own)}
            configs[name] = make_config(name, data, Path(output_dir) / name, mine)
    return configs


def settings_of(name: str, own: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """A system's settings: those of the method whose variant it is, then its own.

    >>> settings_of("kto_shuffled", {"kto": {"beta": 5.0}})
    {'beta': 5.0}
    """
    return {**own.get(SHARES_SETTINGS.get(name, name), {}), **own.get(name, {})}


def train_systems(
    names: Sequence[str],
    data: SharedData,
    output_dir: str | Path,
    common: Mapping[str, object],
    own: Mapping[str, Mapping[str, object]],
    *,
    processes: int = 1,
) -> dict[str, Path]:
    """Train every system that has something to train, some side by side; finished runs are kept.

    Args:
        names, data, output_dir, common, own: see `system_configs`.
        processes: see `run_configs`.

    Returns:
        The run's folder of each trained system.
    """
    configs = system_configs(names, data, output_dir, common, own)
    run_configs(list(configs.values()), processes)
    return {name: config.output_dir for name, config in configs.items()}


def sampled_as(
    runs: Mapping[str, Path],
    names: Sequence[str],
    base: System,
    guidances: Mapping[str, float] | None = None,
) -> dict[str, System]:
    """How each system draws: CSFT asks for a good picture in the form it was trained with.

    Args:
        runs: folder of each trained system.
        names: of `SYSTEMS`.
        base: model, guidance, steps and precision.
        guidances: guidance scale by system where it is not the base's; `base_best_guidance` needs one.

    Raises:
        ValueError: if `base_best_guidance` is asked for without its scale.
    """
    guidances = guidances or {}
    drawn = {}
    for name in check_systems(names):
        sampling = {"guidance": guidances.get(name, base.guidance), "steps": base.steps, "precision": base.precision}
        if name == "base":
            drawn[name] = base
        elif name == "base_best_guidance":
            if name not in guidances:
                raise ValueError("system 'base_best_guidance' needs a scale: sweep_guidance finds it")
            drawn[name] = replace(base, **sampling)
        else:
            drawn[name] = System.of_run(runs[name], **sampling)
    return drawn


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
        prompts: validation prompts.
        scorer: name of the user's measure.
        output_dir: pictures land here.
        images_per_prompt, seed, num_processes: as in `dkto.evaluation.generate.generate_images`.

    Raises:
        ValueError: if no scale is given.
    """
    if not scales:
        raise ValueError("guidance scales must hold at least one, got none")
    tried = {(n, scale): replace(system, guidance=scale) for n, system in systems.items() for scale in scales}
    options = {"images_per_prompt": images_per_prompt, "seed": seed, "num_processes": num_processes}
    named = {f"{name}-{scale:g}": system for (name, scale), system in tried.items()}
    folders = generate_all(named, list(prompts), output_dir, **options)
    scores = score_all(folders, [scorer], num_processes=num_processes)
    rows = {name: {scale: float(scores[f"{name}-{scale:g}", scorer].mean()) for scale in scales} for name in systems}
    return pd.DataFrame.from_dict(rows, orient="index")


def read_settings(path: str | Path) -> dict:
    """A committed search result (`dkto.paper.search`): `settings` by system, `guidance`, and how they were found.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is no search result.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"settings file {path} does not exist: `dkto paper-search` writes one")
    return read_json(path, "search result", ("settings", "guidance", "search"))


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
    frame = pd.DataFrame([{"method": row["method"], "chosen": row["chosen"], **row["settings"]} for row in tried])
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


def write_settings(path: str | Path, settings: Mapping, guidance: float, search: Mapping) -> Path:
    """Keep a search result."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"settings": dict(settings), "guidance": guidance, "search": dict(search)})
    return path
