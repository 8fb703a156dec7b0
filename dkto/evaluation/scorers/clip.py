"""Published scorers on CLIP: the cosine itself, PickScore, HPS v2 and v2.1, and the LAION aesthetics head."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import ftfy
from PIL import Image
from torch import Tensor, nn

from dkto.evaluation.scorers.network import ClipScorer, ClipWithTokenizer, NetworkScorer, aesthetics_head
from dkto.evaluation.scorers.open_clip import load_vit_h_14
from dkto.evaluation.scorers.preprocess import cropped_image, cropped_pixels, padded_pixels, to_pixels
from dkto.evaluation.scorers.weights import converted_about, fill, model_about, model_folder, read_converted

CLIP_H14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_L14 = "openai/clip-vit-large-patch14"
MODEL_FILES = ("config.json", "model*.safetensors")
MODEL_INDEX = ("model.safetensors.index.json",)
TOKENIZER_FILES = ("tokenizer*.json",)
OLDER_TOKENIZER = ("vocab.json", "merges.txt", "special_tokens_map.json")


def clip_folder(model: str, scorer: str) -> Path:
    """The folder of a CLIP model with its tokenizer."""
    sizes = {CLIP_H14: "3.9 GB", CLIP_L14: "1.7 GB"}
    files, optional = (*MODEL_FILES, *TOKENIZER_FILES), (*MODEL_INDEX, *OLDER_TOKENIZER)
    return model_folder(model, scorer, files, optional, sizes.get(model, ""))


def tokenizer_folder(source: str, scorer: str) -> Path:
    """The folder of a CLIP tokenizer."""
    return model_folder(source, scorer, TOKENIZER_FILES, OLDER_TOKENIZER, "2 MB")


@dataclass(frozen=True)
class CLIPScore(ClipScorer):
    """Cosine of a CLIP model's image and prompt embeddings, in [-1, 1]; values of different CLIPs do not compare.

    ViT-H/14 trained on LAION-2B is `clip_h14`, OpenAI's ViT-L/14 `clip_l14`; some multiply by 100 or 2.5. The paper
    does not say which it used. Images and prompts are prepared as transformers does or, for open_clip's own file, as
    open_clip does: prompts cleaned, the crop rounded. Diffusion-DPO's utilities take ViT-H/14 too, but pad the image
    instead of cropping it.

    Attributes:
        model: folder or hub id of a CLIPModel in safetensors with its tokenizer.
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

    def weights_about(self) -> dict[str, str | None]:
        if not self.weights:
            return model_about(self.model)
        return converted_about(self.name, self.weights) | {"prepared": "as open_clip"}

    def prepare_image(self, image: Image.Image, side: int) -> Tensor:
        return cropped_image(image, side, rounded=bool(self.weights))

    def prepare_pixels(self, pixels: Tensor, side: int) -> Tensor:
        return cropped_pixels(pixels, side, rounded=bool(self.weights))

    def score_prepared(self, network: ClipWithTokenizer, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        read = [clean_prompt(prompt) for prompt in prompts] if self.weights else prompts
        return super().score_prepared(network, pixel_values, read)

    def load(self) -> ClipWithTokenizer:
        if self.weights:
            return load_vit_h_14(self.name, self.weights, tokenizer_folder(self.model, self.name))
        folder = clip_folder(self.model, self.name)
        return ClipWithTokenizer.from_folder(folder, folder)


@dataclass(frozen=True)
class PickScore(ClipScorer):
    """PickScore (Kirstain et al. 2023): exp(logit_scale) * cosine of a CLIP ViT-H/14 tuned on Pick-a-Pic's choices.

    About 20 to 23, as in the authors' README. Others report the plain cosine (Diffusion-DPO's utilities) or divide by
    26 (flow_grpo): win-rates are the same, means are not.

    Attributes:
        model, tokenizer: folders or hub ids of the CLIPModel and of its tokenizer.
    """

    model: str = "yuvalkirstain/PickScore_v1"
    tokenizer: str = CLIP_H14
    device: str = ""
    name: str = "pickscore"
    scaled: ClassVar[bool] = True

    def weights_about(self) -> dict[str, str | None]:
        return model_about(self.model)

    def load(self) -> ClipWithTokenizer:
        folder = model_folder(self.model, self.name, MODEL_FILES, MODEL_INDEX, "3.9 GB")
        return ClipWithTokenizer.from_folder(folder, tokenizer_folder(self.tokenizer, self.name))


@dataclass(frozen=True)
class HPS(ClipScorer):
    """HPS v2 and v2.1 (Wu et al. 2023): the cosine of open_clip's ViT-H-14 tuned on human choices, about 0.25 to 0.29.

    The authors' leaderboard multiplies by 100. The image's longer side becomes 224 and the rest is black: nothing is
    cropped. Prompts are cleaned as open_clip does it: text mended by ftfy, HTML entities resolved twice. The authors
    compute in half precision, this in float32. The paper says "HPS v2"; `hpsv2.score` means v2.0 and `hpsv2.evaluate`
    v2.1.

    Attributes:
        name: hps_v2 or hps_v2_1; which weights are read.
        weights: converted safetensors file, or "" for its place in the weights folder.
        tokenizer: folder or hub id of CLIP's tokenizer.
        antialias: the authors leave it to torchvision, which smooths tensors that it shrinks since 0.17 (True); with
            an older one, as was current when HPS v2 appeared, it did not (False).
    """

    name: str = "hps_v2"
    weights: str = ""
    tokenizer: str = CLIP_H14
    device: str = ""
    antialias: bool = True

    def weights_about(self) -> dict[str, str | None]:
        return converted_about(self.name, self.weights)

    def load(self) -> ClipWithTokenizer:
        return load_vit_h_14(self.name, self.weights, tokenizer_folder(self.tokenizer, self.name))

    def prepare_image(self, image: Image.Image, side: int) -> Tensor:
        return self.prepare_pixels(to_pixels(image)[None], side)[0]

    def prepare_pixels(self, pixels: Tensor, side: int) -> Tensor:
        return padded_pixels(pixels, side, antialias=self.antialias)

    def score_prepared(self, network: ClipWithTokenizer, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        return super().score_prepared(network, pixel_values, [clean_prompt(prompt) for prompt in prompts])


def clean_prompt(prompt: str) -> str:
    """A prompt as open_clip's tokenizer sees it before it lowers the case.

    >>> clean_prompt("  Tom &amp;amp; Jerry\u2019s house ")
    "Tom & Jerry's house"
    """
    return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()


class AestheticsPredictor(nn.Module):
    """OpenAI's ViT-L/14, or a smaller CLIP, and the head on its image embedding."""

    def __init__(self, clip: ClipWithTokenizer) -> None:
        super().__init__()
        self.clip, self.side = clip, clip.side
        self.layers = aesthetics_head(clip.model.config.projection_dim)


@dataclass(frozen=True)
class LaionAesthetics(NetworkScorer):
    """LAION aesthetics (Schuhmann 2022): a head on CLIP ViT-L/14's image embedding of unit length, about 1 to 10.

    The prompt plays no part. The paper's aesthetic user likes 7 and above (section 6).

    Attributes:
        weights: converted safetensors file of the head, or "" for its place in the weights folder.
        clip: folder or hub id of CLIP ViT-L/14.
    """

    weights: str = ""
    clip: str = CLIP_L14
    device: str = ""
    name: str = "laion_aesthetics"
    scale: ClassVar[str] = "head(unit embedding)"

    def weights_about(self) -> dict[str, str | None]:
        head = converted_about("laion_aesthetics", self.weights)
        return {**head, "clip_weights": model_about(self.clip)["weights"]}

    def load(self) -> AestheticsPredictor:
        head = read_converted("laion_aesthetics", self.weights)
        folder = clip_folder(self.clip, self.name)
        network = AestheticsPredictor(ClipWithTokenizer.from_folder(folder, folder))
        state = {name.removeprefix("layers."): value for name, value in head.items()}
        fill(network.layers, state, self.weights or self.name)
        return network.eval()

    def score_prepared(self, network: AestheticsPredictor, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        return network.layers(network.clip.embed_images(pixel_values))[:, 0]
