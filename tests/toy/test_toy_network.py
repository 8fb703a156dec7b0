"""Stacked networks against plain torch modules and autograd."""

import pytest
import torch
from exact_density import with_jacobian

from toy.network import Architecture, Ensemble, stream

SMALL = Architecture(num_train_timesteps=20, width=8, depth=3)


def plain_module(ensemble, member):
    """The same network as torch.nn layers."""
    layers = []
    for weight, bias in ensemble._views(ensemble.parameters):
        linear = torch.nn.Linear(*weight.shape[1:], dtype=weight.dtype)
        linear.weight.data, linear.bias.data = weight[member].mT.clone(), bias[member, 0].clone()
        layers += [linear, torch.nn.SiLU()]
    return torch.nn.Sequential(*layers[:-1])


@pytest.fixture
def ensemble():
    return Ensemble.initial(SMALL, [1, 2, 3], torch.float64)


@pytest.fixture
def batch():
    return torch.randn(3, 5, 2, dtype=torch.float64), torch.randint(20, (3, 5)), torch.randn(3, 5, dtype=torch.float64)


def test_a_member_is_a_plain_torch_network(ensemble, batch):
    noisy, timesteps, label = batch
    read = ensemble.inputs(noisy, timesteps, label)
    noise_pred, _ = ensemble.forward(read)
    for member in range(3):
        assert torch.allclose(noise_pred[member], plain_module(ensemble, member)(read[member]), atol=1e-13)


def test_backward_equals_autograd(ensemble, batch):
    """Every parameter of every member, to the rounding of float64."""
    read = ensemble.inputs(*batch)
    upstream = torch.randn(3, 5, 2, dtype=torch.float64)
    _, trace = ensemble.forward(read)
    by_hand = ensemble.backward(trace, upstream)
    leaf = Ensemble(SMALL, ensemble.parameters.clone().requires_grad_(True))
    (expected,) = torch.autograd.grad(leaf.forward(read)[0], leaf.parameters, upstream)
    assert torch.allclose(by_hand, expected, rtol=0, atol=1e-12)
    assert float(expected.abs().max()) > 0.1


def test_calling_at_one_timestep_equals_forward(ensemble, batch):
    noisy, _, _ = batch
    label = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
    every = label[:, None].expand(3, 5)
    expected, _ = ensemble.forward(ensemble.inputs(noisy, torch.full((3, 5), 7), every))
    assert torch.allclose(ensemble(noisy, 7, label), expected, atol=1e-13)
    assert not torch.allclose(ensemble(noisy, 7), expected, atol=1e-6)


def test_jacobian_equals_autograd(ensemble, batch):
    noisy = batch[0].requires_grad_(True)
    noise_pred, jacobian = with_jacobian(ensemble, noisy, 3)
    assert torch.allclose(noise_pred, ensemble(noisy, 3), atol=1e-13)
    for i in (0, 1):
        (row,) = torch.autograd.grad(noise_pred[..., i].sum(), noisy, retain_graph=True)
        assert torch.allclose(jacobian[..., i, :], row, atol=1e-12)


def test_members_depend_on_their_seed_alone():
    together = Ensemble.initial(SMALL, [5, 6])
    assert torch.equal(together.parameters[1], Ensemble.initial(SMALL, [6]).parameters[0])
    assert not torch.equal(together.parameters[0], together.parameters[1])
    double = Ensemble.initial(SMALL, [5], torch.float64).parameters
    assert torch.equal(double.float()[0], together.parameters[0]), "a seed means the same in every precision"


def test_streams_differ_by_seed_and_purpose():
    first = {
        (seed, purpose): torch.rand(1, generator=stream(seed, purpose)).item() for seed in (0, 1) for purpose in "ab"
    }
    assert len(set(first.values())) == 4
    assert torch.rand(1, generator=stream(0, "a")).item() == first[0, "a"]


def test_copies_and_selections_have_parameters_of_their_own(ensemble):
    twice, one = ensemble.copy(2), ensemble.select([2])
    assert torch.equal(twice.parameters[3:], ensemble.parameters) and torch.equal(
        one.parameters[0], ensemble.parameters[2]
    )
    twice.parameters.zero_()
    one.parameters.zero_()
    assert ensemble.parameters.abs().sum() > 0


def test_a_broken_member_leaves_the_others_alone(ensemble, batch):
    clean = ensemble(batch[0], 4)
    ensemble.parameters[0] = torch.nan
    broken = ensemble(batch[0], 4)
    assert broken[0].isnan().all() and torch.equal(broken[1:], clean[1:])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Architecture(20, width=0), "width must be 1 or above, got 0"),
        (lambda: Ensemble(SMALL, torch.zeros(2, 3)), rf"parameters must have shape \(M, {SMALL.count}\), got \(2, 3\)"),
    ],
)
def test_wrong_arguments_raise_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
