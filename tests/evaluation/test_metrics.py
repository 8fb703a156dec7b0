import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from dkto.evaluation.metrics import (
    WinRate,
    agreement,
    diversity,
    drift,
    median_of_images,
    paired_bootstrap,
    sign_test,
    tango_interval,
    wilson_interval,
    win_rate,
)

SCORES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40)


# --- win-rates


@settings(deadline=None, max_examples=50)
@given(SCORES)
def test_win_rate_counts_every_prompt_once(scores):
    ours, theirs = np.array(scores).T
    result, mirrored = win_rate(ours, theirs), win_rate(theirs, ours)
    assert result.wins + result.ties + result.losses == result.n == len(scores)
    assert result.rate == (result.wins + 0.5 * result.ties) / result.n
    assert 0 <= result.low <= result.rate <= result.high <= 1
    assert (mirrored.wins, mirrored.losses, mirrored.ties) == (result.losses, result.wins, result.ties)
    assert mirrored.rate == pytest.approx(1 - result.rate)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - result.high, 1 - result.low))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_interval_equals_scipys_on_whole_counts(counts, confidence):
    expected = stats.binomtest(*counts).proportion_ci(confidence, method="wilson")
    assert wilson_interval(*counts, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 100), st.floats(0, 1))
def test_the_ends_of_a_wilson_interval_solve_the_score_equation(n, rate):
    z = stats.norm.ppf(0.975)
    for end in wilson_interval(rate * n, n):
        assert abs(rate - end) == pytest.approx(z * (end * (1 - end) / n) ** 0.5, abs=1e-7)


def test_the_interval_of_no_win_and_of_wins_only_reaches_the_rate_exactly():
    for n in range(1, 200):
        assert wilson_interval(0, n)[0] == 0.0
        assert wilson_interval(n, n)[1] == 1.0


def test_a_half_win_lies_between_its_neighbours():
    low = [wilson_interval(successes, 20)[0] for successes in (12, 12.5, 13)]
    high = [wilson_interval(successes, 20)[1] for successes in (12, 12.5, 13)]
    assert low == sorted(low)
    assert high == sorted(high)
    assert len({*low, *high}) == 6


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 400), st.integers(0, 400), st.floats(0.5, 0.999))
def test_without_ties_tangos_interval_is_wilsons(wins, losses, confidence):
    counts = (wins + 1, losses)
    expected = wilson_interval(counts[0], sum(counts), confidence)
    assert tango_interval(counts[0], 0, losses, confidence) == pytest.approx(expected, abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.tuples(*[st.integers(0, 60)] * 3).filter(any))
def test_the_ends_of_tangos_interval_solve_its_score_equation(counts):
    """The likeliest share of losses, given the difference, is found here by searching, not by the formula."""
    wins, _, losses = counts
    n, seen = sum(counts), np.array(counts) > 0
    for rate in tango_interval(*counts):
        d = 2 * rate - 1
        if abs(d) > 1 - 1e-9:
            continue

        def unlikely(q, d=d):
            parts = np.array([q + d, 1 - 2 * q - d, q])
            return -(np.array(counts)[seen] * np.log(np.maximum(parts[seen], 1e-300))).sum()

        q = optimize.minimize_scalar(
            unlikely, bounds=(max(0, -d), (1 - d) / 2), method="bounded", options={"xatol": 1e-10}
        ).x
        spread = (n * (2 * q + d * (1 - d))) ** 0.5
        assert abs(wins - losses - n * d) == pytest.approx(stats.norm.ppf(0.975) * spread, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("n", "win", "tie", "width"),
    [
        *((500, 0.386, 0.58, 4.8), (500, 0.2, 0.66, 5.1), (500, 0.5, 0, 8.7)),
        *((60, 0.2, 0.6, 16.1), (60, 0.95, 0.04, 8.5), (40, 0.1, 0.85, 13.6)),
    ],
)
def test_tangos_interval_covers_what_it_says_where_most_prompts_tie(n, win, tie, width):
    """Half a win for a tie made Wilson's cover 99.9 % and be up to twice as wide."""
    draws, times = np.unique(
        np.random.default_rng(0).multinomial(n, [win, tie, 1 - win - tie], 5000), axis=0, return_counts=True
    )
    low, high = np.array([tango_interval(*map(int, draw)) for draw in draws]).T
    rate = win + tie / 2
    assert ((low <= rate) & (rate <= high)) @ times / 5000 == pytest.approx(0.95, abs=0.013)
    assert 100 * (high - low) @ times / 5000 == pytest.approx(width, abs=0.15)


def test_the_kept_rows_that_wilson_left_open():
    """KTO is ahead of its loss-averse utility on the prompts of seed 0, and behind the risk-seeking one."""
    ahead, behind = WinRate.of(101, 333, 66), WinRate.of(67, 337, 96)  # seed 0 of papermill_runs/reference/paper_full
    assert (round(100 * ahead.low, 1), round(100 * ahead.high, 1)) == (51.0, 56.0)
    assert (round(100 * behind.low, 1), round(100 * behind.high, 1)) == (44.6, 49.6)
    assert wilson_interval(101 + 333 / 2, 500)[0] < 0.5 < wilson_interval(67 + 337 / 2, 500)[1]


def test_one_end_of_tangos_interval_is_the_rate_where_all_was_won_or_lost():
    for counts in ((0, 0, 1), (7, 0, 0), (0, 4, 0)):
        low, high = tango_interval(*counts)
        assert (low == 0) == (counts[2] == sum(counts)) and (high == 1) == (counts[0] == sum(counts))


def test_a_difference_in_the_seventh_decimal_is_a_tie():
    """One image scored in two batches; rounding each score would part two that lie on both sides of a border."""
    ours, theirs = [0.5 + 3e-8, 0.1234565 + 3e-8, 1.0], [0.5, 0.1234565 - 3e-8, 1.0 - 2e-6]
    result = win_rate(ours, theirs)
    assert (result.wins, result.ties, result.losses) == (1, 2, 0) and sign_test(ours, theirs) == 1.0
    assert agreement([3e-8, 1.0], [1.0, 1.0]).n == 1
    with pytest.warns(UserWarning, match="all scores lie within 3e-07 of each other and tie, .*a larger scale"):
        assert win_rate([3e-7, 1e-7], [0.0, 2e-7]).ties == 2


def test_a_win_rate_reads_as_one_line():
    ours = np.array([1.0] * 46 + [0.0] * 2 + [0.5] * 2)
    assert str(win_rate(ours, np.full(50, 0.5))) == "94 % [85, 98] n=50"


@settings(deadline=None, max_examples=50)
@given(SCORES)
def test_sign_test_is_the_binomial_test_without_ties(scores):
    ours, theirs = np.array(scores).T
    wins, losses = sum(a > b for a, b in scores), sum(a < b for a, b in scores)
    expected = stats.binomtest(int(wins), int(wins + losses)).pvalue if wins + losses else 1.0
    assert sign_test(ours, theirs) == pytest.approx(expected)


def test_sign_test_by_hand():
    assert sign_test([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]) == pytest.approx(2 / 2**5)
    assert sign_test([1, 2], [1, 2]) == 1.0


def test_paired_bootstrap_covers_the_normal_interval_of_a_large_sample():
    generator = np.random.default_rng(0)
    theirs = generator.normal(size=2000)
    ours = theirs + generator.normal(0.3, 1.0, size=2000)  # paired: the prompts' own spread cancels
    result = paired_bootstrap(ours, theirs)
    standard_error = np.std(ours - theirs) / 2000**0.5
    assert result.mean == pytest.approx(np.mean(ours - theirs))
    assert result.low == pytest.approx(result.mean - 1.96 * standard_error, abs=0.2 * standard_error)
    assert result.high == pytest.approx(result.mean + 1.96 * standard_error, abs=0.2 * standard_error)
    narrower = paired_bootstrap(ours, theirs, confidence=0.5)
    assert result.low < narrower.low < narrower.high < result.high


def test_paired_bootstrap_is_repeatable():
    ours, theirs = np.random.default_rng(1).normal(size=(2, 30))
    assert paired_bootstrap(ours, theirs, seed=3) == paired_bootstrap(ours, theirs, seed=3)
    assert paired_bootstrap(ours, theirs, seed=3) != paired_bootstrap(ours, theirs, seed=4)


# --- pictures


def test_the_median_image_exists_and_is_the_lower_middle_one_of_an_even_number():
    values, which = median_of_images([[5.0, 1.0, 3.0, 2.0], [1.0, 2.0, 2.0, 9.0]])
    assert values.tolist() == [2.0, 2.0]
    assert which.tolist() == [3, 1]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 9), min_size=5, max_size=5), min_size=1, max_size=6))
def test_the_median_of_five_is_numpys(scores):
    values, which = median_of_images(scores)
    assert values.tolist() == np.median(scores, axis=1).tolist()
    assert [row[i] for row, i in zip(scores, which, strict=True)] == values.tolist()


def test_drift_and_diversity_by_hand():
    black, grey, white = (np.full((4, 4, 3), value, np.uint8) for value in (0, 51, 255))
    assert drift(np.stack([grey, white]), np.stack([black, black])) == pytest.approx((0.2 + 1) / 2)
    assert drift(np.stack([black]), np.stack([white])) == 1.0  # no wrap-around of unsigned numbers
    assert diversity(np.stack([black, grey, white])[None]) == pytest.approx((0.2 + 1 + 0.8) / 3)
    assert diversity(np.stack([grey, grey])[None]) == 0.0


def test_diversity_does_not_see_the_difference_between_prompts():
    black, white = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 255, np.uint8)
    assert diversity(np.stack([black, white])) == 0.0


# --- wrong arguments


PIXELS = np.zeros((2, 3, 3, 3), np.uint8)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: win_rate([1, 2], [1]), "scores must be two lists of equal length, got shapes (2,) and (1,)"),
        (lambda: win_rate([], []), "scores must be two lists of equal length, got shapes (0,) and (0,)"),
        (lambda: win_rate([[1]], [[1]]), "scores must be two lists of equal length, got shapes (1, 1) and (1, 1)"),
        (lambda: win_rate([1, 2], [1, np.nan]), "score 1 of theirs is not finite"),
        (lambda: sign_test([np.inf], [1]), "score 0 of ours is not finite"),
        (lambda: win_rate([1], [2], confidence=95), "confidence must be in (0, 1), got 95"),
        (lambda: tango_interval(0, 0, 0), "wins, ties and losses must be counts, one above 0, got 0, 0 and 0"),
        (lambda: tango_interval(3, -1, 0), "wins, ties and losses must be counts, one above 0, got 3, -1 and 0"),
        (lambda: wilson_interval(0, 0), "n must be 1 or above, got 0"),
        (lambda: wilson_interval(5.5, 5), "successes must be in [0, 5], got 5.5"),
        (lambda: paired_bootstrap([1], [2]), "paired_bootstrap needs at least 2 prompts, got 1"),
        (lambda: paired_bootstrap([1, 2], [2, 3], confidence=1), "confidence must be in (0, 1), got 1"),
        (lambda: median_of_images([1.0, 2.0]), "scores must have shape (prompts, images), got (2,)"),
        (lambda: median_of_images([[1.0, 2.0], [np.nan, 1.0]]), "score of prompt 1, image 0 is not finite"),
        (lambda: drift(PIXELS, PIXELS[:1]), "base_images must have the shape of images (2, 3, 3, 3), got (1, 3, 3, 3)"),
        (lambda: drift(PIXELS / 255, PIXELS), "images must be uint8 and not empty, got float64 of shape (2, 3, 3, 3)"),
        (lambda: diversity(PIXELS), "images must have shape (prompts, 2 or more, H, W, 3), got (2, 3, 3, 3)"),
        (
            lambda: diversity(PIXELS[:, None]),
            "images must have shape (prompts, 2 or more, H, W, 3), got (2, 1, 3, 3, 3)",
        ),
    ],
)
def test_a_wrong_argument_raises_its_sentence(call, sentence):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith(sentence)


def test_agreement_counts_prompts_where_both_scorers_name_a_winner():
    result = agreement([1.0, 2.0, -1.0, 0.0, 3.0], [0.5, -2.0, -9.0, 1.0, 0.0])
    assert (result.rate, result.n) == (2 / 3, 3)
    assert (result.low, result.high) == wilson_interval(2, 3)
    assert agreement([0.0, 1.0], [1.0, 0.0]) == (0.5, 0.0, 1.0, 0)
    with pytest.raises(ValueError, match="scores must be two lists of equal length"):
        agreement([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 2"):
        agreement([1.0], [1.0], confidence=2)
