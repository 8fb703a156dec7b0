"""The face that every latent diffusion model shows to preparation and training."""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from dkto.common.files import read_json
from dkto.common.names import check_choice
from dkto.common.tensors import write_tensors

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
SMALL_WORLD = "small-world"
SMALL_WORLD_FOLDER = Path(__file__).parent.parent / "world" / "weights"
PIPELINE_FILES = ["**/*.json", "**/*.txt", "**/*.safetensors", "**/*.model", "model_index.json"]
TIMESTEP_SAMPLINGS = ("default", "uniform", "logit_normal")
# parts that a written pipeline and a system that draws do without: nothing here trains them or vouches for them
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")


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
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:
        raise FileNotFoundError(
            f"{what} {str(source)!r} is neither {other}a folder that exists{',' if other else ''} nor a hub id that "
            f"can be reached ({type(error).__name__})"
        ) from error


def save_denoiser(denoiser: ModelMixin, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Save configuration and weights in one file each, as diffusers does."""
    if weights is None:
        denoiser.save_pretrained(folder, max_shard_size="1TB")
        return
    denoiser.save_config(folder)
    write_tensors(folder / WEIGHTS_FILE, weights)


class PipelineText(nn.Module):
    """The text encoders of a pipeline as one module, to be moved together; `encode_prompt` is the pipeline's own."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        super().__init__()
        self.pipeline = pipeline
        self.encoders = nn.ModuleList(m for m in pipeline.components.values() if isinstance(m, nn.Module))
        self.eval().requires_grad_(False)

    @property
    def tokenizers(self) -> tuple:
        """Those that the pipeline has, in its order."""
        return tuple(v for k, v in sorted(self.pipeline.components.items()) if k.startswith("tokenizer") and v)


class DiffusionModel(ABC):
    """A latent diffusion model in diffusers' layout, as preparation and training see it.

    A subclass says how timesteps are spread, how latents are noised, what is predicted and how a prompt
    conditions. Whatever takes a batch keeps its first dimension, B. `folder` is a pipeline with safetensors weights.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    denoiser_class: ClassVar[type[ModelMixin]]
    denoiser_part: ClassVar[str]  # "unet" or "transformer": folder and keyword of the pipeline
    default_sampling: ClassVar[str]
    prompt_tensors: ClassVar[tuple[str, ...]]  # names of what `encode_prompts` gives

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    @abstractmethod
    def num_train_timesteps(self) -> int:
        """How finely the noise schedule is cut; timesteps lie in [0, num_train_timesteps)."""

    @abstractmethod
    def load_text(self) -> tuple[Any, Any]:
        """Tokenizer, or several, and frozen text encoder, one module in float32, as `encode_prompts` takes them."""

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
    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Mapping) -> Tensor:
        """One pass of a denoiser, shape of `noisy_latents`."""

    def load_denoiser(self) -> ModelMixin:
        """A fresh denoiser in float32."""
        return self.denoiser_class.from_pretrained(
            self.folder, subfolder=self.denoiser_part, use_safetensors=True, dtype=torch.float32
        )

    def load_vae(self) -> AutoencoderKL:
        """The frozen autoencoder in float32."""
        vae = AutoencoderKL.from_pretrained(self.folder, subfolder="vae", use_safetensors=True, dtype=torch.float32)
        return vae.eval().requires_grad_(False)

    @property
    def image_size(self) -> int:
        """Side in pixels of the square images the model was trained on."""
        place = self.folder / self.denoiser_part / "config.json"
        denoiser = read_json(place, "configuration of a denoiser", ["sample_size"])
        vae = read_json(self.folder / "vae" / "config.json", "configuration of a VAE", ["block_out_channels"])
        return denoiser["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)

    @torch.no_grad()
    def encode_images(self, vae: AutoencoderKL, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
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

    def write_pipeline(self, denoiser: ModelMixin, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Save a whole pipeline with this denoiser, to be loaded by plain diffusers; its other parts are copied.

        `weights` are the denoiser's, if they are not to be found in it as a whole.
        """
        folder.mkdir(parents=True, exist_ok=True)
        index = read_json(self.folder / "model_index.json", "index of a pipeline")
        index |= {name: [None, None] for name in LEFT_OUT if name in index}
        if "safety_checker" in index:
            index["requires_safety_checker"] = False
        for name, value in index.items():
            outside = Path(name).name != name  # a downloaded index is data: no part of it leads out of the folder
            if outside or name == self.denoiser_part or not isinstance(value, list) or value[0] is None:
                continue
            for pattern in PIPELINE_FILES[:-1]:
                for path in (self.folder / name).glob(pattern):
                    if ".fp16." not in path.name:
                        target = folder / path.relative_to(self.folder)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(path, target)
        save_denoiser(denoiser, folder / self.denoiser_part, weights)
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
