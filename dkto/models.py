"""One face over latent diffusion models: encode images and prompts, add noise, target, predict.

The trainer asks a model only these questions, so the small world's model and Stable Diffusion 1.x or
2.x are trained by the same code. Policy and reference are made here as well: with LoRA the
reference is the policy with its adapter switched off, with full fine-tuning it is a frozen copy;
weights of the policy are never swapped or re-typed.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import snapshot_download
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

SMALL_WORLD = "small-world"
SMALL_WORLD_FOLDER = Path(__file__).parent / "embedded" / "weights"
LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
PIPELINE_FILES = ["**/*.json", "**/*.txt", "**/*.safetensors", "model_index.json"]


def pipeline_folder(source: str | Path) -> Path:
    """Where the pipeline `source` lies on disk: "small-world", a folder, or a hub id (fetched once).

    Raises:
        ValueError: if a folder is not a diffusers pipeline.
        FileNotFoundError: if there is neither such a folder nor, as far as can be reached, such a hub id.
    """
    folder = SMALL_WORLD_FOLDER if str(source) == SMALL_WORLD else Path(source)
    if not folder.exists():
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=PIPELINE_FILES))
        except Exception as error:
            raise FileNotFoundError(
                f"model {str(source)!r} is neither {SMALL_WORLD!r}, a folder that exists, nor a hub id that can be "
                f"reached ({type(error).__name__})"
            ) from error
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is not a diffusers pipeline: model_index.json is missing")
    return folder


def load_model(source: str | Path) -> "StableDiffusion":
    """The model behind `source`, its parts loaded when they are first asked for.

    Raises:
        ValueError: if the pipeline is of a class that no face is written for.
    """
    folder = pipeline_folder(source)
    kind = json.loads((folder / "model_index.json").read_text()).get("_class_name")
    if kind not in MODEL_CLASSES:
        raise ValueError(f"{folder} is a {kind}; supported: {', '.join(MODEL_CLASSES)}")
    return MODEL_CLASSES[kind](folder)


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x (epsilon or v prediction), of any size.

    Args:
        folder: a pipeline in diffusers' layout with safetensors weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        if self.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"{folder}: prediction type {self.scheduler.config.prediction_type!r} is not supported")

    @property
    def num_train_timesteps(self) -> int:
        return self.scheduler.config.num_train_timesteps

    def load_denoiser(self) -> UNet2DConditionModel:
        """A fresh UNet in float32."""
        return UNet2DConditionModel.from_pretrained(
            self.folder, subfolder="unet", use_safetensors=True, dtype=torch.float32
        )

    def load_vae(self) -> AutoencoderKL:
        """The frozen autoencoder in float32."""
        vae = AutoencoderKL.from_pretrained(self.folder, subfolder="vae", use_safetensors=True, dtype=torch.float32)
        return vae.eval().requires_grad_(False)

    def load_text(self) -> tuple[CLIPTokenizer, CLIPTextModel]:
        """Tokenizer and frozen text encoder in float32."""
        encoder = CLIPTextModel.from_pretrained(
            self.folder, subfolder="text_encoder", use_safetensors=True, dtype=torch.float32
        )
        tokenizer = CLIPTokenizer.from_pretrained(self.folder, subfolder="tokenizer")
        return tokenizer, encoder.eval().requires_grad_(False)

    @property
    def image_size(self) -> int:
        """Side in pixels of the square images the model was trained on."""
        unet = json.loads((self.folder / "unet" / "config.json").read_text())
        vae = json.loads((self.folder / "vae" / "config.json").read_text())
        return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)

    @torch.no_grad()
    def encode_images(self, vae: AutoencoderKL, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled posterior, each (B, C, H/f, W/f).

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1].
        """
        posterior = vae.encode(pixel_values).latent_dist
        scale = vae.config.scaling_factor
        return posterior.mean * scale, posterior.std * scale

    @torch.no_grad()
    def encode_prompts(self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel, prompts: list[str]) -> dict[str, Tensor]:
        """Conditioning of the UNet, `encoder_hidden_states` (B, L, D); longer prompts are truncated."""
        tokens = tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        )
        return {"encoder_hidden_states": encoder(tokens.input_ids.to(encoder.device))[0]}

    def draw_timesteps(self, rng: np.random.Generator, size: int) -> Tensor:
        """Uniform timesteps, (size,) int64 in [0, num_train_timesteps)."""
        return torch.from_numpy(rng.integers(0, self.num_train_timesteps, size))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (paper 3.1), shape of `latents`."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet should predict: the noise, or the velocity for v prediction."""
        if self.scheduler.config.prediction_type == "epsilon":
            return noise
        return self.scheduler.get_velocity(latents, noise, timesteps)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Mapping) -> Tensor:
        """One pass of a UNet, shape of `noisy_latents`."""
        return denoiser(noisy_latents, timesteps, **conditioning).sample

    def write_pipeline(self, denoiser: UNet2DConditionModel, folder: Path) -> None:
        """Save a whole pipeline with this UNet, to be loaded by plain diffusers."""
        tokenizer, text_encoder = self.load_text()
        StableDiffusionPipeline(
            vae=self.load_vae(),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=denoiser,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)


MODEL_CLASSES = {"StableDiffusionPipeline": StableDiffusion}


@dataclass
class PolicyAndReference:
    """The trained model and what it is measured against.

    Attributes:
        policy: the module in training; with LoRA it carries the adapter.
        reference: the frozen copy, or None when the adapter switched off is the reference.
    """

    policy: UNet2DConditionModel
    reference: UNet2DConditionModel | None

    @contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        """The reference policy, without gradient, for the length of a `with` block."""
        with torch.no_grad():
            if self.reference is not None:
                yield self.reference
                return
            self.policy.disable_adapters()
            try:
                yield self.policy
            finally:
                self.policy.enable_adapters()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training may change, by name."""
        return {name: p for name, p in self.policy.named_parameters() if p.requires_grad}


def make_policy(denoiser: UNet2DConditionModel, lora_rank: int, seed: int) -> PolicyAndReference:
    """Turn a loaded UNet into policy and reference.

    Args:
        denoiser: in float32; becomes the policy.
        lora_rank: 0 trains every weight against a frozen copy; above 0, low-rank adapters on the
            attention projections are trained and the reference is the adapter switched off.
        seed: fixes the adapters' initial values.
    """
    if lora_rank == 0:
        reference = copy.deepcopy(denoiser).eval().requires_grad_(False)
        return PolicyAndReference(denoiser.train().requires_grad_(True), reference)
    denoiser.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser.add_adapter(
            LoraConfig(
                r=lora_rank, lora_alpha=lora_rank, init_lora_weights="gaussian", target_modules=list(LORA_TARGETS)
            )
        )
    return PolicyAndReference(denoiser.train(), None)


def write_weights(pair: PolicyAndReference, folder: Path) -> None:
    """Save what was trained in diffusers' layout: `unet/`, or `pytorch_lora_weights.safetensors`."""
    if pair.reference is not None:
        pair.policy.save_pretrained(folder / "unet", max_shard_size="1TB")
    else:
        layers = get_peft_model_state_dict(pair.policy)
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def read_weights(pair: PolicyAndReference, folder: Path) -> None:
    """Put weights saved by `write_weights` back into a policy made in the same way."""
    if pair.reference is not None:
        pair.policy.load_state_dict(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))
        return
    stored = load_file(folder / "pytorch_lora_weights.safetensors")
    set_peft_model_state_dict(pair.policy, {name.removeprefix("unet."): value for name, value in stored.items()})
