"""Methods newer than the paper against their published formulas on random tensors, and the corners they share."""

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence
from torch.nn.functional import logsigmoid

from dkto.objective import Errors, denoising_error, implicit_reward, kto_loss, method_loss, reference_point
from dkto.objective.losses import running_sums
from dkto.objective.methods import GIVEN, METHODS, OFFLINE

GENERATOR = torch.Generator().manual_seed(3)
LIKED = torch.tensor([True, False, True, True, False, False, True, False])
SIGN = torch.where(LIKED, 1.0, -1.0).double()
POLICY, REFERENCE, TARGET = torch.randn(3, 8, 4, 5, generator=GENERATOR, dtype=torch.float64)
POLICY = REFERENCE + 0.1 * POLICY


def errors_of(policy, reference=REFERENCE, target=TARGET):
    chosen, rejected = (policy - target).detach()[0::2], (policy - target).detach()[1::2]
    return Errors(
        denoising_error(policy, target),
        denoising_error(reference, target),
        shift=denoising_error(policy, reference),
        overlap=(chosen * rejected).flatten(1).mean(-1),
    )


ERRORS = errors_of(POLICY)


def gradient(name, **settings):
    policy = POLICY.clone().requires_grad_()
    method_loss(name, errors_of(policy), LIKED, **settings).loss.backward()
    return policy.grad


@pytest.mark.parametrize("mixing", [0.1, 0.5, 1.0, 2.0])
def test_nft_is_the_published_loss_on_predictions(mixing):
    """Liked: ((1 - b) v0 + b v - t)^2 / b; disliked: ((1 + b) v0 - b v - t)^2 / b; value and gradient."""
    policy = POLICY.clone().requires_grad_()
    positive = denoising_error((1 - mixing) * REFERENCE + mixing * policy, TARGET) / mixing
    negative = denoising_error((1 + mixing) * REFERENCE - mixing * policy, TARGET) / mixing
    published = torch.where(LIKED, positive, negative).mean()
    published.backward()
    torch.testing.assert_close(method_loss("nft", ERRORS, LIKED, mixing=mixing).loss, published.detach())
    torch.testing.assert_close(gradient("nft", mixing=mixing), policy.grad)


def test_nft_is_the_linear_utility_with_a_brake_on_what_was_disliked():
    linear = gradient("kto", beta=1.0, utility="linear", estimator="zero")
    shift = torch.autograd.grad(
        (2 * denoising_error(policy := POLICY.clone().requires_grad_(), REFERENCE) * ~LIKED).mean(), policy
    )[0]
    torch.testing.assert_close(gradient("nft", mixing=1.0), linear + shift)


def test_bco_is_the_published_classifier_with_a_running_mean():
    """-log sigmoid(r - delta) for chosen, -log sigmoid(delta - r) for rejected, delta the mean over all batches."""
    rewards = [implicit_reward(ERRORS.policy * scale, ERRORS.reference, 7.0) for scale in (1.0, 0.5, 0.9)]
    past = None
    for count, (scale, reward) in enumerate(zip((1.0, 0.5, 0.9), rewards, strict=True), 1):
        felt = method_loss("bco", ERRORS._replace(policy=ERRORS.policy * scale), LIKED, beta=7.0, past=past)
        delta, past = torch.cat(rewards[:count]).mean(), felt.past
        torch.testing.assert_close(felt.point, delta)
        torch.testing.assert_close(
            felt.loss, torch.where(LIKED, -logsigmoid(reward - delta), -logsigmoid(delta - reward)).mean()
        )
    weighted = method_loss("bco", ERRORS, LIKED, beta=7.0, undesirable_weight=3.0)
    parts = -logsigmoid(SIGN * (rewards[0] - rewards[0].mean())) * torch.where(LIKED, 1.0, 3.0)
    torch.testing.assert_close(weighted.loss, parts.mean())


def test_a_running_mean_is_the_same_on_any_number_of_processes():
    reward = torch.randn(8, generator=GENERATOR)
    whole = running_sums(reward, torch.tensor([5.0, 3.0], dtype=torch.float64))
    shares = [running_sums(part) for part in (reward[:2], reward[2:])]
    split = running_sums(reward[:2], torch.tensor([5.0, 3.0], dtype=torch.float64), reduce=lambda _: sum(shares))
    torch.testing.assert_close(split, whole)
    point = reference_point(reward, "running", past=whole, clamp=False)
    torch.testing.assert_close(point, ((5 + reward.double().sum()) / 11).float())
    assert reference_point(-reward.abs() - 9, "running", past=running_sums(-reward.abs() - 9)) == 0, "clamped"


def test_tgo_weighs_each_sample_by_its_distance_from_the_threshold():
    score = torch.randn(8, generator=GENERATOR, dtype=torch.float64)
    threshold = score.median()
    weight, reward = 1 + 2 * (score - threshold).abs(), implicit_reward(ERRORS.policy, ERRORS.reference, 7.0)
    liked = score > threshold
    published = (weight * -logsigmoid(torch.where(liked, reward, -reward))).mean()
    found = method_loss("tgo", ERRORS, liked, beta=7.0, sample_weight=weight)
    torch.testing.assert_close(found.loss, published)
    unweighted = kto_loss(reward, LIKED, torch.zeros_like(reward[0]), "loss_averse") - 1
    torch.testing.assert_close(method_loss("tgo", ERRORS, LIKED, beta=7.0).loss, unweighted)


def test_apo_zero_unpaired_is_kahneman_tversky_at_zero():
    """Published: 1 - sigmoid(r) for a liked, sigmoid(r) for a disliked sample."""
    reward = implicit_reward(ERRORS.policy, ERRORS.reference, 7.0)
    published = torch.where(LIKED, 1 - reward.sigmoid(), reward.sigmoid()).mean()
    torch.testing.assert_close(method_loss("kto", ERRORS, LIKED, beta=7.0, estimator="zero").loss, published)


def test_awm_is_a_clipped_ratio_and_unclipped_the_exponential_utility():
    ratio = (7.0 * (ERRORS.reference - ERRORS.policy)).exp()
    published = -torch.minimum(SIGN * ratio, SIGN * ratio.clamp(0.9, 1.1)).mean()
    torch.testing.assert_close(method_loss("awm", ERRORS, LIKED, beta=7.0, clip_range=0.1).loss, published)
    free = method_loss("awm", ERRORS, LIKED, beta=7.0, clip_range=1e6).loss
    exponential = method_loss("kto", ERRORS, LIKED, beta=7.0, utility="exponential", estimator="zero").loss
    torch.testing.assert_close(free, exponential - 1)
    still = gradient("awm", beta=7.0, clip_range=0.1).flatten(1).abs().sum(1) == 0
    assert still.tolist() == (SIGN * (ratio - 1) > 0.1).tolist() and still.any() and not still.all()


def test_dgpo_compares_sums_within_a_group_and_a_group_of_two_is_a_pair_of_dpo():
    pairs = torch.tensor([True, False] * 4)
    torch.testing.assert_close(
        method_loss("dgpo", ERRORS, pairs, beta=7.0, group_size=2).loss,
        method_loss("dpo", ERRORS, pairs, beta=7.0).loss,
    )
    reward = implicit_reward(ERRORS.policy, ERRORS.reference, 7.0)
    groups = [-logsigmoid((SIGN * reward)[part].sum()) for part in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(method_loss("dgpo", ERRORS, LIKED, beta=7.0).loss, sum(groups) / 2)
    one_class = LIKED.clone()
    one_class[:4] = True
    felt = method_loss("dgpo", ERRORS, one_class, beta=7.0)
    torch.testing.assert_close(felt.loss, -logsigmoid((SIGN * reward)[4:].sum()) / 2)
    assert (felt.slope[:4] == 0).all() and (felt.slope[4:] > 0).all()


def test_dmpo_is_the_reverse_kl_of_the_published_code():
    reward = implicit_reward(ERRORS.policy, ERRORS.reference, 7.0)
    gap = reward[0::2] - reward[1::2]
    published = kl_divergence(Bernoulli(logits=gap), Bernoulli(torch.full_like(gap, 0.95))).mean()
    torch.testing.assert_close(method_loss("dmpo", ERRORS, LIKED, beta=7.0, smoothing=0.05).loss, published)
    best = torch.tensor([0.5, 0.5 + torch.logit(torch.tensor(0.95)) / 7.0])
    settled = method_loss("dmpo", Errors(best, best.new_full((2,), 0.5)), LIKED[:2], beta=7.0, smoothing=0.05)
    assert float(settled.loss) == pytest.approx(0, abs=1e-6) and settled.slope.max() < 1e-5


def test_sdpo_slows_the_rejected_side_until_the_chosen_one_is_not_harmed():
    """One shared vector of outputs, as if both sides had the same parameters: after a step E_c must not have grown."""
    dpo, slowed = gradient("dpo", beta=7.0), gradient("sdpo", beta=7.0)
    torch.testing.assert_close(slowed[0::2], dpo[0::2])
    residual = POLICY - TARGET
    overlap = (residual[0::2] * residual[1::2]).flatten(1).sum(1)
    allowed = residual[0::2].square().flatten(1).sum(1) / overlap
    scale = torch.where(overlap > 0, allowed.clamp(max=1), 1)
    torch.testing.assert_close(slowed[1::2], dpo[1::2] * scale[:, None, None])
    assert method_loss("sdpo", ERRORS, LIKED, beta=7.0).loss == method_loss("dpo", ERRORS, LIKED, beta=7.0).loss
    target = TARGET[0::2].repeat_interleave(2, dim=0)  # the sides of a pair share their noise
    near = target * torch.tensor([1.1, 1.4], dtype=torch.float64).repeat(4)[:, None, None]
    policy = near.clone().requires_grad_()
    for name, harmed in (("dpo", True), ("sdpo", False)):
        felt = method_loss(name, errors_of(policy, target=target), LIKED, beta=7.0)
        (pull,) = torch.autograd.grad(felt.loss, policy)
        step = -(pull[0::2] + pull[1::2])  # both sides move the same outputs
        change = ((near - target)[0::2] * step).flatten(1).sum(1)
        assert (change > 1e-6).all() == harmed, name
    more = method_loss("sdpo", errors_of(near, target=target), LIKED, beta=7.0, safeguard=0.5).slope
    torch.testing.assert_close(more[1::2], 0.5 * felt.slope[1::2])


def test_noise_draws_are_averaged_before_the_utility():
    liked = torch.tensor([True, True, False, False, True, True, False, False])
    reward = implicit_reward(ERRORS.policy, ERRORS.reference, 7.0)
    means = reward.unflatten(0, (4, 2)).mean(1)
    felt = method_loss("kto", ERRORS, liked, beta=7.0, noise_draws=2)
    torch.testing.assert_close(felt.loss, kto_loss(means, liked[::2], reference_point(means)))
    assert felt.slope.shape == felt.reward.shape == (8,)
    single = method_loss("kto", ERRORS, liked, beta=7.0)
    assert abs(float(felt.loss - single.loss)) > 1e-4, "the utility of a mean is not the mean of utilities"
    same = method_loss("kto", ERRORS, liked, beta=7.0, utility="linear", noise_draws=2).loss
    torch.testing.assert_close(same, method_loss("kto", ERRORS, liked, beta=7.0, utility="linear").loss)


@pytest.mark.parametrize("name", OFFLINE)
def test_brakes_add_their_gradients_to_every_method(name):
    settings = {"beta": 7.0} if "beta" in METHODS[name].settings else {}
    policy = POLICY.clone().requires_grad_()
    chosen = LIKED if METHODS[name].draws != "pairs" else torch.tensor([True, False] * 4)
    brakes = 3.0 * denoising_error(policy, REFERENCE).mean() + 2.0 * (denoising_error(policy, TARGET) * chosen).mean()
    brakes.backward()
    braked = gradient(name, anchor=3.0, sft_weight=2.0, **settings)
    torch.testing.assert_close(braked, gradient(name, **settings) + policy.grad)


def test_what_a_step_gives_is_no_setting():
    assert not [name for name in OFFLINE if set(GIVEN) & set(METHODS[name].settings)]


@pytest.mark.parametrize(
    ("name", "settings", "change", "sentence"),
    [
        ("nft", {"mixing": 0.0}, {}, "mixing must be > 0, got 0.0"),
        ("nft", {}, {"shift": None}, "nft needs errors.shift"),
        ("awm", {"beta": 1.0, "clip_range": 0}, {}, "clip_range must be > 0, got 0"),
        ("dgpo", {"beta": 1.0, "group_size": 3}, {}, "group_size 3 does not divide the batch of 8 samples"),
        ("dmpo", {"beta": 1.0, "smoothing": 0.5}, {}, r"smoothing must be in \(0, 0.5\), got 0.5"),
        ("sdpo", {"beta": 1.0, "safeguard": 1}, {}, r"safeguard must be in \[0, 1\), got 1"),
        ("sdpo", {"beta": 1.0}, {"overlap": None}, "sdpo needs errors.overlap"),
        ("dpo", {"beta": 1.0, "anchor": 1.0}, {"shift": None}, "anchor needs errors.shift"),
        ("kto", {"beta": 1.0, "estimator": "running", "past": torch.zeros(3)}, {}, "past|size|shape"),
        ("tgo", {"beta": 1.0, "sample_weight": torch.ones(3)}, {}, "sample_weight must have the shape"),
    ],
)
def test_wrong_settings_raise_a_sentence(name, settings, change, sentence):
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        method_loss(name, ERRORS._replace(**change), LIKED, **settings)
