"""Figures: each function takes axes (`ax`) or makes them, draws, and returns them; none calls show.

Colour follows role everywhere: pretraining grey, desirable blue, undesirable vermilion, model samples
black. Utilities have colours that no role has. Hues are safe for colour-blind readers (Okabe and Ito;
Tol for registered utilities), sizes meant for a notebook about 7 inches wide.
"""

import textwrap
from collections.abc import Iterable, Sequence
from itertools import cycle
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from dkto.common.fonts import drawable
from dkto.common.pixels import to_rgb
from dkto.evaluation.metrics import WinRate
from dkto.objective.losses import effective_weight
from dkto.objective.methods import METHODS
from dkto.objective.utilities import UTILITIES, Utility, get_utility

COLOURS = {
    "pretraining": "#7f7f7f",
    "desirable": "#0072B2",
    "undesirable": "#D55E00",
    "model": "#000000",
    "reference_point": "#009E73",
}
UTILITY_COLOURS = {
    "kahneman_tversky": "#E69F00",
    "loss_averse": "#56B4E9",
    "risk_seeking": "#CC79A7",
    "risk_seeking_literal": "#882255",
    "exponential": "#332288",
    "linear": "#999999",
}
REGISTERED_COLOURS = ("#44AA99", "#117733", "#999933", "#661100")
DASHED = ("risk_seeking_literal", "linear")  # the first lies on risk_seeking
PAPER_UTILITIES = ("kahneman_tversky", "loss_averse", "risk_seeking")

NOTEBOOK_WIDTH = 7.0  # inches
CAPTION_SIZE = 7.0  # points
LETTER = 0.55 * CAPTION_SIZE / 72  # inches, a caption's mean letter
REWARD_AXIS = "implicit reward"
GAINS = torch.linspace(-6, 6, 401, dtype=torch.float64)
LEGEND = {"fontsize": 9, "edgecolor": "none", "framealpha": 0.8}  # a curve behind it stays visible
OUTSIDE = LEGEND | {"loc": "upper left", "bbox_to_anchor": (1, 1)}


def display_name(name: str) -> str:
    """A utility's or a method's name as labels and legends show it; any other name stays as it is.

    >>> display_name("kahneman_tversky"), display_name("dpo"), display_name("base")
    ('Kahneman-Tversky', 'Diffusion-DPO', 'base')
    """
    return (UTILITIES.get(name) or METHODS.get(name) or SimpleNamespace(title=name)).title


def utility_colours(names: Iterable[str]) -> dict[str, str]:
    """Colours of utilities by name; registered ones take spare colours in turn."""
    registered = [name for name in names if name not in UTILITY_COLOURS]
    return UTILITY_COLOURS | dict(zip(registered, cycle(REGISTERED_COLOURS), strict=False))


def plot_utilities(
    utilities: Sequence[str | Utility] = PAPER_UTILITIES, x: Tensor | None = None, ax: Axes | None = None
) -> Axes:
    """U over gains and losses (paper Figure 2); a curve that outgrows that range is cut off.

    Args:
        utilities: names or `Utility` objects.
        x: (N,) gains and losses, in implicit reward; 401 points on [-6, 6] if left out.
    """
    x = GAINS if x is None else x
    most = 1.15 * float(x.abs().max())
    return _draw_curves(
        [(u, u.value(x)) for u in map(get_utility, utilities)], x, ax, "utility U (no unit)", -most, most
    )


def plot_slopes(
    utilities: Sequence[str | Utility] = PAPER_UTILITIES, x: Tensor | None = None, ax: Axes | None = None
) -> Axes:
    """U', the weight with which the model learns from a sample (paper Figure 8); slopes above 2 are cut off.

    Arguments as of `plot_utilities`.
    """
    x, label = GAINS if x is None else x, "slope U' (per unit of implicit reward)"
    return _draw_curves([(u, u.slope(x)) for u in map(get_utility, utilities)], x, ax, label, -0.1, 2.0)


def weight_at(x: Tensor, liked: bool, utility: str | Utility, reference_point: float, **weights: float) -> Tensor:
    """`dkto.objective.losses.effective_weight` of liked, or of disliked, samples with implicit rewards x; as `x`."""
    labels, point = torch.full_like(x, liked, dtype=torch.bool), torch.tensor(reference_point, dtype=x.dtype)
    return effective_weight(x, labels, point, utility, **weights)


def plot_sample_weights(
    utility: str | Utility,
    x: Tensor | None = None,
    ax: Axes | None = None,
    *,
    reference_point: float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Axes:
    """How hard a liked and a disliked sample pull on the denoising error (`dkto.objective.losses.effective_weight`).

    The rewards `x`, (N,), are 401 points on [-6, 6] if left out; the reference point is an implicit reward too.
    """
    ax, utility, x = _axes(ax), get_utility(utility), GAINS if x is None else x
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    for role, liked, label in (("desirable", True, "a liked sample"), ("undesirable", False, "a disliked sample")):
        weight = weight_at(x, liked, utility, reference_point, **weights)
        ax.plot(x, weight, color=COLOURS[role], lw=2, label=label)
    ax.axhline(0, color="0.8", lw=0.8, zorder=0)
    ax.axvline(reference_point, color=COLOURS["reference_point"], ls=":", label="reference point")
    ax.set_xlabel(REWARD_AXIS, fontsize="small")
    ax.set_ylabel("weight on the denoising error\n(> 0: training lowers it)", fontsize="small")
    ax.set_title(utility.title, fontsize="medium", parse_math=False)
    _cut_off(ax, -2.0, 2.0)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, columnspacing=1, handlelength=1.2, **LEGEND)
    return ax


def plot_reward_weights(
    rewards: np.ndarray,
    is_desirable: np.ndarray,
    utility: str | Utility,
    ax: Axes | None = None,
    *,
    reference_point: float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    limit: float = 6.0,
    title: str = "",
) -> Axes:
    """Rewards of liked (upwards) and disliked (downwards) samples under the weight with which each learns (paper C.4).

    A bar is strong where the weight there is at least a tenth of the largest in the figure; the curve
    of the weight is scaled to the figure.

    Args:
        rewards, is_desirable: (N,) implicit rewards and bools.
        utility: name or `Utility`.
        reference_point: an implicit reward.
        desirable_weight, undesirable_weight: class weights, no unit.
        limit: half width of the drawn range; rewards outside are counted in a note.
        title: what the rewards are.
    """
    ax, x = _axes(ax), torch.linspace(-limit, limit, 401, dtype=torch.float64)
    edges = np.linspace(-limit, limit, 41)
    middles = torch.from_numpy((edges[:-1] + edges[1:]) / 2)
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}

    def weight(at: Tensor, liked: bool) -> np.ndarray:
        return weight_at(at, liked, utility, reference_point, **weights).numpy()

    largest, top = max(np.abs(weight(x, liked)).max() for liked in (True, False)), 0.05
    handles: list[Artist] = []
    for role, liked, label in (("desirable", True, "liked"), ("undesirable", False, "disliked")):
        rows = np.asarray(rewards)[np.asarray(is_desirable) == liked]
        share = np.histogram(rows, edges)[0] / max(len(rows), 1)
        top = max(top, share.max() * 1.25)
        learns = np.abs(weight(middles, liked)) >= 0.1 * largest
        heights = share if liked else -share
        for mask, alpha, name in ((learns, 0.9, f"{label}, learning"), (~learns, 0.25, f"{label}, not learning")):
            at = {"width": edges[1] - edges[0], "color": COLOURS[role], "alpha": alpha}
            ax.bar(middles.numpy()[mask], heights[mask], **at)
            handles.append(Patch(color=COLOURS[role], alpha=alpha, label=name))  # also where there is no bar
    for liked in (True, False):
        lines = ax.plot(x, weight(x, liked) * 0.9 * top / largest, color=COLOURS["model"], lw=1.6)
    ax.axvline(reference_point, color=COLOURS["reference_point"], ls=":")
    ax.set(xlim=(-limit, limit), ylim=(-top, top))
    ax.yaxis.set_major_formatter(lambda value, _: f"{abs(100 * value):g} %")
    outside = int((np.abs(rewards) > limit).sum())
    ax.set_xlabel(REWARD_AXIS + (f"; {outside} outside" if outside else ""), fontsize="small")
    ax.set_ylabel("share of the class's samples", fontsize="small")
    ax.set_title(title, fontsize="medium", parse_math=False)
    lines[0].set_label("weight (not to scale)")
    ax.legend(handles=[*handles, *lines], **OUTSIDE)
    return ax


def plot_training(records: Sequence[dict], *, window: int = 10, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Loss, and implicit rewards with their margin, over optimiser steps: thin as recorded, thick a running mean.

    Args:
        records: step records of `dkto.training.loop.train`; a key that a record lacks is skipped in that step.
        window: records under the running mean, 1 or more.
        axes: two axes, for loss and rewards, made if left out.

    Raises:
        ValueError: if there is no record, or not two axes.
    """
    if not records:
        raise ValueError("records must hold at least one step, got none")
    if axes is None:
        axes = plt.subplots(1, 2, figsize=(NOTEBOOK_WIDTH, 3.0), layout="constrained")[1]
    if len(axes) != 2:
        raise ValueError(f"axes must be two, got {len(axes)}")

    def draw(ax: Axes, key: str, colour: str, label: str, style: str = "-") -> None:
        points = [(record["global_step"], record[key]) for record in records if key in record]
        if points:
            steps, values = (np.asarray(column, dtype=float) for column in zip(*points, strict=True))
            ax.plot(steps, values, color=colour, lw=0.6, alpha=0.3)
            ax.plot(steps, _running_mean(values, window), style, color=colour, lw=1.8, label=label)

    draw(axes[0], "loss", COLOURS["model"], "loss")
    draw(axes[1], "reward/desirable", COLOURS["desirable"], "liked")
    draw(axes[1], "reward/undesirable", COLOURS["undesirable"], "disliked")
    draw(axes[1], "reward/margin", COLOURS["model"], "margin (liked - disliked)", "--")
    draw(axes[1], "reference_point", COLOURS["reference_point"], "reference point", ":")
    axes[0].set_ylabel("loss (no unit)")
    axes[1].set_ylabel(REWARD_AXIS)
    axes[1].axhline(0, color="0.8", lw=0.8, zorder=0)
    if axes[1].get_legend_handles_labels()[1]:
        axes[1].legend(**OUTSIDE)
    for ax in axes:
        ax.set_xlabel("optimiser step")
    return axes


def image_grid(
    rows: Sequence[Sequence[Image.Image | np.ndarray]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """Images in rows and columns, in one pair of axes; an image of another aspect is not stretched.

    Labels are taken as they stand (a dollar sign is a dollar sign), wrapped to the width of an image,
    and shortened after six lines.

    Args:
        rows: equally long rows of PIL images or uint8 arrays (H, W, 3); one row per method, say.
        row_labels, column_labels: name of each row and prompt of each column, or none.
        ax: axes to draw on, made as wide as a notebook at the most if left out.

    Raises:
        ValueError: if rows are empty or unequal, labels too few or too many, or an array is not uint8.
    """
    height, width = len(rows), len(rows[0]) if rows else 0
    if not width or any(len(row) != width for row in rows):
        raise ValueError(f"rows must be equally long and not empty, got lengths {[len(row) for row in rows]}")
    for name, labels, count in (("row_labels", row_labels, height), ("column_labels", column_labels, width)):
        if len(labels) not in (0, count):
            raise ValueError(f"{name} must be {count} or none, got {len(labels)}")
    images = [[_to_pil(image) for image in row] for row in rows]
    cell = images[0][0].height / images[0][0].width  # a cell is 1 wide
    labels, families = drawable([*row_labels, *column_labels])
    row_labels, column_labels = labels[: len(row_labels)], labels[len(row_labels) :]
    names = [_wrapped(label, 22) for label in row_labels]
    margin = 0.15 + LETTER * max((len(line) for name in names for line in name.split("\n")), default=0)
    side = min(1.2, (NOTEBOOK_WIDTH - margin) / width)  # inches
    columns = [_wrapped(label, int(0.9 * side / LETTER)) for label in column_labels]
    if ax is None:
        header = 0.2 + CAPTION_SIZE / 72 * 1.4 * max((name.count("\n") + 1 for name in columns), default=0)
        ax = plt.subplots(figsize=(margin + side * width, header + side * cell * height), layout="constrained")[1]
    gap = 1.04
    for i, row in enumerate(images):
        for j, image in enumerate(row):
            scale = min(1 / image.width, cell / image.height) / 2
            x, y, dx, dy = j * gap, i * gap * cell, image.width * scale, image.height * scale
            ax.imshow(image, extent=(x - dx, x + dx, y + dy, y - dy), interpolation="nearest")
    ax.set(xlim=(-0.5, (width - 1) * gap + 0.5), ylim=(((height - 1) * gap + 0.5) * cell, -0.5 * cell), aspect="equal")
    ax.set_anchor("S")  # what height is left over goes to the captions
    ax.xaxis.tick_top()
    ax.tick_params(length=0, labelsize=CAPTION_SIZE)
    ax.set_xticks([j * gap for j in range(len(columns))], columns, parse_math=False, fontfamily=families)
    ax.set_yticks([i * gap * cell for i in range(len(names))], names, parse_math=False, fontfamily=families)
    sns.despine(ax=ax, left=True, bottom=True)
    return ax


def plot_win_rates(
    results: Sequence[tuple[str, WinRate]], ax: Axes | None = None, *, dots: Sequence[Sequence[float]] = ()
) -> Axes:
    """Win-rates, by label from top to bottom, with their intervals beside the line of equal chances.

    Args:
        results: label and rate of each row; none raises a ValueError.
        ax: where to draw.
        dots: rates of the training seeds that each row is the mean of.
    """
    if not results:
        raise ValueError("results must hold at least one win-rate, got none")
    ax = _axes(ax, 5.6, 0.8 + 0.42 * len(results))
    for row, (_, result) in enumerate(results):
        ax.plot([100 * result.low, 100 * result.high], [row, row], color=COLOURS["model"], lw=1.6)
        ax.plot(100 * result.rate, row, "o", color=COLOURS["model"], ms=6)
        label = f"{100 * result.rate:.0f} %"
        if len(dots):
            seeds = 100 * np.asarray(dots[row])
            ax.plot(seeds, np.full(len(seeds), row + 0.22), "o", color=COLOURS["desirable"], ms=3.5)
        side = "right" if result.rate > 0.95 else "left" if result.rate < 0.05 else "center"  # not beyond the frame
        ax.annotate(label, (100 * result.rate, row), (0, 6), textcoords="offset points", ha=side, fontsize=8)
    ax.axvline(50, color="0.6", ls="--", lw=1, zorder=0)
    counts = sorted({result.n for _, result in results})
    shared = f", n = {counts[0]} prompts" if len(counts) == 1 else ""
    labels = [label if shared else f"{label} (n = {result.n})" for label, result in results]
    ax.set_yticks(range(len(results)), labels, parse_math=False)
    ax.set(xlim=(0, 102), ylim=(len(results) - 0.4, -0.8))
    ax.set_xlabel(f"win-rate (%) with Tango's 95 % interval{shared}")
    return ax


def plot_preferences(results: Sequence[tuple[str, str, WinRate]], ax: Axes | None = None) -> Axes:
    """Who was preferred in blind comparisons, as bars (paper Figure 3), with the interval that the figure lacks.

    Each result is ours, theirs and our win-rate. No result raises a ValueError.
    """
    if not results:
        raise ValueError("results must hold at least one comparison, got none")
    ax = _axes(ax, 1.8 + 1.9 * len(results), 3.2)
    ticks, labels = [], []
    for at, (ours, theirs, result) in enumerate(results):
        low, high = 100 * (result.rate - result.low), 100 * (result.high - result.rate)
        left = (-0.2, ours, result.rate, "desirable", "", [[low], [high]])
        right = (0.2, theirs, 1 - result.rate, "pretraining", "//", [[high], [low]])
        for shift, name, share, role, hatch, error in (left, right):
            ax.bar(at + shift, 100 * share, 0.38, color=COLOURS[role], hatch=hatch, edgecolor="white")
            ax.errorbar(at + shift, 100 * share, error, color=COLOURS["model"], capsize=4, lw=1.4)
            ticks.append(at + shift)
            labels.append(f"{name}\n{100 * share:.0f} %")
    ax.axhline(50, color="0.4", ls="--", lw=1)
    ax.set_xticks(ticks, labels, fontsize="small", parse_math=False)
    ax.set_xlabel(f"n = {', '.join(str(result.n) for _, _, result in results)} prompts", fontsize="small")
    ax.set(ylim=(0, 100), xlim=(-0.6, len(results) - 0.4), ylabel="preferred (% of prompts)")
    return ax


def _axes(ax: Axes | None, width: float = 4.6, height: float = 3.2) -> Axes:
    return plt.subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax


def _draw_curves(
    curves: Sequence[tuple[Utility, Tensor]], x: Tensor, ax: Axes | None, label: str, low: float, high: float
) -> Axes:
    ax, colours = _axes(ax), utility_colours([utility.name for utility, _ in curves])
    for utility, y in curves:
        style = "--" if utility.name in DASHED else "-"
        ax.plot(x, y, style, label=utility.title, color=colours[utility.name], lw=2)
    ax.axvline(0, color="0.8", lw=0.8, zorder=0)
    ax.axhline(0, color="0.8", lw=0.8, zorder=0)
    ax.set_xlabel("gain or loss (implicit reward − reference point)", fontsize="small")
    ax.set_ylabel(label)
    ax.legend(**OUTSIDE)
    _cut_off(ax, low, high)
    return ax


def _cut_off(ax: Axes, low: float, high: float) -> None:
    """Bound the view to [low, high]; left to matplotlib where it is within, so that shared axes still grow."""
    bottom, top = ax.get_ylim()
    if bottom < low:
        ax.set_ylim(bottom=low)
    if top > high:
        ax.set_ylim(top=high)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and the window - 1 before it; of fewer at the start."""
    return np.array([values[max(0, end - window) : end].mean() for end in range(1, len(values) + 1)])


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, width, max_lines=6, placeholder=" ...")


def _to_pil(image: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        came = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"an image must be a PIL image or a uint8 array of shape (H, W, 3), got {came}")
    return Image.fromarray(image)
