"""Settings of a training: each with its unit, the paper's value and, where it differs, the released code's."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import KW_ONLY, asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, Literal

from dkto.common.names import shown
from dkto.common.settings import check_settings, setting
from dkto.objective.methods import METHODS, OFFLINE, ONLINE
from dkto.objective.utilities import get_utility


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training has, whatever its method; a value out of its range is a ValueError that names the field."""

    model: str = "small-world"
    """"small-world", a diffusers pipeline folder, or a hub id."""
    lora_rank: int = setting(0, 0)
    """0 trains the full UNet (paper); above 0, adapters of that rank."""
    learning_rate: float = setting(1e-7, above=0)
    """AdamW step size. Paper 1e-7 for SD v1.5; about 1e-4 for the small world."""
    warmup_steps: int = setting(1000, 0)
    """Steps over which the rate rises linearly. Paper 1000; the released example 200."""
    max_train_steps: int = setting(10_000, above=0)
    """Optimiser steps. Paper 10,000; the released example 20,000."""
    batch_size: int = setting(32, above=0)
    """Samples per step over all processes; dpo counts both sides of a pair. Paper 32 (16 GPUs x 2)."""
    weight_decay: float = setting(0.01, 0)
    """AdamW weight decay, 1/step relative to the rate."""
    max_grad_norm: float = setting(1.0, above=0)
    """Gradients are scaled down to this norm."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time. Released code: on."""
    seed: int = setting(0, 0)
    """Fixes sampling, noise, timesteps and adapter initialisation."""
    checkpoint_every: int = setting(500, above=0)
    """Steps between checkpoints."""
    keep_checkpoints: int = setting(2, above=0)
    """How many of the last checkpoints stay on disk."""
    max_bad_steps: int = setting(3, above=0)
    """Steps in a row with a loss or gradient that is not finite after which the run stops; single ones are skipped."""

    # settings of the engine that an online training always has in one way, and `TrainConfig` lets one choose
    precision: ClassVar[str] = "float32"
    optimizer: ClassVar[str] = "adamw"
    tracker: ClassVar[str] = "none"
    ema_decay: ClassVar[float] = 0.0
    compile: ClassVar[bool] = False
    gradient_accumulation: ClassVar[int] = 1

    # what changes nothing about the result, so that a run may go on with other values
    NEUTRAL: ClassVar[frozenset[str]] = frozenset(
        {
            *("prepared_dir", "output_dir", "checkpoint_every", "keep_checkpoints", "max_bad_steps", "tracker"),
            "max_train_steps",  # no step depends on how many follow it
        }
    )

    def __post_init__(self) -> None:
        check_settings(self)

    def doubts(self) -> list[str]:
        """What may be meant but mostly is a mistake, a sentence each; `dkto.training.loop.train` warns of them."""
        if not self.warmup_steps or self.warmup_steps < self.max_train_steps:
            return []
        share = min(1.0, self.max_train_steps / self.warmup_steps)
        return [
            f"warmup_steps {self.warmup_steps} is not below max_train_steps {self.max_train_steps}: learning_rate "
            f"{self.learning_rate:g} is reached at the end at most ({share:.0%} of it); choose a shorter warm-up"
        ]

    def samples_per_rank(self, ranks: int) -> int:
        """Samples that one process works on at once; a ValueError if `batch_size` cannot be shared so."""
        raise NotImplementedError

    def to_dict(self) -> dict:
        """Plain values, for training.json."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}

    def resolved(self) -> "RunConfig":
        """The same, as any other process understands it."""
        return self

    def fingerprint(self) -> str:
        """Hash of everything that changes the result; two runs with one fingerprint may resume each other."""
        values = {key: value for key, value in self.to_dict().items() if key not in self.NEUTRAL}
        return hashlib.sha256(json.dumps([values, *self._content()], sort_keys=True).encode()).hexdigest()[:16]

    def _content(self) -> Iterator[object]:
        """What is trained on, where a file of the configuration holds it."""
        return iter(())

    def difference(self, other: dict) -> str:
        """The fields that differ from a stored run's, as text."""
        mine = self.to_dict()
        names = [f.name for f in fields(self) if f.name in other and other[f.name] != mine[f.name]]
        return ", ".join(f"{name}: {shown(other[name])} stored, {shown(mine[name])} asked" for name in names)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """One training on prepared feedback."""

    prepared_dir: Path
    """Folder written by `dkto prepare`: latents and prompt embeddings of the feedback, of the same model."""
    output_dir: Path
    """Folder for metrics.jsonl, training.json, checkpoints and the tuned weights."""
    _: KW_ONLY
    model: str = ""
    """"small-world", a diffusers pipeline folder, or a hub id; left out, the one that prepared the data."""
    objective: Literal[*OFFLINE] = "kto"
    """kto (paper eq. 14-15); dpo on pairs (eq. 8; beta has no half here, so the published 5000 is 2500); sft on the
    liked images (eq. 3), sft_all on every image; csft: sft_all with the like written into the prompt (5.1.2). Newer
    ones (dkto.objective.newer_methods): bco, tgo, nft, awm on single likes; dgpo on groups of one prompt; dmpo, sdpo
    on pairs."""
    csft_style: Literal["prefix", "negative"] = "prefix"
    """For csft: prefix ("good image, " / "bad image, ", the paper) or negative ("Weird image. " on disliked ones)."""
    utility: str = "kahneman_tversky"
    """Name in dkto.objective.UTILITIES; the paper's choice is kahneman_tversky."""
    beta: float = setting(5000.0, above=0)
    """Reward scale, multiplies the mean-squared-error gap. Paper 5000; the released script's default is 1000."""
    desirable_fraction: float = setting(0.8, 0, most=1)
    """gamma, the chance that a drawn sample is a liked one, for kto. Paper 0.8; the released default is 0.5."""
    prompt_dropout: float = setting(0.0, 0, most=1)
    """Chance that a sample's prompt is replaced by the empty one. Paper silent; the released code 0.2."""
    estimator: Literal["batch", "unrelated", "per_class", "running", "zero"] = "batch"
    """Reference point: batch (released model), unrelated (paper's text), per_class, running (BCO), zero."""
    clamp: bool = True
    """Keep the reference point at or above 0 (paper 4.1)."""
    timestep_sampling: Literal["default", "uniform", "logit_normal"] = "default"
    """Noise levels: uniform (paper), logit_normal (Stable Diffusion 3), or default, as the model was trained."""
    desirable_weight: float = setting(1.0, above=0)
    """Weight of liked samples, no unit. Paper 1."""
    undesirable_weight: float = setting(1.0, above=0)
    """Weight of disliked samples, no unit. Paper 1."""
    noise_draws: int = setting(1, above=0)
    """For kto: noises of each image whose rewards are averaged before the utility; batch_size counts each. Paper 1."""
    noise_bank: int = setting(0, 0)
    """Draws of noise and timestep that each image has; the reference sees each once, for every run on the same data and
    seed, which saves a fifth of a step, with LoRA a third; 16 cost no quality in 2-D. 0, as in the paper: new draws."""
    group_size: int = setting(4, above=1)
    """For dgpo: images of one prompt that are compared at once, half of them liked."""
    mixing: float = setting(1.0, above=0)
    """For nft: b, how far from the reference the two implicit policies lie. Its code 1 and 0.1."""
    clip_range: float = setting(0.2, above=0)
    """For awm: how far a sample's ratio moves from 1 before it counts no more."""
    smoothing: float = setting(0.01, above=0, below=0.5)
    """For dmpo: chance that a pair is the wrong way round."""
    safeguard: float = setting(0.0, 0, below=1)
    """For sdpo: share of the chosen side's descent that the rejected side must leave."""
    anchor: float = setting(0.0, 0)
    """Brake of every method: times the squared distance of policy's and reference's predictions. Paper: 0, off."""
    sft_weight: float = setting(0.0, 0)
    """Brake of every method: times the denoising error of liked samples. Paper: 0, off."""
    random_flip: bool = False
    """Mirror every second image; needs `dkto prepare --flip`. Paper silent; released code: on."""
    gradient_accumulation: int = setting(1, above=0)
    """Micro-batches that a step is split into; the reference point is the mean over one of them. Paper 1."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the passes of policy and reference; what is trained stays float32. Released code: float16."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw (paper: Adam), or adamw8bit, moments of 8 bits, for GPUs with bitsandbytes (the released example)."""
    ema_decay: float = setting(0.0, 0, below=1)
    """Decay of an average of the trained weights that is written in their place, 0 for none. Paper: none."""
    compile: bool = False
    """Compile the repeated blocks of policy and reference: slow first steps. Refused on a CPU; untried on a GPU."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Send the records to tensorboard, wandb or trackio as well; metrics.jsonl is written always."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.samples_per_rank(1)
        if self.noise_bank and self.borrows_prompts:
            raise ValueError("noise_bank must be 0 for estimator 'unrelated', whose prompts come from the batch")
        if self.noise_bank and (draws := METHODS[self.objective].draws) in ("pairs", "groups"):
            raise ValueError(f"noise_bank must be 0 for {self.objective}, whose {draws} share their noise")

    def samples_per_rank(self, ranks: int) -> int:
        """Samples that one process works on at once: batch_size / gradient_accumulation / ranks.

        Raises:
            ValueError: if that is no whole number, cuts a pair in two, or leaves a sample no reference but itself.
        """
        if self.noise_bank and ranks > 1:
            raise ValueError(f"noise_bank must be 0 on several processes: one fills the bank, got {ranks}")
        parts = self.gradient_accumulation * ranks
        method = METHODS[self.objective]
        unit = method.rows_at_once(self)
        kinds = {"pairs": f"{self.objective}'s pairs", "groups": "group_size"}
        what = f"{unit} ({kinds.get(method.draws, 'noise_draws')})" if unit > 1 else ""
        if method.draws == "groups" and unit % 2:
            raise ValueError(f"group_size must be even, half of a group being liked, got {unit}")
        if self.batch_size % (parts * unit):
            needed = " x ".join(filter(None, [f"{self.gradient_accumulation} gradient_accumulation", what]))
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of {ranks} processes x {needed}")
        felt = "estimator" in method.settings and self.estimator not in ("zero", "running")
        if felt and self.batch_size == self.gradient_accumulation * unit:
            raise ValueError(
                f"estimator {self.estimator!r} needs at least 2 samples in a micro-batch (batch_size / "
                "gradient_accumulation), got 1, whose reference point would be its own reward: raise batch_size, or "
                "take estimator 'zero'"
            )
        return self.batch_size // parts

    def doubts(self) -> list[str]:
        found, gamma = super().doubts(), self.desirable_fraction
        if gamma in (0, 1) and METHODS[self.objective].draws == "biased":
            what = "disliked" if gamma else "liked"
            found.append(
                f"desirable_fraction {gamma:g} draws no {what} sample, so {self.objective} sees one class only"
            )
        if self.prompt_dropout == 1:
            found.append("prompt_dropout 1 trains on no prompt at all")
        return found

    @property
    def borrows_prompts(self) -> bool:
        """Whether a step also looks at its samples under each other's prompts."""
        return self.estimator == "unrelated" and "estimator" in METHODS[self.objective].settings

    def resolved(self) -> "TrainConfig":
        """The same with its model, and the text of a utility that was defined as one, by which any process knows it."""
        found = {"utility": get_utility(self.utility).definition}
        if not self.model and (self.prepared_dir / "prepared.json").is_file():
            from dkto.data.encoded import preparing_model  # torch, which a configuration does without

            found["model"] = preparing_model(self.prepared_dir)
        return replace(self, **{name: value for name, value in found.items() if value})


@dataclass(frozen=True)
class OnlineConfig(RunConfig):
    """One training of AlignProp or D3PO, which draw their own images, on one process."""

    prompts_file: Path
    """Training prompts, one a line; each step draws some of them."""
    output_dir: Path
    """Folder for metrics.jsonl, training.json, checkpoints and the tuned weights."""
    _: KW_ONLY
    objective: Literal[*ONLINE] = "alignprop"
    """alignprop: the reward's gradient through the sampler; d3po: online pairs, paper eq. 9-10."""
    reward: str = "world_aesthetics"
    """Name of a scorer; for alignprop one that has a gradient."""
    sampling_steps: int = setting(10, above=0)
    """Steps of a chain, N: DDIM's, and Euler's of a flow. AlignProp's code 50, D3PO's 20."""
    backprop_steps: int = 1
    """K for alignprop: the last steps of the chain that the gradient passes; 1 is DRaFT-1. AlignProp's code about 8."""
    chain_steps: int = 0
    """For d3po: how many steps of each chain enter the loss, new ones each round; 0 takes all, as its code."""
    guidance: float = setting(3.0, above=0)
    """Classifier-free guidance inside the chain, no unit; 1 is off and halves the cost. Both codes 5."""
    eta: float = setting(1.0, 0, most=1)
    """The chain's noise, 1 = ancestral, 0 = none; d3po needs some. Both codes 1, Flow-GRPO 0.5 (its a = 0.7)."""
    beta: float = setting(0.1, above=0)
    """For d3po: weight of the log-ratio (mean over latent dimensions). Its code 0.1."""
    ratio_clip: float = setting(0.1, above=0)
    """For d3po: probability ratios are kept in [1 - ratio_clip, 1 + ratio_clip]. Its code 0.1."""
    lora_rank: int = setting(8, 0)
    """Rank of the adapters; 0 trains the full UNet. TRL's port of AlignProp 4."""
    learning_rate: float = setting(1e-3, above=0)
    """AdamW step size. AlignProp's code 1e-3, D3PO's 3e-5."""
    warmup_steps: int = setting(0, 0)
    """Steps over which the rate rises linearly."""
    max_train_steps: int = setting(35, above=0)
    """Optimiser steps; each draws new images."""
    batch_size: int = setting(16, above=0)
    """Images per step; d3po draws half as many prompts, two images each. AlignProp's code 128."""
    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass: less memory, about a third more time, the same result."""
    checkpoint_every: int = setting(10, above=0)
    """Steps between checkpoints."""

    NEUTRAL: ClassVar[frozenset[str]] = RunConfig.NEUTRAL | {"prompts_file", "gradient_checkpointing"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("backprop_steps", 1), ("chain_steps", 0)):
            if not low <= getattr(self, name) <= self.sampling_steps:
                raise ValueError(
                    f"{name} must be in [{low}, {self.sampling_steps} sampling_steps], got {getattr(self, name)}"
                )
        if self.objective == "d3po" and self.eta == 0:
            raise ValueError(f"eta must be in (0, 1] for d3po, whose chains need a probability, got {self.eta}")
        if self.objective == "d3po" and self.batch_size % 2:
            raise ValueError(f"batch_size must be even for d3po, two images a prompt, got {self.batch_size}")

    def samples_per_rank(self, ranks: int) -> int:
        """All of `batch_size`; a ValueError on more than one process."""
        if ranks != 1:
            raise ValueError(f"{self.objective} trains on one process, got {ranks}")
        return self.batch_size

    def prompts(self) -> list[str]:
        """The training prompts, each once, read as `dkto.data.prompts.load_prompts` does."""
        from dkto.data.prompts import load_prompts  # pandas, which a run on prepared likes does without

        try:
            return list(load_prompts(self.prompts_file).prompts)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"prompts_file {self.prompts_file} does not exist: {error}") from None

    def _content(self) -> Iterator[object]:
        yield self.prompts()
