import numpy as np
import pytest
from scipy import stats

from dkto.common.files import write_json
from dkto.data.encoded import PreparedFeedback
from dkto.models import load_model, make_policy
from dkto.training.loop import run_training
from dkto.training.rewards import error_gaps, load_run, margin_interval


def test_equal_policies_have_no_gap_and_trained_ones_have(config):
    model = load_model(config.model)
    data = PreparedFeedback(config.prepared_dir, model)
    pair = make_policy(model.load_denoiser(), 0, seed=0)
    assert not error_gaps(model, pair, data, config, draws=2).any()
    run_training(config)
    _, model, pair = load_run(config.output_dir)
    gaps = error_gaps(model, pair, data, config, draws=2)
    assert gaps.shape == (12, 2) and (gaps != 0).all()
    some = error_gaps(model, pair, data, config, draws=2, rows=np.array([3, 5]))
    assert some.shape == (2, 2)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_finished_run_is_loaded_with_what_it_trained(config, lora_rank):
    from dataclasses import replace

    config = replace(config, lora_rank=lora_rank, learning_rate=1e-2)
    with pytest.raises(FileNotFoundError, match="holds no finished training"):
        load_run(config.output_dir)
    run_training(config)
    found, model, pair = load_run(config.output_dir)
    assert found == config
    fresh = make_policy(model.load_denoiser(), lora_rank, config.seed).trainable()
    assert any((value != fresh[name]).any() for name, value in pair.trainable().items())


def test_a_run_on_its_own_images_is_none_on_prepared_feedback(tmp_path):
    config = {"prompts_file": "p.txt", "reward": "world_redness"}
    write_json(tmp_path / "training.json", {"fingerprint": "ab", "finished": True, "config": config})
    sentence = r"training\.json, config is none of a training on prepared feedback: .*'prompts_file'"
    with pytest.raises(ValueError, match=sentence):
        load_run(tmp_path)


def test_margins_by_hand():
    rewards = np.array([[3.0, 3.0], [5.0, 5.0], [4.0, 4.0], [0.0, 0.0], [2.0, 2.0]])
    liked = np.array([True, True, True, False, False])
    margin = margin_interval(rewards, liked)
    assert margin.mean == 3.0 and (margin.liked, margin.disliked) == (3, 2)
    # Welch: variances 1/3 and 2/2, degrees of freedom (1/3 + 1)^2 / ((1/3)^2 / 2 + 1^2 / 1)
    freedom = (4 / 3) ** 2 / ((1 / 3) ** 2 / 2 + 1)
    half = stats.t.ppf(0.975, freedom) * (4 / 3) ** 0.5
    assert (margin.low, margin.high) == pytest.approx((3 - half, 3 + half))
    with pytest.raises(ValueError, match="needs 2 rows of each class, got 4 liked and 1 disliked"):
        margin_interval(rewards, np.array([True, True, True, True, False]))
