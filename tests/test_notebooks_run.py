"""Every notebook runs with the small parameters of SMALL, and what it hands over is checked.

One of each part runs in a kernel, as users run it; the others run in this process (`in_process.py`), and in a kernel
too among the slow tests.
"""

import json
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import cache

import pandas as pd
import pytest
from in_process import in_this_process
from scipy import stats
from test_notebooks import FOLDER, LESSONS, SOLUTIONS, code_cells, read

from dkto.evaluation import tango_interval
from dkto.paper.demo import run_demo
from dkto.runs.notebooks import check_parameters, run_notebook

TOY_STEPS = {"pretrain_steps": 300, "max_train_steps": 40}

# Parameters that make a notebook small enough for a test, by its path below notebooks/ without the ending.
SMALL: dict[str, dict[str, object]] = {
    "00_start_here": {"pictures": 3},
    "05_prospect_theory": {},
    "10_utility_functions": {},
    "15_diffusion_from_scratch": {"pretrain_steps": 150, "num_samples": 300, "frames": 3},
    "16_likelihood_as_a_reward": {"points": 200, "lengths": [50, 400]},
    "17_from_rlhf_to_kto": {},
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
    "28_likes_or_pairs": {"prompts": 20, "betas": [1.0], "seeds": 2, "group_sizes": [1, 2], "spreads": [0.0, 4.0]}
    | {"budgets": [10, 30], "shares": [0.5, 0.9], "flip_rates": [0.0, 0.3]},
    "27_after_kto": {"brakes": [10.0], "draws": [2], "seeds": 2, "processes": 1, "num_samples": 300, **TOY_STEPS},
    "30_train_with_likes": {
        "pool_prompts": 8,
        "provoking_prompts": 4,
        "max_train_steps": 12,
        "warmup_steps": 2,
        "batch_size": 8,
        "learning_rate": 1e-4,
        "processes": 1,
    },
    "31_feedback_data": {"sessions": 24, "rounds": 4, "scored_pictures": 60},
    "32_one_training_step": {"batch_size": 8, "trial_steps": 4},
    "33_train": {"max_train_steps": 8, "batch_size": 8, "checkpoint_every": 4},
    "40_win_rates": {"prompts": 4, "beside": 2, "images_per_prompt": 3, "processes": 1},
    "41_pitfalls": {"lengths": [20, 40], "pretrain_steps": 300, "seeds": 2, "tries": 200, "processes": 1},
    "42_whose_likes": {"shares": [0.0, 0.3, 0.5], "seeds": 2, "processes": 1, **TOY_STEPS},
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
    "55_a_taste_that_needs_dislikes": {
        "systems": ["sft", "kto", "kto_shuffled_balanced"],
        "pool_prompts": 24,
        "train_steps": 2,
        "prompts": 4,
        "beside": 3,
        "validation_prompts": 2,
        "sampling_steps": 3,
        "processes": 0,
    },
    "56_guidance_by_dislikes": {
        "pool_prompts": 40,
        "train_steps": 2,
        "batch_size": 4,
        "prompts": 3,
        "beside": 2,
        "strengths": [1.0],
        "negative_strengths": [1.0],
        "guidance_scales": [3.0],
        "processes": 0,
    },
    "57_rounds": {
        "rounds": 2,
        "images": 16,
        "train_steps": 2,
        "batch_size": 4,
        "prompts": 3,
        "beside": 2,
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
        "simulated_judge": "dark_backgrounds",
        "least_of_each": 3,
        "press_button": True,
        "max_train_steps": 12,
        "held_out_prompts": 4,
        "sample_steps": 4,
    },
    "62_judge_blind": {"prompts": 8, "per_style": 1, "simulated_scorer": "world_aesthetics"},
    "63_watch_training": {
        "wait": True,
        "max_train_steps": 12,
        "checkpoint_every": 4,
        "sample_prompts": 2,
        "sick_steps": 4,
    },
    "64_toy_playground": {"max_train_steps": 200},
    "solutions/00_start_here": {"pictures": 2},
    "solutions/05_prospect_theory": {},
    "solutions/10_utility_functions": {},
    "solutions/15_diffusion_from_scratch": {},
    "solutions/16_likelihood_as_a_reward": {},
    "solutions/17_from_rlhf_to_kto": {},
    "solutions/20_how_a_model_learns_a_gaussian": {},
    "solutions/21_error_as_reward": TOY_STEPS,
    "solutions/22_reference_point": TOY_STEPS,
    "solutions/23_which_objective": {"max_train_steps": 60, "seeds": 2, "processes": 1},
    "solutions/24_ablations": TOY_STEPS | {"max_train_steps": 150},
    "solutions/25_noisy_labels": {},
    "solutions/26_watch_it_move": {},
    "solutions/28_likes_or_pairs": {"prompts": 20, "seeds": 2},
    "solutions/27_after_kto": {"seeds": 2, "processes": 1, **TOY_STEPS},
    "solutions/30_train_with_likes": {"max_train_steps": 6, "batch_size": 8, "learning_rate": 1e-4},
    "solutions/31_feedback_data": {"sessions": 40},
    "solutions/32_one_training_step": {"batch_size": 8, "trial_steps": 4},
    "solutions/33_train": {"max_train_steps": 4},
    "solutions/40_win_rates": {},
    "solutions/41_pitfalls": {},
    "solutions/42_whose_likes": TOY_STEPS,
    "solutions/60_explore_utilities": {},
    "solutions/70_reading_runs": {},
    "solutions/50_win_rate_tables": {},
    "solutions/51_ablations": {},
    "solutions/52_a_specific_user": {},
    "solutions/53_qualitative_grid": {},
    "solutions/54_published_checkpoints": {"prompts": 100},
    "solutions/55_a_taste_that_needs_dislikes": {},
    "solutions/56_guidance_by_dislikes": {"strengths": [1.0]},
    "solutions/57_rounds": {},
    "solutions/61_teach_by_likes": {},
    "solutions/62_judge_blind": {},
    "solutions/63_watch_training": {},
    "solutions/64_toy_playground": {},
}


def place(name):
    """Where a notebook of SMALL lies: an experiment has the same name, one folder deeper."""
    path = FOLDER / f"{name}.ipynb"
    return path if path.exists() else FOLDER / "experiments" / f"{name}.ipynb"


def test_small_parameters_are_known_to_their_notebooks():
    for name, parameters in SMALL.items():
        check_parameters(place(name), parameters)


# Run in a kernel among the quick tests: a lesson that trains in processes of its own, and one that reads files.
IN_A_KERNEL = ("23_which_objective", "70_reading_runs")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The demo with small parameters: the lessons on utilities, training and win-rates, run by papermill."""
    folder = tmp_path_factory.mktemp("outputs")
    with in_this_process():
        run_demo(folder, train=SMALL["30_train_with_likes"], judge=SMALL["40_win_rates"])
    return folder


def run_small(name, folder, kernel=None, **more):
    """A notebook with the parameters of SMALL through papermill, in this process or in a kernel of its own."""
    executed = folder / f"{name}.ipynb"
    parameters = {"output_dir": str(folder / name), **SMALL[name], **more}
    with nullcontext() if (name in IN_A_KERNEL if kernel is None else kernel) else in_this_process():
        return run_notebook(place(name), executed, parameters, progress=False)


def rate_counted_again(folder, ours, theirs, scorer):
    """The win-rate of one folder of images over another, from the scores on disk: medians, and half a win for a tie."""
    one, other = (
        pd.read_parquet(folder / name / "scores" / f"{scorer}.parquet")
        .groupby("prompt")["score"]
        .quantile(0.5, interpolation="lower")  # of an even number the lower of the two in the middle
        for name in (ours, theirs)
    )
    return ((one > other) + (one == other) / 2).mean()


def check_rate(metrics, key, expected, n):
    """A rate is what was counted, and its interval is Tango's of the counts, without ties Wilson's, by scipy."""
    assert metrics[key] == pytest.approx(expected, abs=1e-12) and metrics[f"{key}/n"] == n
    ties = metrics.get(f"{key}/ties", 0)  # a study asks for a choice
    ends = [metrics[f"{key}/low"], metrics[f"{key}/high"]]
    assert ends == list(tango_interval(round(expected * n - ties / 2), ties, round((1 - expected) * n - ties / 2)))
    if not ties:
        interval = stats.binomtest(round(expected * n), n).proportion_ci(method="wilson")
        assert ends == pytest.approx(list(interval), abs=1e-9)


def test_the_demo_leaves_what_it_promises(outputs, capsys):
    metrics = json.loads((outputs / "metrics.json").read_text())["metrics"]
    for opponent, folder in (("base", "base"), ("shuffled", "kto_shuffled"), ("kto_shuffled", "kto_shuffled")):
        for scorer in ("world_clean", "world_fidelity", "world_craft"):
            expected = rate_counted_again(outputs / "win_rates", "kto", folder, scorer)
            check_rate(metrics, f"win_rate/kto_vs_{opponent}/{scorer}", expected, SMALL["40_win_rates"]["prompts"])
    assert metrics["seconds/total"] > metrics["seconds/train"] > 0
    assert 0.5 < metrics["fidelity/base"] <= 1
    assert metrics["preference/kto"] > metrics["preference/base"], "a few steps make cleaner backgrounds"
    for name in ("utility_functions", "train_with_likes", "win_rates"):
        notebook = read(outputs / name / "notebook.ipynb")
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
    assert again == before


def test_start_here_draws_and_finds_every_function_and_its_tests(tmp_path):
    metrics = run_small("00_start_here", tmp_path)
    assert metrics["picture/fidelity"] > 0.6 and metrics["functions"] >= 10
    named = re.findall(r"\w+/test_\w+", (FOLDER / "00_start_here.ipynb").read_text())
    assert len(named) == metrics["functions"]
    assert all((FOLDER.parent / "tests" / f"{name}.py").is_file() for name in named)


def test_the_students_of_1992_are_loss_averse_and_the_sigmoid_is_not(tmp_path):
    metrics = run_small("05_prospect_theory", tmp_path)
    assert 0.8 < metrics["fitted/alpha"] < 1 and 1.5 < metrics["fitted/lambda"] < 2.6
    assert metrics["missed/fitted here"] < metrics["missed/published"] < 0.05, "the table is the one they fitted"
    assert metrics["aversion/Kahneman-Tversky"] == pytest.approx(1, abs=1e-3)


def test_every_line_from_rlhf_to_kto_holds(tmp_path):
    metrics = run_small("17_from_rlhf_to_kto", tmp_path)
    gaps = [value for key, value in metrics.items() if key.startswith("gap/")]
    assert len(gaps) == 8 and max(gaps) < 1e-12
    assert metrics["far/DPO"] < 1e-3 and metrics["far/RLHF"] < 0.01 < metrics["far/KTO"]
    assert metrics["shuffled/0.8"] == pytest.approx(0.6) and metrics["shuffled/0.5"] == 0


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
    assert metrics["answers"] == 4
    study = tmp_path / "62_judge_blind" / "study"
    (answers,) = (study / "answers").iterdir()
    assert answers.name == "simulated.jsonl", "nobody's name is on a scorer's answers"
    given = [json.loads(line) for line in answers.read_text().splitlines()]
    ours_is_a = json.loads((study / "key.json").read_text())["a_is_ours"]
    left = json.loads((study / "questions.json").read_text())["judges"]["simulated"]["left"]
    taken = [((one["choice"] == "left") == (left[one["question"]] == "a"), one["question"]) for one in given]
    check_rate(metrics, key, sum(a == ours_is_a[question] for a, question in taken) / 4, 4)
    assert (tmp_path / "62_judge_blind" / "preferences.png").is_file()


@pytest.mark.slow  # the widget that it watches with is tested in tests/widgets
def test_a_watched_training_leaves_its_curves_and_rows_of_pictures(tmp_path):
    metrics = run_small("63_watch_training", tmp_path)
    assert metrics["steps"] == 12 and metrics["sample_rows"] >= 1
    assert metrics["slope/healthy"] > 0.9 and {"slope/sick", "margin/sick", "error/sick"} <= set(metrics)


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
def experiment(tmp_path_factory):
    """`experiment(name)`: an experiment with small parameters, run once: what it handed over, and its folder."""
    folder = tmp_path_factory.mktemp("paper")

    @cache
    def run(name):
        inputs = {"lesson_dir": str(run("50_win_rate_tables")[1])} if name == "53_qualitative_grid" else {}
        return run_small(name, folder, **inputs), folder / name

    return run


def test_a_taste_that_needs_dislikes_is_held_against_every_control(experiment):
    metrics, lesson = experiment("55_a_taste_that_needs_dislikes")
    for opponent in ("base", "sft", "kto_shuffled_balanced"):
        expected = rate_counted_again(lesson / "images", "kto", opponent, "world_clean")
        check_rate(metrics, f"win_rate/kto_vs_{opponent}/world_clean", expected, 4)
    assert {"cost/kto/judged/world_craft", "cost/kto/beside/world_fidelity/high"} <= metrics.keys()
    assert metrics["disliked"] >= 1 and metrics["slope/kto"] == pytest.approx(0.25, abs=0.01)
    weights = json.loads((lesson / "runs" / "kto_shuffled_balanced" / "training.json").read_text())["config"]
    assert (weights["desirable_weight"], weights["undesirable_weight"]) == pytest.approx((0.5, 2))


def test_the_tables_hold_every_comparison_and_control(experiment):
    metrics, lesson = experiment("50_win_rate_tables")
    for opponent in ("base", "base_best_guidance", "sft", "kto_shuffled", "alignprop"):
        for scorer in ("world_utility", "world_fidelity", "world_craft"):
            key = f"win_rate/kto_vs_{opponent}/{scorer}"
            expected = rate_counted_again(lesson / "images", "kto", opponent, scorer)
            check_rate(metrics, key, expected, 8)
            assert metrics[f"style_{key}/toy/n"] == 2
    assert metrics["reward_gain/alignprop/low"] <= metrics["reward_gain/alignprop"]
    assert metrics["drift/base"] == 0 < metrics["drift/kto"] and metrics["best_guidance"] in (1.0, 3.0)
    assert metrics["neutral_drift/base"] == 0 < metrics["neutral_drift/kto"]
    table = pd.read_csv(lesson / "cards.csv")
    assert set(table["verdict"]) <= {"yes", "no", "open"} and len(table) == 3


@pytest.mark.slow  # three trainings, five ways to draw; the guidance itself is tested in tests/models
def test_guidance_by_dislikes_is_held_against_kto_and_the_base(experiment):
    metrics, lesson = experiment("56_guidance_by_dislikes")
    for name in ("kto 3", "contrast 1", "push 1", "negative 1"):
        expected = rate_counted_again(lesson / "judged" / "images", name, "base", "world_clean")
        check_rate(metrics, f"win_rate/{name}_vs_base/world_clean", expected, 3)
        assert f"cost/{name}/beside/world_craft/high" in metrics
    assert metrics["liked"] > metrics["disliked"] >= 1


@pytest.mark.slow  # five trainings, each of a model that another one left
def test_rounds_go_on_from_the_model_that_was_asked_about(experiment):
    metrics, lesson = experiment("57_rounds")
    for ours, theirs in (("round 2", "once"), ("round 2", "shuffled"), ("round 2", "round 1")):
        expected = rate_counted_again(lesson / "judged" / "images", ours, theirs, "world_clean")
        check_rate(metrics, f"win_rate/{ours}_vs_{theirs}/world_clean", expected, 3)
    second = json.loads((lesson / "rounds" / "round-2" / "run" / "training.json").read_text())["config"]
    assert second["model"] == str(lesson / "rounds" / "round-1" / "run" / "model"), "the reference is the round's start"
    assert 0 < metrics["disliked/round 1"] < 1


@pytest.mark.slow  # eight trainings; their code is that of the tables
def test_ablations_share_their_centre(experiment):
    metrics, _ = experiment("51_ablations")
    same = {metrics[key] for key in ("centre", "utility/kahneman_tversky", "partition/at_least_once")}
    assert len(same) == 1 and metrics["partition/at_least_once/gap"] == 0
    for gamma in (0.5, 0.8):
        low, gap, high = (metrics[f"gamma/{gamma}/gap{end}"] for end in ("/low", "", "/high"))
        assert low <= gap <= high


@pytest.mark.slow  # seven trainings; their code is that of the tables
def test_a_specific_user_is_learnt_with_and_without_contradiction(experiment):
    metrics, _ = experiment("52_a_specific_user")
    assert {"lost/kto/0.3", "lost/sft/0.3", "dose/10", "dose/24"} <= metrics.keys()
    assert metrics["win_rate/kto_flipped_30_vs_base/world_redness/n"] == 4
    assert metrics["neutral_drift/base"] == 0 < metrics["neutral_drift/kto_flipped_30"]


def test_the_grid_and_the_published_checkpoints_hand_over(experiment):
    grid, _ = experiment("53_qualitative_grid")
    assert grid["prompts"] == 8 and grid["worst"] <= grid["best"]
    equal, lesson = experiment("54_published_checkpoints")  # two names for one model: every prompt is a tie
    assert equal["win_rate/kto_vs_base/world_fidelity"] == 0.5
    control = rate_counted_again(lesson / "images", "kto", "base_best_guidance", "world_fidelity")
    check_rate(equal, "win_rate/kto_vs_base_best_guidance/world_fidelity", control, 4)  # it needs no training
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
        ("53_qualitative_grid", {"lesson_dir": "nowhere"}, "lesson_dir nowhere holds no images: run the notebook"),
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


@pytest.mark.slow  # its steps are those of the demo and of the commands
def test_train_runs_any_prepared_folder_and_its_model_is_judged_beside_published_ones(tmp_path):
    """The chain of the shipped grids for Stable Diffusion: training, then its judgement."""
    metrics = run_small("33_train", tmp_path)
    assert metrics["steps"] == SMALL["33_train"]["max_train_steps"] and metrics["skipped_steps"] == 0
    assert (tmp_path / "33_train" / "run" / "lora" / "README.md").is_file()
    trained = {"runs_dir": str(tmp_path / "33_train"), "methods": ["base"], "unets": [], "loras": []}
    trained |= {"scorers": ["world_fidelity"]}
    metrics = run_small("54_published_checkpoints", tmp_path, **trained)
    expected = rate_counted_again(tmp_path / "54_published_checkpoints" / "images", "ours", "base", "world_fidelity")
    check_rate(metrics, "win_rate/ours_vs_base/world_fidelity", expected, 4)
    assert {"mean/world_fidelity/ours", "mean/world_fidelity/base"} <= metrics.keys()


@pytest.mark.slow  # a kernel each, twenty seconds and more: their cells are run above in this process
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_lesson_runs_in_a_kernel_of_its_own(path, outputs, experiment, tmp_path):
    inputs = {
        "33_train": {"prepared_dir": str(outputs / "train_with_likes" / "prepared")},
        "40_win_rates": {"runs_dir": str(outputs / "train_with_likes")},
    }
    if path.stem == "53_qualitative_grid":
        inputs[path.stem] = {"lesson_dir": str(experiment("50_win_rate_tables")[1])}
    assert run_small(path.stem, tmp_path, kernel=True, **inputs.get(path.stem, {}))


TRAINS = ("30_train_with_likes", "33_train")  # solutions that start four and six trainings, each a process
READS = ("50_win_rate_tables", "53_qualitative_grid", "55_a_taste_that_needs_dislikes")  # an experiment's folder
READS_SLOW = (
    "51_ablations",
    "52_a_specific_user",
    "56_guidance_by_dislikes",
    "57_rounds",
)  # and of those that train most


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in (*TRAINS, *READS_SLOW)))
        for path in SOLUTIONS
    ],
)
def test_solutions_hold(path, outputs, experiment, tmp_path):
    """Every solution carries its own asserts; one that fails names its cell."""
    prepared = {"prepared_dir": str(outputs / "train_with_likes" / "prepared")}
    inputs = dict.fromkeys((*TRAINS, "32_one_training_step"), prepared)
    inputs |= {"40_win_rates": {"lesson_dir": str(outputs / "win_rates")}}
    if path.stem in (*READS, *READS_SLOW):
        inputs[path.stem] = {"lesson_dir": str(experiment(path.stem)[1])}
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
