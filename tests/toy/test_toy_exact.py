"""Training-free truths, the tightest first; each tolerance is derived where it stands."""

import math
from functools import partial

import pytest
import torch
from exact_density import affine_with_jacobian, ddim_with_density, with_jacobian
from hypothesis import given, settings
from hypothesis import strategies as st

from dkto.objective.felt import Errors
from dkto.objective.losses import denoising_error, dpo_loss, implicit_reward, kto_loss
from dkto.objective.newer_methods import dgpo, nft
from toy.exact import (
    AffineDenoiser,
    class_posterior,
    dpo_optimum,
    exact_denoiser,
    nft_optimum,
    normal_quadrature,
    output_law,
    policy_optimum,
)
from toy.measures import normal_points
from toy.network import Architecture, Ensemble
from toy.sampling import ancestral, ddim, sample_ensemble, starting_noise
from toy.schedule import linear_schedule
from toy.world import BASE_KL, DESIRABLE, PRETRAINING, UNDESIRABLE, gaussian_kl, preference_reward

SCHEDULE = linear_schedule(50)


def tilted_mean(beta):
    """Mean of the optimum of "reward minus beta KL", pi ~ p_ref * exp(r / beta) = N(mean, 0.04 I) (paper eq. 6-7)."""
    return 0.5, 0.8 + 0.8 / beta


def test_ddim_log_density_of_an_affine_denoiser():
    """The map is affine, so the density is the Gaussian of `output_law`. 50 steps of rounding at 1e-16 times values
    near 10: 1e-12 (seen 2e-14)."""
    denoiser = exact_denoiser(DESIRABLE.model_units(), SCHEDULE)
    points, log_density = ddim_with_density(partial(affine_with_jacobian, denoiser), SCHEDULE, normal_points(256, 2))
    mean, std = output_law(denoiser, SCHEDULE, "ddim")
    expected = -((points - mean) / std).square().sum(-1) / 2 - math.log(2 * math.pi * std**2)
    assert float((log_density - expected).abs().max()) < 1e-12


def test_ddim_log_density_of_a_network_is_the_change_of_area():
    """A bent map: the density against the area to which a small circle of starts is mapped. A circle of radius 1e-4 is
    bent at second order, about 1e-4 of its area."""
    network = Ensemble.initial(Architecture(50, 8), [0], torch.float64)
    network.parameters += 0.1 * torch.randn(network.parameters.shape, dtype=torch.float64)
    start = torch.randn(1, 20, 2, dtype=torch.float64)
    points, log_density = ddim_with_density(partial(with_jacobian, network), SCHEDULE, start)
    assert torch.allclose(points, ddim(network, SCHEDULE, start), atol=1e-12)
    angle = torch.arange(64, dtype=torch.float64) * 2 * math.pi / 64
    circle = 1e-4 * torch.stack([angle.cos(), angle.sin()], dim=-1)
    rim = ddim(network, SCHEDULE, (start[0, :, None] + circle).flatten(0, 1)[None])[0].unflatten(0, (20, 64))
    x, y = (rim - rim.mean(1, keepdim=True)).unbind(-1)
    ratio = (x * y.roll(-1, 1) - y * x.roll(-1, 1)).sum(1) / (64 * math.sin(2 * math.pi / 64) * 1e-8)
    expected = -start[0].square().sum(-1) / 2 - math.log(2 * math.pi) - ratio.log()
    assert torch.allclose(log_density[0], expected, atol=1e-4)


def test_a_map_that_folds_the_plane_has_no_density():
    folding = AffineDenoiser(torch.full((50,), 100.0).double(), torch.zeros(50, 2).double())

    def mirrored(x, t):
        prediction, jacobian = affine_with_jacobian(folding, x, t)
        return prediction * x.new_tensor([1, 0]), jacobian * x.new_tensor([1, 0])

    _, log_density = ddim_with_density(mirrored, SCHEDULE, torch.ones(1, 2).double())
    assert log_density.isnan().all()


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
@pytest.mark.parametrize("role", [PRETRAINING, DESIRABLE], ids=["pretraining", "desirable"])
def test_sampler_law_of_the_exact_denoiser(sampler, role):
    """100,000 draws against the affine recursion: means within 4 std/sqrt(N), spreads within 4 std/sqrt(2N)."""
    denoiser, count = exact_denoiser(role.model_units(), SCHEDULE), 100_000
    start = torch.randn(count, 2, dtype=torch.float64)
    if sampler == "ancestral":
        points = ancestral(denoiser, SCHEDULE, start, lambda _: torch.randn(count, 2, dtype=torch.float64))
    else:
        points = ddim(denoiser, SCHEDULE, start)
    mean, std = output_law(denoiser, SCHEDULE, sampler)
    assert float((points.mean(0) - mean).abs().max()) < 4 * std / count**0.5
    assert float((points.std(0) - std).abs().max()) < 4 * std / (2 * count) ** 0.5


def test_sampler_law_at_a_hundred_steps():
    """The spread falls 3 to 5 % short of the target: 0.97070 of the pretrained one, 0.4764 instead of 0.5."""
    schedule = linear_schedule(100)
    mean, std = output_law(exact_denoiser(DESIRABLE.model_units(), schedule), schedule)
    assert (float(mean[0]), std) == pytest.approx((-0.99865, 0.47638), abs=1e-5)
    assert output_law(exact_denoiser(PRETRAINING.model_units(), schedule), schedule)[1] == pytest.approx(
        0.97070, abs=1e-5
    )


@given(st.floats(0.0, 0.5), st.sampled_from(["kahneman_tversky", "risk_seeking"]), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_symmetric_noise_identity(rate, utility, seed):
    """Flips with rate rho only rescale these losses: noisy = (1 - 2 rho) clean + c. Kahneman-Tversky since
    sigmoid(u) + sigmoid(-u) = 1, so its two losses add up to 1 and c = rho; risk-seeking since its sign stands outside,
    so they add up to 2 and c = 2 rho. Algebra: to rounding of rewards of size 10."""
    generator = torch.Generator().manual_seed(seed)
    reward = 10 * torch.randn(16, generator=generator, dtype=torch.float64)
    liked, point = torch.rand(16, generator=generator) < 0.5, torch.tensor(0.3, dtype=torch.float64)
    clean, flipped = (kto_loss(reward, labels, point, utility) for labels in (liked, ~liked))
    noisy = (1 - rate) * clean + rate * flipped
    constant = rate if utility == "kahneman_tversky" else 2 * rate
    assert float(noisy) == pytest.approx(float((1 - 2 * rate) * clean + constant), abs=1e-12)


def test_loss_averse_is_not_symmetric():
    """Its two losses add up to 2 + |u| and more, so flips change what is learnt and not only how fast."""
    reward = torch.linspace(-5, 5, 11, dtype=torch.float64)
    point = torch.zeros((), dtype=torch.float64)
    labels = torch.ones(11, dtype=torch.bool)
    both = [kto_loss(reward, chosen, point, "loss_averse", reduction="none") for chosen in (labels, ~labels)]
    sums = both[0] + both[1]
    assert float(sums.max() - sums.min()) > 3


@pytest.mark.parametrize("beta", [1.0, 2.0, 4.0])
def test_exact_likelihood_dpo_is_the_tilted_gaussian(beta):
    """24 nodes resolve the logistic to a few 1e-6 here; 1e-4 leaves room (seen 2e-6)."""
    found = policy_optimum("dpo", beta)
    assert found.mean == pytest.approx(tilted_mean(beta), abs=1e-4)
    assert found.std == pytest.approx((0.2, 0.2), abs=1e-4)


def test_loss_averse_with_a_free_reference_point_is_dpo():
    """The same optimum whatever gamma, which moves the point alone, by ln(4) / beta from 0.5 to 0.8.

    40 nodes resolve the logistic to 1e-4.
    """
    half, four_fifths = (
        policy_optimum("loss_averse", 2.0, desirable_fraction=gamma, reference_point=None, nodes=40)
        for gamma in (0.5, 0.8)
    )
    for found in (half, four_fifths):
        assert found.mean == pytest.approx(tilted_mean(2.0), abs=1e-4)
    assert half.reference_point == pytest.approx(-3, abs=1e-4)
    assert half.reference_point - four_fifths.reference_point == pytest.approx(math.log(4) / 2, abs=2e-4)


def test_a_pinned_reference_point_breaks_the_equivalence():
    """With z = 0 the optima stay near the desirable distribution, in the order of the trained models."""
    found = {name: policy_optimum(name, 2.0) for name in ("loss_averse", "kahneman_tversky", "risk_seeking")}
    assert found["loss_averse"].mean == pytest.approx((0.394, 0.876), abs=5e-4)
    assert found["loss_averse"].std == pytest.approx((0.151, 0.122), abs=5e-4)
    assert found["kahneman_tversky"].mean == pytest.approx((0.336, 0.859), abs=2e-3)
    assert found["risk_seeking"].mean == pytest.approx((0.280, 0.841), abs=4e-3)


def test_flips_move_loss_averse_and_not_kahneman_tversky():
    """To 1e-5 for rates 0 to 0.4, by the symmetric-noise identity; risk-seeking bears them as well."""
    for utility in ("kahneman_tversky", "risk_seeking", "loss_averse"):
        means = [policy_optimum(utility, 2.0, desirable_fraction=0.8, flip_rate=rate).mean for rate in (0.0, 0.2, 0.4)]
        moved = max(abs(a - b) for mean in means[1:] for a, b in zip(mean, means[0], strict=True))
        assert moved > 0.05 if utility == "loss_averse" else moved < 1e-5, utility


def test_tilting_costs_more_than_no_tuning():
    for beta in (0.5, 2.0, 100.0):
        mean = torch.tensor(tilted_mean(beta), dtype=torch.float64)
        kl = gaussian_kl(mean, 0.04 * torch.eye(2, dtype=torch.float64), DESIRABLE)
        assert float(kl) == pytest.approx(BASE_KL + 32 / beta**2, rel=1e-9)


@pytest.mark.parametrize("timestep", [0, 10, 25, 49])
def test_dpo_optimum_makes_the_true_reward_of_every_pair(timestep):
    """With shared noise the implicit rewards of a pair differ by the difference of its true rewards, pair by pair."""
    beta, optimum = 3.0, dpo_optimum(SCHEDULE, 3.0)
    reference = exact_denoiser(PRETRAINING.model_units(), SCHEDULE)
    noise = torch.randn(100, 2, dtype=torch.float64)
    when = torch.full((100,), timestep)
    rewards, truth = [], []
    for role in (DESIRABLE, UNDESIRABLE):
        points = torch.randn(100, 2, dtype=torch.float64)
        noisy = SCHEDULE.add_noise(role.model_units().place(points), noise, when)
        errors = [denoising_error(model(noisy, timestep), noise) for model in (optimum, reference)]
        rewards.append(implicit_reward(*errors, beta))
        truth.append(preference_reward(role.place(points)))
    assert torch.allclose(rewards[0] - rewards[1], truth[0] - truth[1], atol=1e-9)
    assert float(dpo_loss(*rewards)) > 0


def test_dpo_optimum_in_samples():
    """Mean y of ancestral samples by the affine recursion at T = 100: 1.779, 1.126, 0.898 for beta 10, 30, 100."""
    schedule = linear_schedule(100)
    for beta, expected in ((10, 1.7793), (30, 1.1264), (100, 0.8979)):
        mean, std = output_law(dpo_optimum(schedule, beta), schedule)
        assert (0.8 + 0.2 * float(mean[1]), 0.2 * std) == pytest.approx((expected, 0.1941), abs=1e-4)


@pytest.mark.parametrize("mixing", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("timestep", [2, 20, 45])
def test_the_nft_optimum_is_stationary(timestep, mixing):
    """The expected loss of a noisy point, by quadrature through `nft`, has no slope there and rises beside it."""
    noisy, fraction = torch.tensor([0.4, -1.0], dtype=torch.float64), 0.6
    abar = SCHEDULE.alphas_cumprod[timestep]
    best = nft_optimum(SCHEDULE, mixing, fraction)(noisy, timestep).requires_grad_()
    reference = exact_denoiser(PRETRAINING.model_units(), SCHEDULE)(noisy, timestep)
    chances, means = class_posterior(noisy, abar, fraction)
    nodes, weights = normal_quadrature(24)
    noise = torch.stack(torch.meshgrid(nodes, nodes, indexing="ij"), dim=-1).flatten(0, 1)
    weight, variance = (weights[:, None] * weights).flatten(), abar * DESIRABLE.model_units().std ** 2

    def loss(prediction):
        total = 0
        for index, liked in enumerate((True, False)):
            drawn = means[index] + (variance / (variance + 1 - abar)).sqrt() * noise
            expected = [
                (denoising_error(p.expand_as(drawn), drawn) * weight).sum()[None] for p in (prediction, reference)
            ]
            shift = denoising_error(prediction[None], reference[None])
            felt = nft(Errors(*expected, shift=shift), torch.tensor([liked]), mixing=mixing)
            total = total + chances[index] * felt.loss
        return total

    (slope,) = torch.autograd.grad(loss(best), best)
    assert slope.abs().max() < 1e-9
    assert all(loss(best + 1e-2 * torch.tensor(way)) > loss(best) for way in ((1, 0), (0, 1), (-1, 0), (0, -1)))
    assert not torch.allclose(best, reference, atol=1e-3)


def test_dpo_optimum_is_that_of_groups_too():
    """Of groups of two likes and two dislikes: the expected DGPO loss has no slope along the rewards."""
    count, beta, timestep = 20_000, 3.0, 25
    optimum, reference = dpo_optimum(SCHEDULE, beta), exact_denoiser(PRETRAINING.model_units(), SCHEDULE)
    rng = torch.Generator().manual_seed(0)
    liked = torch.tensor([True, False, True, False]).repeat(count)
    noise = torch.randn(count, 2, generator=rng, dtype=torch.float64).repeat_interleave(4, 0)
    points = torch.randn(4 * count, 2, generator=rng, dtype=torch.float64)
    placed = [role.model_units().place(points) for role in (DESIRABLE, UNDESIRABLE)]
    noisy = SCHEDULE.add_noise(torch.where(liked[:, None], *placed), noise, torch.full((4 * count,), timestep))
    errors = [denoising_error(model(noisy, timestep), noise) for model in (optimum, reference)]
    scale = torch.ones(count, 1, dtype=torch.float64, requires_grad=True)
    trained, frozen = (error.view(count, 4) for error in errors)
    moved = Errors(frozen + scale * (trained - frozen), frozen)
    losses = dgpo(moved, liked.view(count, 4), beta=beta, group_size=4).loss
    (slopes,) = torch.autograd.grad(losses.sum(), scale)
    assert losses.shape == (count,) and slopes.std() > 0.1
    assert abs(float(slopes.mean())) < 3 * float(slopes.std()) / count**0.5


def test_quadrature_is_exact_for_polynomials():
    nodes, weights = normal_quadrature(8)
    assert [float((weights * nodes**k).sum()) for k in (0, 2, 4, 6)] == pytest.approx([1, 1, 3, 15], rel=1e-12)


def test_sampling_shares_noise_between_methods_of_a_seed_and_keeps_members_apart():
    seeds = [4, 7]
    reference = Ensemble.initial(Architecture(50, 8), seeds)
    policy = reference.copy(2)
    points = sample_ensemble(policy, SCHEDULE, seeds, 50)
    assert torch.equal(points[0], points[1]), "the same weights, the same noise"
    alone = sample_ensemble(reference.select([1]), SCHEDULE, [7], 50)
    assert torch.allclose(points[0, 1], alone[0, 0], atol=1e-5)
    assert not torch.allclose(points[0, 0], points[0, 1], atol=0.1)
    told = sample_ensemble(policy, SCHEDULE, seeds, 50, [0.0, 1.0], "ddim")
    assert not torch.equal(told[0], told[1])
    assert torch.allclose(told[0, 0], ddim(reference.select([0]), SCHEDULE, starting_noise([4], 50))[0], atol=1e-6)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: sample_ensemble(Ensemble.initial(Architecture(50, 8), [0]), SCHEDULE, [0], 5, sampler="ddpm"),
            "unknown sampler 'ddpm'; did you mean 'ddim'\\? known: ancestral, ddim",
        ),
        (
            lambda: output_law(dpo_optimum(SCHEDULE, 1.0), SCHEDULE, "euler"),
            "unknown sampler 'euler'; known: ancestral, ddim",
        ),
    ],
)
def test_unknown_samplers_list_the_known_ones(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
