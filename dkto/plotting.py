"""Figures: each function takes axes or makes them, draws, and returns them; none calls show.

Colour follows role everywhere (Okabe-Ito, safe for colour-blind readers): pretraining grey, desirable
blue, undesirable vermilion, model samples black.
"""

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image

from dkto.losses import sample_weight
from dkto.metrics import WinRate
from dkto.utilities import Utility, get_utility

COLOURS = {
    "pretraining": "#7f7f7f",
    "desirable": "#0072B2",
    "undesirable": "#D55E00",
    "model": "#000000",
    "reference_point": "#009E73",
}
UTILITY_COLOURS = {
    "kahneman_tversky": "#D55E00",
    "loss_averse": "#0072B2",
    "risk_seeking": "#009E73",
    "risk_seeking_literal": "#56B4E9",
    "exponential": "#CC79A7",
}
PAPER_UTILITIES = ("kahneman_tversky", "loss_averse", "risk_seeking")


def _axes(ax: Axes | None, width: float = 4.6, height: float = 3.2) -> Axes:
    return plt.subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax


def plain(text: str) -> str:
    """Text as it stands: no mathematics between dollar signs."""
    return text.replace("$", r"\$")


def plot_utilities(
    utilities: Sequence[str | Utility] = PAPER_UTILITIES,
    *,
    slopes: bool = False,
    limit: float = 6.0,
    ax: Axes | None = None,
) -> Axes:
    """U (paper Figure 2) or its slope U' (Figure 8) over [-limit, limit].

    Args:
        utilities: names or `Utility` objects.
        slopes: draw U' instead of U.
        limit: half width of the range, in the unit of the reward.
    """
    ax = _axes(ax)
    x = torch.linspace(-limit, limit, 401, dtype=torch.float64)
    for utility in map(get_utility, utilities):
        y = utility.slope(x) if slopes else utility.value(x)
        ax.plot(x, y, label=utility.name, color=UTILITY_COLOURS.get(utility.name), lw=2)
    ax.axvline(0, color="0.8", lw=0.8, zorder=0)
    ax.set_xlabel("gain or loss x = reward - reference point (beta x MSE)")
    ax.set_ylabel("slope U'(x)" if slopes else "utility U(x)")
    ax.legend(frameon=False, fontsize="small")
    return ax


def plot_sample_weights(
    utility: str | Utility,
    *,
    reference_point: float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    limit: float = 6.0,
    ax: Axes | None = None,
) -> Axes:
    """How hard a liked and a disliked sample pull, over their implicit reward (`dkto.losses.sample_weight`)."""
    ax = _axes(ax)
    reward = torch.linspace(-limit, limit, 401, dtype=torch.float64)
    point = torch.tensor(reference_point, dtype=torch.float64)
    for role, liked in (("desirable", True), ("undesirable", False)):
        weight = sample_weight(
            reward,
            torch.full_like(reward, liked, dtype=torch.bool),
            point,
            utility,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
        )
        ax.plot(reward, weight, color=COLOURS[role], lw=2, label=role)
    ax.axhline(0, color="0.8", lw=0.8, zorder=0)
    ax.axvline(reference_point, color=COLOURS["reference_point"], ls=":", label="reference point")
    ax.set_xlabel("implicit reward r (beta x MSE)")
    ax.set_ylabel("weight on the denoising error\n(> 0 pulls it down)")
    ax.set_title(get_utility(utility).name, fontsize="medium")
    ax.legend(frameon=False, fontsize="small")
    return ax


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    window = max(1, min(window, len(values)))
    padded = np.concatenate([np.full(window - 1, values[0]), values])
    return np.convolve(padded, np.ones(window) / window, mode="valid")


def plot_training(records: Sequence[dict], *, window: int = 10, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Loss and implicit rewards over optimiser steps; thin lines as recorded, thick ones a running mean.

    Args:
        records: step records of `dkto.trainer.train`.
        window: steps of the running mean.
        axes: two axes, made if left out.
    """
    if axes is None:
        axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")[1]

    def draw(ax: Axes, key: str, colour: str, label: str) -> None:
        points = [(r["global_step"], r[key]) for r in records if key in r]
        if points:
            steps, values = map(np.array, zip(*points, strict=True))
            ax.plot(steps, values, color=colour, lw=0.6, alpha=0.35)
            ax.plot(steps, _smooth(values, window), color=colour, lw=2, label=label)

    draw(axes[0], "loss", COLOURS["model"], "loss")
    axes[0].set_ylabel("loss (no unit)")
    draw(axes[1], "reward/desirable", COLOURS["desirable"], "liked")
    draw(axes[1], "reward/undesirable", COLOURS["undesirable"], "disliked")
    draw(axes[1], "reference_point", COLOURS["reference_point"], "reference point")
    axes[1].axhline(0, color="0.8", lw=0.8, zorder=0)
    axes[1].set_ylabel("implicit reward (beta x MSE)")
    axes[1].legend(frameon=False, fontsize="small")
    for ax in axes:
        ax.set_xlabel("optimiser step")
    return axes


def image_grid(
    rows: Sequence[Sequence[Image.Image | np.ndarray]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    size: float = 1.1,
) -> np.ndarray:
    """Rows of images, one row per method; labels are plain text, long ones wrapped.

    Args:
        rows: equally long rows of images.
        row_labels: name of each row.
        column_labels: prompt of each column.
        size: side of an image in inches.

    Returns:
        (rows, columns) array of axes.
    """
    height, width = len(rows), len(rows[0])
    header = 0.9 if column_labels else 0.1
    figure, axes = plt.subplots(
        height, width, figsize=(size * width + 0.9, size * height + header), squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    for line, images in zip(axes, rows, strict=True):
        for ax, image in zip(line, images, strict=True):
            ax.imshow(np.asarray(image), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set_visible(False)
    for line, label in zip(axes, row_labels, strict=False):
        line[0].set_ylabel(plain(label), rotation=0, ha="right", va="center", fontsize="small")
    for ax, label in zip(axes[0], column_labels, strict=False):
        ax.set_title(plain(textwrap.fill(label, 16)), fontsize=6)
    return axes


def plot_win_rates(results: Sequence[tuple[str, WinRate]], *, ax: Axes | None = None) -> Axes:
    """Win-rates with their 95 % intervals beside the line of equal chances.

    Args:
        results: label and win-rate of each row, from top to bottom.
    """
    ax = _axes(ax, 5.6, 0.6 + 0.42 * len(results))
    for row, (label, result) in enumerate(results):
        ax.plot([100 * result.low, 100 * result.high], [row, row], color=COLOURS["model"], lw=1.6)
        ax.plot(100 * result.rate, row, "o", color=COLOURS["desirable"], ms=6)
        ax.annotate(f"{100 * result.rate:.0f} %", (100 * result.rate, row), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    ax.axvline(50, color="0.6", ls="--", lw=1, zorder=0)
    ax.set_yticks(range(len(results)), [plain(label) for label, _ in results])
    ax.set(xlim=(0, 102), ylim=(len(results) - 0.4, -0.7))
    ax.set_xlabel(f"win-rate in %, 95 % interval, n = {', '.join(sorted({str(r.n) for _, r in results}))} prompts")
    return ax


