"""The biased sampler (paper 4.3): classes at gamma, rows evenly, each draw a function of seed, step and place."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dkto.data.sampler import BiasedSampler


def test_the_sampler_draws_classes_at_gamma_and_rows_evenly():
    is_desirable = np.arange(20) < 5
    sampler = BiasedSampler(is_desirable, 0.8, seed=0)
    rows = np.concatenate([sampler.rows(step, 50) for step in range(200)])
    share = is_desirable[rows].mean()
    assert abs(share - 0.8) < 4 * (0.8 * 0.2 / len(rows)) ** 0.5
    for members in (rows[is_desirable[rows]], rows[~is_desirable[rows]]):
        counts = np.bincount(members)[np.unique(members)]
        expected = len(members) / len(counts)
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert len(counts) in (5, 15) and chi_square < 40  # the 99.9 % quantile at 14 degrees of freedom is 36


@given(step=st.integers(0, 10**6), seed=st.integers(0, 2**32 - 1), size=st.integers(1, 16))
def test_a_draw_depends_only_on_seed_step_and_place(step, seed, size):
    is_desirable = np.arange(9) % 2 == 0
    one, two = (BiasedSampler(is_desirable, 0.5, seed).rows(step, n) for n in (size, 16))
    assert (one == two[:size]).all() and one.min() >= 0 and one.max() < 9


@given(st.integers(1, 2**53 - 1), st.integers(1, 10**7))
def test_the_last_place_is_never_beyond_the_class(numerator, members):
    """The generator gives multiples of 2^-53 below 1; times the size of a class they round to a valid place."""
    assert 0 <= int(numerator / 2**53 * members) < members


def test_steps_and_seeds_differ():
    is_desirable = np.arange(1000) % 2 == 0
    sampler = BiasedSampler(is_desirable, 0.5, 0)
    assert (sampler.rows(0, 16) != sampler.rows(1, 16)).any()
    assert (sampler.rows(0, 16) != BiasedSampler(is_desirable, 0.5, 1).rows(0, 16)).any()


@pytest.mark.parametrize(("liked", "missing"), [(True, "disliked"), (False, "liked")])
def test_one_class_only_is_refused_unless_gamma_asks_for_it_alone(liked, missing):
    with pytest.raises(ValueError, match=f"one class only: no {missing} image among 4"):
        BiasedSampler(np.full(4, liked), 0.8, 0)
    assert BiasedSampler(np.full(4, liked), float(liked), 0).rows(0, 3).max() < 4


def test_gamma_outside_its_range():
    with pytest.raises(ValueError, match=r"desirable_fraction must be in \[0, 1\], got 1.2"):
        BiasedSampler(np.array([True, False]), 1.2, 0)
