"""What an online training is told: AlignProp or D3PO, which sample while they train."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from dkto.training.config import TrainConfig

OnlineObjective = Literal["alignprop", "d3po"]


@dataclass(frozen=True)
class OnlineConfig:
    """One online training run on one process.

    Raises:
        ValueError: if a value is out of its range; the sentence names the field.
    """

    prompts_file: Path
    """Training prompts, one a line; each step draws some of them."""
    output_dir: Path
    """Folder for metrics.jsonl, run.json, checkpoints and the tuned weights."""
    model: str = "small-world"
    """"small-world", a Stable Diffusion pipeline folder in diffusers' layout, or a hub id."""
    objective: OnlineObjective = "alignprop"
    """alignprop: the reward's gradient through the sampler; d3po: online pairs, paper eq. 9-10."""
    reward: str = "world_aesthetics"
    """Name of a scorer; for alignprop one that has a gradient."""
    sampling_steps: int = 10
    """DDIM steps of a chain, N. AlignProp's code 50, D3PO's 20."""
    backprop_steps: int = 1
    """K for alignprop: the last steps of the chain that the gradient passes; 1 is DRaFT-1. AlignProp's code about 8."""
    chain_steps: int = 0
    """For d3po: how many steps of each chain enter the loss, drawn anew each round; 0 takes all, as its code."""
    guidance: float = 3.0
    """Classifier-free guidance inside the chain, no unit; 1 is off and halves the cost. Both codes 5."""
    eta: float = 1.0
    """DDIM's noise, 1 = ancestral, 0 = none; d3po needs some. Both codes 1."""
    beta: float = 0.1
    """For d3po: weight of the log-ratio (mean over latent dimensions). Its code 0.1."""
    ratio_clip: float = 0.1
    """For d3po: probability ratios are kept in [1 - ratio_clip, 1 + ratio_clip]. Its code 0.1."""
    lora_rank: int = 8
    """Rank of the adapters; 0 trains the full UNet. TRL's port of AlignProp 4."""
    learning_rate: float = 1e-3
    """AdamW step size. AlignProp's code 1e-3, D3PO's 3e-5."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly."""
    max_train_steps: int = 35
    """Optimiser steps; each samples anew."""
    batch_size: int = 16
    """Images per step; d3po draws half as many prompts, two images each. AlignProp's code 128."""
    weight_decay: float = 0.01
    """AdamW weight decay, 1/step relative to the rate."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    gradient_checkpointing: bool = True
    """Activations are computed again in the backward pass: less memory, about a third more time, the same result."""
    seed: int = 0
    """Fixes prompts, noise and adapter initialisation."""
    checkpoint_every: int = 10
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the last checkpoints stay on disk."""

    # what `dkto.training.engine.Engine` asks of every configuration, and an online run always does in one way
    mixed_precision: ClassVar[str] = "no"
    optimizer: ClassVar[str] = "adamw"
    tracker: ClassVar[str] = "none"
    ema_decay: ClassVar[float] = 0.0
    compile: ClassVar[bool] = False

    def samples_per_rank(self, ranks: int) -> int:
        """All of `batch_size`.

        Raises:
            ValueError: on more than one process.
        """
        if ranks != 1:
            raise ValueError(f"{self.objective} trains on one process, got {ranks}")
        return self.batch_size

    def __post_init__(self) -> None:
        positive = (
            "sampling_steps",
            "guidance",
            "beta",
            "ratio_clip",
            "learning_rate",
            "max_train_steps",
            "batch_size",
        )
        for name in (*positive, "max_grad_norm", "checkpoint_every", "keep_checkpoints"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("lora_rank", "warmup_steps", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or above, got {getattr(self, name)}")
        for name, low in (("backprop_steps", 1), ("chain_steps", 0)):
            if not low <= getattr(self, name) <= self.sampling_steps:
                raise ValueError(
                    f"{name} must be in [{low}, {self.sampling_steps} sampling_steps], got {getattr(self, name)}"
                )
        if self.objective not in OnlineObjective.__args__:
            raise ValueError(f"objective must be one of {', '.join(OnlineObjective.__args__)}, got {self.objective!r}")
        allowed = "in (0, 1] for d3po, whose chains need a probability" if self.objective == "d3po" else "in [0, 1]"
        if not 0 <= self.eta <= 1 or (self.objective == "d3po" and self.eta == 0):
            raise ValueError(f"eta must be {allowed}, got {self.eta}")
        if self.objective == "d3po" and self.batch_size % 2:
            raise ValueError(f"batch_size must be even for d3po, two images a prompt, got {self.batch_size}")
        object.__setattr__(self, "prompts_file", Path(self.prompts_file))
        object.__setattr__(self, "output_dir", Path(self.output_dir))

    def prompts(self) -> list[str]:
        """The training prompts.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds none.
        """
        if not self.prompts_file.is_file():
            raise FileNotFoundError(f"prompts_file {self.prompts_file} does not exist")
        prompts = [line.strip() for line in self.prompts_file.read_text(encoding="utf-8").split("\n") if line.strip()]
        if not prompts:
            raise ValueError(f"prompts_file {self.prompts_file} holds no prompt")
        return prompts

    def resolved(self) -> "OnlineConfig":
        """Itself: an online training has no utility."""
        return self

    to_dict = TrainConfig.to_dict
    difference = TrainConfig.difference

    def fingerprint(self) -> str:
        """Hash of everything that changes the result, the prompts among it."""
        ignored = {"output_dir", "prompts_file", "checkpoint_every", "keep_checkpoints", "gradient_checkpointing"}
        values = {key: value for key, value in self.to_dict().items() if key not in ignored}
        return hashlib.sha256(repr((sorted(values.items()), self.prompts())).encode()).hexdigest()[:16]
