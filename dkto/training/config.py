"""What a training run is told: each value with its unit, the paper's and, where it differs, the released code's."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

Objective = Literal["kto", "dpo", "sft", "sft_all", "csft"]
TimestepSampling = Literal["default", "uniform", "logit_normal"]
MixedPrecision = Literal["no", "fp16", "bf16"]
Optimizer = Literal["adamw", "adamw8bit"]
Tracker = Literal["none", "tensorboard", "wandb", "trackio"]
CsftStyle = Literal["prefix", "negative"]
Estimator = Literal["batch", "unrelated", "per_class", "zero"]


CHOICES = {
    "objective": Objective,
    "csft_style": CsftStyle,
    "estimator": Estimator,
    "timestep_sampling": TimestepSampling,
    "mixed_precision": MixedPrecision,
    "optimizer": Optimizer,
    "tracker": Tracker,
}


@dataclass(frozen=True)
class TrainConfig:
    """One fine-tuning run.

    Raises:
        ValueError: if a value is out of its range; the sentence names the field.
    """

    prepared_dir: Path
    """Folder written by `dkto prepare`: latents and prompt embeddings of the feedback."""
    output_dir: Path
    """Folder for metrics.jsonl, run.json, checkpoints and the tuned weights."""
    model: str = "small-world"
    """"small-world", a diffusers pipeline folder, or a hub id; must be the model the data were prepared with."""
    objective: Objective = "kto"
    """kto (paper eq. 14-15); dpo on pairs (eq. 8; beta has no half here, so the published 5000 is 2500); sft on the
    liked images (eq. 3), sft_all on every image; csft: sft_all with the like written into the prompt (5.1.2)."""
    csft_style: CsftStyle = "prefix"
    """For csft: prefix ("good image, " / "bad image, ", the paper) or negative ("Weird image. " on disliked ones)."""
    utility: str = "kahneman_tversky"
    """Name in dkto.objective.utilities.UTILITIES; the paper's choice is kahneman_tversky."""
    beta: float = 5000.0
    """Reward scale, multiplies the mean-squared-error gap. Paper 5000; the released script's default is 1000."""
    desirable_fraction: float = 0.8
    """gamma, the chance that a drawn sample is a liked one, for kto. Paper 0.8; the released default is 0.5."""
    prompt_dropout: float = 0.0
    """Chance that a sample's prompt is replaced by the empty one. Paper silent; the released code 0.2."""
    estimator: Estimator = "batch"
    """Reference point: batch (released model), unrelated (paper's text), per_class, zero."""
    clamp: bool = True
    """Keep the reference point at or above 0 (paper 4.1)."""
    timestep_sampling: TimestepSampling = "default"
    """Noise levels: uniform (paper), logit_normal (Stable Diffusion 3), or default, as the model was trained."""
    desirable_weight: float = 1.0
    """Weight of liked samples, no unit. Paper 1."""
    undesirable_weight: float = 1.0
    """Weight of disliked samples, no unit. Paper 1."""
    lora_rank: int = 0
    """0 trains the full UNet (paper); above 0, adapters of that rank."""
    learning_rate: float = 1e-7
    """AdamW step size. Paper 1e-7 for SD v1.5; about 1e-4 for the small world."""
    warmup_steps: int = 1000
    """Steps over which the rate rises linearly. Paper 1000; the released example 200."""
    max_train_steps: int = 10_000
    """Optimiser steps. Paper 10,000; the released example 20,000."""
    batch_size: int = 32
    """Samples per step over all processes; dpo counts both sides of a pair. Paper 32 (16 GPUs x 2)."""
    random_flip: bool = False
    """Mirror every second image; needs `dkto prepare --flip`. Paper silent; released code: on."""
    gradient_accumulation: int = 1
    """Micro-batches that a step is split into; the reference point is the mean over one of them. Paper 1."""
    weight_decay: float = 0.01
    """AdamW weight decay, 1/step relative to the rate."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    mixed_precision: MixedPrecision = "no"
    """Precision of the passes of policy and reference; what is trained stays float32. Released code: fp16."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time. Released code: on."""
    optimizer: Optimizer = "adamw"
    """adamw (paper: Adam), or adamw8bit, moments of 8 bits, for GPUs with bitsandbytes (the released example)."""
    ema_decay: float = 0.0
    """Decay of an average of the trained weights that is written in their place, 0 for none. Paper: none."""
    compile: bool = False
    """torch.compile the policy on a GPU: slow first steps, faster ones after. Refused on a CPU; untried on a GPU."""
    tracker: Tracker = "none"
    """Send the records to tensorboard, wandb or trackio as well; metrics.jsonl is written always."""
    seed: int = 0
    """Fixes sampling, noise, timesteps and adapter initialisation."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the last checkpoints stay on disk."""
    max_bad_steps: int = 3
    """Steps in a row with a loss or gradient that is not finite after which the run stops; single ones are skipped."""

    def __post_init__(self) -> None:
        positive = ("beta", "learning_rate", "max_train_steps", "batch_size", "desirable_weight", "undesirable_weight")
        positive += ("gradient_accumulation", "max_grad_norm", "checkpoint_every", "keep_checkpoints", "max_bad_steps")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("lora_rank", "warmup_steps", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or above, got {getattr(self, name)}")
        for name in ("desirable_fraction", "prompt_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known.__args__:
                raise ValueError(f"{name} must be one of {', '.join(known.__args__)}, got {getattr(self, name)!r}")
        self.samples_per_rank(1)
        object.__setattr__(self, "prepared_dir", Path(self.prepared_dir))
        object.__setattr__(self, "output_dir", Path(self.output_dir))

    def samples_per_rank(self, ranks: int) -> int:
        """Samples that one process works on at once: batch_size / gradient_accumulation / ranks.

        Raises:
            ValueError: if that is no whole number, cuts a pair in two, or leaves nobody to borrow a prompt from.
        """
        parts = self.gradient_accumulation * ranks
        unit, what = (2, "2 (dpo's pairs)") if self.objective == "dpo" else (1, "")
        if self.batch_size % (parts * unit):
            needed = " x ".join(filter(None, [f"{self.gradient_accumulation} gradient_accumulation", what]))
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of {ranks} processes x {needed}")
        if self.objective == "kto" and self.estimator == "unrelated" and self.batch_size == self.gradient_accumulation:
            raise ValueError("estimator 'unrelated' needs at least 2 samples in a micro-batch, got 1")
        return self.batch_size // parts

    def to_dict(self) -> dict:
        """Plain values, for run.json."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}

    def resolved(self) -> "TrainConfig":
        """The same, with the text of a utility that was defined as one, by which any process knows it."""
        from dkto.objective.utilities import get_utility  # it loads torch, which a configuration does without

        definition = get_utility(self.utility).definition
        return replace(self, utility=definition) if definition else self

    def fingerprint(self) -> str:
        """Hash of everything that changes the result; two runs with one fingerprint may resume each other."""
        ignored = {"output_dir", "prepared_dir", "checkpoint_every", "keep_checkpoints", "max_bad_steps", "tracker"}
        values = {key: value for key, value in self.to_dict().items() if key not in ignored}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def difference(self, other: dict) -> str:
        """The fields that differ from a stored run's, as text."""
        mine = self.to_dict()
        names = [f.name for f in fields(self) if f.name in other and other[f.name] != mine[f.name]]
        return ", ".join(f"{name}: {other[name]!r} stored, {mine[name]!r} asked" for name in names)
