"""The face that every latent diffusion model shows to preparation and training."""

import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import diffusers
import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from dkto.common.files import read_json, write_json
from dkto.common.names import PATH_SHOWN, check_choice, shown
from dkto.common.tensors import write_tensors
from dkto.models.parts import COPIED, PLACES, UNREADABLE, check_family, copy_part, first_line, kept_in, load_part

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
SMALL_WORLD = "small-world"
EXAMPLE = "'stabilityai/stable-diffusion-xl-base-1.0'"  # of a model, for sentences
SMALL_WORLD_FOLDER = Path(__file__).parent.parent / "world" / "weights"
PIPELINE_FILES = [*COPIED, "model_index.json"]
TIMESTEP_SAMPLINGS = ("default", "uniform", "logit_normal")
# parts that a written pipeline and a system that draws do without: nothing here trains them or vouches for them
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
T5_TOKENS = 77  # as the training scripts of diffusers; the pipeline's own default, 256, fills the disk


def pipeline_folder(source: str | Path) -> Path:
    """Where the pipeline `source` lies on disk: "small-world", a folder, or a hub id (see `fetched_folder`).

    Raises:
        ValueError: if a folder is not a diffusers pipeline.
    """
    small = str(source) == SMALL_WORLD
    folder = SMALL_WORLD_FOLDER if small else fetched_folder(source, "model", PIPELINE_FILES, f"{SMALL_WORLD!r}, ")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is not a diffusers pipeline: model_index.json is missing")
    return folder


def fetched_folder(source: str | Path, what: str, patterns: list[str], other: str = "") -> Path:
    """A folder as it is, or the files of a hub id that have these patterns, fetched once.

    Args:
        what, other: what it is, and what else it may be, for the sentence.

    Raises:
        FileNotFoundError: if there is neither such a folder nor, as far as can be reached, such a hub id.
        ValueError: if it is a file.
    """
    if os.path.isdir(source):  # false too for what can be no name
        return Path(source)
    if os.path.isfile(source):
        raise ValueError(f"{what} must be {other}a folder or a hub id, got the file {shown(str(source), PATH_SHOWN)}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)) or Path(source).suffix in (".safetensors", ".bin", ".pt"):
        raise FileNotFoundError(
            f"{what} {shown(str(source), PATH_SHOWN)} does not exist, and is no hub id (OWNER/NAME)"
        )
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:
        raise FileNotFoundError(
            f"{what} {str(source)!r} is neither {other}a folder that exists{',' if other else ''} nor a hub id that "
            f"can be reached ({type(error).__name__})"
        ) from error


def cut_sentence(count: int, prompts: int, path: Path) -> str:
    """The warning about cut prompts, which `path` lists."""
    return f"{count} of {prompts} prompts are longer than the text encoder takes and are cut, see {path}"


def save_denoiser(denoiser: "diffusers.ModelMixin", folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Save configuration and weights in one file each, as diffusers does, without the place it was loaded from."""
    if weights is None:
        denoiser.save_pretrained(folder, max_shard_size="1TB")
    else:
        denoiser.save_config(folder)
        write_tensors(folder / WEIGHTS_FILE, weights)
    path = folder / "config.json"
    config = {key: value for key, value in read_json(path, "configuration").items() if key not in PLACES}
    # a denoiser whose weights lie in pieces has a class of torch's making, which nobody could load
    own = next(kind.__name__ for kind in type(denoiser).__mro__ if kind.__module__.startswith("diffusers."))
    write_json(path, config | {"_class_name": own})


class PipelineText(nn.Module):
    """The text encoders of a pipeline as one module, to be moved together; `encode_prompt` is the pipeline's own."""

    def __init__(self, pipeline: "diffusers.DiffusionPipeline") -> None:
        super().__init__()
        self.pipeline = pipeline
        self.encoders = nn.ModuleList(m for m in pipeline.components.values() if isinstance(m, nn.Module))
        self.eval().requires_grad_(False)

    @property
    def tokenizers(self) -> tuple:
        """Those that the pipeline has, in its order."""
        return tuple(v for k, v in sorted(self.pipeline.components.items()) if k.startswith("tokenizer") and v)


class Level(NamedTuple):
    """How noisy a latent is: x_t = signal x_0 + spread noise."""

    signal: float
    spread: float


class DiffusionModel(ABC):
    """A latent diffusion model in diffusers' layout, as preparation and training see it.

    A subclass says how timesteps are spread, how latents are noised, what is predicted and how a prompt
    conditions. Whatever takes a batch keeps its first dimension, B. `folder` is a pipeline with safetensors weights.
    """

    pipeline_name: ClassVar[str]  # class of diffusers; a training never imports the pipelines, which take seconds
    denoiser_name: ClassVar[str]  # class of diffusers
    denoiser_part: ClassVar[str]  # "unet" or "transformer": folder and keyword of the pipeline
    default_sampling: ClassVar[str]
    prompt_tensors: ClassVar[tuple[str, ...]]  # names of what `encode_prompts` gives
    family: ClassVar[str]  # key of `dkto.models.families.FAMILIES`
    vae_name: ClassVar[str] = "AutoencoderKL"  # class of diffusers
    prompt_tokens: ClassVar[float] = math.inf  # taken of a prompt, where a tokenizer would take more
    prompt_dtype: ClassVar[torch.dtype] = torch.float16  # in which embeddings are kept on disk
    prompts_at_once: ClassVar[int] = 64  # of the text encoders
    led_by: ClassVar[tuple[str, ...]] = ("negative_prompt", "disliked_lora")  # fields of `System` that drawing takes

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts()
        vae = folder / "vae" / "config.json"
        about = read_json(vae, "configuration of a VAE") if vae.is_file() and self.vae_name == "AutoencoderKL" else {}
        if about.get("latents_mean") is not None or about.get("latents_std") is not None:
            raise ValueError(
                f"{vae} has latents_mean or latents_std, by which latents are shifted channel by channel: that is not "
                "supported; expected a VAE with scaling_factor and shift_factor alone"
            )

    def load_scheduler(self, kind: "type[diffusers.SchedulerMixin]") -> "diffusers.SchedulerMixin":
        """The stored schedule as a scheduler of this class.

        Raises:
            ValueError: if the stored one is of another family of processes than `kind`, belongs to a distilled model,
                or is damaged; the sentence names the file.
        """
        path = self.folder / "scheduler" / "scheduler_config.json"
        stored = read_json(path, "configuration of a scheduler", ["_class_name"])
        check_family(stored, kind, path)
        try:
            return kind.from_config(stored)
        except UNREADABLE as error:
            raise ValueError(f"{path} is no configuration of a scheduler: {first_line(error)}") from error

    def tokenizers(self) -> list:
        """The tokenizers alone, in the pipeline's order."""
        found = []
        for name, (library, kind) in sorted(self.parts().items()):
            if name.startswith("tokenizer"):
                cls = getattr(transformers, kind, None) if library == "transformers" else None
                try:
                    found.append(cls.from_pretrained(self.folder / name))
                except UNREADABLE as error:
                    raise ValueError(f"{self.folder / name} holds no {kind} ({first_line(error)})") from error
        return found

    def cut_prompts(self, prompts: list[str], tokenizers: Iterable[Any] | None = None) -> list[tuple[int, str]]:
        """Rows of prompts that one of the pipeline's tokenizers has to cut, with its limit in words."""
        cut: dict[int, str] = {}
        for tokenizer in self.tokenizers() if tokenizers is None else tokenizers:
            limit = min(tokenizer.model_max_length, self.prompt_tokens)
            for row, ids in enumerate(tokenizer(prompts).input_ids):
                if len(ids) > limit:
                    cut.setdefault(row, f"{len(ids)} tokens, {limit} are taken: {prompts[row]}")
        return sorted(cut.items())

    @classmethod
    def call_options(
        cls, pipeline: "diffusers.DiffusionPipeline", guidance: float, negative: list[str]
    ) -> dict[str, Any]:
        """Keywords of the pipeline's own call, for a guidance scale (1 is off) and what it leads away from, B texts."""
        return {"guidance_scale": guidance, "negative_prompt": negative if any(negative) else None}

    def parts(self) -> dict[str, tuple[str, str]]:
        """Library and class of each part that the pipeline has, by name; those of `LEFT_OUT` apart.

        A downloaded index is data: a name that leads out of the folder is no part.

        Raises:
            ValueError: if model_index.json names a part in another way.
        """
        path, found = self.folder / "model_index.json", {}
        for name, entry in read_json(path, "index of a pipeline").items():
            inside = Path(name).name == name and name not in LEFT_OUT
            if inside and isinstance(entry, list) and entry != [None, None]:
                if len(entry) != 2 or not all(isinstance(each, str) for each in entry):
                    raise ValueError(f"{path}: part {shown(name)} must be a library and a class, got {shown(entry)}")
                found[name] = tuple(entry)
        return found

    def load_pipeline(self, device: str = "cpu", **given: Any) -> "diffusers.DiffusionPipeline":
        """The pipeline with these parts, None being none; its other networks loaded and checked, on no device yet.

        They are in float32; one that works on a GPU and is large by its files is in bfloat16 (`kept_in`).

        Raises:
            FileNotFoundError, ValueError: as `load_part`; and for a part that plain diffusers cannot load.
        """
        index = read_json(self.folder / "model_index.json", "index of a pipeline")
        parts = {name: None for name, entry in index.items() if isinstance(entry, list)}
        parts = {name: None for name in parts if name in LEFT_OUT or index[name] == [None, None]} | given
        for name, (library, kind) in self.parts().items():
            cls = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), kind, None)
            if name not in parts and cls is None:
                raise ValueError(f"{self.folder}: part {shown(name)} is a {shown(kind)} of {shown(library)}, unknown")
            if name not in parts and issubclass(cls, nn.Module):
                parts[name] = load_part(cls, self.folder / name, kept_in(self.folder / name, device))
        if "safety_checker" in parts:
            parts["requires_safety_checker"] = False
        try:
            kind = getattr(diffusers, self.pipeline_name)
            return kind.from_pretrained(self.folder, use_safetensors=True, dtype=torch.float32, **parts)
        except UNREADABLE as error:
            raise ValueError(f"{self.folder} cannot be loaded as a pipeline ({first_line(error)})") from error

    @property
    @abstractmethod
    def num_train_timesteps(self) -> int:
        """How finely the noise schedule is cut; timesteps lie in [0, num_train_timesteps)."""

    @abstractmethod
    def load_text(self, device: str = "cpu") -> tuple[Any, Any]:
        """Tokenizer, or several, and frozen text encoder, one module, as `encode_prompts` takes them.

        Args:
            device: where the encoder is going to work; its precision is that of `load_pipeline`.
        """

    @abstractmethod
    def encode_prompts(self, tokenizer: Any, encoder: Any, prompts: list[str]) -> dict[str, Tensor]:
        """Conditioning of the denoiser by name, each (B, ...); longer prompts are truncated."""

    @abstractmethod
    def timesteps_at(self, quantiles: Tensor) -> Tensor:
        """Timesteps at points of (0, 1) of the schedule, 1 being pure noise; (B,) to (B,)."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents, shape of `latents`."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict, shape of `latents`."""

    @abstractmethod
    def clean_and_noise(self, output: Tensor, noisy_latents: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """x_0 and the noise that a prediction means at a level, both of the shape of `noisy_latents`."""

    @abstractmethod
    def sampler_levels(self, count: int) -> Iterator[tuple[float, Level, Level]]:
        """Of each of `count` steps of the sampler without noise: timestep, level and the next; noisiest first."""

    @abstractmethod
    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Mapping) -> Tensor:
        """One pass of a denoiser, shape of `noisy_latents`."""

    def load_denoiser(self) -> "diffusers.ModelMixin":
        """A fresh denoiser in float32."""
        return load_part(getattr(diffusers, self.denoiser_name), self.folder / self.denoiser_part)

    def load_vae(self) -> "diffusers.AutoencoderKL":
        """The frozen autoencoder in float32."""
        return load_part(getattr(diffusers, self.vae_name), self.folder / "vae").eval().requires_grad_(False)

    @property
    def image_size(self) -> int:
        """Side in pixels of the square images the model was trained on."""
        place = self.folder / self.denoiser_part / "config.json"
        denoiser = read_json(place, "configuration of a denoiser", ["sample_size"])
        vae = read_json(self.folder / "vae" / "config.json", "configuration of a VAE", ["block_out_channels"])
        return denoiser["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)

    @torch.no_grad()
    def encode_images(self, vae: "diffusers.AutoencoderKL", pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled posterior, each (B, C, H/f, W/f).

            latents = (x - shift) * scale

        Args:
            vae: from `load_vae`.
            pixel_values: (B, 3, H, W) in [-1, 1].
        """
        posterior = vae.encode(pixel_values).latent_dist
        scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
        return (posterior.mean - shift) * scale, posterior.std * scale

    def draw_timesteps(self, rng: np.random.Generator, size: int, sampling: str = "default") -> Tensor:
        """Timesteps of a batch, (size,).

            uniform       every noise level of the schedule equally often (DDPM, the paper)
            logit_normal  sigmoid of a standard normal: middle levels more often (Stable Diffusion 3)

        Args:
            sampling: one of `TIMESTEP_SAMPLINGS`; "default" is the one that the model was trained with.
        """
        check_choice("sampling", sampling, TIMESTEP_SAMPLINGS)
        if (self.default_sampling if sampling == "default" else sampling) == "uniform":
            quantiles = torch.from_numpy(rng.random(size))
        else:
            quantiles = torch.sigmoid(torch.from_numpy(rng.standard_normal(size)))
        return self.timesteps_at(quantiles)

    def write_pipeline(
        self, denoiser: "diffusers.ModelMixin", folder: Path, weights: dict[str, Tensor] | None = None
    ) -> None:
        """Save a whole pipeline with this denoiser, to be loaded by plain diffusers; its other parts are copied.

        `weights` are the denoiser's, if they are not to be found in it as a whole.
        """
        folder.mkdir(parents=True, exist_ok=True)
        index = read_json(self.folder / "model_index.json", "index of a pipeline")
        index |= {name: [None, None] for name in LEFT_OUT if name in index}
        if "safety_checker" in index:
            index["requires_safety_checker"] = False
        for name in self.parts():
            if name != self.denoiser_part:
                copy_part(self.folder / name, folder / name)
        save_denoiser(denoiser, folder / self.denoiser_part, weights)
        index = {key: value for key, value in index.items() if key not in PLACES}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
