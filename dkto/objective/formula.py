"""A utility written as text, such as "tanh(x / 2)": parsed over a short list of allowed parts, never evaluated.

Text comes from people who type it into a browser. Only numbers, `x`, the constants and functions below,
+ - * / and powers by a plain number can be said; anything else is refused in one sentence before
anything is computed, and what is computed are torch operations on the given tensor, at most `MAX_PARTS` of them.
"""

import ast
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from dkto.common.names import not_known, shown

MAX_LENGTH = 200  # characters
MAX_PARTS = 100  # numbers, names, operations and calls
MAX_NUMBER = 1e6
MAX_EXPONENT = 10.0

CONSTANTS = {"pi": math.pi, "e": math.e}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "arctan": torch.atan,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "logsigmoid": logsigmoid,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "sinh": torch.sinh,
    "softplus": softplus,
    "sqrt": torch.sqrt,
    "tanh": torch.tanh,
}
FUNCTIONS_OF_TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"maximum": torch.maximum, "minimum": torch.minimum}
KNOWN = ("x", *CONSTANTS, *FUNCTIONS, *FUNCTIONS_OF_TWO)
_OPERATORS = {ast.Add: torch.add, ast.Sub: torch.sub, ast.Mult: torch.mul, ast.Div: torch.div}
_SIGNS = {ast.UAdd: torch.positive, ast.USub: torch.neg}

Map = Callable[[Tensor], Tensor]


def compile_expression(text: str) -> Map:
    """Turn a formula in `x` into an elementwise function of a tensor.

    Allowed: `x`, numbers up to 1e6, `pi`, `e`, + - * /, powers `... ** number` with the number in [-10, 10],
    the functions of one value in `FUNCTIONS`, and `minimum` and `maximum` of two.

    Args:
        text: at most 200 characters.

    Returns:
        A function (any shape, floating) -> the same shape and precision, differentiable by autograd.

    Raises:
        ValueError: if the text is no formula, too long, says anything that is not allowed, or lacks `x`;
            the sentence quotes the part.

    >>> compile_expression("tanh(x / 2)")(torch.tensor([0.0, 2.0]))
    tensor([0.0000, 0.7616])
    >>> compile_expression("9 ** 9 ** 9 * x")
    Traceback (most recent call last):
    ValueError: formula '9 ** 9 ** 9 * x': the exponent of a power must be a number from -10 to 10, got '9 ** 9'
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"a formula must be text such as 'tanh(x / 2)', got {shown(text)}")
    text = text.strip()
    if len(text) > MAX_LENGTH:
        raise ValueError(f"a formula may have {MAX_LENGTH} characters, got {len(text)}")
    try:
        tree = ast.parse(text, mode="eval").body
        parts = [part for part in ast.walk(tree) if isinstance(part, ast.expr)]
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else "it is nested too deeply or holds a strange character"
        raise ValueError(f"formula {shown(text)} cannot be read: {reason}") from None
    if len(parts) > MAX_PARTS:
        raise ValueError(f"formula {shown(text)} has {len(parts)} parts, more than {MAX_PARTS}")
    try:
        compiled = _compile(tree)
    except ValueError as refusal:
        raise ValueError(f"formula {shown(text)}: {refusal}") from None
    if not any(isinstance(part, ast.Name) and part.id == "x" for part in parts):
        raise ValueError(f"formula {shown(text)} does not depend on x")
    return compiled


def _compile(node: ast.expr) -> Map:
    """The function of one part; whatever is not listed here is refused."""
    match node:
        case ast.Name(id="x"):
            return lambda x: x
        case ast.Name(id=name) if name in CONSTANTS:
            return _constant(CONSTANTS[name])
        case ast.Name(id=name) if name in KNOWN:
            raise ValueError(f"{name} is a function: write its values in brackets")
        case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)) if name not in KNOWN:
            raise ValueError(not_known(f"unknown name {shown(name)}", name, KNOWN))
        case ast.Constant():
            return _constant(_number(node, MAX_NUMBER, f"a number must be plain and at most {MAX_NUMBER:g}"))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _SIGNS:
            sign, inner = _SIGNS[type(op)], _compile(operand)
            return lambda x: sign(inner(x))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            limit = f"the exponent of a power must be a number from -{MAX_EXPONENT:g} to {MAX_EXPONENT:g}"
            base, exponent = _compile(left), _number(right, MAX_EXPONENT, limit)
            return lambda x: base(x) ** exponent
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            operate, first, second = _OPERATORS[type(op)], _compile(left), _compile(right)
            return lambda x: operate(first(x), second(x))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS | FUNCTIONS_OF_TWO:
            wanted = 1 if name in FUNCTIONS else 2
            if len(arguments) != wanted:
                raise ValueError(f"{name} takes {wanted} value{'s' * (wanted > 1)}, got {len(arguments)}")
            function, inner = (FUNCTIONS | FUNCTIONS_OF_TWO)[name], [_compile(argument) for argument in arguments]
            return lambda x: function(*(part(x) for part in inner))
    part = shown(ast.unparse(node))
    raise ValueError(f"{part} is not allowed; write it with x, numbers, + - * / ** and the known functions")


def _constant(value: float) -> Map:
    return lambda x: torch.full_like(x, value, requires_grad=False)


def _number(node: ast.expr, largest: float, expected: str) -> float:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):  # no literal
        value = None
    if type(value) not in (int, float) or not abs(value) <= largest:
        raise ValueError(f"{expected}, got {shown(ast.unparse(node))}")
    return float(value)
