"""CLIP score: the cosine of picture and prompt. The name says which CLIP: values of different ones do not compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dkto.evaluation.scorers.network import ClipWithTokenizer, NetworkScorer
from dkto.evaluation.scorers.open_clip import load_vit_h_14
from dkto.evaluation.scorers.weights import converted_about, model_about, model_folder

CLIP_H14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_L14 = "openai/clip-vit-large-patch14"
MODEL_FILES = ("config.json", "model*.safetensors")
MODEL_INDEX = ("model.safetensors.index.json",)
TOKENIZER_FILES = ("tokenizer*.json",)
OLDER_TOKENIZER = ("vocab.json", "merges.txt", "special_tokens_map.json")


@dataclass(frozen=True)
class CLIPScore(NetworkScorer):
    """Cosine of a CLIP model's picture and prompt embeddings, in [-1, 1].

    Diffusion-DPO's utilities use ViT-H/14 trained on LAION-2B (`clip_h14`); many others OpenAI's ViT-L/14
    (`clip_l14`); some multiply by 100 or 2.5. The paper does not say which it used.

    Attributes:
        name: how tables call it.
        model: folder or hub id of a CLIPModel in safetensors with its tokenizer.
        device: "" for the GPU where there is one.
        weights: for ViT-H/14, the converted safetensors file of open_clip's release
            (`python -m dkto.evaluation.scorers convert clip_h14`), the tokenizer still from `model`; "" takes the
            CLIPModel.

    Raises:
        ValueError: if weights are given for another CLIP.
    """

    name: str = "clip_h14"
    model: str = CLIP_H14
    device: str = ""
    weights: str = ""

    def __post_init__(self):
        if self.weights and self.name != CLIPScore.name:
            raise ValueError(
                f"weights are the converted file of {CLIPScore.name}, got scorer {self.name!r}: give model instead"
            )

    @property
    def about(self) -> dict[str, str | None]:
        told = converted_about(self.name, self.weights) if self.weights else model_about(self.model)
        return {**told, "scale": "cosine"}

    def load(self) -> ClipWithTokenizer:
        if self.weights:
            return load_vit_h_14(self.name, self.weights, tokenizer_folder(self.model, self.name))
        folder = clip_folder(self.model, self.name)
        return ClipWithTokenizer.from_folder(folder, folder)

    def score_prepared(self, network: ClipWithTokenizer, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        return network.cosine(pixel_values, prompts)


def clip_folder(model: str, scorer: str) -> Path:
    """The folder of a CLIP model with its tokenizer."""
    sizes = {CLIP_H14: "3.9 GB", CLIP_L14: "1.7 GB"}
    files, optional = (*MODEL_FILES, *TOKENIZER_FILES), (*MODEL_INDEX, *OLDER_TOKENIZER)
    return model_folder(model, scorer, files, optional, sizes.get(model, ""))


def tokenizer_folder(source: str, scorer: str) -> Path:
    """The folder of a CLIP tokenizer."""
    return model_folder(source, scorer, TOKENIZER_FILES, OLDER_TOKENIZER, "2 MB")
