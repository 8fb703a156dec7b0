"""The toy's objectives are `dkto.objective.losses`: weights against autograd, groups, draws, names."""

import pytest
import torch

from dkto.objective.losses import denoising_error, effective_weight, implicit_reward, reference_point
from dkto.objective.methods import Errors
from dkto.objective.utilities import UTILITIES
from toy.network import Architecture, Ensemble
from toy.objectives import (
    METHODS,
    NEWER,
    TOY_ESTIMATORS,
    Drawing,
    Method,
    draw_samples,
    drawing_of,
    error_weights,
    get_method,
    group_methods,
    loss_of,
)
from toy.training import draw_steps
from toy.world import DESIRABLE, UNDESIRABLE

EVERY = [
    *METHODS.values(),
    *(Method(utility=name) for name in UTILITIES),
    *(Method(estimator=name, clamp=clamp) for name in TOY_ESTIMATORS for clamp in (True, False)),
    Method(beta=3.0, desirable_weight=2.0, undesirable_weight=0.5),
    Method("dpo", beta=100.0),
    *NEWER.values(),
    Method("nft", mixing=0.5, anchor=2.0),
    Method("dpo", anchor=0.5, sft_weight=1.5),
    Method(noise_draws=2),
]


def some_errors(methods, batch=8):
    shape = (len(methods), 2, batch)
    policy, reference = torch.rand(2, *shape, dtype=torch.float64)
    is_desirable = torch.rand(shape) < 0.7
    is_desirable[..., 0] = True
    return policy, reference, is_desirable, torch.randn(shape, dtype=torch.float64)


def name_of(method):
    changed = (f"{k}={v}" for k, v in vars(method).items() if v != getattr(Method, k))
    return ",".join(changed) or "kto"


@pytest.mark.parametrize("method", EVERY, ids=name_of)
def test_weighted_denoising_is_the_gradient_of_every_loss(method):
    """Weights on a hand-written backward pass = autograd from the loss to every parameter, to 1e-12 in float64."""
    network = Ensemble.initial(Architecture(20, width=8), [0, 1], torch.float64)
    leaf = Ensemble(network.architecture, network.parameters.clone().requires_grad_(True))
    noise, expected_noise = torch.randn(2, 2, 8, 2, dtype=torch.float64)
    read = network.inputs(torch.randn_like(noise), torch.randint(20, (2, 8)))
    _, reference_error, is_desirable, gap = some_errors([method])
    (objective,) = group_methods([method], torch.float64)

    def errors_of(noise_pred):
        errors = Errors(denoising_error(noise_pred, noise, batch_dims=2)[None], reference_error)
        shift = denoising_error(noise_pred, expected_noise, batch_dims=2)[None]
        return errors._replace(shift=shift, overlap=torch.rand(1, 2, 4, dtype=torch.float64, generator=fixed()))

    unrelated = None if gap is None else Errors(torch.zeros_like(gap), gap)
    felt = loss_of(objective, errors_of(leaf.forward(read)[0])._replace(unrelated=unrelated), is_desirable)
    (expected,) = torch.autograd.grad(felt.loss.sum(), leaf.parameters)

    noise_pred, trace = network.forward(read)
    errors = errors_of(noise_pred)
    pull = error_weights([objective], errors if method.needs_shift else errors._replace(shift=None), is_desirable, gap)
    by_prediction = pull.on_error[0, ..., None] * (noise_pred - noise)
    if method.needs_shift:
        by_prediction = by_prediction + pull.on_shift[0, ..., None] * (noise_pred - expected_noise)
    by_hand = network.backward(trace, by_prediction)
    assert torch.allclose(by_hand, expected, rtol=1e-12, atol=1e-12)
    assert float(expected.abs().max()) > 1e-4


def fixed():
    return torch.Generator().manual_seed(5)


def test_weights_of_kto_are_beta_times_effective_weight():
    method = Method(beta=7.0, desirable_weight=2.0)
    policy, reference, is_desirable, _ = some_errors([method])
    errors = Errors(policy, reference)
    weights, _, (felt,) = error_weights(group_methods([method], torch.float64), errors, is_desirable)
    reward = implicit_reward(policy, reference, 7.0)
    point = reference_point(reward)
    expected = 7.0 * effective_weight(reward, is_desirable, point, desirable_weight=2.0) / 8
    assert torch.allclose(weights, expected, atol=1e-14)
    assert torch.equal(felt.point, point)


def test_groups_give_what_methods_give_alone():
    """Methods of one loss go through one call with a number each; nothing leaks between them."""
    policy, reference, is_desirable, gap = some_errors(EVERY)
    errors = Errors(policy, reference, shift=torch.rand_like(policy), overlap=torch.rand_like(policy[..., ::2]))
    groups = group_methods(EVERY, torch.float64)
    assert len(groups) < len(EVERY)
    together = error_weights(groups, errors, is_desirable, gap)
    for row, method in enumerate(EVERY):
        part = slice(row, row + 1)
        mine = Errors(*(None if value is None else value[part] for value in errors))
        alone = error_weights(group_methods([method], torch.float64), mine, is_desirable[part], gap[part])
        assert torch.allclose(together.on_error[row], alone.on_error[0], atol=1e-14), method
        if method.needs_shift:
            assert torch.allclose(together.on_shift[row], alone.on_shift[0], atol=1e-14), method
            assert together.on_shift[row].any()
        else:
            assert not together.on_shift[row].any(), method


def test_samples_come_from_their_distributions():
    draws = next(draw_steps([0], "test", 200_000, 20, torch.float64))
    samples = draw_samples(Drawing(), draws)
    liked = samples.is_desirable[0]
    assert float(liked.double().mean()) == pytest.approx(0.8, abs=4e-3)
    for role, mask in ((DESIRABLE, liked), (UNDESIRABLE, ~liked)):
        points = samples.clean[0][mask]
        assert points.mean(0).tolist() == pytest.approx(role.model_units().mean, abs=0.015)
        assert points.std(0).tolist() == pytest.approx([0.5, 0.5], abs=0.01)
    assert samples.timesteps.unique().tolist() == list(range(20))


def test_flips_change_labels_at_their_rate_and_never_the_points():
    draws = next(draw_steps([0], "test", 200_000, 20, torch.float32))
    clean, noisy = (draw_samples(Drawing(flip_rate=rate), draws) for rate in (0.0, 0.3))
    assert torch.equal(clean.clean, noisy.clean)
    wrong = clean.is_desirable != noisy.is_desirable
    assert float(wrong.float().mean()) == pytest.approx(0.3, abs=5e-3)
    every = draw_samples(Drawing(flip_rate=1.0), draws)
    assert torch.equal(every.is_desirable, ~clean.is_desirable)


def test_pairs_share_noise_and_time_and_flips_swap_their_sides():
    draws = next(draw_steps([0], "test", 1000, 20, torch.float32))
    right, wrong = (draw_samples(Drawing("pairs", 1.0, rate), draws) for rate in (0.0, 1.0))
    half = 500
    assert torch.equal(right.noise[:, :half], right.noise[:, half:])
    assert torch.equal(right.timesteps[:, :half], right.timesteps[:, half:])
    assert right.is_desirable[:, :half].all() and not right.is_desirable[:, half:].any()
    assert torch.equal(right.clean[:, :half], wrong.clean[:, half:])
    assert float(right.clean[:, :half, 1].mean() - right.clean[:, half:, 1].mean()) == pytest.approx(1, abs=0.15)


def test_groups_alternate_and_share_noise_and_time():
    draws = next(draw_steps([0], "test", 1000, 20, torch.float32))
    samples = draw_samples(drawing_of(Method("dgpo", group_size=4)), draws)
    groups = samples.timesteps.unflatten(1, (-1, 4))
    assert (groups == groups[..., :1]).all() and samples.timesteps.unique().numel() == 20
    assert samples.is_desirable[0, ::2].all() and not samples.is_desirable[0, 1::2].any()
    assert float(samples.clean[0, ::2, 1].mean() - samples.clean[0, 1::2, 1].mean()) == pytest.approx(1, abs=0.15)
    with pytest.raises(ValueError, match="batch_size 1000 is not a multiple of the 6 samples that belong together"):
        draw_samples(drawing_of(Method("dgpo", group_size=6)), draws)


def test_noises_of_one_sample_lie_together():
    draws = next(draw_steps([0], "test", 1000, 20, torch.float32))
    samples = draw_samples(drawing_of(Method(noise_draws=2)), draws)
    assert torch.equal(samples.clean[:, ::2], samples.clean[:, 1::2])
    assert torch.equal(samples.is_desirable[:, ::2], samples.is_desirable[:, 1::2])
    assert not torch.equal(samples.noise[:, ::2], samples.noise[:, 1::2])


def test_methods_that_draw_alike_share_their_samples():
    same = {drawing_of(METHODS[name]) for name in ("loss_averse", "risk_seeking", "kahneman_tversky")}
    assert len(same) == 1
    assert len({drawing_of(method) for method in METHODS.values()}) == 4
    assert drawing_of(Method("dpo", desirable_fraction=0.3)) == drawing_of(METHODS["dpo"])


def test_only_csft_is_told_a_label():
    assert {name for name, method in METHODS.items() if method.label} == {"csft"}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Method("ktoo"), "unknown objective 'ktoo'; did you mean 'kto'\\? known: kto, dpo, sft, sft_all, csft"),
        (
            lambda: Method(estimator="unrelated"),
            "unknown estimator 'unrelated'; known: batch, independent, per_class, running, zero",
        ),
        (lambda: Method(utility="sigmoid"), "unknown utility 'sigmoid'.*known: kahneman_tversky, loss_averse"),
        (lambda: get_method("kahneman"), "unknown method 'kahneman'; did you mean 'kahneman_tversky'\\? known: sft"),
        (lambda: Method(beta=0.0), "beta must be > 0, got 0.0"),
        (lambda: Method(undesirable_weight=-1.0), "undesirable_weight must be > 0, got -1.0"),
        (lambda: Method(desirable_fraction=1.2), r"desirable_fraction must be in \[0, 1\], got 1.2"),
        (lambda: Method(flip_rate=-0.1), r"flip_rate must be in \[0, 1\], got -0.1"),
    ],
)
def test_wrong_arguments_raise_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
