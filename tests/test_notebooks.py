"""The form of every notebook, read from the files alone; nothing is executed here but what SMALL names."""

import ast
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from dkto.paper.demo import run_demo
from dkto.runs.notebooks import check_parameters, declared_parameters, parameters_cell, run_notebook

FOLDER = Path(__file__).parent.parent / "notebooks"
LESSONS = sorted([*FOLDER.glob("*.ipynb"), *FOLDER.glob("experiments/*.ipynb")])
SOLUTIONS = sorted(FOLDER.rglob("solutions/*.ipynb"))
NOTEBOOKS = sorted(path for path in FOLDER.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)

TOY_STEPS = {"pretrain_steps": 300, "max_train_steps": 40}

# Parameters that make a notebook small enough for a test, by its path below notebooks/ without the ending.
SMALL: dict[str, dict[str, object]] = {
    "00_start_here": {"pictures": 3},
    "10_utility_functions": {},
    "20_how_a_model_learns_a_gaussian": {"pretrain_steps": 800, "seeds": 2, "num_samples": 500},
    "21_error_as_reward": {"seeds": 2, "resolution": 9, "draws": 6, **TOY_STEPS},
    "22_reference_point": {"seeds": 2, "processes": 1, **TOY_STEPS},
    "23_which_objective": {"seeds": 2, "processes": 1, "num_samples": 300, **TOY_STEPS},
    "24_ablations": {
        "betas": [1.0, 10.0],
        "fractions": [0.5, 0.8],
        "lengths": [20, 40],
        "seeds": 2,
        "processes": 1,
        **TOY_STEPS,
    },
    "25_noisy_labels": {"flip_rates": [0.0, 0.4], "seeds": 2, "processes": 1, **TOY_STEPS},
    "26_watch_it_move": {"frames": 3, "num_samples": 100, **TOY_STEPS},
    "30_train_with_likes": {
        "pool_prompts": 12,
        "max_train_steps": 12,
        "warmup_steps": 2,
        "batch_size": 8,
        "learning_rate": 1e-4,
    },
    "31_feedback_data": {"sessions": 24, "rounds": 4, "scored_pictures": 60},
    "32_one_training_step": {"batch_size": 8, "trial_steps": 4},
    "33_train": {"max_train_steps": 8, "batch_size": 8, "checkpoint_every": 4},
    "40_win_rates": {"prompts": 4, "images_per_prompt": 3},
    "60_explore_utilities": {},
    "70_reading_runs": {},
    "50_win_rate_tables": {
        "systems": ["base", "base_best_guidance", "sft", "kto", "kto_shuffled", "alignprop"],
        "pool_prompts": 12,
        "train_steps": 2,
        "online_steps": 1,
        "batch_size": 4,
        "prompts": 8,
        "images_per_prompt": 2,
        "guidance_scales": [1.0, 3.0],
        "validation_prompts": 4,
        "sampling_steps": 3,
        "neutral_set": "neutral",
        "processes": 0,
    },
    "51_ablations": {
        "utilities": ["kahneman_tversky", "loss_averse"],
        "gammas": [0.5, 0.8],
        "beta_factors": [],
        "partitions": ["at_least_once", "always"],
        "pool_prompts": 12,
        "train_steps": 2,
        "batch_size": 4,
        "prompts": 4,
        "images_per_prompt": 1,
        "sampling_steps": 3,
        "processes": 0,
    },
    "52_a_specific_user": {
        "systems": ["sft", "kto", "kto_shuffled"],
        "doses": [10, 1000],
        "pool_prompts": 12,
        "train_steps": 2,
        "batch_size": 4,
        "prompts": 4,
        "images_per_prompt": 2,
        "sampling_steps": 3,
        "neutral_set": "neutral",
        "processes": 0,
    },
    "53_qualitative_grid": {"columns": 4},
    "54_published_checkpoints": {
        "methods": ["base", "kto"],
        "model": "small-world",
        "unets": ["", ""],
        "loras": ["", ""],
        "scorers": ["world_fidelity", "world_aesthetics"],
        "prompt_set": "world_test",
        "prompts": 4,
        "images_per_prompt": 2,
        "guidance_scales": [1.0, 3.0],
        "validation_set": "world_validation",
        "validation_prompts": 4,
        "sampling_steps": 3,
        "processes": 0,
    },
    "61_teach_by_likes": {
        "pictures": 14,
        "simulated_judge": "likes_red",
        "press_button": True,
        "max_train_steps": 12,
        "held_out_prompts": 4,
        "sample_steps": 4,
    },
    "62_judge_blind": {"prompts": 8, "per_style": 1, "simulated_scorer": "world_aesthetics"},
    "63_watch_training": {"wait": True, "max_train_steps": 12, "checkpoint_every": 4, "sample_prompts": 2},
    "64_toy_playground": {"max_train_steps": 200},
    "solutions/00_start_here": {"pictures": 2},
    "solutions/10_utility_functions": {},
    "solutions/20_how_a_model_learns_a_gaussian": {},
    "solutions/21_error_as_reward": TOY_STEPS,
    "solutions/22_reference_point": TOY_STEPS,
    "solutions/23_which_objective": {"max_train_steps": 60, "seeds": 2, "processes": 1},
    "solutions/24_ablations": TOY_STEPS | {"max_train_steps": 150},
    "solutions/25_noisy_labels": {},
    "solutions/26_watch_it_move": {},
    "solutions/30_train_with_likes": {"max_train_steps": 6, "batch_size": 8, "learning_rate": 1e-4},
    "solutions/31_feedback_data": {"sessions": 40},
    "solutions/32_one_training_step": {"batch_size": 8, "trial_steps": 4},
    "solutions/33_train": {"max_train_steps": 4},
    "solutions/40_win_rates": {},
    "solutions/60_explore_utilities": {},
    "solutions/70_reading_runs": {},
    "solutions/50_win_rate_tables": {},
    "solutions/51_ablations": {},
    "solutions/52_a_specific_user": {},
    "solutions/53_qualitative_grid": {},
    "solutions/54_published_checkpoints": {"prompts": 100},
    "solutions/61_teach_by_likes": {},
    "solutions/62_judge_blind": {},
    "solutions/63_watch_training": {},
    "solutions/64_toy_playground": {},
}

LONGEST_CELL = 25
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~-])/(?:home|root|Users|tmp|mnt|opt|srv|usr|var|work|data)/|\b[A-Z]:\\")

every_notebook = pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda path: str(path.relative_to(FOLDER).with_suffix(""))
)
every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def place(name):
    """Where a notebook of SMALL lies: an experiment has the same name, one folder deeper."""
    path = FOLDER / f"{name}.ipynb"
    return path if path.exists() else FOLDER / "experiments" / f"{name}.ipynb"


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def names_read(source):
    """Names that a cell reads; lines for the shell or with magics are no Python and are skipped."""
    python = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))
    nodes = ast.walk(ast.parse(python))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def test_there_are_notebooks():
    assert NOTEBOOKS, "notebooks/ is empty: the checks below would pass without checking anything"


@every_notebook
def test_kernel_is_python3(path):
    assert read(path).metadata.kernelspec.name == "python3"


@every_notebook
def test_cells_are_clean(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor >= 5) == (4, True), "cell ids need format 4.5"
    identifiers = [cell.id for cell in notebook.cells]
    assert len(set(identifiers)) == len(identifiers)
    for cell in code_cells(notebook):
        assert not cell.outputs, f"stored outputs in cell {cell.id}: make format strips them"
        assert cell.execution_count is None
        assert cell.source.strip(), f"cell {cell.id} is empty"


@every_notebook
def test_cells_are_short(path):
    for cell in code_cells(read(path)):
        assert len(cell.source.splitlines()) <= LONGEST_CELL, f"cell {cell.id} has more than {LONGEST_CELL} lines"


@every_notebook
def test_no_absolute_path(path):
    for cell in read(path).cells:
        assert not ABSOLUTE_PATH.search(cell.source), f"cell {cell.id} names a place on one machine"


@every_notebook
def test_parameters_are_annotated_literals_with_a_comment(path):
    """One parameters cell, one literal a line (`declared_parameters` refuses anything else), each with its meaning."""
    declared = declared_parameters(path)
    assert {"seed", "output_dir"} <= set(declared)
    assert not Path(declared["output_dir"].default).is_absolute()
    lines = [line for line in parameters_cell(read(path), path.name).source.splitlines() if line.strip()]
    assert len(lines) == len(declared), "one parameter a line, and nothing else"
    for parameter in declared.values():
        assert len(parameter.comment) >= 3, f"{parameter.name} needs a comment: meaning and unit"


@every_notebook
def test_every_parameter_is_used_below(path):
    cells = code_cells(read(path))
    here = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    used = set().union(*(names_read(cell.source) for cell in cells[here + 1 :]))
    assert not set(declared_parameters(path)) - used, "a parameter that nothing reads"


@every_notebook
def test_only_imports_stand_before_the_parameters(path):
    """What is computed there could not follow a parameter."""
    for cell in code_cells(read(path)):
        if "parameters" in cell.metadata.get("tags", []):
            return
        names = {target.id for node in ast.walk(ast.parse(cell.source)) for target in getattr(node, "targets", [])}
        assert not names, f"{names} set before the parameters"


@every_notebook
def test_results_are_handed_over(path):
    assert "write_metrics" in set().union(*(names_read(cell.source) for cell in code_cells(read(path))))


@every_lesson
def test_first_cell_says_what_when_and_how_long(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    title = first.source.splitlines()[0]
    assert title.startswith("# "), "the first line is the title"
    assert title.endswith("?"), "the title is a question"
    for part in (r"You will be able to", r"\bPaper\b", r"Before this|Prerequisites", r"Runtime"):
        assert re.search(part, first.source), f"the first cell lacks {part}"
    assert re.search(r"\d+ (second|minute|hour)s?", first.source), "the runtime is a measured number"


@every_lesson
def test_last_part_sums_up_and_sets_exercises(path):
    cells = read(path).cells
    last_code = max(i for i, cell in enumerate(cells) if cell.cell_type == "code")
    ending = "\n".join(cell.source for cell in cells[last_code + 1 :])
    assert "## What we saw" in ending
    assert "## Exercises" in ending
    exercises = re.findall(r"^\d+\. ", ending.split("## Exercises")[1], flags=re.MULTILINE)
    assert 2 <= len(exercises) <= 4


@every_lesson
def test_every_lesson_has_solutions(path):
    assert (path.parent / "solutions" / path.name).is_file()


def test_every_solution_belongs_to_a_lesson():
    assert {path.name for path in SOLUTIONS} <= {path.name for path in LESSONS}


def test_small_parameters_are_known_to_their_notebooks():
    for name, parameters in SMALL.items():
        check_parameters(place(name), parameters)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The demo with small parameters: the lessons on utilities, training and win-rates, really run by papermill."""
    folder = tmp_path_factory.mktemp("outputs")
    run_demo(folder, train=SMALL["30_train_with_likes"], judge=SMALL["40_win_rates"])
    return folder


def run_small(name, folder, **more):
    executed = folder / f"{name}.ipynb"
    parameters = {"output_dir": str(folder / name), **SMALL[name], **more}
    return run_notebook(place(name), executed, parameters, progress=False)


def test_the_demo_leaves_what_it_promises(outputs, capsys):
    metrics = json.loads((outputs / "metrics.json").read_text())["metrics"]
    for opponent in ("base", "shuffled"):
        for scorer in ("world_redness", "world_fidelity"):
            key = f"win_rate/kto_vs_{opponent}/{scorer}"
            assert 0 <= metrics[f"{key}/low"] <= metrics[key] <= metrics[f"{key}/high"] <= 1
            assert metrics[f"{key}/n"] == SMALL["40_win_rates"]["prompts"]
    assert metrics["seconds/total"] > metrics["seconds/train"] > 0
    assert 0.5 < metrics["fidelity/base"] <= 1
    assert metrics["preference/kto"] > metrics["preference/base"], "a few steps on red likes make redder pictures"
    for name in ("10_utility_functions", "30_train_with_likes", "40_win_rates"):
        notebook = read(outputs / f"{name}.ipynb")
        assert any(output.get("data", {}).get("image/png") for cell in code_cells(notebook) for output in cell.outputs)
    assert (outputs / "train_with_likes" / "kto" / "model" / "model_index.json").is_file()
    assert (outputs / "train_with_likes" / "before_after.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_second_call_of_the_demo_trains_and_draws_nothing_again(outputs):
    weights = outputs / "train_with_likes" / "kto" / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    before = json.loads((outputs / "metrics.json").read_text())["metrics"]
    stamp = weights.stat().st_mtime_ns
    again = run_demo(outputs, train=SMALL["30_train_with_likes"], judge=SMALL["40_win_rates"])
    assert weights.stat().st_mtime_ns == stamp
    assert {k: v for k, v in again.items() if k != "seconds/total"} == {
        k: v for k, v in before.items() if k != "seconds/total"
    }


def test_start_here_draws_and_finds_every_function(tmp_path):
    metrics = run_small("00_start_here", tmp_path)
    assert metrics["picture/fidelity"] > 0.6 and metrics["functions"] >= 10


def test_the_explorer_leaves_a_static_picture(tmp_path):
    metrics = run_small("60_explore_utilities", tmp_path)
    assert metrics["slope_at_0"] == 0.5, "tanh(x / 2) at the reference point"
    assert (tmp_path / "60_explore_utilities" / "explorer.png").stat().st_size > 10_000


def test_likes_of_a_simulated_user_tune_a_model_at_the_press_of_a_button(tmp_path):
    metrics = run_small("61_teach_by_likes", tmp_path)
    assert metrics["judged"] == 14 and metrics["steps"] == 12 and metrics["win_rate/n"] == 4
    assert (tmp_path / "61_teach_by_likes" / "run-01" / "lora").is_dir()


def test_a_simulated_judge_prefers_many_sampler_steps(tmp_path):
    """Of prompts that are not the small world's, as of Stable Diffusion: their styles come with the set."""
    rows = [
        f"a {style} of {thing},{style}" for style in ("photo", "anime") for thing in ("dogs", "cats", "trees", "tea")
    ]
    (tmp_path / "set.csv").write_text("\n".join(["prompt,style", *rows]))
    metrics = run_small("62_judge_blind", tmp_path, prompt_set=str(tmp_path / "set.csv"), per_style=2)
    key = "study/ours_vs_theirs"
    assert metrics["answers"] == metrics[f"{key}/n"] == 4
    answers = list((tmp_path / "62_judge_blind" / "study" / "answers").iterdir())
    assert [path.name for path in answers] == ["simulated.jsonl"], "nobody's name stands under a scorer's answers"
    assert metrics[f"{key}/low"] <= metrics[key] <= metrics[f"{key}/high"]
    assert (tmp_path / "62_judge_blind" / "preferences.png").is_file()


def test_a_watched_training_leaves_its_curves_and_rows_of_pictures(tmp_path):
    metrics = run_small("63_watch_training", tmp_path)
    assert metrics["steps"] == 12 and metrics["sample_rows"] >= 1


def test_the_cloud_of_the_playground_goes_to_the_liked_gaussian(tmp_path):
    metrics = run_small("64_toy_playground", tmp_path)
    assert metrics["distance/after"] < metrics["distance/before"]


def test_utility_weights_are_the_gradients(outputs):
    metrics = json.loads((outputs / "utility_functions" / "metrics.json").read_text())["metrics"]
    assert metrics["worst_gradient_gap"] < 1e-12 and metrics["dpo_gap"] < 1e-12


def test_pairs_become_likes_under_both_rules(tmp_path):
    metrics = run_small("31_feedback_data", tmp_path)
    assert metrics["share_liked/always"] < metrics["share_liked/at_least_once"] < 0.6
    assert metrics["purity/at_least_once"] > 0.55 and abs(metrics["share_drawn"] - 0.8) < 0.02
    assert metrics["views_of_a_liked_picture/paper"] > 1 > metrics["views_of_a_disliked_picture/paper"]


def test_pictures_that_met_one_other_have_no_third_kind(tmp_path):
    metrics = run_small("31_feedback_data", tmp_path, rounds=1)
    assert metrics["share_liked/always"] == metrics["share_liked/at_least_once"]


def test_reading_runs_reads_the_example_sweep(tmp_path):
    metrics = run_small("70_reading_runs", tmp_path)
    assert (metrics["runs"], metrics["groups"], metrics["seeds/fewest"], metrics["unfinished"]) == (18, 6, 3, 0)


@pytest.fixture(scope="module")
def paper_outputs(tmp_path_factory):
    """The lessons on the paper's tables with small parameters: what each handed over, and the folder of all."""
    folder = tmp_path_factory.mktemp("paper")
    found = {name: run_small(name, folder) for name in SMALL if re.match("5[0124]_", name)}
    lesson_dir = str(folder / "50_win_rate_tables")
    return found | {"53": run_small("53_qualitative_grid", folder, lesson_dir=lesson_dir)}, folder


def test_the_tables_hold_every_comparison_and_control(paper_outputs):
    metrics = paper_outputs[0]["50_win_rate_tables"]
    for opponent in ("base", "base_best_guidance", "sft", "kto_shuffled", "alignprop"):
        for scorer in ("world_utility", "world_fidelity", "world_aesthetics"):
            key = f"win_rate/kto_vs_{opponent}/{scorer}"
            assert 0 <= metrics[f"{key}/low"] <= metrics[key] <= metrics[f"{key}/high"] <= 1
            assert metrics[f"{key}/n"] == 8 and metrics[f"style_{key}/toy/n"] == 2
    assert metrics["reward_gain/alignprop/low"] <= metrics["reward_gain/alignprop"]
    assert metrics["drift/base"] == 0 < metrics["drift/kto"] and metrics["best_guidance"] in (1.0, 3.0)
    assert metrics["neutral_drift/base"] == 0 < metrics["neutral_drift/kto"]
    table = pd.read_csv(paper_outputs[1] / "50_win_rate_tables" / "cards.csv")
    assert set(table["verdict"]) <= {"yes", "no", "open"} and len(table) == 3


def test_ablations_share_their_centre(paper_outputs):
    metrics = paper_outputs[0]["51_ablations"]
    same = {metrics[key] for key in ("centre", "utility/kahneman_tversky", "partition/at_least_once")}
    assert len(same) == 1 and metrics["partition/at_least_once/gap"] == 0
    for gamma in (0.5, 0.8):
        low, gap, high = (metrics[f"gamma/{gamma}/gap{end}"] for end in ("/low", "", "/high"))
        assert low <= gap <= high


def test_a_specific_user_is_learnt_with_and_without_contradiction(paper_outputs):
    metrics = paper_outputs[0]["52_a_specific_user"]
    assert {"lost/kto/0.3", "lost/sft/0.3", "dose/10", "dose/24"} <= metrics.keys()
    assert metrics["win_rate/kto_flipped_30_vs_base/world_redness/n"] == 4
    assert metrics["neutral_drift/base"] == 0 < metrics["neutral_drift/kto_flipped_30"]


def test_the_grid_and_the_published_checkpoints_hand_over(paper_outputs):
    found = paper_outputs[0]
    assert found["53"]["prompts"] == 8 and found["53"]["worst"] <= found["53"]["best"]
    equal = found["54_published_checkpoints"]  # two names for one model: every prompt is a tie
    assert equal["win_rate/kto_vs_base/world_fidelity"] == 0.5
    assert 0 <= equal["win_rate/kto_vs_base_best_guidance/world_fidelity"] <= 1, "the control that needs no training"
    assert (
        equal["neutral_drift/kto"] == equal["neutral_drift/base_best_guidance"] == 0
        and equal["mean/world_fidelity/kto"] == equal["mean/world_fidelity/base"]
    )


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("lesson", "change", "sentence"),
    [
        slow("50_win_rate_tables", {"systems": ["base", "sft"]}, "systems must hold base and kto, got base, sft"),
        ("50_win_rate_tables", {"scorers": ["pickscore"]}, "scorer pickscore needs the model"),
        ("54_published_checkpoints", {"methods": ["base"]}, "unets must name one for each of 1 methods, got 2"),
        slow("50_win_rate_tables", {"user": "likes_bleu"}, "user must be one of balanced, .*got 'likes_bleu'"),
        ("51_ablations", {"scorer": "world_utilty"}, "unknown scorer 'world_utilty'; did you mean 'world_utility'"),
        slow("50_win_rate_tables", {"guidance_scales": []}, "guidance_scales must hold at least one"),
        ("53_qualitative_grid", {"lesson_dir": "nowhere"}, "lesson_dir nowhere holds no pictures: run the notebook"),
        slow("51_ablations", {"partitions": []}, "partitions must name at least one rule"),
        ("52_a_specific_user", {"prompt_set": "neutral"}, "scorer world_fidelity judges the small world alone: prompt"),
        slow("52_a_specific_user", {"systems": ["kto", "d3po"]}, "alignprop and d3po learn from a scorer"),
        slow("52_a_specific_user", {"flip_rates": [0.3, 0.0]}, r"flip_rates must begin with 0, .*got \[0.3, 0.0\]"),
        slow("54_published_checkpoints", {"looked_at": "dpo"}, "looked_at must be one of at least two systems"),
    ],
)
def test_what_a_table_lacks_is_said_before_anything_is_drawn(tmp_path, monkeypatch, lesson, change, sentence):
    monkeypatch.setenv("DKTO_WEIGHTS", str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match=sentence):
        run_small(lesson, tmp_path, **change)
    assert not list(tmp_path.rglob("*.png"))


def test_one_training_step_agrees_with_the_trainer(tmp_path):
    metrics = run_small("32_one_training_step", tmp_path)
    assert metrics["loss"] == pytest.approx(0.5) and metrics["gradient_gap"] < 1e-6
    assert metrics["proposed_beta"] > 0 and metrics["margin_after_one_step"] > 0
    assert (tmp_path / "32_one_training_step" / "calibration.png").stat().st_size > 5_000


def test_train_runs_any_prepared_folder_and_its_model_is_judged_beside_published_ones(tmp_path):
    """The chain of the shipped grids for Stable Diffusion: training, then its judgement."""
    metrics = run_small("33_train", tmp_path, ranks=2)
    assert metrics["steps"] == SMALL["33_train"]["max_train_steps"] and metrics["skipped_steps"] == 0
    assert (tmp_path / "33_train" / "run" / "lora" / "README.md").is_file()
    trained = {"runs_dir": str(tmp_path / "33_train"), "methods": ["base"], "unets": [], "loras": []}
    trained |= {"scorers": ["world_fidelity"]}
    metrics = run_small("54_published_checkpoints", tmp_path, **trained)
    assert 0 <= metrics["win_rate/ours_vs_base/world_fidelity"] <= 1
    assert {"mean/world_fidelity/ours", "mean/world_fidelity/base"} <= metrics.keys()


TRAINS = ("30_train_with_likes", "33_train")  # solutions that start four and six trainings, each a process


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in TRAINS)) for path in SOLUTIONS]
)
def test_solutions_hold(path, outputs, paper_outputs, tmp_path):
    """Every solution carries its own asserts; one that fails names its cell."""
    prepared = {"prepared_dir": str(outputs / "train_with_likes" / "prepared")}
    inputs = dict.fromkeys((*TRAINS, "32_one_training_step"), prepared)
    inputs |= {"40_win_rates": {"lesson_dir": str(outputs / "win_rates")}}
    lessons = ("50_win_rate_tables", "51_ablations", "52_a_specific_user", "53_qualitative_grid")
    inputs |= {name: {"lesson_dir": str(paper_outputs[1] / name)} for name in lessons}
    assert run_small(f"solutions/{path.stem}", tmp_path, **inputs.get(path.stem, {}))


KILLED = """
import sys
from dkto.paper.demo import run_demo
run_demo(sys.argv[1], train={train!r}, judge={judge!r})
"""


@pytest.mark.slow
def test_a_demo_killed_in_training_ends_with_the_same_metrics(tmp_path):
    """SIGKILL to the whole program once a checkpoint lies there; the trainings die with it; a second call goes on."""
    small = SMALL["30_train_with_likes"] | {"max_train_steps": 60}
    program = KILLED.format(train=small, judge=SMALL["40_win_rates"])
    expected = run_demo(tmp_path / "whole", train=small, judge=SMALL["40_win_rates"])
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "cut")])
    runs = tmp_path / "cut" / "train_with_likes"
    deadline = time.monotonic() + 300
    while not list(runs.glob("kto/checkpoint-*[0-9]")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert list(runs.glob("kto/checkpoint-*[0-9]"))
    time.sleep(5)
    steps = len((runs / "kto" / "metrics.jsonl").read_text().splitlines())
    time.sleep(5)
    assert len((runs / "kto" / "metrics.jsonl").read_text().splitlines()) == steps, "an orphan goes on training"
    resumed = run_demo(tmp_path / "cut", train=small, judge=SMALL["40_win_rates"])
    same = {key for key in expected if not key.startswith("seconds/")}
    assert {key: resumed[key] for key in same} == {key: expected[key] for key in same}
