"""Figures of the laboratory: axes (`ax`) in or made, axes out; roles and utilities keep the colours of `dkto.plotting`.

Clouds share limits and equal aspect, so that panels can be compared by eye; marks of methods differ in shape too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from dkto.plotting import COLOURS, LEGEND, NOTEBOOK_WIDTH, UTILITY_COLOURS, display_name
from toy.experiment import Experiment
from toy.measures import Estimate
from toy.world import ROLES, UNIT, undesirable_share

if TYPE_CHECKING:
    from IPython.display import HTML

LIMITS = {"x": (-0.25, 1.25), "y": (0.05, 1.75)}
METHOD_COLOURS = UTILITY_COLOURS | {
    "base": COLOURS["pretraining"],
    "sft": "#44AA99",
    "csft": "#117733",
    "dpo": "#661100",
    **{"bco": "#DDCC77", "tgo": "#999933", "nft": "#332288", "awm": "#88CCEE"},
    **{"dgpo": "#CC6677", "dmpo": "#AA4499", "sdpo": "#882255"},
    **{"anchor": "#332288", "sft_weight": "#44AA99"},
}
METHOD_MARKS = {"base": "s", "sft": "v", "csft": "^", "dpo": "D"}
METHOD_MARKS |= {
    "bco": "<",
    "tgo": ">",
    "nft": "*",
    "awm": "h",
    "dgpo": "d",
    "dmpo": "p",
    "sdpo": "8",
    "sft_weight": "v",
}
METHOD_MARKS |= {"loss_averse": "P", "risk_seeking": "X", "kahneman_tversky": "o"}
NOTE = 9  # points, of a note in a figure
BOUNDARY = 0.7  # y below which a point is more likely under the undesirable distribution


def method_label(name: str, desirable_fraction: float | None = 0.8) -> str:
    """A method's name for a figure: "kahneman_tversky@0.5" is "Kahneman-Tversky, γ = 0.5".

    The fraction is shown for a utility whose name has none; None leaves it out.
    """
    stem, _, fraction = name.partition("@")
    label = "SFT term" if stem == "sft_weight" else display_name(stem)
    if stem in UTILITY_COLOURS and (fraction or desirable_fraction):
        label += f", γ = {fraction or f'{desirable_fraction:g}'}"
    return label


def method_colour(name: str) -> str:
    """Colour of a method, whatever its desirable fraction."""
    return METHOD_COLOURS.get(name.partition("@")[0], "#332288")


def method_mark(name: str) -> str:
    """Marker of a method, whatever its desirable fraction."""
    return METHOD_MARKS.get(name.partition("@")[0], "*")


def plot_world(ax: Axes | None = None, *, legend: bool = False) -> Axes:
    """The distributions as circles of 2 standard deviations, and the line below which the undesirable is more likely.

    The legend names the circles.
    """
    ax = plt.subplots(figsize=(3.6, 3.9), layout="constrained")[1] if ax is None else ax
    for role, gaussian in ROLES.items():
        style = ":" if role == "pretraining" else "-"
        circle = Circle(gaussian.mean, 2 * gaussian.std, fill=False, ec=COLOURS[role], lw=1.6, ls=style, zorder=3)
        circle.set_label(f"{role}, 2σ")
        ax.add_patch(circle)
    ax.axhline(BOUNDARY, color="0.7", lw=0.8, zorder=0)
    ax.set(xlim=LIMITS["x"], ylim=LIMITS["y"], aspect="equal", xticks=[0, 0.5, 1], yticks=[0.5, 1, 1.5])
    ax.set_xlabel("x", fontsize="small")
    ax.set_ylabel("y", fontsize="small")
    ax.tick_params(labelsize="x-small")
    if legend:
        ax.legend(loc="upper right", **LEGEND)
    return ax


def plot_cloud(points: Tensor, ax: Axes | None = None, *, title: str = "", note: str = "") -> Axes:
    """Samples of one model, (N, 2) in paper units, over the world; the first 1500 are drawn.

    Points outside the frame, or not finite, are counted in its corner, under the note.
    """
    ax = plot_world(ax)
    drawn = points[:1500].double().numpy()
    low, high = np.array([LIMITS["x"], LIMITS["y"]]).T
    inside = ((drawn >= low) & (drawn <= high)).all(axis=1)
    ax.scatter(*drawn[inside].T, s=2, color=COLOURS["model"], alpha=0.5, lw=0, zorder=2, rasterized=True)
    ax.set_title(title, fontsize="small")
    lost = "" if inside.all() else f"{100 * (1 - inside.mean()):.2g} % outside"
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5}
    text = "\n".join(filter(None, [note, lost]))
    ax.text(0.98, 0.02, text, transform=ax.transAxes, ha="right", va="bottom", fontsize=NOTE, zorder=4, bbox=box)
    return ax


def plot_clouds(experiment: Experiment, names: Sequence[str], seed: int, columns: int = 5) -> Figure:
    """Panels of one seed's samples, `columns` a row, each with its estimates over all seeds."""
    rows = -(-len(names) // columns)
    options = {"layout": "constrained", "sharex": True, "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(rows, columns, figsize=(2.0 * columns, 2.75 * rows), **options)
    place = list(experiment.seeds).index(seed)
    for ax, name in zip(axes.flat, names, strict=False):
        row = experiment.names.index(name)
        note = f"KL {_with_half(experiment.estimate('kl', name), 3)}"
        note += f"\nundesirable {_with_half(experiment.estimate('undesirable_share', name), 2, 100)} %"
        lost = int(experiment.diverged[row].sum())
        note += f"\n{lost} of {len(experiment.seeds)} seeds diverged" if lost else ""
        plot_cloud(experiment.points[row, place], ax, title=method_label(name), note=note)
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    for ax in axes.flat:
        ax.label_outer()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    return figure


def plot_estimates(
    estimates: Mapping[str, Estimate],
    ax: Axes | None = None,
    *,
    label: str,
    log: bool = False,
    scale: float = 1.0,
    limits: Mapping[str, float] | None = None,
) -> Axes:
    """Measures of methods with their intervals, one row each; diverged seeds are named at the row.

    Args:
        estimates: by method, from top to bottom.
        label: of the measure, with its unit.
        log: logarithmic axis.
        scale: factor on the values, 100 for percent.
        limits: exact values drawn as lines, by their name.
    """
    ax = plt.subplots(figsize=(5.6, 0.8 + 0.3 * len(estimates)), layout="constrained")[1] if ax is None else ax
    for row, (name, estimate) in enumerate(estimates.items()):
        colour = method_colour(name)
        if estimate.n:
            low, high = (np.nan_to_num(end, nan=estimate.mean) for end in (estimate.low, estimate.high))
            ax.plot([scale * max(low, 1e-9), scale * high], [row, row], color=colour, lw=2)
            ax.plot(scale * estimate.mean, row, method_mark(name), color=colour, ms=6)
        if estimate.diverged:
            text = f"{estimate.diverged} of {estimate.diverged + estimate.n} seeds diverged"
            ax.text(0.99, row, text, transform=ax.get_yaxis_transform(), ha="right", va="center", fontsize="x-small")
    for style, (name, value) in zip((":", "--", "-."), (limits or {}).items(), strict=False):
        ax.axvline(scale * value, color="0.5", ls=style, lw=1, label=name, zorder=0)
    if limits:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.1, **LEGEND)
    ax.set_yticks(range(len(estimates)), [method_label(name) for name in estimates], fontsize="small")
    ax.set_ylim(len(estimates) - 0.5, -0.5)
    if log:
        ax.set_xscale("log")
    ax.set_xlabel(label, fontsize="small")
    return ax


def plot_tradeoff(experiment: Experiment, names: Sequence[str], ax: Axes | None = None) -> Axes:
    """What each method pays: KL to desirable against its undesirable share, both with intervals.

    Lines join the two desirable fractions of one utility. Below and left is better, but the share of the desirable
    distribution itself (dotted) is what SFT aims at: only preference objectives go left of it.
    """
    ax = plt.subplots(figsize=(NOTEBOOK_WIDTH, 4.2), layout="constrained")[1] if ax is None else ax
    places = {}
    for name in names:
        share, kl = experiment.estimate("undesirable_share", name), experiment.estimate("kl", name)
        if not kl.n:
            continue
        places[name] = (100 * share.mean, kl.mean)
        look = {"fmt": method_mark(name), "color": method_colour(name), "ms": 7, "label": method_label(name)}
        look |= {"mfc": "white"} if "@" in name else {}
        ax.errorbar(*places[name], xerr=_bars(share, 100), yerr=_bars(kl, 1), **look)
    for name, place in places.items():
        stem = name.partition("@")[0]
        if stem != name and stem in places:
            ax.plot(*zip(places[stem], place, strict=True), color=method_colour(name), lw=0.8, alpha=0.6, zorder=0)
    itself, colour = 100 * undesirable_share(ROLES["desirable"]), COLOURS["desirable"]
    ax.axvline(itself, color=colour, ls=":", lw=1.2)
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
    ax.annotate("desirable itself", (itself, 1), (3, -3), **place, fontsize=9, color=colour)
    ax.set_yscale("log")
    ax.set_xlabel("undesirable share (% of samples)")
    ax.set_ylabel("KL to desirable (nats)")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)
    return ax


def plot_sweep(
    curves: Mapping[str, Mapping[float, Estimate]],
    ax: Axes | None = None,
    *,
    label: str,
    setting: str,
    scale: float = 1.0,
    log: tuple[bool, bool] = (True, True),
) -> Axes:
    """A measure over the values of a setting, with its intervals as bands; settings where seeds diverged are ringed.

    Args:
        curves: by method, estimates by value of the setting.
        label: of the measure, with its unit.
        setting: of the horizontal axis.
        scale: factor on the measure.
        log: whether the axes are logarithmic.
    """
    ax = plt.subplots(figsize=(4.6, 3.4), layout="constrained")[1] if ax is None else ax
    for name, estimates in curves.items():
        kept = {value: e for value, e in estimates.items() if e.n}
        x = np.array(list(kept))
        mean, low, high = scale * np.array([(e.mean, e.low, e.high) for e in kept.values()]).reshape(-1, 3).T
        colour = method_colour(name)
        ax.plot(x, mean, marker=method_mark(name), ms=4.5, lw=1.5, color=colour, label=method_label(name, None))
        low = np.maximum(low, mean / 10) if log[1] else low  # an end below zero has no place on a logarithmic axis
        ax.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
        lost = np.array([e.diverged > 0 for e in kept.values()], dtype=bool)
        ax.plot(x[lost], mean[lost], "o", ms=10, mfc="none", color=colour)
    ax.set_xscale("log" if log[0] else "linear")
    ax.set_yscale("log" if log[1] else "linear")
    values = sorted({value for estimates in curves.values() for value in estimates})
    ax.set_xticks(values, [f"{value:g}" for value in values], fontsize="small")
    ax.minorticks_off()
    ax.set_xlabel(setting, fontsize="small")
    ax.set_ylabel(label, fontsize="small")
    return ax


def plot_reward_map(rewards: Tensor, x: Tensor, y: Tensor, ax: Axes | None = None, *, label: str) -> Axes:
    """A reward over the plane in two colours, equally far to both sides of zero, with the world on top.

    Args:
        rewards: (len(y), len(x)).
        x, y: coordinates in paper units.
        label: of the colour bar, with its unit.
    """
    ax = plot_world(ax)
    rewards, x, y = rewards.numpy(), x.numpy(), y.numpy()
    norm = CenteredNorm(0, max(float(np.abs(rewards).max()), 1e-6))
    mesh = ax.pcolormesh(x, y, rewards, cmap="PuOr", norm=norm, shading="nearest", rasterized=True, zorder=-1)
    ax.contour(x, y, rewards, [0.0], colors="black", linewidths=1, linestyles="--")
    ends = [norm.vmin, 0, norm.vmax]
    bar = ax.figure.colorbar(mesh, ax=ax, shrink=0.8, ticks=ends)
    bar.ax.set_yticklabels([f"{end:.2g}" for end in ends], fontsize="x-small")
    bar.set_label(label, fontsize="small")
    return ax


def plot_field(points: Tensor, arrows: Tensor, ax: Axes | None = None, *, longest: float, title: str = "") -> Axes:
    """Where a tuned model pulls a denoised point, compared with the reference: arrows over the plane.

    Args:
        points: (N, 2) in paper units.
        arrows: (N, 2) displacement of the denoised point, paper units.
        longest: length in paper units that is drawn as 0.25; panels that are compared share it.
    """
    ax = plot_world(ax)
    scaled = arrows / longest * 0.25
    look = {"width": 0.006, "color": "0.15", "zorder": 4}
    ax.quiver(*points.T.numpy(), *scaled.T.numpy(), angles="xy", scale_units="xy", scale=1, **look)
    ax.set_title(title, fontsize="small")
    return ax


def animation(draw: Callable, frames: Sequence, figure: Figure) -> "HTML":
    """Frames with buttons to play, stop and step; `draw(frame)` clears and redraws the figure's axes.

    It plays once, 5 frames a second, and rests on the last one. The figure is closed.
    """
    from IPython.display import HTML

    figure.set_dpi(72)
    player = FuncAnimation(figure, draw, frames=frames, init_func=lambda: None, interval=200)
    html = player.to_jshtml(default_mode="once")
    plt.close(figure)
    return HTML(html)


def denoised_shift(difference: Tensor, alphas_cumprod: float) -> Tensor:
    """Displacement of the predicted clean point, in paper units, that a difference of noise predictions makes.

    x_0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar), so  shift = -sqrt((1 - abar) / abar) * difference
    """
    return -UNIT * ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5 * difference


def _bars(estimate: Estimate, scale: float) -> list[list[float]] | None:
    if not np.isfinite(estimate.low):
        return None
    return [[scale * (estimate.mean - estimate.low)], [scale * (estimate.high - estimate.mean)]]


def _with_half(estimate: Estimate, digits: int, scale: float = 1.0) -> str:
    if not estimate.n:
        return "–"
    half = scale * (estimate.high - estimate.mean)
    return f"{scale * estimate.mean:.{digits}g}" + (f" ± {half:.1g}" if np.isfinite(half) else "")
