"""The table of methods: each entry is the loss functions of the paper put together, and a new one is one entry."""

import pytest
import torch

from dkto.objective import METHODS, Errors, Felt, method_loss, methods
from dkto.objective.losses import (
    dpo_loss,
    effective_weight,
    implicit_reward,
    kto_loss,
    reference_point,
    sft_loss,
)

GENERATOR = torch.Generator().manual_seed(0)
ERRORS = Errors(*torch.rand(2, 6, generator=GENERATOR, dtype=torch.float64))
ERRORS = ERRORS._replace(shift=ERRORS.policy / 10, overlap=ERRORS.policy[0::2] / 2)
LIKED = torch.tensor([True, False, True, True, False, False])
ALL_LIKED = torch.ones(6, dtype=torch.bool)
OF_LOSS = tuple(name for name, method in METHODS.items() if method.loss is not None)
OF_PAPER = ("kto", "dpo", "sft", "sft_all", "csft")


def by_hand(name, beta=7.0):
    """What a method must give, from the functions of the losses alone."""
    reward = implicit_reward(ERRORS.policy, ERRORS.reference, beta)
    if name == "kto":
        point = reference_point(reward, "batch", is_desirable=LIKED)
        loss = kto_loss(reward, LIKED, point, "kahneman_tversky")
        return Felt(loss, reward, point, effective_weight(reward, LIKED, point, "kahneman_tversky").abs())
    if name == "dpo":
        chosen, rejected = reward[0::2], reward[1::2]
        slope = torch.stack([(rejected - chosen).sigmoid()] * 2, -1).flatten()
        return Felt(dpo_loss(chosen, rejected), reward, slope=slope)
    return Felt(sft_loss(ERRORS.policy, LIKED) if name == "sft" else sft_loss(ERRORS.policy))


@pytest.mark.parametrize("name", OF_PAPER)
def test_an_entry_is_its_loss_functions_put_together(name):
    beta = {"beta": 7.0} if "beta" in METHODS[name].settings else {}
    found = method_loss(name, ERRORS, LIKED, **beta)
    for got, wanted in zip(found, by_hand(name), strict=True):
        assert (got is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", OF_LOSS)
def test_only_the_loss_carries_a_gradient(name):
    policy = ERRORS.policy.clone().requires_grad_()
    beta = {"beta": 7.0} if "beta" in METHODS[name].settings else {}
    group = {"group_size": 6} if name == "dgpo" else {}
    felt = method_loss(name, ERRORS._replace(policy=policy), LIKED, **beta, **group)
    assert felt.loss.requires_grad
    assert not any(value.requires_grad for value in felt[1:] if value is not None)


def test_the_settings_of_kto_reach_its_loss():
    """Each keyword changes what is felt exactly as it changes the function that takes it."""
    reward = implicit_reward(ERRORS.policy, ERRORS.reference, 7.0)
    zero = torch.zeros((), dtype=torch.float64)
    felt = method_loss("kto", ERRORS, LIKED, beta=7.0, utility="loss_averse", estimator="zero", undesirable_weight=2.0)
    assert felt.point == 0
    torch.testing.assert_close(felt.loss, kto_loss(reward, LIKED, zero, "loss_averse", undesirable_weight=2.0))
    other = Errors(*torch.rand(2, 6, generator=GENERATOR, dtype=torch.float64))
    felt = method_loss("kto", ERRORS._replace(unrelated=other), LIKED, beta=7.0, estimator="unrelated", clamp=False)
    torch.testing.assert_close(felt.point, implicit_reward(other.policy, other.reference, 7.0).mean())


def test_a_batch_split_over_processes_has_the_reference_point_of_the_whole():
    """`reduce` sums over all processes; a method without a reference point does not take it."""
    whole = method_loss("kto", ERRORS, LIKED, beta=7.0)
    halves = [Errors(*(error[part] for error in ERRORS[:2])) for part in (slice(0, 3), slice(3, 6))]
    sums = []
    for half, part in zip(halves, (LIKED[:3], LIKED[3:]), strict=True):
        method_loss("kto", half, part, beta=7.0, reduce=lambda x: sums.append(x) or x)
    total = torch.stack(sums).sum(0)
    found = method_loss("kto", halves[0], LIKED[:3], beta=7.0, reduce=lambda _: total)
    torch.testing.assert_close(found.point, whole.point)
    assert method_loss("sft", ERRORS, ALL_LIKED, reduce=lambda x: 2 * x).loss == sft_loss(ERRORS.policy)


def test_settings_are_the_keywords_of_the_loss_and_those_outside_it():
    assert METHODS["kto"].settings == (
        *("beta", "utility", "estimator", "clamp", "desirable_weight", "undesirable_weight", "noise_draws"),
        "desirable_fraction",
    )
    assert METHODS["dpo"].settings == ("beta",) and METHODS["csft"].settings == ("csft_style",)
    assert "sampling_steps" in METHODS["alignprop"].settings and "beta" in METHODS["d3po"].settings
    for name, method in METHODS.items():
        assert len(set(method.settings)) == len(method.settings), name


def test_settings_are_read_from_a_configuration_by_their_names():
    class Config:
        beta, csft_style, other = 3.0, "prefix", "unused"

    assert METHODS["dpo"].loss_settings(Config) == {"beta": 3.0}
    assert METHODS["csft"].loss_settings(Config) == {}, "what is outside the loss does not reach it"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name):
    method = METHODS[name]
    assert method.title and method.trained_on
    assert (method.loss is None) == (method.draws == "own"), "without a loss of rows it draws its own images"
    assert (name in methods.OFFLINE) != (name in methods.ONLINE)


def test_unknown_names_and_settings_are_refused():
    with pytest.raises(ValueError, match=r"unknown method 'kt'.* kto, dpo, sft, sft_all, csft"):
        method_loss("kt", ERRORS, LIKED, beta=1.0)
    with pytest.raises(ValueError, match="unknown method 'alignprop'"):
        method_loss("alignprop", ERRORS, LIKED)
    with pytest.raises(TypeError, match="utility"):
        method_loss("dpo", ERRORS, LIKED, beta=1.0, utility="linear")
    with pytest.raises(TypeError, match="beta"):
        method_loss("kto", ERRORS, LIKED)


def test_a_new_method_is_one_function_and_one_entry(monkeypatch):
    """CONTRIBUTING promises no more: its settings are found by their names, its loss by its own."""

    def hinge(errors, is_desirable, *, beta, margin=1.0):
        reward = implicit_reward(errors.policy, errors.reference, beta)
        signed = torch.where(is_desirable, reward, -reward)
        return Felt((margin - signed).relu().mean(-1), reward.detach())

    monkeypatch.setitem(METHODS, "hinge", methods.Method("hinge", "on single likes", "all", hinge))
    # computed from the table when the module is read, so with an entry in the file this line is not needed
    monkeypatch.setattr(methods, "OFFLINE", tuple(name for name, m in METHODS.items() if m.loss is not None))
    assert METHODS["hinge"].settings == ("beta", "margin")
    felt = method_loss("hinge", ERRORS, LIKED, beta=7.0, margin=0.5)
    signs = torch.where(LIKED, 1.0, -1.0)
    expected = (0.5 - signs * 7.0 * (ERRORS.reference - ERRORS.policy)).clamp(min=0).mean()
    torch.testing.assert_close(felt.loss, expected)
