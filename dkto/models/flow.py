"""Rectified flows: a transformer predicts the velocity from image to noise. Stable Diffusion 3, and the common part."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from dkto.common.files import read_json
from dkto.models.base import T5_TOKENS, DiffusionModel, Level, PipelineText


class Flow(DiffusionModel):
    """x_t = (1 - s) x_0 + s noise, s = t / num_train_timesteps.

    Noise levels follow the scheduler's static shift, as in the training of the model:
    s = shift u / (1 + (shift - 1) u) for u uniform or logit-normal in (0, 1). A shift that grows with the image
    belongs to drawing: such a model is trained without, as by diffusers' scripts.
    """

    denoiser_part = "transformer"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.scheduler = self.load_scheduler(diffusers.FlowMatchEulerDiscreteScheduler)

    @property
    def num_train_timesteps(self) -> int:
        return self.scheduler.config.num_train_timesteps

    @property
    def shift(self) -> float:
        """The schedule's static shift; 1 where the pipeline takes one that grows with the image."""
        config = self.scheduler.config
        return 1.0 if config.use_dynamic_shifting else config.shift

    def load_text(self, device: str = "cpu") -> tuple[tuple, PipelineText]:
        pipeline = self.load_pipeline(device, transformer=None, vae=None)
        # Stable Diffusion 3 without T5 pads with zeros and asks the transformer, which is not loaded, for their width
        config = read_json(self.folder / "transformer" / "config.json", "configuration of a transformer")
        object.__setattr__(pipeline, "transformer", SimpleNamespace(config=SimpleNamespace(**config)))
        encoder = PipelineText(pipeline)
        return encoder.tokenizers, encoder

    def timesteps_at(self, quantiles: Tensor) -> Tensor:
        """Timesteps of the shifted schedule, (B,) float32."""
        shifted = self.shift * quantiles / (1 + (self.shift - 1) * quantiles)
        return (shifted * self.num_train_timesteps).float()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = (1 - s) x_0 + s noise, shape of `latents`."""
        s = (timesteps / self.num_train_timesteps).to(latents.dtype).reshape(-1, *[1] * (latents.ndim - 1))
        return (1 - s) * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity, noise - x_0."""
        return noise - latents

    def clean_and_noise(self, output: Tensor, noisy_latents: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """From the velocity v: x_0 = x_t - s v and noise = x_t + (1 - s) v."""
        return noisy_latents - level.spread * output, noisy_latents + level.signal * output

    def sampler_levels(self, count: int) -> Iterator[tuple[float, Level, Level]]:
        """Those of Euler's steps, with the static shift of `timesteps_at`."""
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(
            self.scheduler.config, use_dynamic_shifting=False, shift=self.shift
        )
        scheduler.set_timesteps(count)
        levels = [Level(1 - s, s) for s in scheduler.sigmas.tolist()]
        yield from zip(scheduler.timesteps.tolist(), levels, levels[1:], strict=False)


class StableDiffusion3(Flow):
    """Stable Diffusion 3 and 3.5."""

    pipeline_name = "StableDiffusion3Pipeline"
    denoiser_name = "SD3Transformer2DModel"
    default_sampling = "logit_normal"
    prompt_tensors = ("encoder_hidden_states", "pooled_projections")
    prompt_tokens = T5_TOKENS
    family = "sd3"

    @torch.no_grad()
    def encode_prompts(self, tokenizers: tuple, encoder: PipelineText, prompts: list[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (B, L, D) of all encoders and `pooled_projections` (B, D2) of the first two."""
        embeds, _, pooled, _ = encoder.pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    @classmethod
    def call_options(
        cls, pipeline: "diffusers.DiffusionPipeline", guidance: float, negative: list[str]
    ) -> dict[str, Any]:
        return super().call_options(pipeline, guidance, negative) | {"max_sequence_length": T5_TOKENS}

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Mapping) -> Tensor:
        return denoiser(hidden_states=noisy_latents, timestep=timesteps, **conditioning).sample
