"""Utility functions of human judgement and their slopes (paper 4.2, Figures 2 and 8).

A utility U maps a gain or loss, measured from the reference point, to how much it is felt. Its slope
U' is the weight with which the model learns from a sample (paper C.4). `UTILITIES` holds them by name;
`register_utility` adds a user's own.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dkto.common.names import check_name
from dkto.objective.formula import Map, compile_expression

Sign = Literal["inside", "outside"]


@dataclass(frozen=True)
class Utility:
    """An increasing elementwise map with its slope.

    The sign w of a sample (+1 liked, -1 disliked) is "inside" the utility, U(w * x), or "outside" of it, w * U(x).
    """

    name: str  # key in `UTILITIES`
    value: Map  # U, elementwise, any shape; takes an implicit reward, gives a number without unit
    slope: Map  # U', elementwise
    sign: Sign = "inside"
    formula: str = ""  # U in plain text, for tables
    description: str = ""  # what kind of person feels like that, in one line
    definition: str = ""  # "name = formula" of a utility given as text: with it another process knows the utility too
    title: str = ""  # its name in labels and legends; the key unless given

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.name)

    def __call__(self, x: Tensor) -> Tensor:
        return self.value(x)


def _kahneman_tversky_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)  # s * (1 - s) rounds to 0 for large x, this does not


def _sigmoid_of_negative(x: Tensor) -> Tensor:
    return torch.sigmoid(-x)


def _softplus(x: Tensor) -> Tensor:
    return -logsigmoid(-x)


def _identity(x: Tensor) -> Tensor:
    return x


_BUILT_IN = (
    Utility(
        "kahneman_tversky",
        torch.sigmoid,
        _kahneman_tversky_slope,
        formula="sigmoid(x)",
        description="feels the first gains and losses most and gets used to both; the paper's choice",
        title="Kahneman-Tversky",
    ),
    Utility(
        "loss_averse",
        logsigmoid,
        _sigmoid_of_negative,
        formula="log sigmoid(x)",
        description="feels gains ever less and every further loss in full; DPO, measured from the other side of a pair",
        title="loss-averse",
    ),
    Utility(
        "risk_seeking",
        _softplus,
        torch.sigmoid,
        sign="outside",
        formula="-log sigmoid(-x)",
        description="feels every further gain in full and losses ever less; the stable reading",
        title="risk-seeking",
    ),
    Utility(
        "risk_seeking_literal",
        _softplus,
        torch.sigmoid,
        formula="-log sigmoid(-x)",
        description="the paper's text to the letter: pushes a disliked sample away without end, and diverges",
        title="risk-seeking, literal",
    ),
    Utility(
        "exponential",
        torch.exp,
        torch.exp,
        sign="outside",
        formula="exp(x)",
        description="the untamed risk seeker of paper 4.2.2: exp overflows to inf, above x = 11 in fp16, 88 in fp32",
    ),
    Utility(
        "linear",
        _identity,
        torch.ones_like,
        formula="x",
        description="feels all alike: SFT on the liked minus SFT on the disliked; every utility's limit for small beta",
    ),
)
_BUILT_IN_NAMES = frozenset(utility.name for utility in _BUILT_IN)

UTILITIES: dict[str, Utility] = {utility.name: utility for utility in _BUILT_IN}
"""Every known utility by its name; add to it with `register_utility`.

All but `exponential` keep value and slope finite for |x| up to 1e4 in half, bfloat16 and single precision.
"""


def get_utility(utility: str | Utility) -> Utility:
    """The utility of that name; "name = formula" is one as text; a `Utility` is passed through. Registers nothing.

    Raises:
        ValueError: if the name is unknown (the sentence names the nearest and lists the known ones), or the text is
            refused as by `define_utility`.

    >>> get_utility("loss_averse").formula
    'log sigmoid(x)'
    >>> get_utility("tanh_half = tanh(x / 2)")(torch.tensor([0.0, 2.0]))
    tensor([0.0000, 0.7616])
    """
    if isinstance(utility, Utility):
        return utility
    if isinstance(utility, str) and "=" in utility:
        return _from_text(utility)
    check_name("utility", utility, UTILITIES)
    return UTILITIES[utility]


def register_utility(
    name: str,
    value: Map,
    slope: Map | None = None,
    sign: Sign = "inside",
    *,
    formula: str = "",
    description: str = "registered by the user",
    replace: bool = False,
) -> Utility:
    """Add a utility of one's own to `UTILITIES`; from then on its name works wherever a utility is asked for.

    U is tried on a float64 grid over [-8, 8]: elementwise, finite, increasing (it may level off), and
    rising between neighbouring points as its slope says, which no jump does. Kinks are allowed.

    Args:
        name: a word; not that of a built-in utility, so that a run's record never lies.
        value: U, elementwise.
        slope: U'; by autograd if left out.
        sign: "inside" or "outside", see `Utility`.
        formula: U in plain text, shown in tables.
        description: one line for tables.
        replace: allow a name that was registered before.

    Raises:
        ValueError: if the name is taken or no word, the sign unknown, or U or its slope fails a check.

    >>> tanh = register_utility("tanh", torch.tanh, formula="tanh(x)", replace=True)
    >>> tanh.slope(torch.tensor([0.0]))
    tensor([1.])
    """
    if name in UTILITIES and name not in _BUILT_IN_NAMES and not replace:
        raise ValueError(f"utility {name!r} exists already; choose another name or pass replace=True")
    utility = Utility(name, value, slope or _slope_by_autograd(value), sign, formula or name, description)
    _check(utility)
    UTILITIES[name] = utility
    return utility


def define_utility(name: str, formula: str) -> Utility:
    """Register a utility given as text (`dkto.objective.formula` says what it may hold), under a name of one's own.

    A name may be defined again. In a run's settings the text "name = formula" replaces the name, so
    that the run's record says what was trained, and a sub-process knows it too.

    Raises:
        ValueError: if the formula is refused, or fails a check of `register_utility`.

    >>> define_utility("steep", "2 * sigmoid(3 * x)").definition
    'steep = 2 * sigmoid(3 * x)'
    """
    UTILITIES[name] = _from_text(f"{name} = {formula}")
    return UTILITIES[name]


@cache
def _from_text(definition: str) -> Utility:
    name, formula = (part.strip() for part in definition.split("=", 1))
    value = compile_expression(formula)
    about = {"formula": formula, "description": "defined as text", "definition": f"{name} = {formula}"}
    utility = Utility(name, value, _slope_by_autograd(value), **about)
    _check(utility)
    return utility


def _slope_by_autograd(value: Map) -> Map:
    def slope(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(value(leaf).sum(), leaf)
        return gradient

    return slope


def _check(utility: Utility) -> None:
    if not utility.name.isidentifier():
        raise ValueError(f"name must be a word of letters, digits and underscores, got {utility.name!r}")
    if utility.name in _BUILT_IN_NAMES:
        raise ValueError(f"utility {utility.name!r} is built in and cannot be replaced; choose another name")
    if utility.sign not in ("inside", "outside"):
        raise ValueError(f"sign must be 'inside' or 'outside', got {utility.sign!r}")
    grid = torch.linspace(-8, 8, 2049, dtype=torch.float64)  # steps of 1/128 and 0 itself, exactly
    y = _on_grid(f"utility {utility.name!r}", utility.value, grid)
    slopes = _on_grid(f"slope of utility {utility.name!r}", utility.slope, grid)
    falls = y.diff() < -1e-12
    if falls.any():
        raise ValueError(f"utility {utility.name!r} must be increasing, but falls after x = {grid[:-1][falls][0]:g}")
    if y[-1] <= y[0]:
        raise ValueError(f"utility {utility.name!r} must be increasing, but is constant on [-8, 8]")
    # mean value theorem: the rise over a step lies between the slopes at its ends, but for curvature within it
    rise = y.diff() / grid.diff()
    low, high = torch.minimum(slopes[:-1], slopes[1:]), torch.maximum(slopes[:-1], slopes[1:])
    slack = 0.01 * high.abs() + 1e-4
    wrong = (rise < low - slack) | (rise > high + slack)
    if wrong.any():
        raise ValueError(
            f"utility {utility.name!r} must be differentiable with the given slope, "
            f"but jumps or has another slope near x = {grid[:-1][wrong][0]:g}"
        )


def _on_grid(what: str, map_: Map, grid: Tensor) -> Tensor:
    try:
        y, middle = map_(grid), map_(grid[700:703])
    except Exception as error:  # whatever a user's function raises, say whose it is
        raise ValueError(f"{what} failed on a float64 tensor of shape {tuple(grid.shape)}: {error}") from error
    if not isinstance(y, Tensor) or y.shape != grid.shape or not y.is_floating_point():
        came = (
            f"{y.dtype} of shape {tuple(y.shape)}".removeprefix("torch.") if isinstance(y, Tensor) else type(y).__name__
        )
        raise ValueError(f"{what} must be elementwise: floats of shape {tuple(grid.shape)} expected, got {came}")
    if not torch.isfinite(y).all():
        raise ValueError(f"{what} must be finite on [-8, 8], but is not at x = {grid[~torch.isfinite(y)][0]:g}")
    if middle.shape != (3,) or not torch.allclose(middle, y[700:703], rtol=1e-9, atol=1e-12):
        raise ValueError(f"{what} must be elementwise, but its value at x depends on the other elements")
    return y.detach()
