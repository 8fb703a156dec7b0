"""Implicit accuracy and margin: three definitions by hand, ensembles as loops, wrong arguments as sentences."""

import pytest
import torch

from dkto.objective.accuracy import implicit_accuracy, measures

LIKED = torch.tensor([True, True, False, False])
R = torch.zeros(4)


def test_the_three_accuracies_by_hand():
    reward = torch.tensor([3.0, 1.0, 2.0, -1.0], dtype=torch.float64)
    assert implicit_accuracy(reward, LIKED, definition="sample").item() == 0.75
    assert implicit_accuracy(reward, LIKED, definition="sample_centred", reference_point=2.5).item() == 0.75
    assert implicit_accuracy(reward, LIKED, definition="sample_centred", reference_point=1.5).item() == 0.5
    pairs = implicit_accuracy(reward[:2], definition="pair", rejected_reward=reward[2:])
    assert pairs.item() == 1.0
    assert pairs.dtype == torch.float64


def test_only_the_centred_accuracy_looks_at_the_reference_point():
    reward = torch.tensor([3.0, 1.0, 2.0, -1.0])
    assert implicit_accuracy(reward, LIKED, definition="sample", reference_point=99.0).item() == 0.75


def test_ties_count_half_in_pairs_and_not_at_all_in_samples():
    """Before the first step policy = reference: chance by pairs, 0 by samples."""
    zeros = torch.zeros(4)
    assert implicit_accuracy(zeros, definition="pair", rejected_reward=zeros).item() == 0.5
    assert implicit_accuracy(zeros, LIKED, definition="sample").item() == 0.0
    assert implicit_accuracy(zeros + 2, LIKED, definition="sample_centred", reference_point=2.0).item() == 0.0


def test_accuracy_and_margin_of_an_ensemble_equal_a_loop():
    reward = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    liked = reward.roll(1, -1) > 0
    point = reward.mean(-1)
    for i in range(2):
        for j in range(3):
            one, labels = reward[i, j], liked[i, j]
            for definition in ("sample", "sample_centred"):
                many = implicit_accuracy(reward, liked, definition=definition, reference_point=point)
                alone = implicit_accuracy(one, labels, definition=definition, reference_point=point[i, j])
                assert many[i, j] == alone
            many = implicit_accuracy(reward, definition="pair", rejected_reward=reward.flip(-1))
            assert many[i, j] == implicit_accuracy(one, definition="pair", rejected_reward=one.flip(-1))


def test_a_diverged_member_shows_as_nan_and_leaves_the_others_alone():
    reward = torch.tensor([[1.0, 1.0, -1.0, torch.nan], [1.0, 1.0, -1.0, -1.0]])
    liked = LIKED.expand(2, 4)
    for definition in ("sample", "sample_centred"):
        accuracy = implicit_accuracy(reward, liked, definition=definition)
        assert accuracy.isnan().tolist() == [True, False]
        assert accuracy[1] == 1.0
    pair = implicit_accuracy(torch.ones(2, 4), definition="pair", rejected_reward=reward)
    assert pair.isnan().tolist() == [True, False]


def test_the_measures_of_a_step_by_hand():
    reward = torch.tensor([4.0, 2.0, 1.0, -5.0])
    found = measures(reward, LIKED, torch.full((4,), 0.5), torch.full((4,), 0.25), point=torch.ones(4))
    assert (found["reward/desirable"], found["reward/undesirable"], found["reward/margin"]) == (3.0, -2.0, 5.0)
    assert (found["loss"], found["policy_error"], found["mean_abs_reward"]) == (0.25, 0.5, 3.0)
    assert (found["reference_point"], found["implicit_accuracy/sample"]) == (1.0, 0.75)
    assert found["implicit_accuracy/sample_centred"] == 0.75 and "utility_slope" not in found
    one_class = measures(reward, torch.ones(4), reward, reward, slope=torch.full((4,), 0.5), pairs=True)
    assert "reward/margin" not in one_class and "reward/undesirable" not in one_class
    assert (one_class["implicit_accuracy/pair"], one_class["utility_slope"]) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: implicit_accuracy(R, LIKED, definition="acc"), "unknown definition 'acc'; known: pair, sample,"),
        (lambda: implicit_accuracy(R, definition="sample"), "definition 'sample' needs is_desirable"),
        (lambda: implicit_accuracy(R, definition="sample_centred"), "definition 'sample_centred' needs is_desirable"),
        (lambda: implicit_accuracy(R, LIKED, definition="pair"), "definition 'pair' needs rejected_reward"),
        (
            lambda: implicit_accuracy(R, definition="pair", rejected_reward=R[:2]),
            "rejected_reward must have the shape of reward (4,), got (2,)",
        ),
        (
            lambda: implicit_accuracy(R, LIKED.long(), definition="sample"),
            "is_desirable must be bool of shape (4,), got int64 of shape (4,)",
        ),
    ],
)
def test_a_wrong_argument_raises_its_sentence(call, sentence):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith(sentence)
