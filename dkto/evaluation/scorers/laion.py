"""LAION aesthetics (Schuhmann 2022): a head on CLIP ViT-L/14's picture embedding; the prompt plays no part."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from dkto.evaluation.scorers.clip import CLIP_L14, clip_folder
from dkto.evaluation.scorers.network import ClipWithTokenizer, NetworkScorer, aesthetics_head
from dkto.evaluation.scorers.weights import converted_about, fill, model_about, read_converted


class AestheticsPredictor(nn.Module):
    """CLIP and the head on its picture embedding.

    Args:
        clip: OpenAI's ViT-L/14, or a smaller one.
    """

    def __init__(self, clip: ClipWithTokenizer) -> None:
        super().__init__()
        self.clip, self.side = clip, clip.side
        self.layers = aesthetics_head(clip.model.config.projection_dim)


@dataclass(frozen=True)
class LaionAesthetics(NetworkScorer):
    """Head(picture embedding of unit length), about 1 to 10; the paper's aesthetic user likes 7 and above (section 6).

    Attributes:
        weights: converted safetensors file of the head, or "" for its place in the weights folder.
        clip: folder or hub id of CLIP ViT-L/14.
        device: "" for the GPU where there is one.
        name: how tables call it.
    """

    weights: str = ""
    clip: str = CLIP_L14
    device: str = ""
    name: str = "laion_aesthetics"

    @property
    def about(self) -> dict[str, str | None]:
        return {
            **converted_about("laion_aesthetics", self.weights),
            "clip": self.clip,
            "clip_weights": model_about(self.clip)["weights"],
            "scale": "head(unit embedding)",
        }

    def load(self) -> AestheticsPredictor:
        head = read_converted("laion_aesthetics", self.weights)
        folder = clip_folder(self.clip, self.name)
        network = AestheticsPredictor(ClipWithTokenizer.from_folder(folder, folder))
        state = {name.removeprefix("layers."): value for name, value in head.items()}
        fill(network.layers, state, self.weights or self.name)
        return network.eval()

    def score_prepared(self, network: AestheticsPredictor, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        return network.layers(network.clip.embed_images(pixel_values))[:, 0]
