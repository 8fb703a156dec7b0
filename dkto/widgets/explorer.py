"""Utility explorer: U and U' of every utility, the weight of a sample, and which rewards learn (paper 4.2, C.4).

The browser computes every curve by itself (closed forms; a sampled table for utilities that it does not
know), so a slider moves the curve at once. `Explorer.figure` draws the same without a browser.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import traitlets
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from dkto.common.files import Fields, check_fields, read_json, read_records, refuse_leaving
from dkto.common.json_text import parse_json
from dkto.common.names import printable, shown
from dkto.data.sources import parse_label
from dkto.data.tables import need_columns, refuse_rows, table_of_text
from dkto.objective.utilities import UTILITIES, define_utility, get_utility
from dkto.plotting import (
    DASHED,
    NOTEBOOK_WIDTH,
    UTILITY_COLOURS,
    plot_reward_weights,
    plot_sample_weights,
    plot_slopes,
    plot_utilities,
    utility_colours,
    weight_at,
)
from dkto.widgets.base import ROLE_COLOURS, Instrument, script, style

TABLE_LIMIT = 50.0  # a sampled utility covers gains in [-50, 50]
TABLE_POINTS = 10_001
MOST_REWARDS = 50_000
LARGEST_UPLOAD = 4_000_000  # bytes
CONFIG: Fields = {
    "beta": (lambda value: type(value) in (int, float) and 0 < value < np.inf, "a number above 0"),
    "utility": (lambda value: isinstance(value, str), "text"),
}


class Explorer(Instrument):
    """All utilities on one screen, with sliders for the settings of a training.

    Rewards are kept as error gaps, reward / beta, so that the beta slider spreads and gathers them as it
    would in training.

    Args:
        rewards: (N,) implicit rewards at `beta`, or None for no histogram.
        is_desirable: (N,) bool, True where the image was liked; needed with rewards.
        source: what the rewards are, for the histogram's title.
        settings: beta, reference_point, desirable_weight, undesirable_weight, desirable_fraction, utility,
            largest_reward (half width of the plots); each is also an attribute that follows its slider.

    Raises:
        ValueError: if rewards and labels differ in length, are not finite, are more than 50,000, or a setting
            is out of its range or the utility unknown.
    """

    _esm = script("explorer")
    _css = style("explorer")

    beta = traitlets.Float(100.0).tag(sync=True)
    reference_point = traitlets.Float(0.0).tag(sync=True)
    desirable_weight = traitlets.Float(1.0).tag(sync=True)
    undesirable_weight = traitlets.Float(1.0).tag(sync=True)
    desirable_fraction = traitlets.Float(0.8).tag(sync=True)
    largest_reward = traitlets.Float(6.0).tag(sync=True)
    utility = traitlets.Unicode("kahneman_tversky").tag(sync=True)

    curves = traitlets.List().tag(sync=True)
    gaps = traitlets.Bytes().tag(sync=True)
    liked = traitlets.Bytes().tag(sync=True)
    source = traitlets.Unicode().tag(sync=True)
    colours = traitlets.Dict(ROLE_COLOURS).tag(sync=True)
    table_limit = traitlets.Float(TABLE_LIMIT).tag(sync=True)
    saved_points = traitlets.Int(121).tag(sync=True)
    largest_upload = traitlets.Int(LARGEST_UPLOAD).tag(sync=True)

    def __init__(
        self,
        rewards: ArrayLike | None = None,
        is_desirable: ArrayLike | None = None,
        *,
        source: str = "given rewards",
        **settings,
    ) -> None:
        super().__init__(**settings)
        self.refresh()
        if rewards is not None:
            self.set_rewards(rewards, is_desirable, source=source)

    @classmethod
    def of_run(cls, folder: str | Path, **settings) -> "Explorer":
        """Rewards from a run's `metrics.jsonl`: the mean of the liked and of the disliked samples of every step.

        Beta and utility are the run's, read from its `training.json`.

        Raises:
            FileNotFoundError: if the folder holds no run.
            ValueError: if one of its files is damaged.
        """
        folder = Path(folder)
        for name in ("metrics.jsonl", "training.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no run ({name} is missing)")
            refuse_leaving(folder / name, folder, "the run's folder")
        config = read_json(folder / "training.json", "record of a training", ["config"])["config"]
        where = f"{folder / 'training.json'}, config"
        check_fields(config if isinstance(config, dict) else {}, CONFIG, where)
        rewards, labels = rewards_of_records(read_records(folder / "metrics.jsonl"))
        known = {"beta": config["beta"], "utility": _name_of(config["utility"])}
        return cls(rewards, labels, source=f"step means of {folder.name}", **(known | settings))

    @traitlets.validate("beta", "desirable_weight", "undesirable_weight", "largest_reward")
    def _positive(self, proposal: dict) -> float:
        if not 0 < proposal["value"] < float("inf"):
            raise ValueError(f"{proposal['trait'].name} must be above 0, got {proposal['value']}")
        return proposal["value"]

    @traitlets.validate("desirable_fraction")
    def _fraction(self, proposal: dict) -> float:
        if not 0 <= proposal["value"] <= 1:
            raise ValueError(f"desirable_fraction must be in [0, 1], got {proposal['value']}")
        return proposal["value"]

    @traitlets.validate("utility")
    def _known_utility(self, proposal: dict) -> str:
        return _name_of(proposal["value"])

    def refresh(self) -> None:
        """Send every utility of `dkto.objective.UTILITIES` to the page, after one was registered in Python."""
        x = torch.linspace(-TABLE_LIMIT, TABLE_LIMIT, TABLE_POINTS, dtype=torch.float64)
        curves, colours = [], utility_colours(UTILITIES)
        for name, utility in UTILITIES.items():
            curve = {"name": name, "title": utility.title, "formula": utility.formula, "sign": utility.sign}
            curve |= {"colour": colours[name], "dash": [6, 4] if name in DASHED else []}
            if name not in UTILITY_COLOURS:
                curve |= {"value": _samples(utility.value(x)), "slope": _samples(utility.slope(x)), "dash": [9, 3]}
            curves.append(curve)
        self.curves = curves

    def define(self, name: str, formula: str) -> None:
        """Add a utility given as text (`dkto.objective.utilities.define_utility`) and show its weights."""
        utility = define_utility(name, formula)
        self.refresh()
        self.utility = utility.name

    def set_rewards(self, rewards: ArrayLike, is_desirable: ArrayLike | None, *, source: str = "given rewards") -> None:
        """Show rewards at the present `beta` under the slope; a ValueError as of the class."""
        rewards, labels = np.asarray(rewards, dtype=np.float64), np.asarray(is_desirable)
        if rewards.ndim != 1 or labels.shape != rewards.shape or labels.dtype != np.bool_:
            raise ValueError(
                f"rewards and is_desirable must be lists of one length, the second of bool, "
                f"got shapes {rewards.shape} and {labels.shape} of {labels.dtype}"
            )
        if not 1 <= len(rewards) <= MOST_REWARDS:
            raise ValueError(f"rewards must be 1 to {MOST_REWARDS:,}, got {len(rewards):,}: pass a random part")
        gaps = rewards / self.beta
        good = abs(gaps) <= np.finfo(np.float32).max  # the page holds gaps as float32
        if not good.all():
            at = int(np.argmin(good))
            raise ValueError(f"reward {at} must be finite, and a float32 when divided by beta, got {rewards[at]:g}")
        with self.hold_sync():
            self.gaps = gaps.astype(np.float32).tobytes()
            self.liked = labels.astype(np.uint8).tobytes()
            self.source = source

    def rewards(self) -> tuple[np.ndarray, np.ndarray]:
        """The shown rewards at the present `beta`, (N,), and (N,) bool labels."""
        gaps = np.frombuffer(self.gaps, dtype=np.float32).astype(np.float64)
        return gaps * self.beta, np.frombuffer(self.liked, dtype=np.uint8).astype(bool)

    def curves_table(self) -> pd.DataFrame:
        """What the page's *Save curves* button writes, computed here: U, U', and the weights of the chosen utility."""
        x = torch.linspace(-self.largest_reward, self.largest_reward, self.saved_points, dtype=torch.float64)
        columns = {"x": x}
        for name, utility in UTILITIES.items():
            columns |= {f"U:{name}": utility.value(x), f"slope:{name}": utility.slope(x)}
        chances = {"liked": self.desirable_fraction, "disliked": 1 - self.desirable_fraction}
        weights = {name: weight_at(x, name == "liked", self.utility, **self._weights()) for name in chances}
        columns |= {f"weight:{name}": weight for name, weight in weights.items()}
        columns |= {f"drawn:{name}": weight * chances[name] for name, weight in weights.items()}
        return pd.DataFrame({name: column.numpy() for name, column in columns.items()})

    def figure(self) -> Figure:
        """The four panels as a static figure, for paper and papermill."""
        x = torch.linspace(-self.largest_reward, self.largest_reward, 401, dtype=torch.float64)
        figure, axes = plt.subplots(2, 2, figsize=(1.35 * NOTEBOOK_WIDTH, 6.6), layout="constrained")
        plot_utilities(list(UTILITIES), x, axes[0, 0])
        plot_slopes(list(UTILITIES), x, axes[0, 1])
        axes[0, 0].get_legend().remove()
        plot_sample_weights(self.utility, x, axes[1, 0], **self._weights())
        rewards, labels = self.rewards()
        if len(rewards):
            options = {"limit": self.largest_reward, "title": self.source, **self._weights()}
            plot_reward_weights(rewards, labels, self.utility, axes[1, 1], **options)
        else:
            axes[1, 1].text(0.5, 0.5, "no rewards given", ha="center", transform=axes[1, 1].transAxes)
            axes[1, 1].set_axis_off()
        plt.close(figure)
        return figure

    def _weights(self) -> dict[str, float]:
        names = ("reference_point", "desirable_weight", "undesirable_weight")
        return {name: getattr(self, name) for name in names}

    def _obey(self, message: dict) -> None:
        """The page sends a formula, or the text of a file with rewards."""
        if message.get("type") == "utility":
            self.define(str(message.get("name")), str(message.get("formula")))
        elif message.get("type") == "rewards":
            name = str(message.get("name"))
            self.set_rewards(*rewards_of_text(str(message.get("text")), name), source=name)


def rewards_of_records(records: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Step records of a training to rewards, (N,), and labels, (N,) bool: the mean of each class in each step's batch.

    No reward in any record raises a ValueError.
    """
    keys = {"reward/desirable": True, "reward/undesirable": False}
    found = []
    for number, record in enumerate(records, 1):
        for key in keys.keys() & record.keys():
            if type(record[key]) not in (int, float) or not abs(record[key]) < np.inf:
                raise ValueError(f"record {number}: {key} must be a finite number, got {shown(record[key])}")
        found += [(record[key], label) for key, label in keys.items() if key in record]
    if not found:
        raise ValueError(f"none of {len(records)} records holds reward/desirable or reward/undesirable")
    rewards, labels = zip(*found, strict=True)
    return np.array(rewards, dtype=np.float64), np.array(labels, dtype=bool)


def rewards_of_text(text: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(N,) rewards and (N,) bool labels of a file's text: CSV with reward and liked, or a run's metrics.jsonl.

    The ending of the file's name says which.

    Raises:
        ValueError: if the file is too long, of another format, lacks a column, or a row is no number or no like;
            the sentence names the row.

    >>> rewards_of_text("reward,liked\\n1.5,like\\n-2,dislike\\n", "mine.csv")
    (array([ 1.5, -2. ]), array([ True, False]))
    """
    name = printable(name, 80)
    if len(text) > LARGEST_UPLOAD:
        raise ValueError(f"{name} has {len(text):,} characters, more than {LARGEST_UPLOAD:,}")
    if name.endswith(".jsonl"):
        records = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                records += [parse_json(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"{name} is not JSON lines: line {number}: {error}") from None
        if wrong := [record for record in records if not isinstance(record, dict)]:
            raise ValueError(f"{name} must hold one JSON object a line, got {shown(wrong[0])}")
        return rewards_of_records(records)
    if not name.endswith(".csv"):
        raise ValueError(f"{name} must be a .csv with the columns reward and liked, or a run's metrics.jsonl")
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")  # an old Mac ends a line by \r
    table = table_of_text(lines, name, ".csv")
    need_columns(table, ("reward", "liked"), name)
    rewards = pd.to_numeric(table["reward"], errors="coerce").to_numpy(np.float64)
    refuse_rows(table["reward"], np.isfinite(rewards), name, "reward must be a number")
    labels = [parse_label(value, f"{name}, row {row}") for row, value in enumerate(table["liked"], 1)]
    return rewards, np.array(labels, dtype=bool)


def _name_of(utility: str) -> str:
    """The name of a utility; one that comes as text is registered, for the page knows names."""
    found = get_utility(utility)
    return define_utility(found.name, found.formula).name if found.definition else found.name


def _samples(y: torch.Tensor) -> bytes:
    return y.detach().to(torch.float64).numpy().tobytes()
