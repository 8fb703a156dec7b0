"""Utility functions of human judgement and their slopes (paper 4.2, Figures 2 and 8).

A utility U maps a gain or loss, measured from the reference point, to how much it is felt. Its slope
U' is the weight with which a sample is learnt from (paper C.4). `UTILITIES` holds them by name;
`register_utility` adds a user's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Sign = Literal["inside", "outside"]
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Utility:
    """An increasing elementwise map with its slope.

    Attributes:
        name: key in `UTILITIES`.
        value: U, elementwise, any shape, no unit.
        slope: U', elementwise.
        sign: where the sign of a sample stands (equations of `dkto.losses.kto_loss`): "inside" the
            utility, U(w * x), or "outside", w * U(x).
        formula: U in text, for tables and figures.
        description: what kind of person feels like that.
    """

    name: str
    value: Map
    slope: Map
    sign: Sign
    formula: str
    description: str

    def __call__(self, x: Tensor) -> Tensor:
        return self.value(x)


def _kahneman_tversky_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


def _sigmoid_of_negative(x: Tensor) -> Tensor:
    return torch.sigmoid(-x)


def _softplus(x: Tensor) -> Tensor:
    return -logsigmoid(-x)


UTILITIES: dict[str, Utility] = {
    utility.name: utility
    for utility in (
        Utility(
            "kahneman_tversky",
            torch.sigmoid,
            _kahneman_tversky_slope,
            "inside",
            "sigmoid(x)",
            "feels the first gains and losses most and gets used to both (the paper's choice)",
        ),
        Utility(
            "loss_averse",
            logsigmoid,
            _sigmoid_of_negative,
            "inside",
            "log sigmoid(x)",
            "feels losses ever more and gains ever less; relative to the other sample's reward, DPO",
        ),
        Utility(
            "risk_seeking",
            _softplus,
            torch.sigmoid,
            "outside",
            "-log sigmoid(-x)",
            "feels gains ever more and losses ever less; the stable reading, sign outside",
        ),
        Utility(
            "risk_seeking_literal",
            _softplus,
            torch.sigmoid,
            "inside",
            "-log sigmoid(-x)",
            "the paper's text read literally: rewards pushing a disliked sample away for ever, diverges",
        ),
        Utility(
            "exponential",
            torch.exp,
            torch.exp,
            "outside",
            "exp(x)",
            "the untamed risk seeker (paper 4.2.2), whose gradient explodes",
        ),
    )
}
BUILT_IN = frozenset(UTILITIES)


def get_utility(utility: str | Utility) -> Utility:
    """The utility of that name (a `Utility` is passed through).

    Raises:
        ValueError: if the name is unknown; the sentence names the nearest and lists the known ones.

    >>> get_utility("loss_averse").formula
    'log sigmoid(x)'
    """
    if isinstance(utility, Utility):
        return utility
    if utility in UTILITIES:
        return UTILITIES[utility]
    near = get_close_matches(str(utility), UTILITIES, 1)
    guess = f"; did you mean {near[0]!r}?" if near else ";"
    raise ValueError(f"unknown utility {utility!r}{guess} known: {', '.join(UTILITIES)}")


def register_utility(
    name: str,
    value: Map,
    slope: Map | None = None,
    *,
    sign: Sign = "inside",
    formula: str = "",
    description: str = "registered by the user",
    replace: bool = False,
) -> Utility:
    """Add a utility of one's own to `UTILITIES`, usable everywhere by its name.

    It must be elementwise, and on a grid over [-8, 8] finite and increasing; it may saturate but not fall.

    Args:
        name: not the name of a built-in one.
        value: U, elementwise.
        slope: U'; by autograd where it is left out.
        sign: "inside" (the default) or "outside", see `Utility`.
        formula: U in text, shown in figures.
        description: one line for tables.
        replace: allow a name that was registered before.

    Returns:
        The registered utility.

    Raises:
        ValueError: if the name is taken or not a word, the sign unknown, or U fails a check.

    >>> tanh = register_utility("tanh", torch.tanh, formula="tanh(x)", replace=True)
    >>> tanh.slope(torch.tensor([0.0]))
    tensor([1.])
    """
    if not name.isidentifier():
        raise ValueError(f"name must be a word of letters, digits and underscores, got {name!r}")
    if name in BUILT_IN or (name in UTILITIES and not replace):
        raise ValueError(f"utility {name!r} exists already; choose another name{'' if name in BUILT_IN else ' or pass replace=True'}")
    if sign not in ("inside", "outside"):
        raise ValueError(f"sign must be 'inside' or 'outside', got {sign!r}")
    slope = slope or _slope_by_autograd(value)
    _check_utility(name, value, slope)
    UTILITIES[name] = Utility(name, value, slope, sign, formula or name, description)
    return UTILITIES[name]


def _slope_by_autograd(value: Map) -> Map:
    def slope(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(value(leaf).sum(), leaf)
        return gradient

    return slope


def _check_utility(name: str, value: Map, slope: Map) -> None:
    grid = torch.linspace(-8, 8, 321, dtype=torch.float64)
    y = value(grid)
    if not isinstance(y, Tensor) or y.shape != grid.shape:
        raise ValueError(f"utility {name!r} must be elementwise: a tensor of shape (321,) came back as {_shape(y)}")
    if not torch.allclose(value(grid[100:103]), y[100:103], rtol=1e-9, atol=1e-12):
        raise ValueError(f"utility {name!r} must be elementwise: its value at x depends on the other elements")
    if not torch.isfinite(y).all():
        raise ValueError(f"utility {name!r} must be finite on [-8, 8], but is not at x = {grid[~torch.isfinite(y)][0]:g}")
    falls = y.diff() < -1e-12
    if falls.any():
        raise ValueError(f"utility {name!r} must be increasing, but falls after x = {grid[:-1][falls][0]:g}")
    if y[-1] <= y[0]:
        raise ValueError(f"utility {name!r} must be increasing, but is constant on [-8, 8]")
    inner = grid[1:-1]
    measured = (value(inner + 1e-5) - value(inner - 1e-5)) / 2e-5
    wrong = ((slope(inner) - measured).abs() > 1e-3 * (1 + measured.abs()))
    if wrong.sum() > 4:  # a few kinks are allowed
        raise ValueError(f"slope of utility {name!r} is not its derivative, for example at x = {inner[wrong][0]:g}")


def _shape(y: object) -> str:
    return f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
