import warnings
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib import font_manager
from matplotlib.colors import to_hex
from PIL import Image

from dkto.evaluation.metrics import win_rate
from dkto.objective.losses import effective_weight
from dkto.objective.utilities import UTILITIES, Utility
from dkto.plotting import (
    COLOURS,
    PAPER_UTILITIES,
    UTILITY_COLOURS,
    display_name,
    image_grid,
    plot_sample_weights,
    plot_slopes,
    plot_training,
    plot_utilities,
    plot_win_rates,
)

BUILT_IN = tuple(UTILITY_COLOURS)
RECORDS = [
    {"global_step": s, "loss": 1 - s / 10, "reward/desirable": s / 2, "reference_point": 0.1}
    | ({"reward/undesirable": -s, "reward/margin": 1.5 * s} if s % 2 else {})
    for s in range(1, 7)
]


@pytest.fixture(autouse=True)
def figures_are_closed(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *_: pytest.fail("a plot function called show"))
    yield
    plt.close("all")


def red(height=8, width=8):
    return np.full((height, width, 3), (200, 30, 30), np.uint8)


def line(ax, label):
    (found,) = [line for line in ax.lines if line.get_label() == label]
    return found


CALLS = {
    "utilities": lambda ax: plot_utilities(ax=ax),
    "slopes": lambda ax: plot_slopes(ax=ax),
    "weights": lambda ax: plot_sample_weights("loss_averse", ax=ax),
    "grid": lambda ax: image_grid([[red()]], ["a"], ["b"], ax=ax),
    "win_rates": lambda ax: plot_win_rates([("a", win_rate([1], [0]))], ax=ax),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_axes_in_the_same_axes_out_or_new_ones(call):
    _, mine = plt.subplots()
    assert call(mine) is mine
    assert plt.get_fignums() == [1], "no other figure is opened"
    new = call(None)
    assert new is not mine
    new.figure.canvas.draw()
    assert new.figure.get_figwidth() <= 7.0


def test_no_two_utilities_and_no_utility_and_role_look_alike():
    assert set(BUILT_IN) <= set(UTILITIES)
    ax = plot_utilities(BUILT_IN)
    looks = {
        (to_hex(line(ax, title).get_color()), line(ax, title).get_linestyle()) for title in map(display_name, BUILT_IN)
    }
    assert len(looks) == len(BUILT_IN)
    assert not {colour.lower() for colour in UTILITY_COLOURS.values()} & {c.lower() for c in COLOURS.values()}


@pytest.mark.parametrize(("plot", "attribute"), [(plot_utilities, "value"), (plot_slopes, "slope")])
def test_curves_are_the_utilities(plot, attribute):
    x = torch.linspace(-2, 3, 7, dtype=torch.float64)
    ax = plot(BUILT_IN, x)
    for name in BUILT_IN:
        drawn = line(ax, display_name(name))
        assert np.array_equal(drawn.get_xdata(), x)
        assert np.array_equal(drawn.get_ydata(), getattr(UTILITIES[name], attribute)(x))
    assert [text.get_text() for text in plot().get_legend().texts] == [
        "Kahneman-Tversky",
        "loss-averse",
        "risk-seeking",
    ]


def test_an_exploding_curve_does_not_squash_the_others():
    assert plot_utilities(BUILT_IN).get_ylim()[1] == pytest.approx(6.9)
    assert plot_slopes(BUILT_IN).get_ylim() == (-0.1, 2.0)
    assert plot_slopes().get_ylim()[1] < 1.1
    assert plot_sample_weights("exponential").get_ylim() == (-2.0, 2.0)


def test_panels_that_share_an_axis_show_every_curve_whole():
    _, axes = plt.subplots(1, 2, sharey=True)
    plot_sample_weights("kahneman_tversky", ax=axes[0])  # up to 0.25
    plot_sample_weights("loss_averse", ax=axes[1])  # up to 1
    assert axes[0].get_ylim()[0] < -1
    assert axes[0].get_ylim()[1] > 1


def test_registered_utilities_get_colours_of_their_own():
    mine = [Utility(name, torch.tanh, torch.ones_like) for name in ("one", "two")]
    ax = plot_utilities([*PAPER_UTILITIES, *mine])
    assert len({to_hex(curve.get_color()) for curve in ax.lines[:5]}) == 5


def test_sample_weights_are_the_effective_weights_in_the_colours_of_their_roles():
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    ax = plot_sample_weights("loss_averse", x, reference_point=1.0, undesirable_weight=1.5)
    for liked, role, label in ((True, "desirable", "a liked sample"), (False, "undesirable", "a disliked sample")):
        labels = torch.full((13,), liked)
        point = torch.tensor(1.0, dtype=torch.float64)
        expected = effective_weight(x, labels, point, "loss_averse", undesirable_weight=1.5)
        assert np.array_equal(line(ax, label).get_ydata(), expected)
        assert line(ax, label).get_color() == COLOURS[role]
    assert line(ax, "reference point").get_xdata() == [1.0, 1.0]


def test_training_curves_follow_the_records():
    axes = plot_training(RECORDS, window=2)
    assert line(axes[0], "loss").get_ydata() == pytest.approx([0.9, 0.85, 0.75, 0.65, 0.55, 0.45])
    disliked = line(axes[1], "disliked")  # recorded at odd steps only
    assert disliked.get_xdata().tolist() == [1, 3, 5]
    assert disliked.get_ydata().tolist() == [-1, -2, -4]
    assert disliked.get_color() == COLOURS["undesirable"]
    assert line(axes[1], "margin (liked - disliked)").get_ydata().tolist() == [1.5, 3.0, 6.0]
    assert line(axes[1], "reference point").get_ydata() == pytest.approx([0.1] * 6)
    assert "step" in axes[0].get_xlabel() and "step" in axes[1].get_xlabel()


def test_training_draws_on_given_axes_and_without_rewards():
    _, mine = plt.subplots(1, 2)
    axes = plot_training([{"global_step": 1, "loss": 2.0}], axes=mine)
    assert axes is mine
    assert axes[1].get_legend() is None


def test_image_grid_places_every_image_and_label():
    rows = [[red(), Image.new("L", (8, 8), 255)], [Image.new("RGB", (8, 8), "blue"), red()]]
    ax = image_grid(rows, ["base", "tuned"], ["one", "two"])
    assert len(ax.images) == 4
    left = [image.get_extent()[0] for image in ax.images]
    upper = [image.get_extent()[3] for image in ax.images]
    assert left[0] == left[2] < left[1] == left[3]
    assert upper[0] == upper[1] < upper[2] == upper[3]
    assert ax.images[2].get_array()[0, 0].tolist() == [0, 0, 255]
    ax.figure.canvas.draw()
    assert [text.get_text() for text in ax.get_yticklabels()] == ["base", "tuned"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["one", "two"]
    first, second = (text.get_window_extent().y0 for text in ax.get_yticklabels())
    assert first > second, "the first row is the upper one"
    for j in range(2):
        tick = ax.get_xticks()[j]
        assert ax.images[j].get_extent()[0] < tick < ax.images[j].get_extent()[1]


def test_a_label_is_drawn_by_the_fonts_that_have_its_signs(monkeypatch):
    shipped = [font for font in font_manager.fontManager.ttflist if font.name in ("DejaVu Sans", "DejaVu Serif")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", shipped)
    with pytest.warns(UserWarning, match=r"^no installed font has '星空' of the labels, which are drawn as boxes: ins"):
        ax = image_grid([[red()]], ["a \u2900"], ["星空"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax.figure.canvas.draw()
    assert [label.get_text() for label in (ax.get_xticklabels()[0], ax.get_yticklabels()[0])] == ["□□", "a \u2900"]
    assert ax.get_yticklabels()[0].get_fontfamily() == ["sans-serif", "DejaVu Serif"]


def test_image_grid_does_not_stretch():
    ax = image_grid([[red(8, 16), red(16, 8)]])
    for image, aspect in zip(ax.images, (2.0, 0.5), strict=True):
        x0, x1, y1, y0 = image.get_extent()
        assert (x1 - x0) / (y1 - y0) == pytest.approx(aspect)
    assert ax.get_aspect() == 1.0


def test_labels_are_plain_text_and_long_ones_are_wrapped():
    price = r"a $5 hat and a $\frac{ bag_"  # would not parse as mathematics
    ax = image_grid([[red()] * 6], [price], [price] + ["a very long caption of a picture " * 20] * 5)
    ax.figure.canvas.draw()
    assert "".join(ax.get_xticklabels()[0].get_text().split()) == "".join(price.split())
    long = ax.get_xticklabels()[1].get_text()
    assert long.count("\n") == 5
    assert long.endswith("...")
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert max(box.y1 for box in boxes) <= ax.figure.bbox.y1, "captions leave the figure"
    assert all(a.x1 <= b.x0 for a, b in pairwise(boxes)), "captions overlap"
    plot_win_rates([(price, win_rate([1], [0]))]).figure.canvas.draw()


def test_win_rates_show_rate_and_interval_from_top_to_bottom():
    results = [("first", win_rate([1, 1, 1, 0], [0, 0, 0, 1])), ("second", win_rate([1, 0], [0, 1]))]
    ax = plot_win_rates(results)
    for row, (_, result) in enumerate(results):
        interval, point = ax.lines[2 * row : 2 * row + 2]
        assert list(interval.get_xdata()) == [100 * result.low, 100 * result.high]
        assert (list(point.get_xdata()), list(point.get_ydata())) == ([100 * result.rate], [row])
    assert ax.lines[-1].get_xdata() == [50, 50]
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first row is the upper one"
    assert [text.get_text() for text in ax.get_yticklabels()] == ["first (n = 4)", "second (n = 2)"]
    seeds = plot_win_rates(results, dots=[[0.5, 0.6], [0.7, 0.9]])
    points = [line.get_xdata().tolist() for line in seeds.lines if line.get_marker() == "o"]
    dots = [point for point in points if len(point) == 2]
    assert dots == [pytest.approx([50, 60]), pytest.approx([70, 90])], "each seed is a dot"
    same = plot_win_rates([("first", results[0][1]), ("again", results[0][1])])
    assert "n = 4 prompts" in same.get_xlabel()
    assert [text.get_text() for text in same.get_yticklabels()] == ["first", "again"]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: plot_utilities(["kahneman"]), "unknown utility 'kahneman'"),
        (lambda: plot_training([]), "records must hold at least one step, got none"),
        (lambda: plot_training(RECORDS, axes=plt.subplots(1, 3)[1]), "axes must be two, got 3"),
        (lambda: plot_win_rates([]), "results must hold at least one win-rate, got none"),
        (lambda: image_grid([]), "rows must be equally long and not empty, got lengths []"),
        (lambda: image_grid([[red()], [red()] * 2]), "rows must be equally long and not empty, got lengths [1, 2]"),
        (lambda: image_grid([[red()]], ["a", "b"]), "row_labels must be 1 or none, got 2"),
        (lambda: image_grid([[red()]], (), ["a", "b"]), "column_labels must be 1 or none, got 2"),
        (
            lambda: image_grid([[red() / 255]]),
            "an image must be a PIL image or a uint8 array of shape (H, W, 3), got float64 of shape (8, 8, 3)",
        ),
        (lambda: image_grid([["a.png"]]), "an image must be a PIL image or a uint8 array of shape (H, W, 3), got str"),
    ],
)
def test_a_wrong_argument_raises_its_sentence(call, sentence):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith(sentence)
