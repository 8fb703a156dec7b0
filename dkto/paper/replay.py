"""The paper replayed on the small world: notebooks through papermill, one table of numbers, one page to look at.

    make paper                     one seed, 50 prompts, ablations with three points, all users
    make paper PROFILE=quick       the systems of the paper's tables, their controls, and the user who likes red
    make paper PROFILE=full        a search with equal budgets, three seeds, 500 prompts
    make paper PROFILE=full STEPS="win_rate_tables-1 win_rate_tables-2"      a part of it, here or on another machine

Each profile works in a folder of its own; the numbers and the page of the last one lie beside these folders as well.

Called again, it goes on: a notebook that finished with the same parameters is not run again, and within a
notebook runs, pictures and scores on disk are kept. The full profile can be divided among machines of one commit: copy
the first one's `full/paper_settings.json` to the others, later their steps' folders to the first, and call without
steps there.
"""

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from dkto.common.files import read_json, write_json
from dkto.models.system import computes_bfloat16
from dkto.paper import demo
from dkto.paper.page import MAIN, PREFERENCE, aims_sentence, make_report
from dkto.paper.report import write_report
from dkto.paper.search import search_settings
from dkto.paper.search_config import SearchConfig
from dkto.paper.seeds import pool_values, read_seed, write_pooled
from dkto.paper.train_all import CONTROLS, read_settings, settings_origin
from dkto.runs.notebooks import run_notebook, write_metrics
from dkto.runs.record import source_hash

NOTEBOOKS = demo.NOTEBOOKS / "experiments"
SETTINGS_FILE = "papermill_runs/paper_settings.json"


@dataclass(frozen=True)
class Step:
    """One execution of a notebook.

    Attributes:
        name: its folder, and the prefix of its numbers; those of the main tables carry none.
        notebook: file name without ending.
        parameters: that differ from the notebook's own.
    """

    name: str
    notebook: str
    parameters: Mapping[str, object] = field(default_factory=dict)


def _users(others: Mapping[str, object], **parameters: object) -> list[Step]:
    """The three users with the same parameters but for `others`, which the two get who do not like red."""
    return [
        Step(f"user_{user}", "52_a_specific_user", {"user": user, **parameters, **changes})
        for user, changes in (("likes_red", {}), ("likes_vivid", others), ("prompt_faithful", others))
    ]


def _small(**parameters: object) -> dict[str, object]:
    return {"pool_prompts": 16, "train_steps": 2, "batch_size": 4, "prompts": 4, "images_per_prompt": 1, **parameters}


_QUICK = {"train_steps": 40, "batch_size": 16, "prompts": 32, "images_per_prompt": 2, "validation_prompts": 8}
_QUICK |= {"guidance_scales": [3.0, 7.5, 15.0], "sampling_steps": 10}
_OF_THE_TABLES = ["base", *CONTROLS, "sft", "csft", "dpo", "kto", "alignprop"]
_PLAIN_USER = {"flip_rates": [0.0], "doses": []}  # he neither contradicts himself nor says how many likes it takes
_ONE_HOUR = {"sampling_steps": 10}  # on two cores of 2017, which compute a third of what new ones do
_FULL = {"prompts": 500, "images_per_prompt": 5, "validation_prompts": 40, "precision": "bfloat16"}
PROFILES: dict[str, list[Step]] = {
    "tiny": [
        Step(
            MAIN,
            "50_win_rate_tables",
            _small(
                systems=["base", "base_best_guidance", "sft_all", "kto", "kto_shuffled", "alignprop"],
                online_steps=1,
                guidance_scales=[3.0],
                validation_prompts=4,
                sampling_steps=2,
                processes=0,
            ),
        ),
    ],
    "quick": [
        Step(
            MAIN, "50_win_rate_tables", {**_QUICK, "systems": _OF_THE_TABLES, "pool_prompts": 100, "online_steps": 20}
        ),
        Step(
            "user_likes_red",
            "52_a_specific_user",
            {**_QUICK, "pool_prompts": 200, "user": "likes_red", **_PLAIN_USER},
        ),
    ],
    "default": [
        Step(MAIN, "50_win_rate_tables", {**_ONE_HOUR, "train_steps": 100}),
        Step("ablations", "51_ablations", {**_ONE_HOUR, "train_steps": 50, "batch_size": 16}),
        *_users(_PLAIN_USER, **_ONE_HOUR, train_steps=40, batch_size=16, images_per_prompt=2),
        Step("qualitative_grid", "53_qualitative_grid"),
    ],
    "full": [
        Step(f"{MAIN}-0", "50_win_rate_tables", {**_FULL, "seed": 0}),
        Step("ablations", "51_ablations", {"prompts": 200}),
        *_users({}, prompts=100, pool_prompts=500, doses=[10, 30, 100, 300, 1000]),
        Step("qualitative_grid", "53_qualitative_grid"),
        *(Step(f"{MAIN}-{seed}", "50_win_rate_tables", {**_FULL, "seed": seed}) for seed in (1, 2)),
    ],
}
READS_TABLES = "53_qualitative_grid"  # takes the pictures of the main tables


def run_paper(
    output_dir: str | Path = "papermill_runs/outputs/paper",
    profile: str = "default",
    *,
    settings_file: str = SETTINGS_FILE,
    only: Sequence[str] = (),
) -> dict[str, float]:
    """Run a profile; writes `metrics.json` and `report.html` and returns the metrics.

    Args:
        output_dir: executed notebooks and their folders land in `output_dir/profile`, numbers and page there and here.
        profile: a name in `PROFILES`.
        settings_file: a search result; "full" makes its own.
        only: names of steps; the others are not run, and neither numbers nor page of the whole are written.

    Raises:
        ValueError: if the profile or a step is unknown.
        FileNotFoundError: outside a checkout, where there are no notebooks.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    steps = PROFILES[profile]
    if unknown := sorted(set(only) - {step.name for step in steps}):
        raise ValueError(
            f"profile {profile!r} has no step {unknown[0]!r}; its steps: {', '.join(step.name for step in steps)}"
        )
    if not NOTEBOOKS.is_dir():
        raise FileNotFoundError(f"the replay runs the notebooks of a checkout, but {NOTEBOOKS} does not exist")
    folder, processes = Path(output_dir) / profile, min(os.cpu_count() or 1, 8)
    if profile == "full":
        settings_file = str(folder / "paper_settings.json")
        if not Path(settings_file).exists():
            search_settings(SearchConfig(folder / "search"), settings_file)
    found = read_settings(settings_file)
    results: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    for number, step in enumerate(steps, 1):
        if only and step.name not in only:
            continue
        print(f"[{number}/{len(steps)}] notebook {step.notebook} as {step.name}", flush=True)
        given = {"processes": processes, **step.parameters, "output_dir": str(folder / step.name)}
        if given.get("precision") == "bfloat16" and not computes_bfloat16():
            given["precision"] = "float32"  # the other would take many times as long here
        if step.notebook == READS_TABLES:
            tables = next(other.name for other in steps if other.notebook == "50_win_rate_tables")
            given = {"lesson_dir": str(folder / tables), "output_dir": given["output_dir"]}
        else:
            given["settings_file"] = settings_file
        results[step.name], seconds[step.name] = _run(step, folder, given, found)
    metrics = combine(results, seconds)
    if only:
        print(f"\nran {', '.join(results)} of {len(steps)} steps; numbers and page of the whole: call without steps")
        return metrics
    seeds = [name for name in results if name.startswith(f"{MAIN}-")]
    if len(seeds) > 1:
        read = {name.partition("-")[2]: read_seed(folder / name, PREFERENCE) for name in seeds}
        cost = pd.read_csv(folder / seeds[0] / "cards.csv")["cost"][0]
        holds = write_pooled(folder, read, PREFERENCE, cost)["holds"]
        metrics |= {f"orderings/{name}": int((holds == name).sum()) for name in ("yes", "no")}
    lead = f"{aims_sentence(metrics)} {settings_origin(found)}"
    page = make_report(folder, profile, metrics, lead)
    for place in (folder, Path(output_dir)):
        write_metrics(place, metrics, {"profile": profile, "settings_file": settings_file}, seed=0)
        write_report(place / "report.html", page)
    print(f"\n{lead}\n{metrics['seconds/total']:.0f} s, what earlier calls had left not counted")
    print(f"numbers: {output_dir}/metrics.json")
    print(f"page: {output_dir}/report.html\nnotebooks as they ran, trained models and pictures: {folder}")
    return metrics


def _run(
    step: Step, folder: Path, given: dict[str, object], settings: Mapping[str, object]
) -> tuple[dict[str, float], float]:
    """Run one notebook, or read what it left when it finished with these parameters, cells, code and search result."""
    notebook, done = NOTEBOOKS / f"{step.notebook}.ipynb", folder / step.name / "step.json"
    result = folder / step.name / "metrics.json"
    asked = {name: value for name, value in given.items() if name != "processes"}  # changes no number
    told = {"parameters": asked, "settings": settings, "cells": source_hash(notebook), "code": _code_hash()}
    if done.exists():
        stored = read_json(done, "record of a finished notebook")
        if told.items() <= stored.items() and result.exists():
            return read_json(result, "table of metrics", ["metrics"])["metrics"], stored["seconds"]
    began = time.monotonic()
    found = run_notebook(notebook, folder / f"{step.name}.ipynb", given)
    took = round(time.monotonic() - began, 1)
    write_json(done, {**told, "seconds": took})
    return found, took


def _code_hash() -> str:
    """Hash over the package's modules: a notebook runs again with newer code, on the trainings and pictures it has."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def combine(results: Mapping[str, Mapping[str, float]], seconds: Mapping[str, float]) -> dict[str, float]:
    """One flat table: the main tables' numbers as they are, those of other notebooks under their name.

    `seconds/` are those of each notebook's last execution, which reads what an earlier one left on disk.

    Where the main tables ran with several seeds, a rate is the mean over seeds, its interval reaches from the
    lowest to the highest bound, its n is the sum, and each seed's numbers stand under `seed-<n>/`; what is chosen and
    not measured, the best guidance scale, stands there alone.
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
