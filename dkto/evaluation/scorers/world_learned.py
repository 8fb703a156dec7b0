"""The small world's learned scorers: a small CLIP, and a preference model in PickScore's recipe.

Their weights ship with the package (`dkto/world/scorers/README.md` is their card); `python -m dkto.workshop
preference` makes them. They are for 64 x 64 pictures of the small world and are neither CLIP nor PickScore.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dkto.common.files import read_json
from dkto.evaluation.scorers.network import ClipWithTokenizer, NetworkScorer
from dkto.evaluation.scorers.weights import check_sha256

WORLD_FOLDER = Path(__file__).parents[2] / "world" / "scorers"


@dataclass(frozen=True)
class WorldCLIP(NetworkScorer):
    """Cosine of picture and prompt by the small CLIP, in [-1, 1].

    Attributes:
        folder: holds the networks, their tokenizer and card.json.
        device: "" for the GPU where there is one.
        name: how tables call it; `world_<part>` of the folder.
    """

    folder: str = str(WORLD_FOLDER)
    device: str = ""
    name: str = "world_clip"

    @property
    def about(self) -> dict[str, str]:
        return {"sha256": self._sha256(), "scale": "cosine"}

    def load(self) -> ClipWithTokenizer:
        folder = Path(self.folder) / self.name.removeprefix("world_")
        check_sha256(folder / "model.safetensors", self._sha256())
        return ClipWithTokenizer.from_folder(folder, Path(self.folder) / "tokenizer")

    def score_prepared(self, network: ClipWithTokenizer, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        return network.cosine(pixel_values, prompts)

    def _sha256(self) -> str:
        card = Path(self.folder) / "card.json"
        if not card.is_file():
            raise FileNotFoundError(
                f"scorer {self.name} needs its weights in {self.folder}: make them with `python -m dkto.world "
                f"preference --folder runs/scorers --output {self.folder}`"
            )
        return read_json(card, "card of weights", ["sha256"])["sha256"][self.name.removeprefix("world_")]


@dataclass(frozen=True)
class WorldPreference(WorldCLIP):
    """exp(logit_scale) * cosine by the small preference model: what simulated people choose by, noise taken away."""

    name: str = "world_preference"

    @property
    def about(self) -> dict[str, str]:
        return {**super().about, "scale": "exp(logit_scale) * cosine"}

    def score_prepared(self, network: ClipWithTokenizer, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        return network.model.logit_scale.exp() * network.cosine(pixel_values, prompts)
