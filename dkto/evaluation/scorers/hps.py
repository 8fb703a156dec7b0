"""HPS v2 and v2.1 (Wu et al. 2023): open_clip's ViT-H-14 tuned on human choices, on transformers' CLIPModel."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import ftfy
from PIL import Image
from torch import Tensor

from dkto.evaluation.scorers.clip import CLIP_H14, tokenizer_folder
from dkto.evaluation.scorers.network import ClipWithTokenizer, NetworkScorer
from dkto.evaluation.scorers.open_clip import load_vit_h_14
from dkto.evaluation.scorers.preprocess import padded_pixels, to_pixels
from dkto.evaluation.scorers.weights import converted_about


@dataclass(frozen=True)
class HPS(NetworkScorer):
    """cosine(picture, prompt), about 0.25 to 0.29; the authors' leaderboard multiplies by 100.

    The picture's longer side becomes 224 and the rest is black: nothing is cropped. Prompts are cleaned as open_clip
    does it: text mended by ftfy, HTML entities resolved twice. The authors compute in half precision, this in
    float32. The paper says "HPS v2"; `hpsv2.score` means v2.0 and `hpsv2.evaluate` v2.1.

    Attributes:
        name: hps_v2 or hps_v2_1; which weights are read.
        weights: converted safetensors file, or "" for its place in the weights folder.
        tokenizer: folder or hub id of CLIP's tokenizer.
        device: "" for the GPU where there is one.
        antialias: the authors leave it to torchvision, which smooths tensors that it shrinks since 0.17 (True); with
            an older one, as was current when HPS v2 appeared, it did not (False).
    """

    name: str = "hps_v2"
    weights: str = ""
    tokenizer: str = CLIP_H14
    device: str = ""
    antialias: bool = True

    @property
    def about(self) -> dict[str, str | bool | None]:
        return {
            **converted_about(self.name, self.weights),
            "tokenizer": self.tokenizer,
            "antialias": self.antialias,
            "scale": "cosine",
        }

    def load(self) -> ClipWithTokenizer:
        return load_vit_h_14(self.name, self.weights, tokenizer_folder(self.tokenizer, self.name))

    def prepare_image(self, image: Image.Image, side: int) -> Tensor:
        return self.prepare_pixels(to_pixels(image)[None], side)[0]

    def prepare_pixels(self, pixels: Tensor, side: int) -> Tensor:
        return padded_pixels(pixels, side, antialias=self.antialias)

    def score_prepared(self, network: ClipWithTokenizer, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        return network.cosine(pixel_values, [clean_prompt(prompt) for prompt in prompts])


def clean_prompt(prompt: str) -> str:
    """A prompt as open_clip's tokenizer sees it before it lowers the case.

    >>> clean_prompt("  Tom &amp;amp; Jerry\u2019s house ")
    "Tom & Jerry's house"
    """
    return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
