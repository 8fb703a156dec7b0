"""Watch a training that runs as a sub-process: loss, rewards, reference point, sample images, and a stop button.

A thread reads `metrics.jsonl` and sets what the page shows; the kernel stays free. A second thread draws
sample images from the newest checkpoint. Stop sends SIGTERM: the trainer finishes its step, writes a
checkpoint and ends; *Start* goes on from there.
"""

import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import traitlets
from matplotlib.figure import Figure
from PIL import Image

from dkto.common.files import read_records
from dkto.models.system import System, draw, noise_generator
from dkto.plotting import plot_training
from dkto.training.config import TrainConfig
from dkto.training.launch import start_training
from dkto.training.run_folder import RunFolder
from dkto.widgets.base import ROLE_COLOURS, Instrument, script, small_bytes, style

POLL_SECONDS = 0.5
MOST_POINTS = 600  # points of a curve that are sent to the page
MOST_SAMPLES = 6  # rows of sample images that are kept on the page
SAMPLE_SIDE = 512  # pixels: larger samples are sent as copies of that size
SERIES = ("loss", "reward/desirable", "reward/undesirable", "reference_point")  # the page knows the last part


class TrainingView(Instrument):
    """One training, live.

    Args:
        config: what to train; sample images come from its checkpoints, every `checkpoint_every` steps.
        prompts: what the sample images show; none draws no images.
        guidance: of the sample images, no unit.
        sample_steps: sampler steps of the sample images: few, since they share the machine with the training.
        seed: of their noise, which is the same at every step.
        threads: CPU threads of the training.
    """

    _esm = script("training_view")
    _css = style("training_view")

    _again = False  # whether a finished training can be followed by another

    state = traitlets.Unicode("ready").tag(sync=True)  # ready, preparing, running, stopping, stopped, finished, failed
    can_start = traitlets.Bool(True).tag(sync=True)
    start_label = traitlets.Unicode("Start training").tag(sync=True)
    curves = traitlets.Dict().tag(sync=True)  # by series: [[steps], [values]]
    step = traitlets.Int(0).tag(sync=True)
    total = traitlets.Int().tag(sync=True)
    updates = traitlets.Int(0).tag(sync=True)  # how often the curves were sent
    samples = traitlets.List().tag(sync=True)  # dicts: label, images (bytes)
    prompts = traitlets.List().tag(sync=True)
    result = traitlets.Unicode().tag(sync=True)
    colours = traitlets.Dict(ROLE_COLOURS).tag(sync=True)

    def __init__(
        self,
        config: TrainConfig,
        prompts: Sequence[str] = (),
        *,
        guidance: float = 3.0,
        sample_steps: int = 8,
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        super().__init__(total=config.max_train_steps, prompts=list(prompts))
        self.config, self.process = config, None
        self._guidance, self._sample_steps, self._seed, self._threads = guidance, sample_steps, seed, threads
        self._thread: threading.Thread | None = None
        self._drawn: set[str] = set()
        self._read()
        if RunFolder(config).is_finished():
            self.state, self.can_start = "finished", False
            self._finish()

    def start(self) -> None:
        """Start the training, or let it go on from its last checkpoint. Returns at once; a RuntimeError if it runs."""
        if self._thread is not None and self._thread.is_alive():
            raise RuntimeError("the training runs already")
        self.message, self.can_start = "", False
        self._thread = threading.Thread(target=self._guarded, name="training view", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask the training to write a checkpoint after its present step and to end. Returns at once."""
        if self.process is not None and self.process.poll() is None:
            self.state = "stopping"
            self.process.terminate()

    def wait(self, seconds: float | None = None) -> str:
        """Until the training has ended and its images are drawn, or the time is over; returns the state.

        The kernel answers no button while it waits.
        """
        if self._thread is not None:
            self._thread.join(seconds)
        return self.state

    def figure(self) -> Figure:
        """Loss and rewards as a static figure."""
        records = self._records()
        figure, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
        if records:
            plot_training(records, axes=axes)
        else:
            for ax in axes:
                ax.text(0.5, 0.5, "no step yet", ha="center")
        plt.close(figure)
        return figure

    def _guarded(self) -> None:
        try:
            self._work()
        except Exception as error:  # a thread's exception is seen by nobody: say it on the page
            self.message, self.state = f"{type(error).__name__}: {error}", "failed"
        self.can_start = self.state in ("stopped", "failed") or self._again

    def _work(self) -> None:
        # started by this thread and waited for in it: the kernel asks Linux to end the training with the thread
        self.process = start_training(self.config, threads=self._threads)
        self.state = "running"
        end = f"checkpoint-{self.config.max_train_steps:08d}"  # which `_finish` shows
        with ThreadPoolExecutor(1, thread_name_prefix="samples") as pool:
            drawing: Future | None = None
            while self.process.poll() is None:
                self._read()
                newest = (RunFolder(self.config).checkpoints() or [None])[-1]
                if drawing is not None and drawing.done():
                    drawing.result()
                    drawing = None
                if drawing is None and newest is not None and newest.name not in {*self._drawn, end}:
                    self._drawn.add(newest.name)
                    drawing = pool.submit(self._sample, newest)
                time.sleep(POLL_SECONDS)
        self._read()
        before_it_listened = self.process.returncode == -signal.SIGTERM and self.state == "stopping"
        if self.process.returncode and not before_it_listened:
            log = Path(self.config.output_dir) / "train.log"
            last = (log.read_text().strip().splitlines() or ["no output"])[-1]
            raise RuntimeError(f"training ended with code {self.process.returncode}: {last} (see {log})")
        if not RunFolder(self.config).is_finished():
            self.state = "stopped"
        else:
            self._finish()
            self.state = "finished"

    def _records(self) -> list[dict]:
        path = Path(self.config.output_dir) / "metrics.jsonl"
        return read_records(path) if path.exists() else []

    def _read(self) -> None:
        """Send the curves if the records have grown."""
        records = self._records()
        if not records or records[-1]["global_step"] == self.step:
            return
        curves = {}
        for key in SERIES:
            points = [(r["global_step"], r[key]) for r in records if key in r and np.isfinite(r[key])]
            points = points[:: max(1, len(points) // MOST_POINTS)]
            columns = [list(column) for column in zip(*points, strict=True)]
            curves[key.removeprefix("reward/")] = columns or [[], []]
        with self.hold_sync():
            self.curves, self.step, self.updates = curves, records[-1]["global_step"], self.updates + 1

    def _sample(self, checkpoint: Path) -> None:
        """Images of a checkpoint, unless the training removed it meanwhile."""
        lora, unet = checkpoint / "pytorch_lora_weights.safetensors", checkpoint / "unet"
        settings = {"model": self.config.resolved().model, "guidance": self._guidance, "steps": self._sample_steps}
        try:
            system = System(**settings, **({"lora": str(lora)} if lora.exists() else {"unet": str(unet)}))
            self._show_samples(f"step {int(checkpoint.name.split('-')[1])}", system)
        except OSError:
            if checkpoint.exists():
                raise

    def _finish(self) -> None:
        """What is shown at the end: images of the finished model."""
        system = System.of_run(self.config.output_dir, guidance=self._guidance, steps=self._sample_steps)
        self._show_samples(f"end, step {self.config.max_train_steps}", system)

    def _show_samples(self, label: str, system: System) -> None:
        if self.prompts:
            self._show(label, self._draw(system, list(self.prompts)))

    def _draw(self, system: System, prompts: list[str]) -> list[Image.Image]:
        noise = [noise_generator(self._seed, number, 0) for number in range(len(prompts))]
        return draw(system.load(), prompts, noise, system)

    def _show(self, label: str, images: Sequence[Image.Image]) -> None:
        row = {"label": label, "images": [small_bytes(image, SAMPLE_SIDE) for image in images]}
        self.samples = [*self.samples, row][-MOST_SAMPLES:]

    def _obey(self, message: dict) -> None:
        if message.get("type") == "stop":
            self.stop()
        elif message.get("type") == "start":
            self.start()
