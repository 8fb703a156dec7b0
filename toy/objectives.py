"""Every objective of the paper as data: what a method draws, and which of `dkto.objective.losses` it minimises.

Nothing of the losses is written again here. A method's gradient is that of weighted denoising, and the
weights are the derivatives of its loss by the denoising errors: `error_weights`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dkto.common.names import check_name
from dkto.common.settings import checked_number
from dkto.objective.losses import ESTIMATORS
from dkto.objective.methods import BRAKES, OFFLINE, Errors, Felt, method_loss
from dkto.objective.methods import METHODS as LOSSES
from dkto.objective.utilities import get_utility
from toy.world import DESIRABLE, PRETRAINING, UNDESIRABLE, Gaussian

# settings of which each method of one call of a loss has its own; the others it shares with them
NUMBERS = ("beta", "desirable_weight", "undesirable_weight", *BRAKES)
TOY_ESTIMATORS = tuple(name for name in ESTIMATORS if name != "unrelated")


@dataclass(frozen=True)
class Method:
    """One way of tuning: an objective with its settings.

    Attributes:
        objective: "sft" and "csft" (paper eq. 3, 5.1.2), "dpo" (Diffusion-DPO), "kto" (eq. 14-15), or a newer one of
            `dkto.objective.newer_methods`.
        utility: name in `dkto.objective.utilities.UTILITIES`; only "kto" looks at it, as at the next five.
        desirable_weight, undesirable_weight: of the classes, no unit.
        estimator: of the reference point, see `dkto.objective.losses.reference_point`; a world without prompts has
            "independent" for the paper's "unrelated".
        clamp: keep the reference point at or above 0.
        beta: reward scale, per unit of mean squared error; "kto" and "dpo".
        desirable_fraction: gamma, chance that a drawn sample is desirable (paper 4.3); pairs ignore it.
        flip_rate: chance that a label, or the order of a pair, is wrong; in [0, 1].
        noise_draws, mixing, clip_range, group_size, smoothing, safeguard: of the objectives that have them.
        anchor, sft_weight: brakes of any objective, see `dkto.objective.methods.method_loss`.
    """

    objective: str = "kto"
    utility: str = "kahneman_tversky"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    estimator: str = "batch"
    clamp: bool = True
    beta: float = 10.0
    desirable_fraction: float = 0.8
    flip_rate: float = 0.0
    noise_draws: int = 1
    mixing: float = 1.0
    clip_range: float = 0.2
    group_size: int = 4
    smoothing: float = 0.01
    safeguard: float = 0.0
    anchor: float = 0.0
    sft_weight: float = 0.0

    def __post_init__(self) -> None:
        check_name("objective", self.objective, OFFLINE)
        check_name("estimator", self.estimator, TOY_ESTIMATORS)
        get_utility(self.utility)
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("desirable_fraction", "flip_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in BRAKES:
            checked_number(name, getattr(self, name), float, least=0)

    @property
    def needs_shift(self) -> bool:
        """Whether the loss reads `Errors.shift`."""
        return "shift" in LOSSES[self.objective].reads or self.anchor > 0

    @property
    def label(self) -> float:
        """What the trained network gets when it samples: +1 for CSFT ("good image"), else 0."""
        return 1.0 if self.objective == "csft" else 0.0


OF_DRAWING = ("desirable_fraction", "flip_rate")
SHARED = tuple(f.name for f in fields(Method) if f.name not in ("objective", *OF_DRAWING, *NUMBERS))
KTO_FAMILY = ("loss_averse", "risk_seeking", "kahneman_tversky")

METHODS: dict[str, Method] = {
    "sft": Method("sft", desirable_fraction=1.0),
    "csft": Method("csft", desirable_fraction=0.5),
    "dpo": Method("dpo"),
    **{name: Method(utility=name) for name in KTO_FAMILY},
    **{f"{name}@0.5": Method(utility=name, desirable_fraction=0.5) for name in KTO_FAMILY},
}
"""The methods of the headline figure by name; "@0.5" marks half of the samples desirable instead of 0.8."""

NEWER: dict[str, Method] = {name: Method(name) for name in ("bco", "tgo", "nft", "awm", "dgpo", "dmpo", "sdpo")}
"""Methods newer than the paper by name, see `dkto.objective.newer_methods`."""


def get_method(name: str, **changes: object) -> Method:
    """A method of the headline by name, with other settings where asked; an unknown name raises a ValueError.

    >>> get_method("kahneman_tversky", beta=3.0).beta
    3.0
    """
    check_name("method", name, METHODS | NEWER)
    return replace((METHODS | NEWER)[name], **changes)


class Draws(NamedTuple):
    """Randomness of one training step for S seeds, (S, B, ...); all methods of a seed share it.

    `points` and `partners` are N(0, I) draws that become clean samples, `independent` ones of the pretraining
    distribution; `noise` and `timesteps` are the diffusion's; `coin` and `flip` are uniform on [0, 1).
    """

    points: Tensor
    partners: Tensor
    independent: Tensor
    noise: Tensor
    coin: Tensor
    flip: Tensor
    timesteps: Tensor


class Samples(NamedTuple):
    """What one way of drawing gives: clean points in model units (S, B, 2), with labels as training sees them.

    Pairs fill the batch with their two sides: the first half is chosen, the second half rejected, and both
    share noise and timesteps.
    """

    clean: Tensor
    is_desirable: Tensor
    noise: Tensor
    timesteps: Tensor


class Drawing(NamedTuple):
    """How a method draws; methods with the same share their samples."""

    draws: str = "biased"  # "pairs", "groups" (liked, disliked in turn), or single samples by gamma
    desirable_fraction: float = 0.8
    flip_rate: float = 0.0
    together: int = 1  # samples of a group, which share noise and timestep, or noises of one sample


def drawing_of(method: Method) -> Drawing:
    """How a method draws (paper 4.3)."""
    about = LOSSES[method.objective]
    if about.draws in ("pairs", "groups"):
        return Drawing(about.draws, 1.0, method.flip_rate, about.rows_at_once(method))
    return Drawing("biased", method.desirable_fraction, method.flip_rate, about.rows_at_once(method))


def draw_samples(
    drawing: Drawing, draws: Draws, classes: tuple[Gaussian, Gaussian] = (DESIRABLE, UNDESIRABLE)
) -> Samples:
    """Samples for a way of drawing (`drawing_of`, paper 4.3): classes by a coin, then labels flipped by another.

    Raises:
        ValueError: if what belongs together does not fill the batch.
    """
    kind, desirable_fraction, flip_rate, together = drawing
    if (size := draws.coin.shape[-1]) % together:
        raise ValueError(f"batch_size {size} is not a multiple of the {together} samples that belong together")
    liked, disliked = (gaussian.model_units() for gaussian in classes)
    if kind == "pairs":
        half = draws.points.shape[-2] // 2
        chosen, rejected = liked.place(draws.points[..., :half, :]), disliked.place(draws.partners[..., :half, :])
        swapped = (draws.flip[..., :half] < flip_rate)[..., None]
        sides = torch.where(swapped, rejected, chosen), torch.where(swapped, chosen, rejected)
        first = torch.arange(2 * half) < half
        return Samples(
            torch.cat(sides, dim=-2),
            first.expand(*draws.coin.shape[:-1], 2 * half),
            torch.cat([draws.noise[..., :half, :]] * 2, dim=-2),
            torch.cat([draws.timesteps[..., :half]] * 2, dim=-1),
        )
    if together > 1:
        first = torch.arange(size) // together * together
        shared = ("noise", "timesteps") if kind == "groups" else ("points", "coin", "flip")
        draws = draws._replace(**{name: getattr(draws, name)[:, first] for name in shared})
    truth = draws.coin < desirable_fraction
    if kind == "groups":
        truth = (torch.arange(size) % 2 == 0).expand_as(truth)
    clean = torch.where(truth[..., None], liked.place(draws.points), disliked.place(draws.points))
    return Samples(clean, truth ^ (draws.flip < flip_rate), draws.noise, draws.timesteps)


def independent_samples(draws: Draws) -> Samples:
    """Fresh pretraining samples, for the "independent" estimate of the reference point."""
    clean = PRETRAINING.model_units().place(draws.independent)
    return Samples(clean, torch.ones_like(draws.coin, dtype=torch.bool), draws.noise, draws.timesteps)


class Objective(NamedTuple):
    """Methods that go through one call of a loss function: they differ in numbers alone, (G, 1) each."""

    method: Method  # one of them, for what they share
    rows: Tensor  # which methods of the ensemble they are, (G,)
    beta: Tensor
    desirable_weight: Tensor
    undesirable_weight: Tensor
    anchor: Tensor
    sft_weight: Tensor


def group_methods(methods: Sequence[Method], dtype: torch.dtype = torch.float32) -> list[Objective]:
    """Methods gathered by the call they share: objective, utility, estimator and clamp, and whether a brake is on."""
    groups: dict[tuple, list[int]] = {}
    for row, method in enumerate(methods):
        shared = [getattr(method, name) for name in SHARED if name in LOSSES[method.objective].settings]
        brakes = [getattr(method, name) > 0 for name in BRAKES]
        groups.setdefault((method.objective, *shared, *brakes), []).append(row)

    def column(rows: list[int], name: str) -> Tensor:
        return torch.tensor([[getattr(methods[row], name)] for row in rows], dtype=dtype)

    return [
        Objective(methods[rows[0]], torch.tensor(rows), *(column(rows, name) for name in NUMBERS))
        for rows in groups.values()
    ]


def loss_of(
    objective: Objective,
    errors: Errors,
    is_desirable: Tensor,
    past: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Felt:
    """The loss of each member, by `dkto.objective.methods.method_loss`, and what it felt: (G, S) and (G, S, B).

    Errors and the labels as training sees them are (G, S, B). Only the estimator "independent" reads
    `errors.unrelated`, the errors on `independent_samples`. `past` is what the objective felt in the step before.
    """
    method, shape = objective.method, errors.policy.shape[:-1]
    settings = {name: getattr(method, name) for name in SHARED}
    settings |= {name: getattr(objective, name).expand(shape) for name in NUMBERS}
    kept = (*LOSSES[method.objective].settings, *(name for name in BRAKES if getattr(method, name) > 0))
    settings = {name: value for name, value in settings.items() if name in kept}
    if LOSSES[method.objective].draws != "pairs":
        given = {"past": past, "sample_weight": sample_weight}
        return method_loss(method.objective, errors, is_desirable, **given, **settings)
    sides = errors._replace(
        **{
            name: torch.stack(value.chunk(2, -1), -1).flatten(-2)  # chosen, rejected, ...
            for name in ("policy", "reference", "shift")
            if (value := getattr(errors, name)) is not None
        }
    )
    felt = method_loss(method.objective, sides, is_desirable, **settings)
    return felt._replace(reward=torch.cat([felt.reward[..., 0::2], felt.reward[..., 1::2]], -1))


class Pull(NamedTuple):
    """How hard each sample pulls, (K, S, B), and what each objective felt."""

    on_error: Tensor  # derivative of each member's loss by its denoising errors
    on_shift: Tensor | None  # and by its squared distances from the reference; None where no loss reads them
    felt: list[Felt]


def error_weights(
    objectives: Sequence[Objective],
    errors: Errors,
    is_desirable: Tensor,
    independent_gap: Tensor | None = None,
    past: Sequence[Felt | None] = (),
    sample_weight: Tensor | None = None,
) -> Pull:
    """How hard each sample pulls on its denoising error, and on its shift: the derivatives of each member's loss.

        gradient of the loss = sum over the batch of on_error_i * gradient of e_i + on_shift_i * gradient of d_i

    Taken by autograd through `dkto.objective.losses`, so every utility that is registered works; for "kto" `on_error`
    equals beta * effective_weight / B. The objectives (`group_methods`) cover all K methods; tensors are (K, S, B).
    """
    with torch.enable_grad():
        leaves = [errors.policy.detach().requires_grad_(True)]
        leaves += [] if errors.shift is None else [errors.shift.detach().requires_grad_(True)]
        felt = []
        for index, objective in enumerate(objectives):
            rows, reads = objective.rows, LOSSES[objective.method.objective].reads
            # all of the gap on one side: only the difference of these two errors is looked at
            gap = None if independent_gap is None else Errors(torch.zeros_like(leaves[0][rows]), independent_gap[rows])
            shift = leaves[1][rows] if objective.method.needs_shift else None
            overlap = errors.overlap[rows] if "overlap" in reads else None
            weight = sample_weight[rows] if "sample_weight" in reads and sample_weight is not None else None
            before = past[index].past if past else None
            seen = Errors(leaves[0][rows], errors.reference[rows], gap, shift, overlap)
            felt.append(loss_of(objective, seen, is_desirable[rows], before, weight))
        total = torch.stack([part.loss.sum() for part in felt]).sum()
        weights = torch.autograd.grad(total, leaves, allow_unused=True)
    return Pull(weights[0], weights[1] if len(weights) > 1 else None, felt)
