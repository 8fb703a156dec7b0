"""The trainer's objective against an independent transcription of the published formulas, one number at a time.

Written from the formulas of Diffusion-KTO (paper 4.1-4.2, and the released code's variants) and of Diffusion-DPO with
Python's `math` alone: no tensor, no function of this project.
"""

import math
from dataclasses import replace

import pytest
import torch

from dkto.objective.accuracy import measures
from dkto.objective.methods import METHODS, Errors, method_loss
from dkto.objective.utilities import _BUILT_IN_NAMES
from dkto.training.batches import Batch
from dkto.training.step import columns

ESTIMATORS = ("batch", "unrelated", "per_class", "zero")


def sigma(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigma(x):
    return min(x, 0) - math.log1p(math.exp(-abs(x)))


# what a liked (s = +1) or disliked (s = -1) sample with beta g - z = x contributes, 1 - h
CONTRIBUTION = {
    "kahneman_tversky": lambda s, x: 1 - sigma(s * x),
    "loss_averse": lambda s, x: 1 - log_sigma(s * x),
    "risk_seeking": lambda s, x: 1 - s * -log_sigma(-x),
    "risk_seeking_literal": lambda s, x: 1 - -log_sigma(-s * x),
    "exponential": lambda s, x: 1 - s * math.exp(x),
    "linear": lambda s, x: 1 - s * x,
}


def point(estimator, clamp, beta, policy, reference, unrelated_policy, unrelated_reference, liked):
    def mean(values):
        return sum(values) / len(values)

    gaps = [beta * (r - p) for p, r in zip(policy, reference, strict=True)]
    if estimator == "batch":
        z = mean(gaps)
    elif estimator == "unrelated":
        z = mean([beta * (r - p) for p, r in zip(unrelated_policy, unrelated_reference, strict=True)])
    elif estimator == "per_class":
        classes = [[g for g, like in zip(gaps, liked, strict=True) if like is side] for side in (True, False)]
        z = mean([mean(c) for c in classes if c])
    else:
        return 0.0
    return max(z, 0.0) if clamp else z


def kto(utility, z, beta, policy, reference, liked, weights):
    terms = []
    for p, r, like in zip(policy, reference, liked, strict=True):
        weight, s = (weights[0], 1) if like else (weights[1], -1)
        terms.append(weight * CONTRIBUTION[utility](s, beta * (r - p) - z))
    return sum(terms) / len(terms)


def evaluate(config, policy, reference, unrelated, liked):
    leaf = torch.tensor(policy, dtype=torch.float64, requires_grad=True)

    def tensor(values):
        return torch.tensor(values, dtype=torch.float64)

    batch = Batch(None, None, None, {}, torch.tensor(liked))
    others = Errors(*map(tensor, unrelated)) if config.estimator == "unrelated" else None
    errors = Errors(leaf, tensor(reference), others)
    settings = METHODS[config.objective].loss_settings(config)
    felt = method_loss(config.objective, errors, batch.is_desirable, reduce=lambda sums: sums, **settings)
    felt.loss.backward()
    return float(felt.loss.detach()), leaf.grad.tolist(), columns(felt, errors, batch, config.beta)


@pytest.fixture(params=range(4))
def errors(request):
    generator = torch.Generator().manual_seed(request.param)
    values = torch.rand(4, 6, generator=generator, dtype=torch.float64).tolist()
    liked = [True, True, False, True, False, True] if request.param else [True] * 6
    return *values, liked


def test_every_utility_is_transcribed():
    assert CONTRIBUTION.keys() == _BUILT_IN_NAMES


@pytest.mark.parametrize("utility", CONTRIBUTION)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("beta", [0.3, 6.0])
def test_kto_is_the_published_formula(errors, config, utility, estimator, clamp, beta):
    policy, reference, unrelated_policy, unrelated_reference, liked = errors
    weights = (1.0, 1.5)
    config = replace(
        config,
        utility=utility,
        estimator=estimator,
        clamp=clamp,
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    unrelated = (unrelated_policy, unrelated_reference)
    loss, gradient, table = evaluate(config, policy, reference, unrelated, liked)
    z = point(estimator, clamp, beta, policy, reference, *unrelated, liked)
    assert float(table["point"][0]) == pytest.approx(z, abs=1e-12)
    assert loss == pytest.approx(kto(utility, z, beta, policy, reference, liked, weights), rel=1e-12)
    for i in range(len(policy)):  # the point is held fixed: it carries no gradient
        step = 1e-6
        ends = []
        for sign in (1, -1):
            moved = [p + sign * step * (j == i) for j, p in enumerate(policy)]
            ends.append(kto(utility, z, beta, moved, reference, liked, weights))
        assert gradient[i] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-8)


def test_the_released_exponential_is_ours_at_a_hundredth_of_beta(errors, config):
    """h = s exp(beta g / 100) - 1 there: the same gradient, a loss that lies 1 higher."""
    policy, reference, _, _, liked = errors
    beta = 50.0
    loss, _, _ = evaluate(
        replace(config, utility="exponential", estimator="zero", beta=beta / 100), policy, reference, (), liked
    )
    released = []
    for p, r, like in zip(policy, reference, liked, strict=True):
        s = 1 if like else -1
        released.append(1 - (s * math.exp(beta * (r - p) / 100) - 1))
    assert loss + 1 == pytest.approx(sum(released) / len(released), rel=1e-12)


def test_dpo_is_the_published_formula_at_half_its_beta(errors, config):
    """inside = -beta/2 ((m_w - m_l) - (r_w - r_l)), loss = -log sigma(inside), Diffusion-DPO's released code."""
    policy, reference, *_ = errors
    published_beta = 7.0
    config = replace(config, objective="dpo", beta=published_beta / 2, batch_size=6)
    loss, gradient, table = evaluate(config, policy, reference, (), [True, False] * 3)

    def published(m):
        terms = []
        for w, lost in ((0, 1), (2, 3), (4, 5)):
            inside = -0.5 * published_beta * ((m[w] - m[lost]) - (reference[w] - reference[lost]))
            terms.append(-log_sigma(inside))
        return sum(terms) / 3

    assert loss == pytest.approx(published(policy), rel=1e-12)
    for i in range(6):
        ends = [published([p + s * 1e-6 * (j == i) for j, p in enumerate(policy)]) for s in (1, -1)]
        assert gradient[i] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6, abs=1e-8)
    right = sum(
        (policy[w] - policy[lost]) - (reference[w] - reference[lost]) < 0 for w, lost in ((0, 1), (2, 3), (4, 5))
    )
    assert measures(**table, pairs=True)["implicit_accuracy/pair"] == pytest.approx(right / 3)


@pytest.mark.parametrize("name", ["sft", "sft_all", "csft"])
def test_supervised_objectives_are_the_mean_error_of_the_liked_or_of_all(errors, config, name):
    policy, reference, _, _, liked = errors
    loss, gradient, _ = evaluate(replace(config, objective=name), policy, reference, (), liked)
    counts = [like or name != "sft" for like in liked]
    share = 1 / sum(counts)
    assert loss == pytest.approx(sum(p * share for p, c in zip(policy, counts, strict=True) if c), rel=1e-12)
    assert gradient == pytest.approx([share * c for c in counts])
