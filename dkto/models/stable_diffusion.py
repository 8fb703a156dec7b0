"""Stable Diffusion 1.x, 2.x and XL: a UNet that predicts the noise or the velocity of a variance-preserving process."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from dkto.common.files import read_json
from dkto.models.base import DiffusionModel, Level, PipelineText
from dkto.models.parts import load_part


class StableDiffusion(DiffusionModel):
    """Stable Diffusion 1.x and 2.x (epsilon or v prediction), of any size."""

    pipeline_name = "StableDiffusionPipeline"
    denoiser_name = "UNet2DConditionModel"
    denoiser_part = "unet"
    default_sampling = "uniform"
    prompt_tensors = ("encoder_hidden_states",)
    family = "sd15"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.scheduler = self.load_scheduler(diffusers.DDPMScheduler)
        unet = read_json(folder / "unet" / "config.json", "configuration of a UNet")
        if unet.get("time_cond_proj_dim") is not None:
            raise ValueError(f"{folder} is distilled (its UNet has time_cond_proj_dim) and is not supported")
        if self.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"{folder}: prediction type {self.scheduler.config.prediction_type!r} is not supported")

    @property
    def num_train_timesteps(self) -> int:
        return self.scheduler.config.num_train_timesteps

    def load_text(self, device: str = "cpu") -> "tuple[transformers.CLIPTokenizer, transformers.CLIPTextModel]":
        encoder = load_part(transformers.CLIPTextModel, self.folder / "text_encoder")
        return self.tokenizers()[0], encoder.eval().requires_grad_(False)

    @torch.no_grad()
    def encode_prompts(self, tokenizer: Any, encoder: nn.Module, prompts: list[str]) -> dict[str, Tensor]:
        """Conditioning of the UNet, `encoder_hidden_states` (B, L, D); longer prompts are truncated."""
        tokens = tokenizer(
            prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
        )
        return {"encoder_hidden_states": encoder(tokens.input_ids.to(encoder.device))[0]}

    def timesteps_at(self, quantiles: Tensor) -> Tensor:
        """Whole timesteps, (B,) int64."""
        return (quantiles * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (paper 3.1), shape of `latents`."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet should predict: the noise, or the velocity for v prediction."""
        if self.scheduler.config.prediction_type == "epsilon":
            return noise
        return self.scheduler.get_velocity(latents, noise, timesteps)

    def clean_and_noise(self, output: Tensor, noisy_latents: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """From a noise or a velocity; x_0 is clipped where the schedule says so, as DDIM does."""
        signal, spread = level
        config = self.scheduler.config
        if config.prediction_type == "epsilon":
            clean, noise = (noisy_latents - spread * output) / signal, output
        else:
            clean, noise = signal * noisy_latents - spread * output, signal * output + spread * noisy_latents
        if config.clip_sample:
            clean = clean.clamp(-config.clip_sample_range, config.clip_sample_range)
        return clean, noise

    def sampler_levels(self, count: int) -> Iterator[tuple[float, Level, Level]]:
        """Those of DDIM, with the model's spacing of timesteps."""
        scheduler = diffusers.DDIMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(count)
        gap = self.num_train_timesteps // count
        for t in scheduler.timesteps.tolist():
            after = scheduler.alphas_cumprod[t - gap] if t >= gap else scheduler.final_alpha_cumprod
            levels = (
                Level(abar**0.5, (1 - abar) ** 0.5) for abar in (float(scheduler.alphas_cumprod[t]), float(after))
            )
            yield t, *levels

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Mapping) -> Tensor:
        return denoiser(noisy_latents, timesteps, **conditioning).sample


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL: two text encoders, a pooled embedding, and the image's size as a condition.

    The size condition, `time_ids`, holds height and width of the original image, top and left of the crop, and the
    size that is wanted. Prepared feedback gives each image its own; without one it is what the pipeline
    uses when it draws: an image of the model's own size, not cropped.
    """

    pipeline_name = "StableDiffusionXLPipeline"
    prompt_tensors = ("encoder_hidden_states", "text_embeds")
    family = "sdxl"

    def load_text(self, device: str = "cpu") -> tuple[tuple, PipelineText]:
        encoder = PipelineText(self.load_pipeline(device, unet=None, vae=None))
        return encoder.tokenizers, encoder

    @torch.no_grad()
    def encode_prompts(self, tokenizers: tuple, encoder: PipelineText, prompts: list[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (B, L, D) of both encoders and `text_embeds` (B, D2) of the second.

        The empty prompt becomes zeros if the pipeline draws that way (`force_zeros_for_empty_prompt`).
        """
        embeds, _, pooled, _ = encoder.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        if encoder.pipeline.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([prompt == "" for prompt in prompts], device=embeds.device)
            embeds, pooled = embeds.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def image_conditioning(self, sizes: Tensor) -> dict[str, Tensor]:
        """`time_ids` (B, 6) of images from (B, 4) height and width of the original, top and left of the crop, px."""
        wanted = torch.full_like(sizes[:, :2], self.image_size)
        return {"time_ids": torch.cat([sizes, wanted], 1).float()}

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Mapping) -> Tensor:
        time_ids = conditioning.get("time_ids")
        if time_ids is None:
            own = torch.tensor([[self.image_size, self.image_size, 0, 0]], device=noisy_latents.device)
            time_ids = self.image_conditioning(own)["time_ids"].expand(len(timesteps), -1)
        added = {"text_embeds": conditioning["text_embeds"], "time_ids": time_ids}
        hidden = conditioning["encoder_hidden_states"]
        return denoiser(noisy_latents, timesteps, encoder_hidden_states=hidden, added_cond_kwargs=added).sample
