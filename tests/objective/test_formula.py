import ast
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dkto.objective.formula import FUNCTIONS, FUNCTIONS_OF_TWO, compile_expression
from dkto.objective.losses import kto_loss
from dkto.objective.utilities import UTILITIES, define_utility, get_utility

X = torch.linspace(-3, 3, 13, dtype=torch.float64)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x", X),
        ("tanh(x/2)", torch.tanh(X / 2)),
        (" -x + +2 * pi ", -X + 2 * math.pi),
        ("(x - 1) ** 3 / 4", (X - 1) ** 3 / 4),
        ("x ** -2 + e", X**-2 + math.e),
        ("maximum(x, 0) - 2.25 * relu(-x)", X.clamp(min=0) - 2.25 * (-X).clamp(min=0)),
    ],
)
def test_formulas_mean_what_they_say(text, expected):
    torch.testing.assert_close(compile_expression(text)(X), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [*FUNCTIONS, *FUNCTIONS_OF_TWO])
def test_every_function_can_be_called_and_keeps_precision(name):
    text = f"{name}(x)" if name in FUNCTIONS else f"{name}(x, 1)"
    value = compile_expression(text)(torch.tensor([0.5], dtype=torch.float32))
    assert value.dtype == torch.float32 and torch.isfinite(value).all()


REFUSED = {
    "": "must be text",
    "x.real": "'x.real' is not allowed",
    "x.__class__.__bases__": "is not allowed",
    "__import__('os').system('true')": "is not allowed",
    "__import__": "unknown name '__import__'",
    "open(x)": "unknown name 'open'",
    "eval('x')": "unknown name 'eval'",
    "tanhh(x)": "unknown name 'tanhh'; did you mean 'tanh'",
    "tanh(x": "cannot be read",
    "x = 3": "cannot be read",
    "x; x": "cannot be read",
    "lambda x: x": "is not allowed",
    "[x for x in (1, 2)]": "is not allowed",
    "x[0]": "is not allowed",
    "x if x > 0 else 0": "is not allowed",
    "x and 1": "is not allowed",
    "f'{x}'": "is not allowed",
    "'a' * x": "a number must be plain",
    "True * x": "a number must be plain",
    "1j * x": "a number must be plain",
    "1e999 * x": "a number must be plain",
    "x // 2": "is not allowed",
    "x @ x": "is not allowed",
    "x << 9": "is not allowed",
    "tanh(x, 2)": "tanh takes 1 value, got 2",
    "maximum(x)": "maximum takes 2 values, got 1",
    "tanh(x, out=x)": r"'tanh\(x, out=x\)' is not allowed",
    "2*x(1+x)": r"'x\(1 [+] x\)' is not allowed",
    "pi(2) + x": r"'pi\(2\)' is not allowed",
    "x()": "is not allowed",
    "tahn(x)": "unknown name 'tahn'; did you mean 'tanh'",
    "tanh(*x)": "is not allowed",
    "tanh": "tanh is a function: write its values in brackets",
    "9**9**9 * x": "exponent of a power must be a number from -10 to 10, got '9 [*][*] 9'",
    "x ** 11": "exponent",
    "x ** x": "exponent",
    "x ** 1e300": "exponent",
    "3 + 4": "does not depend on x",
    "x" + "+x" * 60: "has 121 parts, more than 100",
    "x" + " " * 300 + "+ 1": "200 characters, got",
    "(" * 90 + "x" + ")" * 90 + "(": "cannot be read",
    "-" * 150 + "x": "parts, more than 100",
    "x\0": "cannot be read",
    "𝓍 + 1": None,  # Python reads this letter as x, so it is x
}


@pytest.mark.timeout(300)  # what is computed before it is refused takes hours
@pytest.mark.parametrize(("text", "sentence"), REFUSED.items())
def test_what_is_not_allowed_is_refused_at_once_in_one_sentence(text, sentence):
    if sentence is None:
        compile_expression(text)
    else:
        with pytest.raises(ValueError, match=sentence) as raised:
            compile_expression(text)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


ATOMS = st.one_of(
    st.sampled_from(
        ["x", "pi", "e", "__import__", "os", "x.real", "tanh", "'a'", "None", "9**9**9", "1e999", "0", "_"]
    ),
    st.integers(-(10**30), 10**30).map(str),
    st.floats(allow_nan=False).map(repr),
)


def combined(children):
    return st.one_of(
        st.tuples(children, st.sampled_from(["+", "-", "*", "/", "**", "//", "%", "<", "and", ",", "."]), children).map(
            lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"
        ),
        st.tuples(st.sampled_from([*FUNCTIONS, *FUNCTIONS_OF_TWO, "eval", "getattr"]), children).map(
            lambda parts: f"{parts[0]}({parts[1]})"
        ),
        children.map(lambda part: f"-{part}"),
        children.map(lambda part: f"[{part}]"),
    )


@pytest.mark.timeout(300)
@settings(deadline=None, max_examples=300)
@given(st.recursive(ATOMS, combined, max_leaves=12))
def test_any_formula_is_a_function_of_x_or_a_sentence(text):
    """Whatever the text: no other exception, no long computation; and what is accepted is elementwise."""
    try:
        function = compile_expression(text)
    except ValueError as refusal:
        assert "\n" not in str(refusal)
        return
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert names <= {"x", "pi", "e", *FUNCTIONS, *FUNCTIONS_OF_TWO}
    value = function(X)
    assert value.shape == X.shape and value.dtype == X.dtype
    torch.testing.assert_close(function(X[3:5]), value[3:5], equal_nan=True)


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=60))
def test_any_text_at_all_is_refused_or_compiled(text):
    try:
        compile_expression(text)
    except ValueError as refusal:
        assert str(refusal)


def test_a_utility_as_text_is_one_without_being_registered():
    utility = get_utility("of_text = tanh(x / 3)")
    assert utility is get_utility("of_text = tanh(x / 3)") and utility.name == "of_text" not in UTILITIES
    assert define_utility("of_text", "tanh(x / 3)") is utility is UTILITIES["of_text"]
    assert get_utility("of_text = x").formula == "x" and get_utility("of_text") is utility


def test_a_defined_utility_trains_under_its_name_and_under_its_definition():
    utility = define_utility("tanh_half", " tanh(x/2) ")
    assert utility.definition == "tanh_half = tanh(x/2)" and utility.formula == "tanh(x/2)"
    reward = torch.tensor([1.0, -0.5], dtype=torch.float64, requires_grad=True)
    liked, point = torch.tensor([True, False]), torch.tensor(0.0, dtype=torch.float64)
    losses = [kto_loss(reward, liked, point, name) for name in ("tanh_half", utility.definition)]
    expected = (1 - torch.tanh(torch.tensor([1.0, 0.5], dtype=torch.float64) / 2)).mean()
    assert losses[0] == losses[1] == expected
    losses[0].backward()
    assert (reward.grad * torch.tensor([-1, 1]) > 0).all()


@pytest.mark.parametrize(
    ("definition", "sentence"),
    [
        ("mine = -x", "must be increasing"),
        ("mine = log(x)", "must be finite"),
        ("mine = 1 / x", "finite"),
        ("linear = 2 * x", "built in"),
        ("two words = x", "must be a word"),
        ("mine = ", "must be text"),
        ("mine = os", "unknown name 'os'"),
    ],
)
def test_a_formula_that_is_no_utility_is_refused(definition, sentence):
    with pytest.raises(ValueError, match=sentence):
        get_utility(definition)
