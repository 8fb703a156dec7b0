from dataclasses import replace

import numpy as np
import pytest
import torch

from dkto.data.encoded import PreparedFeedback
from dkto.models import load_model
from dkto.training.batches import GlobalBatches

TENSORS = ("noisy_latents", "target", "timesteps", "is_desirable")


@pytest.fixture
def source(tiny_pipeline, prepared):
    model = load_model(str(tiny_pipeline))
    data = PreparedFeedback(prepared, model)
    return lambda config: GlobalBatches(config, data, model)


@pytest.fixture
def pairs(tiny_pipeline, paired):
    model = load_model(str(tiny_pipeline))
    return lambda config: GlobalBatches(config, PreparedFeedback(paired, model), model)


def joined(parts, name):
    return torch.cat([getattr(part, name) for part in parts])


@pytest.mark.parametrize(("micros", "ranks"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_shares_add_up_to_the_global_batch(source, config, micros, ranks):
    config = replace(config, batch_size=8, prompt_dropout=0.5, estimator="unrelated")
    whole = source(config).draw(7)
    split = source(replace(config, gradient_accumulation=micros))
    parts = [split.draw(7, micro, rank, ranks) for micro in range(micros) for rank in range(ranks)]
    for name in TENSORS:
        assert torch.equal(joined(parts, name), getattr(whole, name)), name
    together = torch.cat([part.conditioning["encoder_hidden_states"] for part in parts])
    assert torch.equal(together, whole.conditioning["encoder_hidden_states"])


def test_unrelated_prompts_are_rolled_within_the_global_micro_batch(source, config):
    config = replace(config, batch_size=8, estimator="unrelated")
    source = source(config)
    whole = source.draw(3)
    halves = [source.draw(3, 0, rank, 2) for rank in range(2)]
    expected = whole.conditioning["encoder_hidden_states"].roll(1, 0)
    assert torch.equal(whole.unrelated["encoder_hidden_states"], expected)
    assert torch.equal(torch.cat([half.unrelated["encoder_hidden_states"] for half in halves]), expected)


def test_steps_and_samples_differ(source, config):
    one, two = source(config).draw(0), source(config).draw(1)
    assert not torch.equal(one.target, two.target)
    assert len({float(x) for x in one.target[:, 0, 0, 0]}) == config.batch_size
    assert torch.equal(source(config).draw(0).noisy_latents, one.noisy_latents)


def test_the_two_sides_of_a_pair_share_noise_timestep_and_prompt(pairs, config):
    config = replace(config, objective="dpo", batch_size=8, prompt_dropout=0.5)
    batch = pairs(config).draw(2)
    for values in (batch.target, batch.timesteps, batch.conditioning["encoder_hidden_states"]):
        assert torch.equal(values[0::2], values[1::2])
    assert batch.is_desirable[0::2].all() and not batch.is_desirable[1::2].any()
    assert not torch.equal(batch.noisy_latents[0::2], batch.noisy_latents[1::2])


@pytest.mark.parametrize(("objective", "share"), [("kto", 0.8), ("sft", 1.0), ("sft_all", 0.5), ("csft", 0.5)])
def test_who_is_drawn_follows_the_objective(source, config, objective, share):
    source = source(replace(config, objective=objective, batch_size=500))
    liked = np.concatenate([source.data.is_desirable[source.rows(step)] for step in range(20)])
    assert liked.mean() == pytest.approx(share, abs=0.02)  # 4 standard errors of 10,000 draws


def test_a_group_is_liked_and_disliked_images_of_one_prompt_in_turn(source, config):
    config = replace(config, objective="dgpo", group_size=4, batch_size=8)
    source = source(config)
    rows, batch = source.rows(3), source.draw(3)
    assert (source.data.prompt_ids[rows].reshape(-1, 4) == source.data.prompt_ids[rows[::4]][:, None]).all()
    assert batch.is_desirable.tolist() == [True, False] * 4
    assert torch.equal(batch.timesteps.reshape(-1, 4), batch.timesteps[::4, None].expand(2, 4))
    drawn = np.concatenate([source.rows(step) for step in range(50)])
    assert set(drawn) == set(range(len(source.data))), "every image of a prompt with both takes part"
    with pytest.raises(ValueError, match="group_size must be even, half of a group being liked, got 3"):
        replace(config, group_size=3, batch_size=9)
    source.data.prompt_ids = np.arange(len(source.data))
    with pytest.raises(ValueError, match="objective 'dgpo' needs prompts with a liked and a disliked image, but"):
        GlobalBatches(config, source.data, source.model)


def test_an_image_lies_as_often_in_a_row_as_it_has_noises(source, config):
    config = replace(config, noise_draws=2, batch_size=8)
    rows, batch = source(config).rows(3), source(config).draw(3)
    assert (rows[::2] == rows[1::2]).all()
    assert not torch.equal(batch.target[::2], batch.target[1::2])
    with pytest.raises(ValueError, match=r"batch_size 8 is not a multiple of 1 processes x .* x 3 \(noise_draws\)"):
        replace(config, noise_draws=3)


def test_prompt_dropout_replaces_that_share_of_prompts(source, config):
    source = source(replace(config, batch_size=1000, prompt_dropout=0.2))
    empty = source.data.conditioning(np.array([0]), np.array([True]))["encoder_hidden_states"]
    drawn = source.draw(0).conditioning["encoder_hidden_states"]
    assert (drawn == empty).all((1, 2)).float().mean() == pytest.approx(0.2, abs=0.05)
