"""The lessons of the laboratory run small, and what they hand over is what they show."""

import inspect
from pathlib import Path

import nbformat
import pytest
from test_notebooks import FOLDER
from test_notebooks_run import run_small

from dkto.runs.sweeps import SHIPPED, read_sweep
from toy.__main__ import format_headline, run_headline

METHODS = ["base", "sft", "csft", "dpo", "loss_averse", "risk_seeking", "kahneman_tversky"]
METHODS += ["loss_averse@0.5", "risk_seeking@0.5", "kahneman_tversky@0.5"]


def test_a_gaussian_is_learnt_and_compared_with_its_law(tmp_path):
    metrics = run_small("20_how_a_model_learns_a_gaussian", tmp_path)
    assert metrics["score_mse"] < 0.05 and 0.18 < metrics["std/exact_law"] < 0.2


def test_a_diffusion_model_from_scratch_is_that_of_the_laboratory(tmp_path):
    metrics = run_small("15_diffusion_from_scratch", tmp_path)
    assert max(value for key, value in metrics.items() if key.startswith("gap/")) < 1e-4
    assert metrics["loss/floor"] < metrics["loss/last"] < 1


def test_a_log_ratio_is_a_weighted_sum_of_error_gaps(tmp_path):
    metrics = run_small("16_likelihood_as_a_reward", tmp_path)
    assert metrics["miss/400"] < 0.2 < metrics["miss/50"]
    assert metrics["wrong_order/ELBO weights, 400 steps"] < metrics["wrong_order/no weights"] < 0.1
    assert metrics["noise_ratio"] > 10


def test_reward_maps_are_drawn(tmp_path):
    metrics = run_small("21_error_as_reward", tmp_path)
    assert metrics["map_correlation/dpo"] > 0.3
    assert (tmp_path / "21_error_as_reward" / "reward_maps.png").stat().st_size > 10_000


def test_reference_points_are_compared(tmp_path):
    metrics = run_small("22_reference_point", tmp_path)
    assert metrics["kl/kahneman_tversky/0.5/batch_mean_clamped"] > 0
    assert metrics["kl/kahneman_tversky/0.5/zero"] == pytest.approx(
        metrics["kl/kahneman_tversky/0.5/batch_mean_clamped"], rel=0.2
    ), "at gamma = 0.5 the clamped mean is 0"


def test_the_headline_writes_its_keys(tmp_path):
    metrics = run_small("23_which_objective", tmp_path)
    for name in METHODS:
        for measure in ("kl", "undesirable_share", *(() if name == "base" else ("pair_accuracy",))):
            assert metrics[f"{measure}/{name}/low"] <= metrics[f"{measure}/{name}"] <= metrics[f"{measure}/{name}/high"]
    assert metrics["seconds/ensemble"] > 0 and metrics["seconds/one_by_one"] > 0
    assert "pair_accuracy/base" not in metrics
    assert (tmp_path / "23_which_objective" / "verdicts.csv").read_text().count("\n") >= 6
    table = format_headline(metrics)
    assert all(name in table for name in METHODS) and "diverged" in table


def test_ablations_reach_the_card(tmp_path):
    metrics = run_small("24_ablations", tmp_path)
    assert metrics["beta/kl/dpo/10"] > 0 and metrics["length/40/kl/sft"] > 0 and "gamma/kl/loss_averse/0.5" in metrics


def test_flips_leave_symmetric_optima_alone(tmp_path):
    metrics = run_small("25_noisy_labels", tmp_path)
    moved = {
        name: metrics[f"exact_optimum_moved/{name}"] for name in ("kahneman_tversky", "risk_seeking", "loss_averse")
    }
    assert moved["kahneman_tversky"] < 1e-5 and moved["risk_seeking"] < 1e-5 and moved["loss_averse"] > 0.05


def test_the_animation_is_saved_and_shown(tmp_path):
    metrics = run_small("26_watch_it_move", tmp_path)
    cells = nbformat.read(tmp_path / "26_watch_it_move.ipynb", as_version=4).cells
    shown = [output.get("data", {}).get("text/html", "") for cell in cells for output in cell.get("outputs", [])]
    assert any("animation" in html and "<button" in html for html in shown), "an animation with controls"
    assert 0 <= metrics["alikeness/dpo"] <= 1 and "divergence/dpo" in metrics


def test_make_toy_runs_the_headline_with_20_seeds():
    (run,) = read_sweep(SHIPPED / "toy.yaml").runs
    assert (run.parameters["profile"], run.parameters["seeds"]) == ("small", 20)
    default = {name: p.default for name, p in inspect.signature(run_headline).parameters.items()}
    assert (default["profile"], default["seeds"]) == ("small", 20)
    assert default["output_dir"] == Path("papermill_runs/outputs/toy")
    makefile = (FOLDER.parent / "Makefile").read_text()
    assert "python -m toy --profile $(or $(PROFILE),small)" in makefile
