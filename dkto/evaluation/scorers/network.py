"""What scorers that are networks share: loaded at the first call, images in batches, a differentiable way."""

import json
from collections.abc import Sequence
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dkto.common.tensors import weights_variant
from dkto.evaluation.scorers.preprocess import cropped_image, cropped_pixels

KEEP_LOADED = 2  # networks that stay in memory
BATCH_SIZE = 16  # images per pass


class NetworkScorer:
    """A scorer whose values come from a network; sub-classes are frozen dataclasses, so that they travel to workers.

    A sub-class gives `name` (how tables call it), `weights_about`, `load`, `score_prepared`, and in `scale` what the
    values are; `device` is "" for the GPU where there is one, else for the CPU.
    """

    name: str
    device: str
    scale: str

    @property
    def about(self) -> dict[str, str | bool | None]:
        """What the values depend on: settings, hashes of weights (None where they are not at hand), scale."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        told = {**settings, **self.weights_about(), "scale": self.scale}
        return {key: value for key, value in told.items() if key not in ("name", "device")}

    def weights_about(self) -> dict[str, str | None]:
        """Which weights they are, and their hashes."""
        raise NotImplementedError

    def load(self) -> nn.Module:
        """The network with its weights, frozen, in float32 on the CPU; its attribute `side` is the input size."""
        raise NotImplementedError

    def prepare_image(self, image: Image.Image, side: int) -> Tensor:
        """(3, side, side) as the authors prepare an image."""
        return cropped_image(image, side)

    def prepare_pixels(self, pixels: Tensor, side: int) -> Tensor:
        """The same of (B, 3, H, W) in [0, 1], with gradient."""
        return cropped_pixels(pixels, side)

    def score_prepared(self, network: nn.Module, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) scores of prepared images."""
        raise NotImplementedError

    def network(self) -> nn.Module:
        """The network on its device, loaded again if its weights on disk have changed."""
        return _load(self, json.dumps(self.about, sort_keys=True))

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """(N,) scores of images, prepared exactly as the authors do."""
        network = self.network()
        device, found = next(network.parameters()).device, []
        for start in range(0, len(images), BATCH_SIZE):
            prepared = [self.prepare_image(image, network.side) for image in images[start : start + BATCH_SIZE]]
            asked = prompts[start : start + BATCH_SIZE]
            with torch.inference_mode():
                values = self.score_prepared(network, torch.stack(prepared).to(device), asked)
            found.append(values.float().cpu().numpy())
        return np.concatenate(found) if found else np.zeros(0)

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores with gradient with respect to the images (AlignProp, paper 5.1.2, needs it).

        Args:
            pixels: (B, 3, H, W) float in [0, 1].
            prompts: B prompts.

        Returns:
            (B,) float; equal to the scores of the images up to the rounding of images to bytes
            (see `dkto.evaluation.scorers.preprocess`).
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or len(pixels) != len(prompts):
            raise ValueError(
                f"pixels must have shape ({len(prompts)}, 3, H, W), one image per prompt, got {tuple(pixels.shape)}"
            )
        network = self.network()
        pixels = pixels.to(next(network.parameters()).device)
        return self.score_prepared(network, self.prepare_pixels(pixels, network.side), prompts)


@lru_cache(maxsize=KEEP_LOADED)
def _load(scorer: NetworkScorer, about: str) -> nn.Module:
    """`about` is there for the cache: a folder whose weights were trained again holds another network."""
    return scorer.load().to(scorer.device or ("cuda" if torch.cuda.is_available() else "cpu"))


class ClipWithTokenizer(nn.Module):
    """transformers' CLIPModel and its CLIPTokenizer: embeddings of unit length."""

    def __init__(self, model: nn.Module, tokenizer) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.side: int = model.config.vision_config.image_size
        self.context: int = model.config.text_config.max_position_embeddings

    @classmethod
    def from_folder(cls, folder: Path, tokenizer_folder: Path) -> "ClipWithTokenizer":
        """From transformers' layout, safetensors only; weights that lack a parameter are refused, not made up."""
        from dkto.common.quiet_transformers import transformers

        options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
        options["variant"] = weights_variant(folder)
        model, told = transformers.CLIPModel.from_pretrained(folder, **options)
        if missing := sorted(told["missing_keys"]):
            raise ValueError(
                f"the weights in {folder} lack {len(missing)} parameters of a CLIPModel, the first {missing[0]!r}: "
                "expected transformers' names"
            )
        return cls(model.eval().requires_grad_(False), transformers.CLIPTokenizer.from_pretrained(tokenizer_folder))

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """(B, D) of unit length."""
        return _unit(self.model.get_image_features(pixel_values=pixel_values))

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """(B, D) of unit length; longer prompts are cut."""
        options = {"padding": True, "truncation": True, "max_length": self.context, "return_tensors": "pt"}
        tokens = self.tokenizer(list(prompts), **options).to(self.model.device)
        return _unit(self.model.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask))

    def cosine(self, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) cosine of each image and its prompt."""
        return (self.embed_images(pixel_values) * self.embed_prompts(prompts)).sum(-1)


class ClipScorer(NetworkScorer):
    """A scorer whose values are the cosine of image and prompt, or exp(logit_scale) times it where `scaled`."""

    scaled: ClassVar[bool] = False

    @property
    def scale(self) -> str:
        """What the values are."""
        return "exp(logit_scale) * cosine" if self.scaled else "cosine"

    def score_prepared(self, network: ClipWithTokenizer, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        cosine = network.cosine(pixel_values, prompts)
        return network.model.logit_scale.exp() * cosine if self.scaled else cosine


def _unit(output) -> Tensor:
    """transformers 5 wraps projected features in an output object; older versions return them bare."""
    features = getattr(output, "pooler_output", output)
    return features / features.norm(dim=-1, keepdim=True)


def aesthetics_head(width: int) -> nn.Sequential:
    """width-1024-128-64-16-1 without activations, as the LAION aesthetics predictor and ImageReward publish it."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
