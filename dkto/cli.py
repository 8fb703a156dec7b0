"""The `dkto` command: thin, each sub-command calls one function that notebooks call too."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from dkto.config import TrainConfig


@dataclass(frozen=True)
class Prepare:
    """Encode the images and prompts of a feedback table to disk, once."""

    feedback: tyro.conf.Positional[Path]
    """CSV, JSONL or Parquet with image, prompt, liked; or a folder with liked/ and disliked/."""
    output_dir: Path
    """Folder for the encoded data."""
    model: str = "small-world"
    """"small-world", a diffusers pipeline folder, or a hub id."""
    batch_size: int = 16
    """Images per pass of the VAE."""
    csft: Literal["prefix", "negative"] | None = None
    """Also encode the prompts for `dkto train --objective csft`, in this style."""

    def run(self) -> None:
        from dkto.feedback import read_feedback
        from dkto.prepare import prepare_feedback

        table = read_feedback(self.feedback)
        print(table)
        folder = prepare_feedback(table, self.output_dir, self.model, batch_size=self.batch_size, csft=self.csft)
        print(f"encoded in {folder}")


@dataclass(frozen=True)
class Train:
    """Tune a model on prepared likes and dislikes; called again, it goes on where it stopped."""

    config: tyro.conf.OmitArgPrefixes[TrainConfig]
    threads: int = 0
    """CPU threads, 0 leaves torch's default."""

    def run(self) -> None:
        import torch

        from dkto.checkpoints import CheckpointStore
        from dkto.trainer import run_training

        if self.threads:
            torch.set_num_threads(self.threads)
        folder = run_training(self.config)
        if CheckpointStore(self.config).is_finished():
            print(f"finished; records and weights are in {folder}")
        else:
            print(f"stopped at a checkpoint; the same command goes on from it: {folder}")


@dataclass(frozen=True)
class Generate:
    """Draw images for a list of prompts with the same starting noise for every method."""

    prompts: tyro.conf.Positional[str]
    """A file (one prompt a line, TSV, CSV, JSON), or a set: world_test, hps_v2, parti_prompts, pick_a_pic_test."""
    output_dir: Path
    """Folder for images and manifest."""
    count: int = 0
    """Prompts to take, evenly from the styles; 0 takes all."""
    model: str = "small-world"
    """"small-world", a diffusers pipeline folder, or a hub id."""
    unet: str = ""
    """Folder or hub id of a UNet to use instead of the model's, or empty."""
    lora: str = ""
    """File, folder or hub id of an adapter, or empty."""
    guidance: float = 3.0
    """Classifier-free guidance scale, no unit."""
    steps: int = 15
    """DPM-Solver++ steps."""
    images_per_prompt: int = 5
    """Images of each prompt."""
    seed: int = 0
    """Of all starting noise."""
    num_processes: int = 1
    """Worker processes."""

    def run(self) -> None:
        from dkto.generate import System, generate_images
        from dkto.prompts import load_prompts

        prompts = list(load_prompts(self.prompts, count=self.count).prompts)
        system = System(self.model, self.lora, self.guidance, self.steps, unet=self.unet)
        folder = generate_images(
            system,
            prompts,
            self.output_dir,
            images_per_prompt=self.images_per_prompt,
            seed=self.seed,
            num_processes=self.num_processes,
        )
        print(f"images are in {folder}")


@dataclass(frozen=True)
class Score:
    """Score a folder of generated images."""

    folder: tyro.conf.Positional[Path]
    """Folder written by `dkto generate`."""
    scorers: tuple[str, ...] = ("world_fidelity",)
    """Names of scorers."""
    num_processes: int = 1
    """Worker processes."""

    def run(self) -> None:
        from dkto.scoring import score_images

        for name in self.scorers:
            scores = score_images(self.folder, name, num_processes=self.num_processes)
            print(f"{name}: mean {scores.mean():.4f} over {scores.size} images, kept in {self.folder / 'scores'}")


@dataclass(frozen=True)
class Evaluate:
    """Win-rate of one folder of images over others: median image per prompt, ties half, Wilson interval."""

    ours: tyro.conf.Positional[Path]
    """Images of the method whose wins are counted."""
    theirs: tyro.conf.Positional[tuple[Path, ...]]
    """Images of the methods it is compared with."""
    scorers: tuple[str, ...] = ("world_fidelity",)
    """Names of scorers."""

    def run(self) -> None:
        from dkto.evaluate import win_rate_table

        paths = (self.ours, *self.theirs)
        alike = len({path.name for path in paths}) < len(set(paths))
        ours, *theirs = (str(path) if alike else path.name for path in paths)
        folders = dict(zip((ours, *theirs), paths, strict=True))
        print(win_rate_table(folders, ours, theirs, self.scorers).to_string(index=False))


@dataclass(frozen=True)
class Run:
    """Execute a notebook with papermill, refusing parameters that it does not declare."""

    notebook: tyro.conf.Positional[Path]
    """The notebook."""
    output: tyro.conf.Positional[Path]
    """Where the executed copy goes."""
    parameters: tuple[str, ...] = field(default=())
    """NAME=VALUE, read by the type that the notebook declares."""

    def run(self) -> None:
        from dkto.notebooks import run_notebook

        pairs = [text.partition("=") for text in self.parameters]
        metrics = run_notebook(self.notebook, self.output, {name: value for name, _, value in pairs})
        for name, value in metrics.items():
            print(f"{name} = {value}")


@dataclass(frozen=True)
class Demo:
    """The main job, end to end: likes of generated images to a win-rate table, by papermill."""

    output_dir: Path = Path("papermill_runs/outputs/demo")
    """Folder for everything the demo makes."""

    def run(self) -> None:
        from dkto.demo import run_demo

        run_demo(self.output_dir)


COMMANDS = {
    "prepare": Prepare,
    "train": Train,
    "generate": Generate,
    "score": Score,
    "evaluate": Evaluate,
    "run": Run,
    "demo": Demo,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one sub-command; a mistake of the user ends in one sentence and exit code 2."""
    command = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=arguments, prog="dkto")
    try:
        command.run()
    except (ValueError, TypeError, KeyError, FileNotFoundError, FloatingPointError, RuntimeError) as error:
        print(f"dkto: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
