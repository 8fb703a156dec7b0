"""Every sweep in papermill_runs/sweeps passes its own checks, says what it costs, and is planned without starting."""

import re
from pathlib import Path

import pytest

from dkto.data.prompts import PROMPT_SETS
from dkto.models import FAMILIES
from dkto.objective.utilities import UTILITIES
from dkto.paper.pool import TASTES
from dkto.paper.train_all import COMPARED
from dkto.runs.runner import show_plan
from dkto.runs.sweeps import read_sweep

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "papermill_runs" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_dry_run_shows_every_run_with_its_resources(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = read_sweep(path, tmp_path)
    text = show_plan(plan)
    assert f"{len(plan.runs)} runs into {tmp_path}, {len(plan.runs)} to do" in text
    for run in plan.runs:
        assert re.search(
            rf"^{re.escape(run.name)} +cpus {run.resources.cpus}  gpus {run.resources.gpus}  hours", text, re.M
        )
    assert text.count("\ndkto run notebooks/") == len(plan.runs)
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_comment_says_what_to_expect_and_counts_the_runs_rightly(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    comment = "".join(re.findall(r"^#(.*)", path.read_text(), re.M))
    assert re.search(r"Expected cost: .*\b(seconds|minutes|hours)\b", comment)
    counts = [
        int(count) for count in re.findall(r"(\d+) (?:runs|trainings|judgements)", comment.split("Expected cost:")[1])
    ]
    assert sum(counts) == len(read_sweep(path).runs)


def test_names_that_a_notebook_would_look_up_are_known(monkeypatch):
    monkeypatch.chdir(ROOT)
    known = {"prompt_set": PROMPT_SETS, "user": TASTES, "utility": UTILITIES, "opponent": COMPARED}
    looked_up = set()
    for path in SWEEPS:
        for run in read_sweep(path).runs:
            for name in known.keys() & run.parameters.keys():
                assert run.parameters[name] in known[name], f"{path.stem}, {run.name}: {name}"
                looked_up.add(name)
    assert looked_up, "no sweep gives any of these names: nothing was checked"


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_a_lora_is_trained_by_the_one_table(family, monkeypatch):
    monkeypatch.chdir(ROOT)
    (run,) = read_sweep(ROOT / "papermill_runs" / "sweeps" / f"train_{family}_lora.yaml").runs
    wanted = FAMILIES[family].training()
    assert {name: run.parameters[name] for name in wanted} == wanted


def test_there_are_sweeps():
    assert len(SWEEPS) >= 4
