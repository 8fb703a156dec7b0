import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dkto.cli import main
from dkto.objective.losses import dpo_loss, implicit_reward
from dkto.training.calibration import CONVENTIONS, calibrate, convert_beta, propose_beta, slope_at
from dkto.training.launch import config_arguments


@pytest.fixture
def gaps():
    rng = np.random.default_rng(0)
    return rng.normal(0, 1e-3, 4000), rng.random(4000) < 0.5


@pytest.mark.parametrize("utility", ["kahneman_tversky"])
@pytest.mark.parametrize("wanted", [0.3, 0.7, 0.9])
def test_the_proposed_beta_has_the_wanted_slope(gaps, config, utility, wanted):
    config = replace(config, utility=utility)
    beta = propose_beta(*gaps, config, wanted)
    assert slope_at(*gaps, beta, config).mean_slope == pytest.approx(wanted, abs=1e-6)


def test_the_scale_of_the_gaps_is_undone_by_beta(gaps, config):
    one, ten = (propose_beta(factor * gaps[0], gaps[1], config, 0.7) for factor in (1, 10))
    assert one == pytest.approx(10 * ten, rel=1e-6)


def test_small_betas_are_linear_and_large_ones_saturated(gaps, config):
    small, large = slope_at(*gaps, 1.0, config), slope_at(*gaps, 1e6, config)
    assert small.mean_slope > 0.999 and small.linear == 1 and small.saturated == 0
    assert large.mean_slope < 0.05 and large.linear < 0.01 and large.saturated > 0.9


def test_slopes_by_hand(config):
    """Gaps of 1 and -1 at beta 2, point 0: sigmoid' (2) / sigmoid'(0) = 0.4199743."""
    config = replace(config, desirable_fraction=0.5)
    found = slope_at(np.array([1.0, -1.0]), np.array([True, False]), 2.0, config)
    assert found.mean_slope == pytest.approx(0.4199743, abs=1e-6)


@pytest.mark.parametrize(
    ("liked_gap", "disliked_gap", "by_shares", "by_gamma"), [(5e-4, -2e-3, 727, 1459), (1.5e-3, -5e-4, 1479, 1730)]
)
def test_rows_count_as_often_as_training_draws_them(config, liked_gap, disliked_gap, by_shares, by_gamma):
    """A quarter of the rows is liked and gamma is 0.8: rows that count alike propose another beta."""
    rng = np.random.default_rng(0)
    liked = np.arange(4000) < 0.26 * 4000
    gaps = np.where(liked, liked_gap, disliked_gap) + rng.normal(0, 5e-4, 4000)
    assert propose_beta(gaps, liked, config, 0.7) == pytest.approx(by_gamma, rel=0.02)
    alike = replace(config, desirable_fraction=0.26)
    assert propose_beta(gaps, liked, alike, 0.7) == pytest.approx(by_shares, rel=0.02)
    drawn = np.concatenate([rng.choice(np.flatnonzero(side), n) for side, n in ((liked, 8000), (~liked, 2000))])
    as_drawn = slope_at(gaps[drawn], liked[drawn], by_gamma, config)
    assert as_drawn.mean_slope == pytest.approx(slope_at(gaps, liked, by_gamma, config).mean_slope, abs=0.01)
    for gamma, side in ((1.0, liked), (0.0, ~liked)):
        only = replace(config, desirable_fraction=gamma)
        assert slope_at(gaps, liked, 100.0, only) == slope_at(gaps[side], liked[side], 100.0, only)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gaps": 0.0}, "every gap is 0: policy and reference are still the same"),
        ({"wanted": 1.0}, r"wanted_slope must be in \(0, 1\), got 1.0"),
        ({"utility": "kink_at_zero = relu(x)"}, "utility 'kink_at_zero = .*' is flat where nothing is learned yet"),
        ({"utility": "loss_averse"}, "utility 'loss_averse' keeps a mean slope above 0.7 at every beta"),
    ],
)
def test_what_cannot_be_proposed_is_said(gaps, config, change, sentence):
    config = replace(config, utility=change.get("utility", config.utility), estimator="zero")
    with pytest.raises(ValueError, match=sentence):
        propose_beta(gaps[0] * change.get("gaps", 1.0), gaps[1], config, change.get("wanted", 0.7))


def test_conversions_give_the_neighbours_own_loss():
    """Each convention, written out as its code does, gives the loss of our dpo_loss at the converted beta."""
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(4, 8, 4 * 8 * 8, generator=generator, dtype=torch.float64)  # squared errors by element
    mean, total = errors.mean(-1), errors.sum(-1)
    policy_w, policy_l, reference_w, reference_l = mean
    ours = 5.0
    expected = dpo_loss(*(implicit_reward(p, r, ours) for p, r in ((policy_w, reference_w), (policy_l, reference_l))))

    def inside(parts, factor, beta):
        pw, pl, rw, rl = parts
        return -torch.nn.functional.logsigmoid(-factor * beta * ((pw - pl) - (rw - rl))).mean()

    written = {
        "diffusion_dpo": lambda beta: inside(mean, 0.5, beta),
        "diffusers_sd15": lambda beta: inside(mean, 1.0, beta),
        "simpletuner_flow": lambda beta: inside(total, 0.5, beta),
        "sum": lambda beta: inside(total, 1.0, beta),
        "dkto": lambda beta: inside(mean, 1.0, beta),
    }
    assert written.keys() == CONVENTIONS.keys()
    for name, loss in written.items():
        beta = convert_beta(ours, "dkto", name, elements=4 * 8 * 8)
        assert float(loss(beta)) == pytest.approx(float(expected), rel=1e-12), name
        assert convert_beta(beta, name, "dkto", elements=4 * 8 * 8) == pytest.approx(ours)


def test_published_settings_in_our_unit():
    assert convert_beta(5000, "diffusion_dpo", "dkto") == convert_beta(2500, "diffusers_sd15", "dkto") == 2500
    assert convert_beta(5000, "dkto", "sum") == pytest.approx(0.305, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((1.0, "trl", "dkto"), "unknown convention 'trl'; known: dkto, diffusion_dpo"),
        ((0.0, "dkto", "sum"), "beta must be above 0, got 0.0"),
    ],
)
def test_conversions_that_mean_nothing_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        convert_beta(*arguments)


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"samples": 0}, "samples must be 1 or above, got 0"),
        ({"draws": 1.5}, r"draws must be a whole number, got 1\.5"),
        ({"wanted_slope": 1}, r"wanted_slope must be in \(0, 1\), got 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_trial(config, numbers, sentence):
    with pytest.raises(ValueError, match=sentence):
        calibrate(config, **numbers)
    assert not config.output_dir.exists()


def test_a_trial_is_trained_and_measured(config):
    found = calibrate(config, steps=6, samples=8, wanted_slope=0.8, draws=3)
    assert (found.rows, found.draws, found.steps) == (8, 3, 6)
    assert found.gap_quantiles[0] < found.gap_quantiles[-1]
    middle = found.table[len(found.table) // 2]
    assert middle.beta == pytest.approx(found.beta) and middle.mean_slope == pytest.approx(0.8, abs=1e-3)
    assert [row.mean_slope for row in found.table] == sorted((row.mean_slope for row in found.table), reverse=True)
    stored = json.loads((config.output_dir / "calibration.json").read_text())
    assert stored["beta"] == found.beta and len(stored["table"]) == 13
    assert "proposed beta for a mean slope of 0.8" in str(found)


def test_the_command_prints_the_table_and_other_codes_words(config, capsys):
    assert main(["calibrate", *config_arguments(config), "--steps", "4", "--samples", "6"]) == 0
    said = capsys.readouterr().out
    assert "saturated" in said and "proposed beta" in said and "diffusion_dpo: Diffusion-DPO's released code" in said
