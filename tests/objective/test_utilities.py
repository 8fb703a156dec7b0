import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dkto.objective.utilities import UTILITIES, Utility, get_utility, register_utility

BUILT_IN = ("kahneman_tversky", "loss_averse", "risk_seeking", "risk_seeking_literal", "exponential", "linear")
TAME = tuple(name for name in BUILT_IN if name != "exponential")


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "at_minus_1", "at_0", "at_2"),
    [
        ("kahneman_tversky", 0.2689414213699951, 0.5, 0.8807970779778823),
        ("loss_averse", -1.3132616875182228, -0.6931471805599453, -0.1269280110429725),
        ("risk_seeking", 0.3132616875182228, 0.6931471805599453, 2.1269280110429727),
        ("risk_seeking_literal", 0.3132616875182228, 0.6931471805599453, 2.1269280110429727),
        ("exponential", 0.36787944117144233, 1.0, 7.38905609893065),
        ("linear", -1.0, 0.0, 2.0),
    ],
)
def test_values_are_those_computed_by_hand(name, at_minus_1, at_0, at_2):
    torch.testing.assert_close(get_utility(name)(f64(-1, 0, 2)), f64(at_minus_1, at_0, at_2), rtol=1e-14, atol=0)


def test_the_sign_stands_outside_only_for_the_stable_risk_seekers():
    assert {name for name in BUILT_IN if UTILITIES[name].sign == "outside"} == {"risk_seeking", "exponential"}


@pytest.mark.parametrize("name", BUILT_IN)
@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=8))
def test_slope_equals_autograd(name, numbers):
    x = f64(*numbers).requires_grad_()
    (gradient,) = torch.autograd.grad(UTILITIES[name].value(x).sum(), x)
    torch.testing.assert_close(UTILITIES[name].slope(x.detach()), gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", BUILT_IN)
@settings(deadline=None, max_examples=50)
@given(st.floats(-15, 15), st.floats(0.01, 10))
def test_increasing_everywhere(name, x, step):
    below, above = UTILITIES[name].value(f64(x, x + step))
    assert above > below


def curvature(name, x):
    left, middle, right = UTILITIES[name].value(f64(x - 0.05, x, x + 0.05))
    return float(left - 2 * middle + right)


@settings(deadline=None, max_examples=50)
@given(st.floats(0.1, 6))
def test_shapes_are_those_of_the_paper(x):
    for at in (-x, x):
        assert curvature("loss_averse", at) < 0, "concave"
        assert curvature("risk_seeking", at) > 0, "convex"
        assert curvature("exponential", at) > 0, "convex"
        assert abs(curvature("linear", at)) < 1e-12
    assert curvature("kahneman_tversky", -x) > 0, "convex for losses"
    assert curvature("kahneman_tversky", x) < 0, "concave for gains"


@settings(deadline=None, max_examples=50)
@given(st.floats(-30, 30))
def test_the_risk_seeker_is_the_loss_averse_turned_round(x):
    risk, averse = UTILITIES["risk_seeking"], UTILITIES["loss_averse"]
    torch.testing.assert_close(risk.value(f64(x)), -averse.value(f64(-x)), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", TAME)
def test_value_gradient_and_slope_are_right_up_to_10_000(name, dtype):
    x = torch.tensor([-1e4, -100.0, -12.0, -1.0, 0.0, 1.0, 12.0, 100.0, 1e4], dtype=dtype, requires_grad=True)
    y = UTILITIES[name].value(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    slope = UTILITIES[name].slope(x.detach())
    assert y.dtype == gradient.dtype == slope.dtype == dtype
    exact = x.detach().double()
    precision = 4 * torch.finfo(dtype).eps
    for got, truth in ((y, UTILITIES[name].value), (gradient, UTILITIES[name].slope), (slope, UTILITIES[name].slope)):
        torch.testing.assert_close(got.double(), truth(exact), rtol=precision, atol=precision)


@pytest.mark.parametrize(("dtype", "last"), [(torch.float16, 11.0), (torch.float32, 88.0)])
def test_the_exponential_overflows_where_its_description_says(dtype, last):
    exponential = UTILITIES["exponential"]
    assert torch.isfinite(exponential.value(torch.tensor([-1e4, last], dtype=dtype))).all()
    assert torch.isinf(exponential.value(torch.tensor([last + 1, 1e4], dtype=dtype))).all()
    assert f"{last:g} in fp{torch.finfo(dtype).bits}" in exponential.description


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            "loss_avers",
            "unknown utility 'loss_avers'; did you mean 'loss_averse'? known: kahneman_tversky, loss_averse,",
        ),
        ("zzz", "unknown utility 'zzz'; known: kahneman_tversky, loss_averse, risk_seeking, risk_seeking_literal,"),
        (["linear"], "unknown utility ['linear']"),
    ],
)
def test_an_unknown_name_lists_the_known_ones_and_the_nearest(wrong, sentence):
    with pytest.raises(ValueError) as caught:
        get_utility(wrong)
    assert sentence in str(caught.value)


def test_a_utility_is_passed_through():
    mine = Utility("mine", torch.tanh, lambda x: 1 - torch.tanh(x) ** 2)
    assert get_utility(mine) is mine
    assert mine.sign == "inside"


def test_a_registered_utility_is_found_by_name_and_gets_its_slope_by_autograd():
    registered = register_utility("arctan", torch.atan, sign="outside", formula="arctan(x)")
    assert get_utility("arctan") is registered is UTILITIES["arctan"]
    assert (registered.sign, registered.formula) == ("outside", "arctan(x)")
    x = torch.linspace(-3, 3, 12, dtype=torch.float64).reshape(3, 4)
    with torch.no_grad():  # training measures weights without a graph
        slope = registered.slope(x)
    torch.testing.assert_close(slope, 1 / (1 + x**2), rtol=1e-14, atol=0)
    assert not slope.requires_grad


def test_a_kink_and_a_level_stretch_are_allowed():
    assert register_utility("hinge", lambda x: x.clamp(max=1.0)).slope(f64(0.0, 3.0)).tolist() == [1.0, 0.0]


def test_a_name_is_given_twice_only_on_request_and_a_built_in_one_never():
    register_utility("mine", torch.tanh)
    with pytest.raises(ValueError, match="utility 'mine' exists already; choose another name or pass replace=True"):
        register_utility("mine", torch.atan)
    assert register_utility("mine", torch.atan, replace=True).value is torch.atan
    with pytest.raises(ValueError, match="utility 'loss_averse' is built in and cannot be replaced"):
        register_utility("loss_averse", torch.tanh, replace=True)


@pytest.mark.parametrize(
    ("value", "slope", "sentence"),
    [
        (torch.neg, None, "utility 'wrong' must be increasing, but falls after x = -8"),
        (torch.zeros_like, torch.zeros_like, "utility 'wrong' must be increasing, but is constant on"),
        (torch.log, None, "utility 'wrong' must be finite on [-8, 8], but is not at x = -8"),
        (
            torch.sum,
            None,
            "utility 'wrong' must be elementwise: floats of shape (2049,) expected, got float64 of shape ()",
        ),
        (lambda x: 1.0, None, "utility 'wrong' must be elementwise: floats of shape (2049,) expected, got float"),
        (lambda x: x.long(), None, "got int64 of shape (2049,)"),
        (lambda x: x - x.mean(), None, "utility 'wrong' must be elementwise, but its value at x depends on the other"),
        (lambda x: x.cumsum(0), None, "utility 'wrong' must be elementwise, but its value at x depends on the other"),
        (lambda x: x.sign() + 0 * x, None, "jumps or has another slope near x = -0.0078125"),
        (torch.tanh, torch.sigmoid, "must be differentiable with the given slope, but jumps or has another slope"),
        (torch.tanh, lambda x: x.sum(), "slope of utility 'wrong' must be elementwise"),
        (lambda x: x.detach() * 2, None, "slope of utility 'wrong' failed on a float64 tensor of shape (2049,)"),
        (lambda x: x @ torch.ones(3), None, "utility 'wrong' failed on a float64 tensor of shape (2049,)"),
        (
            lambda x: x.sign() * x.abs().sqrt(),
            None,
            "slope of utility 'wrong' must be finite on [-8, 8], but is not at x = 0",
        ),
    ],
)
def test_a_function_that_is_no_utility_is_refused_with_a_reason(value, slope, sentence):
    with pytest.raises(ValueError) as caught:
        register_utility("wrong", value, slope)
    assert sentence in str(caught.value)
    assert "wrong" not in UTILITIES


def test_a_bad_name_or_sign_is_refused():
    with pytest.raises(ValueError, match="name must be a word of letters, digits and underscores, got 'my utility'"):
        register_utility("my utility", torch.tanh)
    with pytest.raises(ValueError, match="sign must be 'inside' or 'outside', got 'above'"):
        register_utility("mine", torch.tanh, sign="above")
