"""The `dkto` command: thin, each sub-command calls one function that notebooks call too."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from dkto.common.progress import QUIET_VARIABLE
from dkto.paper.search_config import SearchConfig
from dkto.training.config import OnlineConfig, TrainConfig


@dataclass(frozen=True)
class Feedback:
    """Where likes are read from."""

    feedback: tyro.conf.Positional[Path]
    """A CSV, JSONL or Parquet file with image, prompt, liked (or split, as the authors', or rank, as ImageRewardDB's);
    a JSON list of rankings, as HPDv2's; or a folder with liked/ and disliked/."""
    image_folder: Path | None = None
    """Where the images of a file lie; its own folder if not given."""
    partition: Literal["at_least_once", "always", "mostly"] | None = None
    """For split and rankings: which images count as liked. The paper's choice, at_least_once, if not given."""
    ties: Literal["ignore", "liked", "disliked"] | None = None
    """For rankings: what an equal rank says; ignore if not given."""

    def read(self):
        from dkto.data.feedback import read_feedback

        return read_feedback(self.feedback, partition=self.partition, ties=self.ties, image_folder=self.image_folder)


@dataclass(frozen=True)
class Inspect(Feedback):
    """Read likes and say what they hold, without encoding anything."""

    held_out: float = 0.1
    """Share of the prompts that `dkto prepare --held-out` would set apart."""
    gamma: float = 0.8
    """Chance that training draws a liked sample, no unit (paper 0.8)."""

    def run(self) -> None:
        from dkto.data.feedback import describe_feedback

        print(describe_feedback(self.read(), self.held_out, self.gamma))


@dataclass(frozen=True)
class Unpack:
    """Unpack pairs that carry their images (Pick-a-Pic v2's parquet shards) to image files and a table of likes."""

    source: tyro.conf.Positional[str]
    """A parquet file, a folder of them, a quoted pattern, or the hub id of a data set."""
    output_dir: Path
    """Folder for images, votes and table; called again, it goes on where it stopped."""
    partition: Literal["at_least_once", "always", "mostly"] = "at_least_once"
    """Which images count as liked; the paper's choice is at_least_once."""
    ties: Literal["ignore", "liked", "disliked"] = "ignore"
    """What a tie says of its two images."""
    files: str = "*.parquet"
    """For a folder or a hub id: the pattern that the shards' names match, for instance "data/train-*"."""

    def run(self) -> None:
        from dkto.data.pairs import convert_pairs

        path = convert_pairs(self.source, self.output_dir, partition=self.partition, ties=self.ties, files=self.files)
        print(path.with_suffix(".json").read_text().strip())
        print(f"likes are in {path}")


@dataclass(frozen=True)
class Prepare(Feedback):
    """Encode the images and prompts of a feedback table to disk, once."""

    output_dir: Path = field(kw_only=True)
    """Folder for the encoded data; called again, it encodes what is missing."""
    model: str = "small-world"
    """"small-world", a diffusers pipeline folder, or a hub id."""
    batch_size: int = 16
    """Images per pass of the VAE."""
    flip: bool = False
    """Encode each image mirrored as well, for training that flips at random."""
    held_out: float = 0.0
    """Share of the prompts to set apart; their images are encoded in OUTPUT_DIR/held_out."""
    strict: bool = False
    """Stop at the first image that cannot be read, instead of setting it aside in skipped.jsonl."""
    num_processes: int = 1
    """Processes that share the work, over the GPUs if there are any."""
    csft: Literal["prefix", "negative"] | None = None
    """Also encode the prompts for `dkto train --objective csft`, in this style."""

    def run(self) -> None:
        from dkto.data.encode import prepare_feedback

        table = self.read()
        print(table)
        options = {name: getattr(self, name) for name in ("batch_size", "flip", "strict", "num_processes", "csft")}
        train, held_out = table.split_by_prompt(self.held_out)
        for part, folder in ((train, self.output_dir), (held_out, self.output_dir / "held_out")):
            if len(part) or part is train:
                prepare_feedback(part, folder, self.model, **options)
                print(f"encoded in {folder}: {(folder / 'summary.json').read_text()}".strip())


@dataclass(frozen=True)
class Train:
    """Tune a model on prepared likes and dislikes; called again, it goes on where it stopped."""

    config: tyro.conf.OmitArgPrefixes[TrainConfig]
    threads: int = 0
    """CPU threads, 0 leaves torch's default."""

    def run(self) -> None:
        import torch

        from dkto.common.processes import join_family
        from dkto.training.loop import run_training

        join_family()
        if self.threads:
            torch.set_num_threads(self.threads)
        run_training(self.config)
        _say_end(self.config)


@dataclass(frozen=True)
class TrainOnline:
    """Tune a model on pictures that it draws while it learns: AlignProp or D3PO; resumes as `train` does."""

    config: tyro.conf.OmitArgPrefixes[OnlineConfig]
    threads: int = 0
    """CPU threads, 0 leaves torch's default."""

    def run(self) -> None:
        import torch

        from dkto.training.loop import run_training

        if self.threads:
            torch.set_num_threads(self.threads)
        run_training(self.config)
        _say_end(self.config)


def _say_end(config: TrainConfig | OnlineConfig) -> None:
    from dkto.training.run_folder import RunFolder

    if RunFolder(config).is_finished():
        print(f"finished; records and weights are in {config.output_dir}")
    else:
        print(f"stopped at a checkpoint; the same command goes on from it: {config.output_dir}")


@dataclass(frozen=True)
class Calibrate:
    """Measure the gap of errors that a short trial training makes, and propose beta for it."""

    config: tyro.conf.OmitArgPrefixes[TrainConfig]
    steps: int = 50
    """Optimiser steps of the trial, which lands in OUTPUT_DIR/trial."""
    samples: int = 512
    """Rows of the feedback that are measured at most."""
    wanted_slope: float = 0.7
    """Mean slope of the utility, relative to its slope where nothing was learnt yet; in (0, 1)."""
    threads: int = 0
    """CPU threads, 0 leaves torch's default."""

    def run(self) -> None:
        import torch

        from dkto.training.calibration import CONVENTIONS, calibrate, convert_beta

        if self.threads:
            torch.set_num_threads(self.threads)
        found = calibrate(self.config, steps=self.steps, samples=self.samples, wanted_slope=self.wanted_slope)
        print(found)
        print("the same in the words of other codes:")
        for name, (_, reduction, about) in CONVENTIONS.items():
            if reduction == "mean" and name != "dkto":
                print(f"{convert_beta(found.beta, 'dkto', name):>10.4g}  {name}: {about}")


@dataclass(frozen=True)
class Memory:
    """Say how much memory a training takes, and the largest batch for some cards, without taking it; minutes a row."""

    models: tuple[Literal["small-world", "sd15", "sdxl", "sd3"], ...] = ("sd15", "sdxl", "sd3")
    """Which denoisers."""
    lora_ranks: tuple[int, ...] = (0, 32)
    """Ranks of adapters; 0 is full fine-tuning."""
    cards: tuple[int, ...] = (24, 40, 80)
    """Memory of the graphics cards, GB."""
    overhead_gb: float = 1.5
    """Kept free on a card for CUDA and what its allocator leaves."""
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the passes."""
    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass."""
    measure: bool = False
    """Instead take the memory once on this CPU, batch 1, in float32, and print it beside the computed one."""

    def run(self) -> None:
        from dkto.common.progress import progress
        from dkto.training.memory import SIZES, measured_step_memory, memory_row, memory_table, step_memory

        wanted = [(name, rank) for name in self.models for rank in self.lora_ranks]
        if self.measure:
            for name, rank in wanted:
                computed = step_memory(name, lora_rank=rank)
                measured = measured_step_memory(name, lora_rank=rank)
                print(f"{SIZES[name].title}, rank {rank}: computed {computed:.2f} GB, measured {measured:.2f} GB")
            return
        options = {"precision": self.precision, "gradient_checkpointing": self.gradient_checkpointing}
        rows = [
            memory_row(name, rank, cards=self.cards, overhead_gb=self.overhead_gb, **options)
            for name, rank in progress(wanted, desc="computing", unit="row")
        ]
        print(memory_table(rows))


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
        from dkto.data.prompts import load_prompts
        from dkto.evaluation.generate import generate_images
        from dkto.models.system import System

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
        from dkto.evaluation.scoring import score_images

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
        from dkto.evaluation.win_rates import win_rate_table

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
    gpus: int = 0
    """With --cards: how many of them this run takes, waiting until they are free."""
    cards: str | None = None
    """The machine's graphics cards that runs share, as in CUDA_VISIBLE_DEVICES; left out, the notebook sees all."""

    def run(self) -> None:
        # a second of every run: jsonschema compiles a grammar of IRIs if it can, and no notebook's schema holds one
        sys.modules.setdefault("rfc3987_syntax", None)
        from dkto.common.processes import die_with_engine, graphics_cards
        from dkto.runs.notebooks import run_notebook

        die_with_engine()
        told: dict[str, str] = {}
        for text in self.parameters:
            name, equals, value = text.partition("=")
            if not equals or name in told:
                raise ValueError(f"--parameters takes NAME=VALUE, each name once, got {text!r}")
            told[name] = value
        shared = [card for card in (self.cards or "").split(",") if card]
        with graphics_cards(self.gpus if self.cards is not None else 0, shared) as mine:
            if self.cards is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
            metrics = run_notebook(self.notebook, self.output, told, progress=QUIET_VARIABLE not in os.environ)
        for name, value in metrics.items():
            print(f"{name} = {value}")


@dataclass(frozen=True)
class Sweep:
    """Run every notebook of a sweep; called again, it does only what is missing or failed."""

    sweep: tyro.conf.Positional[Path]
    """YAML file, see dkto.runs.sweeps and papermill_runs/sweeps/."""
    dry_run: bool = False
    """Check everything and show the plan; nothing starts."""
    output_dir: Path | None = None
    """Where the runs land; papermill_runs/outputs/NAME OF THE FILE if left out."""
    profile: str = "local"
    """local, slurm, kubernetes, or a folder with Snakemake's config.yaml."""
    cores: int = 0
    """CPU cores to use on this machine, 0 for all."""
    retries: int = 0
    """How often a failed run is tried again at once."""
    redo: bool = False
    """Make runs again whose parameters or notebook have changed since; their old results are removed."""

    def run(self) -> None:
        from dkto.runs.runner import run_sweep, show_plan
        from dkto.runs.sweeps import read_sweep

        plan = read_sweep(self.sweep, self.output_dir)
        if self.dry_run:
            print(show_plan(plan))
        else:
            run_sweep(plan, profile=self.profile, cores=self.cores, retries=self.retries, redo=self.redo)


@dataclass(frozen=True)
class Demo:
    """The main job, end to end: likes of generated images to a win-rate table, by papermill."""

    output_dir: Path = Path("papermill_runs/outputs/demo")
    """Folder for everything the demo makes."""

    def run(self) -> None:
        from dkto.paper.demo import run_demo

        run_demo(self.output_dir)


@dataclass(frozen=True)
class Paper:
    """Replay the paper on the small world: notebooks through papermill, metrics.json and one HTML page."""

    output_dir: Path = Path("papermill_runs/outputs/paper")
    """Folder for everything it makes; called again, it goes on."""
    profile: str = "default"
    """quick, default or full."""
    settings_file: str = "papermill_runs/paper_settings.json"
    """Search result with the settings of every system; "full" searches anew."""
    steps: tuple[str, ...] = ()
    """Names of steps, to run a part of the profile (on one of several machines); all if left out."""

    def run(self) -> None:
        from dkto.paper.replay import run_paper

        run_paper(self.output_dir, self.profile, settings_file=self.settings_file, only=self.steps)


@dataclass(frozen=True)
class PaperSearch:
    """Search the settings of every system, the same number of tries for each, on validation prompts."""

    config: tyro.conf.OmitArgPrefixes[SearchConfig]
    keep: Path = Path("papermill_runs/paper_settings.json")
    """JSON file for the result."""

    def run(self) -> None:
        from dkto.paper.search import search_settings

        print(search_settings(self.config, self.keep).to_string(index=False))
        print(f"kept in {self.keep}")


COMMANDS = {
    "feedback": Inspect,
    "unpack": Unpack,
    "prepare": Prepare,
    "calibrate": Calibrate,
    "memory": Memory,
    "train": Train,
    "train-online": TrainOnline,
    "generate": Generate,
    "score": Score,
    "evaluate": Evaluate,
    "run": Run,
    "sweep": Sweep,
    "demo": Demo,
    "paper": Paper,
    "paper-search": PaperSearch,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one sub-command; a mistake of the user ends in one sentence and exit code 2."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in COMMANDS:  # one parser instead of all: a sweep starts many runs
        command = tyro.cli(COMMANDS[given[0]], args=given[1:], prog=f"dkto {given[0]}")
    else:
        command = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=given, prog="dkto")
    try:
        command.run()
    except (ValueError, TypeError, KeyError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        print(f"dkto: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
