"""Measures against closed forms, independent formulas and members that diverged."""

import math

import pytest
import torch
from exact_density import exact_kl
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from toy.exact import exact_denoiser, output_law
from toy.measures import (
    NONE,
    Rewards,
    energy_distance,
    fitted_kl,
    has_diverged,
    held_out_rewards,
    measure_points,
    normal_points,
    off_manifold_rate,
    over_seeds,
    sliced_wasserstein,
    undesirable_rate,
)
from toy.network import Architecture, Ensemble
from toy.schedule import linear_schedule
from toy.world import BASE_KL, DESIRABLE, PRETRAINING, Gaussian, bayes_accuracy, gaussian_kl, undesirable_share

MANY = 100_000


def draws_of(gaussian, count=MANY):
    return gaussian.place(torch.randn(count, 2, dtype=torch.float64))


def test_fitted_kl_of_draws_is_the_closed_form():
    """Standard error of the KL of 100,000 pretraining draws: below 0.012."""
    assert float(fitted_kl(draws_of(PRETRAINING))) == pytest.approx(BASE_KL, abs=0.05)
    assert float(fitted_kl(draws_of(DESIRABLE))) == pytest.approx(0, abs=1e-3)


def test_shares_of_draws_are_the_exact_ones():
    """4 standard errors of a share of 100,000 draws are 0.006 at most."""
    assert float(undesirable_rate(draws_of(DESIRABLE))) == pytest.approx(undesirable_share(DESIRABLE), abs=6e-3)
    assert float(undesirable_rate(draws_of(PRETRAINING))) == pytest.approx(undesirable_share(PRETRAINING), abs=6e-3)
    # beyond 3 std of a round Gaussian lies exp(-9/2) = 1.1 % of it; the desirable circle reaches out nowhere
    assert float(off_manifold_rate(draws_of(PRETRAINING))) == pytest.approx(math.exp(-4.5), abs=1e-3)


def test_sliced_wasserstein_of_round_gaussians():
    """W2 of N(m, s^2) and N(m', s'^2) on a line is sqrt((m - m')^2 + (s - s')^2); over directions (m - m')^2 halves."""
    other = Gaussian((0.5, 0.8), 0.2)
    expected = math.sqrt(0.2**2 / 2 + 0.1**2)
    assert float(sliced_wasserstein(draws_of(other))) == pytest.approx(expected, rel=0.01)
    assert float(sliced_wasserstein(draws_of(DESIRABLE))) < 2e-3


def test_energy_distance_equals_its_definition_by_draws():
    """Against 2 E|X - Y| - E|X - X'| - E|Y - Y'| from fresh draws of both sides, within 4 standard errors of 0.0015."""
    x, y = draws_of(PRETRAINING), draws_of(DESIRABLE)
    x2, y2 = draws_of(PRETRAINING), draws_of(DESIRABLE)
    expected = 2 * (x - y).norm(dim=1).mean() - (x - x2).norm(dim=1).mean() - (y - y2).norm(dim=1).mean()
    assert float(energy_distance(x[:20_000])) == pytest.approx(float(expected), abs=6e-3)
    assert float(energy_distance(draws_of(DESIRABLE, 20_000))) == pytest.approx(0, abs=1e-3)


def test_members_are_measured_one_by_one():
    points = torch.stack([draws_of(DESIRABLE, 500), draws_of(PRETRAINING, 500)])
    for name, values in measure_points(points).items():
        alone = measure_points(points[1:])[name]
        assert torch.allclose(values[1], alone[0], atol=1e-12), name


def test_a_diverged_member_is_seen_by_every_measure_and_hides_no_other():
    points = torch.stack([draws_of(DESIRABLE, 500)] * 3)
    points[1, 7, 0] = torch.inf
    points[2] *= 1e4
    measures = measure_points(points)
    assert has_diverged(measures).tolist() == [False, True, True]
    for name in ("kl", "undesirable_share", "off_manifold_share", "energy_distance"):
        assert math.isfinite(measures[name][0]) and not math.isfinite(measures[name][1]), name


def test_over_seeds_is_students_interval_and_counts_what_diverged():
    values = [1.0, 2.0, 4.0, 7.0]
    estimate = over_seeds([*values, math.nan, 5000.0], [False] * 5 + [True])
    low, high = stats.t.interval(0.95, 3, loc=3.5, scale=stats.sem(values))
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((3.5, low, high))
    assert (estimate.n, estimate.diverged) == (4, 2)
    assert "2 of 6 seeds diverged" in str(estimate)
    assert str(over_seeds([math.nan, math.inf])) == "all 2 seeds diverged"
    assert math.isnan(over_seeds([1.0]).low) and str(NONE) == "-"


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_intervals_of_rates_stay_rates(values):
    estimate = over_seeds(values, bounds=(0, 1))
    assert 0 <= estimate.low <= estimate.mean + 1e-12 and estimate.mean <= estimate.high + 1e-12 <= 1 + 2e-12


def test_exact_kl_of_an_affine_denoiser_is_the_closed_form():
    """A network of zeros predicts no noise: an affine denoiser with a known output law; Sobol error 0.3 %."""
    schedule = linear_schedule(20)
    network = Ensemble.initial(Architecture(20, 8), [0])
    network.parameters.zero_()
    zero = exact_denoiser(PRETRAINING.model_units(), schedule)
    zero = type(zero)(zero.slope * 0, zero.offset * 0)
    mean, std = output_law(zero, schedule, "ddim")
    place = torch.tensor(PRETRAINING.mean, dtype=torch.float64) + 0.2 * mean
    expected = gaussian_kl(place, (0.2 * std) ** 2 * torch.eye(2, dtype=torch.float64), DESIRABLE)
    assert float(exact_kl(network, schedule)[0]) == pytest.approx(float(expected), rel=3e-3)


def test_sobol_normals_are_normal():
    points = normal_points(1024, 2)
    assert points.mean(0).tolist() == pytest.approx([0, 0], abs=5e-3)
    assert points.square().mean(0).tolist() == pytest.approx([1, 1], abs=0.01)


def test_the_true_reward_reaches_the_bayes_limits_on_the_test_set():
    """The test set alone: the exact reward of its points, so its accuracies are the limits up to Sobol error, 0.005."""
    normal = normal_points(1024, 4)
    sides = [4 * side[:, 1] + 2 for side in (DESIRABLE.model_units().place(normal[:, :2]),)]
    rejected = 4 * (-1 + 0.5 * normal[:, 3]) + 2
    found = Rewards(sides[0], rejected, sides[0], rejected).accuracies()
    assert float(found["pair"]) == pytest.approx(bayes_accuracy("pair"), abs=5e-3)
    assert float(found["sample"]) == pytest.approx(bayes_accuracy("sample"), abs=5e-3)


def test_policy_equal_to_reference_has_no_reward():
    schedule, reference = linear_schedule(20), Ensemble.initial(Architecture(20, 8), [0, 1])
    rewards = held_out_rewards(reference.copy(2), reference, schedule, [0.0, 0.0], pairs=64)
    assert rewards.chosen.shape == (4, 64) and float(rewards.chosen.abs().max()) < 1e-6
    assert (rewards.accuracies()["pair"] == 0.5).all()


def test_single_draws_average_to_the_averaged_reward():
    """One draw a pair against the mean over all: the same mean over the test set, within 5 standard errors."""
    schedule, reference = linear_schedule(20), Ensemble.initial(Architecture(20, 8), [0])
    policy = reference.copy()
    policy.parameters += 0.05 * torch.randn(policy.parameters.shape)
    rewards = held_out_rewards(policy, reference, schedule, [0.0])
    error = float(rewards.chosen_once.std()) / 1024**0.5
    assert float(rewards.chosen_once.mean()) == pytest.approx(float(rewards.chosen.mean()), abs=5 * error)
    assert float(rewards.chosen_once.std()) > float(rewards.chosen.std())


def test_too_few_points_for_the_energy_distance():
    with pytest.raises(ValueError, match="points must be more than 64, got 64"):
        energy_distance(torch.randn(64, 2))
