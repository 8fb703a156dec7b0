"""The world against closed forms, quadrature and draws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toy.world import (
    BASE_KL,
    DESIRABLE,
    PRETRAINING,
    ROLES,
    UNDESIRABLE,
    Gaussian,
    bayes_accuracy,
    exact_noise_pred,
    gaussian_kl,
    preference_reward,
    to_model_units,
    to_paper_units,
    undesirable_share,
)


def test_the_papers_variances():
    assert {name: round(g.std**2, 12) for name, g in ROLES.items()} == {
        "pretraining": 0.04,
        "desirable": 0.01,
        "undesirable": 0.01,
    }


def test_pretraining_is_the_standard_normal_in_model_units():
    assert PRETRAINING.model_units() == Gaussian((0.0, 0.0), 1.0)
    assert UNDESIRABLE.model_units() == Gaussian((-1.0, -1.0), 0.5)


@given(st.tuples(st.floats(-5, 5), st.floats(-5, 5)))
def test_units_go_there_and_back(point):
    x = torch.tensor(point, dtype=torch.float64)
    assert torch.allclose(to_paper_units(to_model_units(x)), x, atol=1e-12)


def test_log_density_integrates_to_one_and_equals_torchs():
    grid = torch.linspace(-0.7, 1.3, 801, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(grid, grid + 0.5, indexing="ij"), dim=-1)
    assert float(DESIRABLE.log_density(points).exp().sum() * (grid[1] - grid[0]) ** 2) == pytest.approx(1, abs=1e-9)
    mean, eye = torch.tensor(DESIRABLE.mean, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    other = torch.distributions.MultivariateNormal(mean, 0.01 * eye)
    assert torch.allclose(DESIRABLE.log_density(points), other.log_prob(points), atol=1e-9)


def test_reward_is_a_plane_in_y():
    x = torch.rand(100, 2, dtype=torch.float64)
    assert torch.allclose(preference_reward(x), 20 * x[:, 1] - 14, atol=1e-12)


def test_constants_of_the_paper_world():
    """Bayes 92.14 % and 84.13 %, undesirable shares 15.87 % and 30.85 %, KL of the base 3.6137."""
    assert bayes_accuracy("pair") == pytest.approx(0.9214, abs=5e-5)
    assert bayes_accuracy("sample") == pytest.approx(0.8413, abs=5e-5)
    assert undesirable_share(DESIRABLE) == pytest.approx(0.1587, abs=5e-5)
    assert undesirable_share(PRETRAINING) == pytest.approx(0.3085, abs=5e-5)
    assert pytest.approx(3.6137, abs=5e-5) == BASE_KL


def test_constants_are_those_of_draws():
    """A million draws: 4 standard errors of a rate are 0.002 at most."""
    draws = torch.randn(2, 1_000_000, 2, dtype=torch.float64)
    liked, disliked = preference_reward(DESIRABLE.place(draws[0])), preference_reward(UNDESIRABLE.place(draws[1]))
    assert float((liked > disliked).double().mean()) == pytest.approx(bayes_accuracy("pair"), abs=2e-3)
    assert float((liked > 0).double().mean()) == pytest.approx(bayes_accuracy("sample"), abs=2e-3)
    assert float((liked < 0).double().mean()) == pytest.approx(undesirable_share(DESIRABLE), abs=2e-3)


def test_kl_equals_torchs():
    covariance = torch.tensor([[0.05, 0.01], [0.01, 0.02]], dtype=torch.float64)
    mean = torch.tensor([0.1, 0.9], dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal
    target = normal(torch.tensor(DESIRABLE.mean, dtype=torch.float64), 0.01 * torch.eye(2, dtype=torch.float64))
    expected = torch.distributions.kl_divergence(normal(mean, covariance), target)
    assert float(gaussian_kl(mean, covariance, DESIRABLE)) == pytest.approx(float(expected), abs=1e-9)


def test_exact_noise_is_the_regression_of_noise_on_the_noisy_point():
    """Least squares of eps on x_t over 400,000 draws; 4 standard errors of its coefficients are below 0.01."""
    gaussian, abar = DESIRABLE.model_units(), torch.tensor(0.3, dtype=torch.float64)
    noise = torch.randn(400_000, 2, dtype=torch.float64)
    noisy = abar.sqrt() * gaussian.place(torch.randn_like(noise)) + (1 - abar).sqrt() * noise
    design = torch.stack([noisy[:, 0], torch.ones(len(noisy), dtype=torch.float64)], dim=1)
    slope, offset = torch.linalg.lstsq(design, noise[:, 0]).solution
    at = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    exact = exact_noise_pred(gaussian, at, abar)
    assert float(exact[0, 0]) == pytest.approx(float(offset), abs=0.01)
    assert float(exact[1, 0] - exact[0, 0]) == pytest.approx(float(slope), abs=0.01)


def test_pretraining_has_the_noise_sqrt_of_one_minus_abar_times_the_point():
    x, abar = torch.randn(10, 2, dtype=torch.float64), torch.rand(10, dtype=torch.float64)
    expected = (1 - abar).sqrt()[:, None] * x
    assert torch.allclose(exact_noise_pred(PRETRAINING.model_units(), x, abar), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Gaussian((0.0,), 1.0), "mean must have 2 coordinates, got 1"),
        (lambda: Gaussian((0.0, 0.0), 0.0), "std must be > 0, got 0.0"),
        (lambda: bayes_accuracy("triple"), "unknown definition 'triple'; known: pair, sample"),
    ],
)
def test_wrong_arguments_raise_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_flat_covariance_has_an_infinite_kl():
    assert math.isinf(float(gaussian_kl(torch.zeros(2), torch.zeros(2, 2), DESIRABLE)))
