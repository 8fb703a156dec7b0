"""The sub-commands of `dkto` that train, and those that say beforehand what a training takes."""

from dataclasses import dataclass
from typing import Literal

import tyro

from dkto.training.config import TrainConfig
from dkto.training.online_config import OnlineConfig


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

        from dkto.training.online import run_online

        if self.threads:
            torch.set_num_threads(self.threads)
        run_online(self.config)
        _say_end(self.config)


def _say_end(config: TrainConfig | OnlineConfig) -> None:
    from dkto.training.run_folder import CheckpointStore

    if CheckpointStore(config).is_finished():
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
    mixed_precision: Literal["no", "fp16", "bf16"] = "bf16"
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
        options = {"mixed_precision": self.mixed_precision, "gradient_checkpointing": self.gradient_checkpointing}
        rows = [
            memory_row(name, rank, cards=self.cards, overhead_gb=self.overhead_gb, **options)
            for name, rank in progress(wanted, desc="computing", unit="row")
        ]
        print(memory_table(rows))
