"""Training as a generator of records: one member = many, seeds, precision, where it leads."""

from dataclasses import replace

import pytest
import torch

from toy.network import Architecture, Ensemble
from toy.objectives import METHODS, NEWER, Method
from toy.sampling import sample_ensemble
from toy.schedule import linear_schedule
from toy.training import FULL, SMALL, Recipe, draw_steps, pretrain, run, tune
from toy.world import PRETRAINING, exact_noise_pred, to_paper_units

TINY = Recipe(num_train_timesteps=20, width=8, batch_size=16, pretrain_steps=100, max_train_steps=100, num_samples=200)


def pretrained(seeds, recipe, dtype=torch.float64):
    schedule = linear_schedule(recipe.num_train_timesteps)
    reference = Ensemble.initial(Architecture(recipe.num_train_timesteps, recipe.width), seeds, dtype)
    run(pretrain(reference, schedule, seeds, recipe))
    return reference


def tuned(reference, methods, seeds, recipe):
    policy = reference.copy(len(methods))
    schedule = linear_schedule(recipe.num_train_timesteps)
    return policy, run(tune(policy, reference, schedule, methods, seeds, recipe, 10))


def test_member_k_is_the_model_trained_alone():
    """All methods x 2 seeds against each method and seed by itself: 100 + 100 steps in float64, equal to 1e-9."""
    methods, seeds = [*METHODS.values(), *NEWER.values(), Method(estimator="independent", flip_rate=0.1)], [3, 1]
    reference = pretrained(seeds, TINY)
    policy, records = tuned(reference, methods, seeds, TINY)
    for column, seed in enumerate(seeds):
        alone = pretrained([seed], TINY)
        assert float((reference.parameters[column] - alone.parameters[0]).abs().max()) < 1e-9
        for row, method in enumerate(methods):
            member, member_records = tuned(alone, [method], [seed], TINY)
            difference = policy.parameters[row * len(seeds) + column] - member.parameters[0]
            assert float(difference.abs().max()) < 1e-9, (method, seed)
            assert float(records[-1].loss[row, column]) == pytest.approx(float(member_records[-1].loss), abs=1e-6)
    assert float((policy.parameters - reference.copy(len(methods)).parameters).abs().max()) > 1e-2


def test_records_start_without_reward_and_rewards_part():
    _, records = tuned(pretrained([0], TINY), list(METHODS.values()), [0], TINY)
    assert [record.global_step for record in records] == list(range(10, 101, 10))
    names = list(METHODS)
    for name in ("dpo", "kahneman_tversky", "loss_averse@0.5"):
        row = names.index(name)
        assert records[-1].reward_desirable[row] > records[-1].reward_undesirable[row]
    assert records[0].reward_desirable[names.index("sft")].isnan().all()
    assert records[0].reference_point[names.index("dpo")].isnan().all()
    assert (records[-1].reference_point[3:] >= 0).all()


def test_the_caller_may_stop_whenever_it_likes():
    schedule = linear_schedule(20)
    reference = Ensemble.initial(Architecture(20, 8), [0])
    policy = reference.copy()
    steps = tune(policy, reference, schedule, [Method()], [0], TINY, 1)
    assert [next(steps).global_step for _ in range(3)] == [1, 2, 3]
    assert not torch.equal(policy.parameters, reference.parameters)


def test_the_first_step_has_no_reward_since_policy_and_reference_are_one():
    reference = Ensemble.initial(Architecture(20, 8), [0])
    first = next(tune(reference.copy(2), reference, linear_schedule(20), [Method(), Method("dpo")], [0], TINY, 1))
    assert first.reward_desirable.abs().max() < 1e-5 and first.reference_point[0].abs().max() < 1e-5
    assert float(first.loss[0, 0]) == pytest.approx(0.5, abs=1e-4)  # 1 - sigmoid(0)
    assert float(first.loss[1, 0]) == pytest.approx(0.6931, abs=1e-4)


def test_seeds_share_nothing_and_methods_of_a_seed_share_all_draws():
    first, second = (next(draw_steps([seed], "tuning", 64, 20, torch.float32)) for seed in (0, 1))
    again = next(draw_steps([1, 0], "tuning", 64, 20, torch.float64))
    assert not torch.equal(first.points, second.points)
    assert torch.equal(again.points[1].float(), first.points[0]) and torch.equal(again.timesteps[1], first.timesteps[0])


def test_pretraining_finds_the_exact_denoiser():
    """Small recipe, one seed: mean squared error below 1.5e-3 of the exact noise, against 0.36 for a fresh network."""
    schedule = linear_schedule(50)
    network = Ensemble.initial(Architecture(50), [0])

    def gap():
        draws = next(draw_steps([9], "test", 4096, 50, torch.float32))
        noisy = schedule.add_noise(draws.points, draws.noise, draws.timesteps)
        exact = exact_noise_pred(PRETRAINING.model_units(), noisy, schedule.alphas_cumprod.float()[draws.timesteps])
        noise_pred, _ = network.forward(network.inputs(noisy, draws.timesteps))
        return float((noise_pred - exact).square().mean())

    assert gap() > 0.2
    records = run(pretrain(network, schedule, [0], SMALL))
    assert gap() < 1.5e-3
    assert records[-1].global_step == SMALL.pretrain_steps and records[0].loss.shape == (1, 1)


def test_sft_moves_the_cloud_to_the_desirable_distribution():
    """The mean to (0.3, 0.8) within 0.02: 4 standard errors of 2000 points are 0.009, and one seed's error 0.005."""
    policy, _ = tuned(pretrained([0], SMALL, torch.float32), [METHODS["sft"]], [0], SMALL)
    points = to_paper_units(sample_ensemble(policy, linear_schedule(50), [0], 2000))[0, 0]
    assert points.mean(0).tolist() == pytest.approx([0.3, 0.8], abs=0.02)


def test_training_can_be_repeated_to_the_bit():
    first, _ = tuned(pretrained([2], TINY, torch.float32), [Method()], [2], TINY)
    second, _ = tuned(pretrained([2], TINY, torch.float32), [Method()], [2], TINY)
    assert torch.equal(first.parameters, second.parameters)


def test_the_literal_risk_seeker_is_not_stopped():
    """It runs to its end whatever its rewards do; `toy.measures` counts it as diverged."""
    recipe = replace(TINY, learning_rate=0.05)
    _, records = tuned(pretrained([0], TINY), [Method(utility="risk_seeking_literal")], [0], recipe)
    assert records[-1].global_step == 100 and not float(records[-1].reward_undesirable[0, 0]) > -100


def test_the_large_recipe_is_the_measured_one():
    assert (FULL.num_train_timesteps, FULL.width, FULL.batch_size, FULL.max_train_steps) == (100, 64, 256, 2000)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Recipe(batch_size=7), "batch_size must be even and at least 2, got 7"),
        (lambda: Recipe(width=0), "width must be 1 or above, got 0"),
        (lambda: Recipe(learning_rate=0.0), "learning_rate must be above 0, got 0.0"),
        (
            lambda: next(
                tune(*[Ensemble.initial(Architecture(20, 8), [0])] * 2, linear_schedule(20), [Method()] * 2, [0], TINY)
            ),
            "policy must have 2 methods x 1 seeds members and reference 1, got 1 and 1",
        ),
    ],
)
def test_wrong_arguments_raise_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
