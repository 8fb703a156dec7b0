"""Likes and pairs of a user whose taste is known: counts, noise, exactness of the measure and of the trainings."""

import math

import pytest
import torch

from toy import Judged, World, as_pairs

SEEDS = 4


@pytest.fixture(scope="module")
def world():
    return World.make(SEEDS, prompts=60, spread=1.0, seed=3)


def rows(judged, world):
    """Rewards of the judged images, (S, B)."""
    return world.rewards[torch.arange(SEEDS)[:, None], judged.prompt, judged.image]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seen", [1, 3])
def test_likes_hold_every_seen_image_once_and_the_share_that_is_asked_for(world, share, seen):
    judged = world.likes(per_prompt=seen, share=share)
    assert judged.liked.shape == (SEEDS, 60 * seen) and judged.real.all()
    assert (judged.image < seen).all()
    assert len({*zip(judged.prompt[0].tolist(), judged.image[0].tolist(), strict=True)}) == 60 * seen
    assert judged.liked.double().mean(1) == pytest.approx(torch.full((SEEDS,), share), abs=1 / 60)


def test_without_noise_answers_are_right_and_flips_turn_their_share(world):
    likes, pairs = world.likes(noise=0), world.pairs(noise=0, per_prompt=3)
    rewards = rows(likes, world)
    for seed in range(SEEDS):
        assert rewards[seed][likes.liked[seed]].min() > rewards[seed][~likes.liked[seed]].max()
    assert (rows(pairs, world)[:, ::2] > rows(pairs, world)[:, 1::2]).all()
    assert pairs.liked[0].tolist() == [True, False] * 120 and (pairs.prompt[:, ::2] == pairs.prompt[:, 1::2]).all()
    flipped = (world.likes(noise=0, flips=0.3).liked != likes.liked).double().mean()
    assert float(flipped) == pytest.approx(0.3, abs=0.08)


def test_noisy_pairs_follow_bradley_terry():
    world = World.make(2, prompts=4000, images=2, seed=1)
    rewards = world.rewards
    pairs = world.pairs()
    first = pairs.image[:, ::2] == 0
    expected = torch.sigmoid(rewards[..., 0] - rewards[..., 1])
    assert float(first.double().mean()) == pytest.approx(float(expected.mean()), abs=0.02)
    sure = expected > 0.9
    assert float(first[sure].double().mean()) == pytest.approx(float(expected[sure].mean()), abs=0.02)


def test_a_pair_needs_two_images_and_luck_does_not_touch_it():
    with pytest.raises(ValueError, match="per_prompt must be 2 or above, got 1"):
        World.make(1, prompts=3).pairs(per_prompt=1)
    even, uneven = (World.make(2, prompts=50, spread=spread, seed=5) for spread in (0.0, 4.0))
    assert torch.equal(even.pairs().image, uneven.pairs().image)
    assert not torch.equal(even.likes().liked, uneven.likes().liked)


def test_pairs_made_of_likes_hold_a_liked_and_a_disliked_image_of_one_prompt_once(world):
    likes = world.likes(per_prompt=4, share=0.3)
    made = as_pairs(likes)
    truth = {}
    for seed in range(SEEDS):
        truth[seed] = dict(
            zip(
                zip(likes.prompt[seed].tolist(), likes.image[seed].tolist(), strict=True),
                likes.liked[seed].tolist(),
                strict=True,
            )
        )
        sides = [
            (p, i)
            for p, i, real in zip(
                made.prompt[seed].tolist(), made.image[seed].tolist(), made.real[seed].tolist(), strict=True
            )
            if real
        ]
        assert len(sides) == len(set(sides)) and len(sides) % 2 == 0
        assert [truth[seed][side] for side in sides] == [True, False] * (len(sides) // 2)
        assert all(a[0] == b[0] for a, b in zip(sides[::2], sides[1::2], strict=True))


def test_the_gain_is_one_along_the_taste_nought_across_it_and_blind_to_length(world):
    taste = world.taste
    assert world.gain(taste) == pytest.approx(torch.ones(SEEDS), abs=1e-4)
    assert world.gain(30 * taste) == pytest.approx(torch.ones(SEEDS), abs=1e-4)
    assert (world.gain(-taste) < -0.9).all()
    other = torch.randn(taste.shape, generator=torch.Generator().manual_seed(0))
    across = other - (other * taste).sum(-1, keepdim=True) * taste / taste.square().sum(-1, keepdim=True)
    assert world.gain(across).abs().max() < 0.15
    assert world.gain(torch.zeros_like(taste)) == pytest.approx(torch.zeros(SEEDS), abs=1e-6)


@pytest.mark.parametrize("method", ["kto", "bco", "sft"])
def test_many_likes_lead_to_the_taste(method):
    world = World.make(SEEDS, prompts=600, spread=0.0, seed=2)
    gain = world.others(60).gain(world.train(method, world.likes(), 0.1))
    assert gain.shape == (SEEDS,) and (gain > 0.9).all()


def test_pairs_lead_there_too_and_betas_are_trained_side_by_side():
    world = World.make(SEEDS, prompts=300, seed=2)
    betas = torch.tensor([0.1, 1.0])
    both = world.train("dpo", world.pairs(), betas)
    assert both.shape == (2, SEEDS, 8)
    assert (world.others(60).gain(both) > 0.9).all()
    assert both[1] == pytest.approx(world.train("dpo", world.pairs(), 1.0), abs=1e-4)


def test_shuffled_likes_say_nothing_and_a_seed_with_one_class_trains(world):
    likes = world.likes()
    order = torch.randperm(likes.liked.shape[1], generator=torch.Generator().manual_seed(0))
    shuffled = Judged(likes.prompt, likes.image, likes.liked[:, order], likes.real)
    assert float(world.gain(world.train("kto", shuffled)).mean().abs()) < 0.35
    one_class = Judged(likes.prompt, likes.image, torch.ones_like(likes.liked), likes.real)
    assert torch.isfinite(world.train("kto", one_class)).all()


def test_the_policy_at_the_compared_length_is_half_a_nat_from_the_reference(world):
    from toy.judgements import KL, _policy, _to_kl

    policy = _policy(world.features, _to_kl(world.features, world.taste))
    kl = torch.xlogy(policy, policy).sum(-1).mean(-1) + math.log(policy.shape[-1])
    assert kl == pytest.approx(torch.full((SEEDS,), KL), abs=1e-3)
