"""PickScore (Kirstain et al. 2023): CLIP ViT-H/14 tuned on Pick-a-Pic's choices."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dkto.evaluation.scorers.clip import CLIP_H14, MODEL_FILES, MODEL_INDEX, tokenizer_folder
from dkto.evaluation.scorers.network import ClipWithTokenizer, NetworkScorer
from dkto.evaluation.scorers.weights import model_about, model_folder


@dataclass(frozen=True)
class PickScore(NetworkScorer):
    """exp(logit_scale) * cosine(picture, prompt), about 20 to 23, as in the authors' README.

    Others report the plain cosine (Diffusion-DPO's utilities) or divide by 26 (flow_grpo): win-rates are the
    same, means are not.

    Attributes:
        model: folder or hub id of the CLIPModel.
        tokenizer: folder or hub id of its tokenizer.
        device: "" for the GPU where there is one.
        name: how tables call it.
    """

    model: str = "yuvalkirstain/PickScore_v1"
    tokenizer: str = CLIP_H14
    device: str = ""
    name: str = "pickscore"

    @property
    def about(self) -> dict[str, str | None]:
        return {**model_about(self.model), "tokenizer": self.tokenizer, "scale": "exp(logit_scale) * cosine"}

    def load(self) -> ClipWithTokenizer:
        folder = model_folder(self.model, self.name, MODEL_FILES, MODEL_INDEX, "3.9 GB")
        return ClipWithTokenizer.from_folder(folder, tokenizer_folder(self.tokenizer, self.name))

    def score_prepared(self, network: ClipWithTokenizer, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        return network.model.logit_scale.exp() * network.cosine(pixel_values, prompts)
