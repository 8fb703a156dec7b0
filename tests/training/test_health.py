"""The light of a training: from made-up records whose health is known."""

import pytest

from dkto.training import training_health


def records(slope, margin, error=0.2, steps=60):
    first = [{"global_step": n, "utility_slope": 0.25, "policy_error": 0.2} for n in range(20)]
    return first + [{"utility_slope": slope, "reward/margin": margin, "policy_error": error} for _ in range(steps)]


@pytest.mark.parametrize(
    ("slope", "margin", "error", "light"),
    [
        (0.2, 1.0, 0.2, "green"),
        (0.2, -0.1, 0.2, "yellow"),
        (0.08, 3.0, 0.2, "yellow"),
        (0.03, 9.0, 0.2, "red"),
        (0.2, 1.0, 0.5, "red"),
        (float("nan"), 1.0, 0.2, "red"),
    ],
)
def test_slope_margin_and_error_make_the_light(slope, margin, error, light):
    found = training_health(records(slope, margin, error))
    assert found.light == light and found.sentence.startswith(f"{light}: the slope is ")
    assert found.error == pytest.approx(error / 0.2) and found.margin == pytest.approx(margin)


def test_the_slope_is_relative_to_that_of_the_utility_at_zero():
    assert training_health(records(0.25, 1.0), "loss_averse").slope == pytest.approx(0.5)


def test_records_without_a_slope_are_refused():
    with pytest.raises(ValueError, match="must hold a step with its utility_slope, got 1 without"):
        training_health([{"loss": 0.1}])
