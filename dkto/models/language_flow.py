"""Flows that read a prompt by a language model: Qwen-Image, Z-Image, FLUX.2 klein. None was run at full size here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from dkto.common.files import read_json
from dkto.models.base import PipelineText
from dkto.models.flow import Flow

TEXT_TOKENS = 512  # the pipelines' own default: tokens of a prompt in its template
SIDE = 128  # latents to a side, as the pipelines draw, where the transformer's configuration has no sample_size
MASK = "encoder_hidden_states_mask"  # (B, TEXT_TOKENS), 1 for a prompt's tokens and 0 for what fills up


class LanguageFlow(Flow):
    """What the three share: prompts of 512 tokens by a large encoder, kept in its bfloat16, and images of any size."""

    default_sampling = "uniform"  # as diffusers' scripts
    prompt_dtype = torch.bfloat16  # layers within a language model have values beyond float16's
    prompts_at_once = 4
    led_by = ("negative_prompt",)
    template: ClassVar[int]  # tokens that the pipeline's template takes of TEXT_TOKENS

    def __init_subclass__(cls) -> None:
        cls.prompt_tokens = TEXT_TOKENS - cls.template

    @property
    def image_size(self) -> int:
        """Side in pixels: 1024, unless the transformer's configuration has a `sample_size`."""
        config = read_json(self.folder / "transformer" / "config.json", "configuration of a transformer")
        return config.get("sample_size", SIDE) * self.latent_pixels

    @property
    def latent_pixels(self) -> int:
        """Pixels to the side of a latent."""
        vae = read_json(self.folder / "vae" / "config.json", "configuration of a VAE", ["block_out_channels"])
        return 2 ** (len(vae["block_out_channels"]) - 1)

    @classmethod
    def call_options(
        cls, pipeline: "diffusers.DiffusionPipeline", guidance: float, negative: list[str]
    ) -> dict[str, Any]:
        side = pipeline.transformer.config.get("sample_size", SIDE) * pipeline.vae_scale_factor
        return {"height": side, "width": side, "guidance_scale": guidance, "max_sequence_length": TEXT_TOKENS}


class QwenImage(LanguageFlow):
    """Qwen-Image: Qwen2.5-VL reads the prompt, and a VAE of videos encodes an image as one frame."""

    pipeline_name = "QwenImagePipeline"
    denoiser_name = "QwenImageTransformer2DModel"
    vae_name = "AutoencoderKLQwenImage"
    prompt_tensors = ("encoder_hidden_states", MASK)
    family = "qwen-image"
    template = 5  # its first 34 tokens are dropped

    @property
    def latent_pixels(self) -> int:
        vae = read_json(self.folder / "vae" / "config.json", "configuration of a VAE", ["temperal_downsample"])
        return 2 ** len(vae["temperal_downsample"])

    @torch.no_grad()
    def encode_prompts(self, tokenizers: tuple, encoder: PipelineText, prompts: list[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (B, 512, D), filled up with zeros, and their mask."""
        embeds, mask = encoder.pipeline.encode_prompt(prompts, max_sequence_length=TEXT_TOKENS)
        mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask.float()
        rest = TEXT_TOKENS - embeds.shape[1]
        return {"encoder_hidden_states": F.pad(embeds, (0, 0, 0, rest)), MASK: F.pad(mask, (0, rest))}

    @torch.no_grad()
    def encode_images(self, vae: nn.Module, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, each channel by its own mean and scale; (B, C, h, w)."""
        posterior = vae.encode(pixel_values.unsqueeze(2)).latent_dist
        mean, std = (
            torch.tensor(values, device=pixel_values.device).reshape(-1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (posterior.mean[:, :, 0] - mean) / std, posterior.std[:, :, 0] / std

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Mapping) -> Tensor:
        patches = F.pixel_unshuffle(noisy_latents, 2)
        shapes = [[(1, *patches.shape[2:])]] * len(patches)
        tokens = patches.flatten(2).transpose(1, 2)
        found = denoiser(hidden_states=tokens, timestep=timesteps / 1000, img_shapes=shapes, **conditioning).sample
        return F.pixel_shuffle(found.transpose(1, 2).unflatten(2, patches.shape[2:]), 2)

    @classmethod
    def call_options(
        cls, pipeline: "diffusers.DiffusionPipeline", guidance: float, negative: list[str]
    ) -> dict[str, Any]:
        options = super().call_options(pipeline, guidance, negative)
        scale = options.pop("guidance_scale")  # which is for distilled models there
        return options | {"true_cfg_scale": scale, "negative_prompt": negative if scale > 1 else None}


class ZImage(LanguageFlow):
    """Z-Image: Qwen3 reads the prompt; time runs from noise to image, and so does the predicted velocity."""

    pipeline_name = "ZImagePipeline"
    denoiser_name = "ZImageTransformer2DModel"
    prompt_tensors = ("encoder_hidden_states", MASK)
    family = "z-image"
    template = 8

    @torch.no_grad()
    def encode_prompts(self, tokenizers: tuple, encoder: PipelineText, prompts: list[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (B, 512, D), filled up with zeros, and their mask."""
        # the pipeline writes its template into the list
        texts, _ = encoder.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
        )
        masks = [torch.ones(len(text), device=text.device) for text in texts]
        embeds, mask = (pad_sequence(each, batch_first=True) for each in (texts, masks))
        rest = TEXT_TOKENS - embeds.shape[1]
        return {"encoder_hidden_states": F.pad(embeds, (0, 0, 0, rest)), MASK: F.pad(mask, (0, rest))}

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Mapping) -> Tensor:
        """Of prompts as long as the mask says, or of all their tokens without one."""
        texts = conditioning["encoder_hidden_states"].unbind()
        if MASK in conditioning:
            lengths = conditioning[MASK].sum(1).int().tolist()
            texts = [text[:length] for text, length in zip(texts, lengths, strict=True)]
        images = list(noisy_latents.unsqueeze(2).unbind())
        found = denoiser(images, (1000 - timesteps) / 1000, list(texts), return_dict=False)[0]
        return -torch.stack(found).squeeze(2)

    @classmethod
    def call_options(
        cls, pipeline: "diffusers.DiffusionPipeline", guidance: float, negative: list[str]
    ) -> dict[str, Any]:
        options = super().call_options(pipeline, guidance, negative)
        return options | {"guidance_scale": guidance - 1, "negative_prompt": negative}  # 0 is off there


class Flux2Klein(LanguageFlow):
    """FLUX.2 klein, as it was before its distillation: Qwen3 reads the prompt, of whom three layers are taken."""

    pipeline_name = "Flux2KleinPipeline"
    denoiser_name = "Flux2Transformer2DModel"
    vae_name = "AutoencoderKLFlux2"
    prompt_tensors = ("encoder_hidden_states",)
    family = "flux2-klein"
    led_by = ()
    template = 12

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if read_json(folder / "model_index.json", "index of a pipeline").get("is_distilled"):
            raise ValueError(
                f"{folder} is distilled (is_distilled in model_index.json) and is not supported: expected the model "
                "that it was distilled from, as 'black-forest-labs/FLUX.2-klein-base-4B'"
            )

    @torch.no_grad()
    def encode_prompts(self, tokenizers: tuple, encoder: PipelineText, prompts: list[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (B, 512, 3 D); what fills up is read too, as the pipeline does."""
        return {"encoder_hidden_states": encoder.pipeline.encode_prompt(prompts, max_sequence_length=TEXT_TOKENS)[0]}

    @torch.no_grad()
    def encode_images(self, vae: nn.Module, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior in patches, by the VAE's own statistics; (B, 4 C, h, w)."""
        posterior = vae.encode(pixel_values).latent_dist
        mean, std = F.pixel_unshuffle(posterior.mean, 2), F.pixel_unshuffle(posterior.std, 2)
        scale = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().reshape(-1, 1, 1)
        return (mean - vae.bn.running_mean.reshape(-1, 1, 1)) / scale, std / scale

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Mapping) -> Tensor:
        text = conditioning["encoder_hidden_states"]
        sizes = {"img_ids": (1, *noisy_latents.shape[2:], 1), "txt_ids": (1, 1, 1, text.shape[1])}
        ids = {
            name: torch.cartesian_prod(*(torch.arange(size, device=text.device) for size in each))
            for name, each in sizes.items()
        }
        tokens = noisy_latents.flatten(2).transpose(1, 2)
        found = denoiser(hidden_states=tokens, timestep=timesteps / 1000, encoder_hidden_states=text, **ids).sample
        return found.transpose(1, 2).unflatten(2, noisy_latents.shape[2:])
