"""A sweep's file is checked whole before anything starts, and its runs and their names follow from what varies."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dkto.runs.notebooks import check_parameters
from dkto.runs.sweeps import LONGEST_NAME, SHIPPED, read_sweep

DATA = Path(__file__).parents[1] / "files"
TRAIN, JUDGE = DATA / "tiny_train.ipynb", DATA / "tiny_judge.ipynb"
ONE = f"notebook: {TRAIN}\n"
TWO_STAGES = f"""
stages:
  - name: train
    notebook: {TRAIN}
    parameters: {{mended: here}}
    resources: {{cpus: 2, gpus: 1, hours: 0.5, memory_gb: 8}}
  - name: judge
    notebook: {JUDGE}
    parameters: {{runs_dir: {{stage: train}}}}
"""


@pytest.fixture
def sweep(tmp_path):
    """Read a sweep from its text."""

    def read(text):
        path = tmp_path / "tiny.yaml"
        path.write_text(text)
        return read_sweep(path)

    return read


def test_a_grid_is_every_combination_and_names_its_runs(sweep):
    plan = sweep(f"notebook: {TRAIN}\nparameters: {{likes: many}}\ngrid: {{beta: [1e-7, 50], seed: [0, 1]}}")
    assert [run.name for run in plan.runs] == [
        "runs/beta=1e-07,seed=0",
        "runs/beta=1e-07,seed=1",
        "runs/beta=50,seed=0",
        "runs/beta=50,seed=1",
    ]
    first = plan.runs[0]
    assert (first.given["beta"], first.given["seed"]) == (1e-7, 0)
    assert first.parameters["beta"] == 1e-7 and type(plan.runs[2].parameters["beta"]) is float
    assert first.parameters["likes"] == "many" and first.parameters["slow_seed"] == -1
    assert plan.folder == Path("papermill_runs/outputs/tiny")
    assert plan.told(first)["output_dir"] == "papermill_runs/outputs/tiny/runs/beta=1e-07,seed=0"


def test_a_list_stands_times_the_grid(sweep):
    plan = sweep(f"notebook: {TRAIN}\nlist: [{{beta: 1}}, {{beta: 1, likes: many}}]\ngrid: {{seed: [0, 1]}}")
    assert [run.name.removeprefix("runs/") for run in plan.runs] == [
        "beta=1,seed=0",
        "beta=1,seed=1",
        "beta=1,likes=many,seed=0",
        "beta=1,likes=many,seed=1",
    ]


def test_without_grid_and_list_there_is_one_run(sweep):
    assert [run.name for run in sweep(f"notebook: {TRAIN}").runs] == ["runs"]


def test_stages_share_the_runs_that_agree(sweep):
    plan = sweep(TWO_STAGES + "grid: {beta: [50, 100], prompts: [5, 10, 20]}")
    names = [run.name for run in plan.runs]
    assert names[:2] == ["train/beta=50", "train/beta=100"] and len(names) == 2 + 6
    judged = {run.name: run for run in plan.runs}["judge/beta=100,prompts=20"]
    assert judged.inputs == {"runs_dir": "train/beta=100"}
    assert plan.told(judged)["runs_dir"] == str(plan.folder / "train/beta=100")
    assert (plan.runs[0].resources.gpus, judged.resources.gpus) == (1, 0)


def test_a_bare_name_goes_to_every_stage_and_a_full_one_to_its_own(sweep):
    both = sweep(TWO_STAGES + "grid: {seed: [3]}")
    assert [run.parameters["seed"] for run in both.runs] == [3, 3]
    assert both.runs[1].name == "judge/seed=3"
    own = sweep(TWO_STAGES + "grid: {judge.seed: [3]}\nparameters: {train.seed: 4}")
    assert [run.parameters["seed"] for run in own.runs] == [4, 3]
    assert [run.name for run in own.runs] == ["train", "judge/judge.seed=3"]


def test_the_commands_by_hand_are_what_dkto_run_reads(sweep):
    plan = sweep(TWO_STAGES + "grid: {likes: ['a b', \"it's\"]}")
    command = plan.command(plan.runs[0])
    assert command[:3] == ["dkto", "run", str(TRAIN)] and command[4] == "--parameters"
    assert "likes='a b'" in plan.shell_command(plan.runs[0]) or "'likes=a b'" in plan.shell_command(plan.runs[0])
    for run in plan.runs:
        pairs = [text.partition("=") for text in plan.command(run)[5:]]
        told = check_parameters(run.notebook, {name: value for name, _, value in pairs})
        assert told == plan.told(run)


@pytest.mark.process
def test_a_command_by_hand_spells_out_what_a_terminal_would_obey(sweep):
    value = "it's\\ \x1b[2J\n\U0001f600\u202e"
    plan = sweep(ONE + f"parameters: {{likes: {json.dumps(value)}}}")
    text = plan.shell_command(plan.runs[0])
    assert text.isprintable()
    arguments = json.loads(
        subprocess.run(
            ["bash", "-c", f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' {text}"],
            capture_output=True,
            check=True,
            env=os.environ | {"LC_ALL": "C.UTF-8"},
        ).stdout
    )
    assert arguments == plan.command(plan.runs[0])


def test_a_large_sweep_is_read_in_time_that_grows_with_its_runs(sweep):
    """20,000 runs of two stages: a search in a list for each would take 13 seconds of a free core."""
    began = time.process_time()
    plan = sweep(TWO_STAGES + f"grid: {{beta: {list(range(100))}, prompts: {list(range(200))}}}")
    assert len(plan.only([]).runs) == 20_100 and time.process_time() - began < 6


def test_changes_take_the_place_of_the_file_s_values(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TWO_STAGES + "grid: {likes: [few]}\nparameters: {prompts: 3}")
    plan = read_sweep(path, changes={"train.mended": "there", "likes": "many", "prompts": 5, "judge.seed": 7})
    train, judge = plan.runs
    assert (train.name, judge.name) == ("train/likes=many", "judge/likes=many")
    assert train.parameters["mended"] == "there" and (judge.parameters["prompts"], judge.parameters["seed"]) == (5, 7)
    with pytest.raises(ValueError, match=r"tiny.yaml: no parameter 'prompt' in .*; did you mean 'prompts'"):
        read_sweep(path, changes={"prompt": 5})
    with pytest.raises(ValueError, match="runs_dir is given twice"):
        read_sweep(path, changes={"runs_dir": "x"})


def test_a_part_of_a_plan_holds_what_it_reads(sweep):
    plan = sweep(TWO_STAGES + "grid: {beta: [50, 100], prompts: [5, 10]}")
    part = plan.only(["judge/beta=100,prompts=5"])
    assert [run.name for run in part.runs] == ["train/beta=100", "judge/beta=100,prompts=5"]
    assert plan.only([]) == plan
    with pytest.raises(
        ValueError, match=r"sweep tiny has no run 'train/beta=10'; did you mean 'train/beta=100'\? its runs"
    ):
        plan.only(["train/beta=10"])


def test_notebooks_of_the_checkout_are_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (run,) = read_sweep(SHIPPED / "toy.yaml").runs
    assert Path(run.notebook).is_file() and run.notebook.endswith("notebooks/23_which_objective.ipynb")


def test_names_stay_inside_their_folder_and_apart(sweep):
    plan = sweep(f"notebook: {TRAIN}\ngrid: {{likes: [../../etc/a, ..-..-etc-a, '', /, '{'x' * 300}']}}")
    names = [run.name for run in plan.runs]
    assert len(set(names)) == 5
    for name in names:
        assert name.startswith("runs/likes=") and name.count("/") == 1 and len(name) < LONGEST_NAME + 20
        assert (plan.folder / name).resolve().is_relative_to((plan.folder / "runs").resolve())


@settings(max_examples=40)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=150),
        min_size=2,
        max_size=4,
        unique=True,
    )
)
def test_any_text_makes_names_that_are_apart(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("names") / "any.yaml"
    quoted = ", ".join(json.dumps(text) for text in texts)
    path.write_text(f"notebook: {TRAIN}\ngrid: {{likes: [{quoted}]}}")
    names = [run.name for run in read_sweep(path).runs]
    assert len(set(names)) == len(texts)
    assert all(name.isascii() and name.count("/") == 1 for name in names)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"the sweep must be a mapping with some of notebook, stages, .*, got None"),
        ("notebok: a", r"the sweep has no key 'notebok'; did you mean 'notebook'\? known: notebook, stages,"),
        ("grid: {}", r"the sweep must have either notebook or stages"),
        (ONE + "stages: []", r"the sweep must have either notebook or stages"),
        ("stages: []", r"stages must be a list of at least one stage, got \[\]"),
        ("stages: [train]", r"stage 1 must be a mapping with some of name, notebook, parameters, resources, got"),
        ("stages: [{name: Tr/ain}]", r"name of stage 1 must be small letters, digits, _ and -, got 'Tr/ain'"),
        ("notebook: 3", r"notebook of stage runs must be a path, got 3"),
        ("notebook: none.ipynb", r"notebook none.ipynb does not exist"),
        (ONE + "grid: {bta: [1]}", r"no parameter 'bta' in tiny_train.ipynb;"),
        (ONE + "parameters: {betas: 1}", r"no parameter 'betas' in tiny_train.ipynb; did you mean 'beta'"),
        (ONE + "parameters: [1]", r"parameters must be a mapping of names to values, got \[1\]"),
        (ONE + "parameters: {beta: x}", r"parameters, .*: parameter beta must be float, got"),
        (ONE + "grid: {seed: [1, 1.5]}", r"grid, .*: parameter seed must be int, got 1.5"),
        (ONE + "grid: {likes: [no, 12]}", r"grid, .*: parameter likes must be str, got 12"),
        (ONE + "list: [{seed: 1}, {sed: 2}]", r"no parameter 'sed' in tiny_train.ipynb; did"),
        (ONE + "grid: {seed: 3}", r"grid: seed must be a list of at least one value, got 3"),
        (ONE + "grid: {seed: []}", r"grid: seed must be a list of at least one value, got \[\]"),
        (ONE + "list: {seed: 3}", r"list must be a list of mappings of names to values, got"),
        (ONE + "grid: {seed: [1, 1]}", r"two runs are the same: seed=1"),
        (ONE + "grid: {seed: [1]}\nlist: [{seed: 2}]", r"seed of stage runs is given twice, in grid and"),
        (ONE + "grid: {seed: [1]}\nparameters: {seed: 2}", r"seed is given twice, in parameters and"),
        (ONE + "parameters: {output_dir: a}", r"output_dir is chosen by the sweep"),
        (ONE + "resources: {cpu: 1}", r"resources of stage runs has no key 'cpu'; did you mean"),
        (ONE + "resources: {cpus: 0}", r"cpus must be a whole number from 1 to 10000, got 0"),
        (ONE + "resources: {gpus: 0.5}", r"gpus must be a whole number from 0 to 10000, got 0.5"),
        (ONE + "resources: {hours: soon}", r"hours must be a number above 0, at most 10000, got 'soon'"),
        (ONE + f"resources: {{hours: 1{'0' * 350}}}", r"hours must be a number above 0, at most 10000, got 1000"),
        (
            ONE + f"list: {list(range(5000))}",
            r"list must be a list of mappings of names to values, got \[0, 1, .*\.\.\.",
        ),
        (ONE + "a: &x [1]\nb: *x", r"line 2: 'x' is an anchor or an alias"),
        (ONE + "grid: {? [1] : [2]}", r"line 2: a key must be a name"),
        (ONE + "notebook: b.ipynb", r"line 2: 'notebook' stands twice"),
        (ONE + "grid: {beta: [.5, 1e999]}", r"grid, .*: parameter beta must be finite, got inf"),
        (ONE + 'parameters: {likes: "a\\0"}', r"parameters, .*: parameter likes must be text without NUL"),
        ('notebook: "a\\0"', r"notebook of stage runs must be a path, got 'a\\x00'"),
        (
            ONE + f"grid: {{beta: {list(range(2000))}, seed: {list(range(2000))}, slow_seed: {list(range(9))}}}",
            r"a sweep may have 100,000 runs, grid and list make 36,000,000: leave values out",
        ),
        ("#" * 250_001, r"must have at most 250,000 bytes, got 250,001"),
        (TWO_STAGES.replace("stage: train", "stage: [train]"), r"runs_dir: \['train'\] is no earlier stage"),
        (TWO_STAGES + "resources: {cpus: 1}", r"resources belong in each stage when there are stages"),
        (TWO_STAGES + "grid: {jugde.seed: [1]}", r"'jugde.seed' names no stage; did you mean 'judge'"),
        (TWO_STAGES + "grid: {judge.beta: [1]}", r"tiny_judge.ipynb has no parameter 'beta'; known: runs_dir"),
        (TWO_STAGES + "grid: {runs_dir: [a]}", r"runs_dir is given twice, in stage judge and in grid or list"),
        (
            TWO_STAGES + "parameters: {seed: 1, train.seed: 2}",
            r"parameters: seed of stage train is given twice, as seed and train.",
        ),
        (
            TWO_STAGES.replace("stage: train", "stage: tran"),
            r"runs_dir: 'tran' is no earlier stage; did you mean 'train'",
        ),
        (TWO_STAGES.replace("stage: train", "from: train"), r"runs_dir must be a value or \{stage: NAME\}, got"),
        (TWO_STAGES.replace("runs_dir:", "prompts:"), r"prompts must be str to get the folder of"),
        (TWO_STAGES.replace("name: judge", "name: train"), r"two stages are called 'train'"),
    ],
)
def test_what_is_wrong_is_one_sentence_that_names_the_file(sweep, tmp_path, text, sentence):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=f"tiny.yaml:? {sentence}") as caught:
        sweep(text)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"], "nothing is written"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sweep .*none.yaml does not exist"):
        read_sweep(tmp_path / "none.yaml")
