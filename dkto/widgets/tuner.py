"""One button that tunes an adapter on likes: encode, train, show before and after, and ask blind (paper 4, 6)."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from ipywidgets import VBox
from matplotlib.figure import Figure
from PIL import Image

from dkto.data.encode import prepare_feedback
from dkto.data.feedback import FeedbackTable, write_feedback
from dkto.evaluation.generate import generate_images
from dkto.evaluation.metrics import WinRate, win_rate
from dkto.evaluation.study import make_study
from dkto.models.system import System
from dkto.plotting import image_grid
from dkto.training.config import TrainConfig
from dkto.widgets.judge import Judge
from dkto.widgets.likelog import LEAST, still_missing
from dkto.widgets.training_view import TrainingView
from dkto.world.stranger import SETTINGS
from dkto.world.users import SimulatedUser

SHOWN = 6  # prompts of the before/after grid
COMPARED = 10  # pairs of the blind comparison


def next_run(root: Path) -> Path:
    """Make the folder of a new run, `run-NN`: one more than the highest number there is, and nobody else's.

    The number of a run that was removed is not given again while its likes, `likes-NN.csv`, are there.
    """
    root.mkdir(parents=True, exist_ok=True)
    while True:
        names = (re.fullmatch(r"(?:run-|likes-)(\d{2,9})(?:\.csv)?", path.name, re.ASCII) for path in root.iterdir())
        number = 1 + max((int(found[1]) for found in names if found), default=0)
        try:
            (folder := root / f"run-{number:02d}").mkdir()
        except FileExistsError:  # another tuner made it just now
            continue
        return folder


class Tuner(TrainingView):
    """Tune on the likes given so far, live; each press is a run of its own in `output_dir/run-N`.

    `panel` is the widget with `COMPARED` blind comparisons below it once a training has ended: other noise than that
    of the images shown before and after, and a `dkto.widgets.Judge` of whoever gave the likes.

    Args:
        likes: called when the button is pressed; gives the table to train on.
        output_dir: folder of the runs; the table's images must lie in it or below.
        prompts: held-out prompts that are drawn before and after, from the same noise.
        model: "small-world", a pipeline folder or a hub id.
        user: a simulated user who never saw the training images, for a win-rate of after against before.
        least: likes, and dislikes, without which no training starts.
        guidance, sample_steps, seed, threads: as `TrainingView`.
        settings: fields of `TrainConfig` other than those of `dkto.world.stranger.SETTINGS`.
    """

    _again = True

    def __init__(
        self,
        likes: Callable[[], FeedbackTable],
        output_dir: str | Path,
        prompts: Sequence[str],
        *,
        model: str = "small-world",
        user: SimulatedUser | None = None,
        least: int = LEAST,
        guidance: float = 3.0,
        sample_steps: int = 15,
        seed: int = 0,
        threads: int = 1,
        **settings,
    ) -> None:
        if not prompts:
            raise ValueError("prompts must hold at least one prompt to draw before and after, got none")
        self._likes, self._root, self._user = likes, Path(output_dir), user
        self._judged, self._least = list(prompts), least
        self.before: list[Image.Image] = []
        self.after: list[Image.Image] = []
        self.win_rate: WinRate | None = None
        self.judge: Judge | None = None
        config = TrainConfig(self._root / "none", self._root / "none", model=model, seed=seed, **(SETTINGS | settings))
        options = {"guidance": guidance, "sample_steps": sample_steps, "seed": seed, "threads": threads}
        super().__init__(config, self._judged[:SHOWN], **options)
        self._base = System(model=model, guidance=guidance, steps=sample_steps)
        self.start_label = "Tune on these likes"
        self.panel = VBox([self])

    def start(self) -> None:
        """Tune on the likes given so far. Returns at once.

        Raises:
            ValueError: if there are fewer likes or dislikes than `least`.
            RuntimeError: if a training runs already.
        """
        if self._thread is not None and self._thread.is_alive():
            raise RuntimeError("the training runs already")
        table = self._likes()
        given = int(table.is_desirable.sum())
        if missing := still_missing(given, len(table) - given, self._least):
            raise ValueError(
                f"tuning needs {self._least} likes and {self._least} dislikes, got {given} and {len(table) - given}: "
                f"give {missing}"
            )
        if self.state != "stopped":
            folder = next_run(self._root)
            write_feedback(table, self._root / f"{folder.name.replace('run', 'likes')}.csv")
            self.config = replace(self.config, prepared_dir=folder / "prepared", output_dir=folder)
            self._table, self.samples, self.result, self.curves = table, [], "", {}
            self.step, self.before, self.after, self.win_rate = 0, [], [], None
            self._drawn.clear()
            self.judge, self.panel.children = None, (self,)
        super().start()

    def figure(self) -> Figure:
        """Before and after as a static figure."""
        if not self.after:
            return super().figure()
        rows = [self.before[:SHOWN], self.after[:SHOWN]]
        figure = image_grid(rows, ["before", "after"], self._judged[:SHOWN]).figure
        plt.close(figure)
        return figure

    def _work(self) -> None:
        self.state = "preparing"
        # one after the other: two threads that load models at once get each other's empty tensors
        prepare_feedback(self._table, self.config.prepared_dir, self.config.model)
        if not self.before:
            self.before = self._draw(self._base, self._judged)
            self._show("before", self.before[:SHOWN])
        super()._work()

    def _finish(self) -> None:
        system = System.of_run(self.config.output_dir, guidance=self._guidance, steps=self._sample_steps)
        self.after = self._draw(system, self._judged)
        self._show("after", self.after[:SHOWN])
        text = f"Tuned on {self._table}."
        if self._user is not None:
            after, before = (
                [self._user.measure(np.asarray(i), p) for i, p in zip(images, self._judged, strict=True)]
                for images in (self.after, self.before)
            )
            self.win_rate = win_rate(after, before)
            text += (
                f" By the rule of the simulated user {self._user.name}, after wins on {self.win_rate} held-out prompts."
            )
        self.result = text
        self._ask_blind(system)

    def _ask_blind(self, after: System) -> None:
        """Ten pairs of new noise, sides drawn by the study, and a judge below the training."""
        folder, run = self._root / "blind", self.config.output_dir.name
        prompts = [self._judged[number % len(self._judged)] for number in range(COMPARED)]
        options = {"images_per_prompt": 1, "seed": self._seed + 1, "num_processes": 0}
        folders = {
            name: generate_images(system, prompts, folder / place, **options)
            for name, place, system in (("after", run, after), ("before", "before", self._base))
        }
        study = make_study(folders, folder / f"{run}-study", ["me"], [""] * COMPARED, per_style=COMPARED)
        self.judge = Judge(study, "me")
        self.panel.children = (self, self.judge)
