import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dkto.objective.losses import (
    ESTIMATORS,
    denoising_error,
    dpo_loss,
    effective_weight,
    implicit_reward,
    kto_loss,
    reference_point,
    running_sums,
    sft_loss,
)
from dkto.objective.utilities import UTILITIES, Utility

NAMES = ("kahneman_tversky", "loss_averse", "risk_seeking", "risk_seeking_literal", "exponential", "linear")
TAME = tuple(name for name in NAMES if name != "exponential")


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def a_batch(*shape, seed=0):
    """Errors of policy (with gradient) and reference, and likes with at least one of each."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    liked = torch.rand(*shape, generator=generator) < 0.6
    liked[..., 0], liked[..., 1] = True, False
    return policy.requires_grad_(), reference, liked


# --- errors and rewards


def test_denoising_error_by_hand():
    noise_pred = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])  # (2, 1, 2)
    target = torch.tensor([[[1.0, 0.0]], [[3.0, 1.0]]])
    assert denoising_error(noise_pred, target).tolist() == [2.0, 5.0]
    assert denoising_error(noise_pred, target, batch_dims=2).tolist() == [[2.0], [5.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_denoising_error_is_never_computed_in_half_precision(dtype):
    noise_pred = torch.full((1, 4, 64, 64), 300.0, dtype=dtype, requires_grad=True)
    error = denoising_error(noise_pred, torch.zeros_like(noise_pred))
    assert error.dtype == torch.float32
    assert error.item() == 90_000.0  # 300^2 is inf in half precision
    error.sum().backward()
    assert torch.isfinite(noise_pred.grad).all()
    assert denoising_error(noise_pred.double(), noise_pred).dtype == torch.float64


def test_policy_equal_to_reference_has_no_reward():
    policy, _, _ = a_batch(5)
    assert implicit_reward(policy, policy.detach(), 5000.0).abs().max() == 0


def test_reward_is_positive_where_the_policy_denoises_better():
    assert implicit_reward(f64(0.2, 0.7), f64(0.5, 0.5), beta=10.0).tolist() == pytest.approx([3.0, -2.0])


# --- the reference point


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("batch", 2.0), ("unrelated", 3.0), ("independent", 3.0), ("per_class", 0.0), ("zero", 0.0)],
)
def test_reference_point_by_hand(estimator, expected):
    liked = torch.tensor([True, True, True, False])
    point = reference_point(f64(4, 4, 4, -4), estimator, is_desirable=liked, unrelated_reward=f64(1, 5))
    assert point.shape == ()
    assert point.item() == expected


def test_per_class_weighs_both_classes_alike_and_an_empty_one_not_at_all():
    reward = f64(1, 2, 3, 8)
    liked = torch.tensor([[True, True, True, False], [True] * 4, [False] * 4])
    point = reference_point(reward.expand(3, 4), "per_class", is_desirable=liked)
    assert point.tolist() == [5.0, 3.5, 3.5]


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "zero"])
def test_the_clamp_comes_after_the_mean(estimator):
    reward, liked = f64(-5, 3), torch.tensor([True, False])
    tensors = {"is_desirable": liked, "unrelated_reward": reward, "past": running_sums(reward)}
    assert reference_point(reward, estimator, **tensors).item() == 0.0  # a clamp before it would give 1.5
    assert reference_point(reward, estimator, clamp=False, **tensors).item() == -1.0


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("clamp", [True, False])
def test_reference_point_carries_no_gradient(estimator, clamp):
    policy, reference, liked = a_batch(6)
    reward = implicit_reward(policy, reference, 10.0)
    tensors = {"is_desirable": liked, "unrelated_reward": reward, "past": running_sums(reward)}
    point = reference_point(reward, estimator, clamp=clamp, **tensors)
    assert not point.requires_grad
    kto_loss(reward, liked, point).backward()
    alone = policy.grad.clone()
    policy.grad = None
    kto_loss(implicit_reward(policy, reference, 10.0), liked, f64(point.item()).squeeze()).backward()
    assert torch.equal(policy.grad, alone)


def test_mismatched_rewards_are_asked_for():
    for estimator in ("unrelated", "independent"):
        with pytest.raises(ValueError, match=f"estimator {estimator!r} needs unrelated_reward"):
            reference_point(f64(1, 5), estimator)


def on_ranks(shards, **options):
    """What every rank gets when `reduce` sums over all of them."""
    seen = []
    for shard in shards:  # first pass: what each rank would send
        reference_point(**shard, **options, reduce=lambda totals: seen.append(totals) or totals)
    return [reference_point(**shard, **options, reduce=lambda totals: torch.stack(seen).sum(0)) for shard in shards]


@pytest.mark.parametrize("estimator", ["batch", "per_class"])
@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-50, 50), min_size=5, max_size=9), st.integers(1, 4), st.booleans())
def test_on_several_ranks_the_point_is_that_of_the_global_batch(estimator, rewards, cut, clamp):
    reward = f64(*rewards)
    liked = torch.arange(len(rewards)) < 3  # some ranks see one class only
    shards = [{"reward": reward[part], "is_desirable": liked[part]} for part in (slice(cut), slice(cut, None))]
    whole = reference_point(reward, estimator, is_desirable=liked, clamp=clamp)
    for point in on_ranks(shards, estimator=estimator, clamp=clamp):
        torch.testing.assert_close(point, whole, rtol=1e-12, atol=1e-12)


def test_the_mean_is_reduced_before_it_is_clamped():
    shards = [{"reward": f64(-6)}, {"reward": f64(1, 1, 1)}]  # clamped rank means would average to 0.5
    assert [point.item() for point in on_ranks(shards)] == [0.0, 0.0]
    assert [point.item() for point in on_ranks(shards, clamp=False)] == [-0.75, -0.75]


def test_a_mean_over_ranks_serves_as_well_as_a_sum():
    point = reference_point(f64(4, 2), reduce=lambda totals: totals / 8)
    assert point.item() == 3.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_of_many_half_precision_rewards_neither_overflows_nor_miscounts(dtype):
    point = reference_point(torch.full((1001,), 10_000.0, dtype=dtype))
    assert point.dtype == dtype
    assert point == torch.tensor(10_000.0, dtype=dtype)


def test_a_nan_reward_is_not_hidden():
    rewards = torch.tensor([[1.0, torch.nan], [1.0, 3.0]])
    assert reference_point(rewards).isnan().tolist() == [True, False]


# --- Diffusion-KTO


@pytest.mark.parametrize(
    ("utility", "liked_loss", "disliked_loss"),
    [
        # reward 2, reference point 0.5: x = 1.5
        ("kahneman_tversky", 1 - sigmoid(1.5), 1 - sigmoid(-1.5)),
        ("loss_averse", 1 - math.log(sigmoid(1.5)), 1 - math.log(sigmoid(-1.5))),
        ("risk_seeking", 1 + math.log(sigmoid(-1.5)), 1 - math.log(sigmoid(-1.5))),
        ("risk_seeking_literal", 1 + math.log(sigmoid(-1.5)), 1 + math.log(sigmoid(1.5))),
        ("exponential", 1 - math.exp(1.5), 1 + math.exp(1.5)),
        ("linear", -0.5, 2.5),
    ],
)
def test_kto_loss_by_hand(utility, liked_loss, disliked_loss):
    reward, liked, point = f64(2, 2), torch.tensor([True, False]), f64(0.5)[0]
    each = kto_loss(reward, liked, point, utility, reduction="none")
    torch.testing.assert_close(each, f64(liked_loss, disliked_loss), rtol=1e-13, atol=1e-15)
    weighted = kto_loss(reward, liked, point, utility, desirable_weight=0.3, undesirable_weight=1.7)
    assert weighted.item() == pytest.approx((0.3 * liked_loss + 1.7 * disliked_loss) / 2, rel=1e-13)
    assert kto_loss(reward, liked, point, UTILITIES[utility]).item() == each.mean().item()


@pytest.mark.parametrize("utility", NAMES)
def test_gradient_lowers_the_error_of_liked_and_raises_that_of_disliked_samples(utility):
    policy, reference, liked = a_batch(16)
    reward = implicit_reward(policy, reference, 3.0)
    kto_loss(reward, liked, reference_point(reward), utility).backward()
    assert (policy.grad[liked] > 0).all()  # a step against the gradient lowers it
    assert (policy.grad[~liked] < 0).all()


@pytest.mark.parametrize("utility", NAMES)
@settings(deadline=None, max_examples=50)
@given(beta=st.floats(0.1, 20), seed=st.integers(0, 1000), d=st.floats(0.1, 4), u=st.floats(0.1, 4))
def test_kto_is_weighted_denoising(utility, beta, seed, d, u):
    policy, reference, liked = a_batch(3, 7, seed=seed)
    reward = implicit_reward(policy, reference, beta)
    point = reference_point(reward)
    weights = {"desirable_weight": d, "undesirable_weight": u}
    (gradient,) = torch.autograd.grad(kto_loss(reward, liked, point, utility, **weights).sum(), policy)
    weight = effective_weight(reward, liked, point, utility, **weights)
    assert not weight.requires_grad
    torch.testing.assert_close(gradient, beta * weight / 7, rtol=1e-12, atol=1e-12 * beta)


def test_effective_weights_by_hand():
    reward, liked, point = f64(2, 2), torch.tensor([True, False]), f64(0.5)[0]
    s = sigmoid(1.5)
    expected = {
        "kahneman_tversky": [s * (1 - s), -s * (1 - s)],
        "loss_averse": [1 - s, -s],
        "risk_seeking": [s, -s],
        "risk_seeking_literal": [s, -(1 - s)],
        "exponential": [math.exp(1.5), -math.exp(1.5)],
        "linear": [1.0, -1.0],
    }
    for name, values in expected.items():
        weight = effective_weight(reward, liked, point, name, undesirable_weight=2.0)
        assert weight.tolist() == pytest.approx([values[0], 2 * values[1]], rel=1e-13), name


@settings(deadline=None, max_examples=50)
@given(st.floats(-5, 5), st.floats(0, 3), st.booleans(), st.floats(0, 0.5))
def test_flipped_labels_only_rescale_symmetric_losses(reward, point, liked, flip_rate):
    """Expected loss under flips = (1 - 2 rho) clean + rho * (clean + flipped); the last bracket is constant."""
    reward, point, liked = f64(reward), f64(point)[0], torch.tensor([liked])
    for utility, constant in (("kahneman_tversky", 1.0), ("risk_seeking", 2.0), ("linear", 2.0)):
        clean, flipped = (kto_loss(reward, label, point, utility).item() for label in (liked, ~liked))
        noisy = (1 - flip_rate) * clean + flip_rate * flipped
        assert noisy == pytest.approx((1 - 2 * flip_rate) * clean + flip_rate * constant, abs=1e-12)


def test_flipped_labels_change_the_loss_averse_objective():
    both = [
        sum(kto_loss(f64(reward), torch.tensor([liked]), f64(0)[0], "loss_averse").item() for liked in (True, False))
        for reward in (0.0, 3.0)
    ]
    assert abs(both[0] - both[1]) > 1


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.floats(1e-7, 1e-5))
def test_every_tame_utility_is_linear_for_small_beta(seed, beta):
    policy, reference, liked = a_batch(6, seed=seed)
    reward = implicit_reward(policy, reference, beta)
    linear = effective_weight(reward, liked, f64(0)[0], "linear")
    for name in TAME:
        slope = UTILITIES[name].slope(f64(0)).item()
        assert torch.allclose(effective_weight(reward, liked, f64(0)[0], name), slope * linear, atol=1e-5)


def test_linear_is_sft_on_the_liked_minus_sft_on_the_disliked():
    policy, reference, _ = a_batch(4)
    liked = torch.tensor([True, False, True, False])
    (kto,) = torch.autograd.grad(
        kto_loss(implicit_reward(policy, reference, 1.0), liked, f64(0.3)[0], "linear"), policy
    )
    (sft,) = torch.autograd.grad((sft_loss(policy, liked) - sft_loss(policy, ~liked)) / 2, policy)
    assert torch.equal(kto, sft)


def test_the_literal_risk_seeker_is_rewarded_for_ever_and_the_others_are_not():
    disliked, far = torch.tensor([False]), f64(-1e4)
    pull = {name: effective_weight(far, disliked, f64(0)[0], name).item() for name in TAME}
    assert pull["risk_seeking_literal"] == -1.0
    assert [pull[name] for name in ("kahneman_tversky", "loss_averse", "risk_seeking")] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("utility", TAME)
def test_loss_gradient_and_weight_stay_finite_up_to_10_000(utility, dtype):
    reward = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4], dtype=dtype, requires_grad=True)
    for liked in (True, False):
        labels = torch.full((5,), liked)
        loss = kto_loss(reward, labels, reference_point(reward), utility)
        (gradient,) = torch.autograd.grad(loss, reward)
        assert loss.dtype == gradient.dtype == dtype
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()
        expected = -effective_weight(reward, labels, reference_point(reward), utility) / 5
        torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.002)


# --- Diffusion-DPO


@settings(deadline=None, max_examples=50)
@given(st.floats(-20, 20), st.floats(-20, 20))
def test_dpo_loss_by_hand(chosen, rejected):
    expected = math.log1p(math.exp(rejected - chosen))
    assert dpo_loss(f64(chosen), f64(rejected)).item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_dpo_stays_finite_up_to_10_000():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        chosen = torch.tensor([-1e4, 1e4], dtype=dtype, requires_grad=True)
        loss = dpo_loss(chosen, -chosen.detach())
        (gradient,) = torch.autograd.grad(loss, chosen)
        assert loss.item() == pytest.approx(1e4, rel=0.01)
        assert gradient.tolist() == [-0.5, 0.0]


def test_the_published_half_is_half_our_beta():
    policy, reference, _ = a_batch(2, 5)
    gap = reference - policy
    published = -torch.nn.functional.logsigmoid(0.5 * 5000 * (gap[0] - gap[1])).mean()
    ours = dpo_loss(*implicit_reward(policy, reference, beta=2500.0))
    torch.testing.assert_close(ours, published, rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=50)
@given(st.floats(0.1, 50), *[st.floats(0, 1)] * 4)
def test_for_one_pair_loss_averse_kto_is_dpo(beta, chosen, rejected, reference_chosen, reference_rejected):
    """Section 4.2.1: with the reference point at the other sample's reward.

    Each half, the liked and the disliked one, is the whole DPO loss plus 1; its gradient, the reference
    point being detached, is DPO's in its own sample. Both together are DPO's gradient.
    """
    errors = f64(chosen, rejected).requires_grad_()
    rewards = implicit_reward(errors, f64(reference_chosen, reference_rejected), beta)
    dpo = dpo_loss(rewards[:1], rewards[1:])
    (dpo_gradient,) = torch.autograd.grad(dpo, errors, retain_graph=True)
    others = rewards.detach().flip(0)
    halves = [
        kto_loss(rewards[i : i + 1], torch.tensor([i == 0]), others[i], "loss_averse", reduction="mean") for i in (0, 1)
    ]
    gradients = [torch.autograd.grad(half, errors, retain_graph=True)[0] for half in halves]
    for half in halves:
        torch.testing.assert_close(half - 1, dpo, rtol=1e-12, atol=1e-12)
    assert gradients[0][1] == gradients[1][0] == 0  # each half moves its own sample only
    torch.testing.assert_close(gradients[0] + gradients[1], dpo_gradient, rtol=1e-12, atol=1e-12)


def test_it_is_not_dpo_with_the_reference_point_elsewhere():
    chosen, rejected = f64(1.0), f64(-1.0)
    assert kto_loss(chosen, torch.tensor([True]), f64(0)[0], "loss_averse") - 1 != dpo_loss(chosen, rejected)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 1000), beta=st.floats(0.1, 20))
def test_dpo_is_weighted_denoising(seed, beta):
    policy, reference, _ = a_batch(2, 6, seed=seed)
    chosen, rejected = implicit_reward(policy, reference, beta)
    (gradient,) = torch.autograd.grad(dpo_loss(chosen, rejected), policy)
    weight = torch.sigmoid(rejected - chosen).detach()
    torch.testing.assert_close(gradient, beta * torch.stack([weight, -weight]) / 6, rtol=1e-12, atol=1e-12 * beta)


# --- SFT


def test_sft_is_the_mean_over_the_liked_samples_alone():
    errors = f64(1, 5, 3).requires_grad_()
    loss = sft_loss(errors, torch.tensor([True, False, True]))
    assert loss.item() == 2.0
    loss.backward()
    assert errors.grad.tolist() == [0.5, 0.0, 0.5]
    assert sft_loss(errors).item() == 3.0


def test_an_error_that_is_masked_out_cannot_spoil_the_loss():
    errors = f64(1, math.inf).requires_grad_()
    loss = sft_loss(errors, torch.tensor([True, False]))
    loss.backward()
    assert loss.item() == 1.0
    assert errors.grad.tolist() == [1.0, 0.0]


# --- ensembles


def test_ensemble_members_equal_a_loop_over_them():
    policy, reference, liked = a_batch(2, 3, 8)
    noise = torch.randn(2, 3, 8, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    beta = torch.arange(1, 7, dtype=torch.float64).reshape(2, 3)
    up = 1 / beta
    reward = implicit_reward(policy, reference, beta)
    tensors = {"is_desirable": liked, "unrelated_reward": -reward, "past": running_sums(reward)}
    points = {name: reference_point(reward, name, **tensors) for name in ESTIMATORS}
    for i in range(2):
        for j in range(3):
            alone = implicit_reward(policy[i, j], reference[i, j], float(beta[i, j]))
            assert torch.equal(reward[i, j], alone)
            assert torch.equal(
                denoising_error(noise, 2 * noise, batch_dims=3)[i, j], denoising_error(noise[i, j], 2 * noise[i, j])
            )
            for name, point in points.items():
                mine = {"is_desirable": liked[i, j], "unrelated_reward": -alone, "past": running_sums(alone)}
                one = reference_point(alone, name, **mine)
                torch.testing.assert_close(point[i, j], one, rtol=1e-14, atol=0)
            for name in NAMES:
                point = points["batch"]
                for function in (kto_loss, effective_weight):
                    together = function(reward, liked, point, name, desirable_weight=up)[i, j]
                    one = function(alone, liked[i, j], point[i, j], name, desirable_weight=float(up[i, j]))
                    torch.testing.assert_close(together, one, rtol=1e-13, atol=1e-15)
            torch.testing.assert_close(dpo_loss(reward, -reward)[i, j], dpo_loss(alone, -alone), rtol=1e-13, atol=0)
            torch.testing.assert_close(sft_loss(policy, liked)[i, j], sft_loss(policy[i, j], liked[i, j]))


def test_a_user_defined_utility_reaches_the_loss():
    tanh = Utility("tanh", torch.tanh, lambda x: 1 - torch.tanh(x) ** 2, sign="outside")
    loss = kto_loss(f64(1.0), torch.tensor([False]), f64(0)[0], tanh)
    assert loss.item() == pytest.approx(1 + math.tanh(1.0))


# --- wrong arguments


R, L, Z = torch.zeros(4), torch.ones(4, dtype=torch.bool), torch.tensor(0.0)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: denoising_error(R, R[:2]), "target must have the shape of noise_pred (4,), got (2,)"),
        (
            lambda: denoising_error(R, R),
            "noise_pred must have shape (..., B, *sample), got (4,)",
        ),
        (
            lambda: denoising_error(R[None], R[None], batch_dims=0),
            "batch_dims must be in [1, 1], got 0",
        ),
        (lambda: implicit_reward(R, R[:2], 1.0), "reference_error must have the shape of policy_error (4,), got (2,)"),
        (lambda: implicit_reward(R, R.clone().requires_grad_(), 1.0), "reference_error must not carry a gradient"),
        (lambda: implicit_reward(R, R, 0.0), "beta must be > 0, got 0.0"),
        (lambda: implicit_reward(R, R, float("nan")), "beta must be > 0, got nan"),
        (lambda: implicit_reward(R, R, torch.ones(4)), "beta must be a number or of shape (), got shape (4,)"),
        (
            lambda: reference_point(R, "median"),
            "unknown estimator 'median'; known: batch, unrelated, independent, per_class, running, zero",
        ),
        (lambda: reference_point(R, "per_class"), "estimator 'per_class' needs is_desirable"),
        (
            lambda: reference_point(R, "per_class", is_desirable=L[:2]),
            "is_desirable must be bool of shape (4,), got bool of shape (2,)",
        ),
        (
            lambda: reference_point(R, "unrelated", unrelated_reward=R[:0]),
            "unrelated_reward must have shape (1 or more), got (0,)",
        ),
        (
            lambda: reference_point(R[None], "independent", unrelated_reward=R),
            "unrelated_reward must have shape (1, 1 or more), got (4,)",
        ),
        (
            lambda: kto_loss(R, torch.ones(4, 1), Z),
            "is_desirable must be bool of shape (4,), got float32 of shape (4, 1)",
        ),
        (lambda: kto_loss(R, L.long(), Z), "is_desirable must be bool of shape (4,), got int64 of shape (4,)"),
        (lambda: kto_loss(R, L, R), "reference_point must be a tensor of shape (), got shape (4,)"),
        (lambda: kto_loss(R, L, 0.0), "reference_point must be a tensor of shape (), got float"),
        (lambda: kto_loss(R, L, Z.clone().requires_grad_()), "reference_point must not carry a gradient"),
        (lambda: kto_loss(R, L, Z, "kahneman"), "unknown utility 'kahneman'; did you mean 'kahneman_tversky'?"),
        (lambda: kto_loss(R, L, Z, reduction="sum"), "unknown reduction 'sum'; known: mean, none"),
        (lambda: kto_loss(R, L, Z, desirable_weight=0.0), "desirable_weight must be > 0, got 0.0"),
        (lambda: kto_loss(R, L, Z, undesirable_weight=-1.0), "undesirable_weight must be > 0, got -1.0"),
        (
            lambda: kto_loss(R, L, Z, undesirable_weight=torch.ones(4)),
            "undesirable_weight must be a number or of shape (), got shape (4,)",
        ),
        (lambda: effective_weight(R, L, R), "reference_point must be a tensor of shape (), got shape (4,)"),
        (lambda: dpo_loss(R, R[:2]), "rejected_reward must have the shape of chosen_reward (4,), got (2,)"),
        (lambda: sft_loss(R, L.float()), "is_desirable must be bool of shape (4,), got float32 of shape (4,)"),
        (lambda: sft_loss(R, ~L), "sft_loss needs a liked sample in every batch, got none among 4"),
        (
            lambda: sft_loss(R.expand(2, 4), torch.stack([L, ~L])),
            "sft_loss needs a liked sample in every batch, got none among 4",
        ),
    ],
)
def test_a_wrong_argument_raises_its_sentence(call, sentence):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith(sentence)
