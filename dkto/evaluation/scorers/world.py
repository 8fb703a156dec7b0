"""The small world's own scorers: exact rules on pixels, and two small networks trained on its images.

The networks' weights ship with the package (`dkto/world/scorers/README.md` is their card); `python -m dkto.workshop
preference` makes them. They are for 64 x 64 images of the small world and are neither CLIP nor PickScore.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dkto.common.files import read_json
from dkto.common.pixels import to_rgb
from dkto.evaluation.scorers.network import ClipScorer, ClipWithTokenizer
from dkto.evaluation.scorers.weights import check_sha256
from dkto.world.craft import CRAFT_VERSION, craft
from dkto.world.tastes import blueness, cleanness, darkness, no_pink, no_white_rim
from dkto.world.truth import RULES_VERSION, aesthetics, judge, redness

CRAFTED = f"craft {CRAFT_VERSION}"  # version of what reads an image as `dkto.world.craft` does
WORLD_FOLDER = Path(__file__).parents[2] / "world" / "scorers"


def world_fidelity(images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
    """Share of what the prompt asks that the image shows, in [0, 1] (see `dkto.world.truth`)."""
    return np.array([judge(_pixels(i), p)["fidelity"] for i, p in zip(images, prompts, strict=True)])


def world_aesthetics(images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
    """Vividness, contrast and sharpness by a stated rule, in [0, 1]; the prompts play no part."""
    return np.array([aesthetics(_pixels(image)) for image in images])


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(to_rgb(image))


def aesthetics_pixels(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """`world_aesthetics` of (B, 3, H, W) in [0, 1], with gradient; returns (B,)."""
    red, green, blue = (pixels * 255).unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    across, along = red - 0.5 * (green + blue), 3**0.5 / 2 * (green - blue)
    chroma = (across.square() + along.square()).clamp(min=1e-6).sqrt()
    low, high = torch.quantile(luma.flatten(1), luma.new_tensor([0.02, 0.98]), dim=1)
    steps = torch.maximum(luma.diff(dim=1).abs()[:, :, :-1], luma.diff(dim=2).abs()[:, :-1])
    vivid, sharp = torch.quantile(chroma.flatten(1), 0.95, dim=1), torch.quantile(steps.flatten(1), 0.98, dim=1)
    return torch.stack([vivid / 150, (high - low) / 130, sharp / 60]).clamp(max=1).mean(0)


def world_redness(images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
    """Mean of red minus the mean of green and blue, in [-1, 1]; the prompts play no part."""
    return np.array([redness(_pixels(image)) for image in images])


def redness_pixels(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """`world_redness` of (B, 3, H, W) in [0, 1], with gradient; returns (B,)."""
    red, green, blue = pixels.mean((2, 3)).unbind(1)
    return red - (green + blue) / 2


def world_craft(images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
    """Nearness to the ideal image of the prompt, in (0, 1] (see `dkto.world.craft`); continuous, without a ceiling."""
    return np.array([craft(_pixels(i), p) for i, p in zip(images, prompts, strict=True)])


def world_utility(images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
    """Fidelity times craft, in [0, 1]: how well an image is made counts only where the prompt is followed."""
    return world_fidelity(images, prompts) * world_craft(images, prompts)


def world_utility_1(images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
    """Fidelity times aesthetics, in [0, 1]: `world_utility` of dkto 0.1, which ties often and can be hacked."""
    return world_fidelity(images, prompts) * world_aesthetics(images, prompts)


@dataclass(frozen=True)
class TasteScorer:
    """A measure of `dkto.world.tastes`, more is better."""

    name: str
    measure: Callable[[np.ndarray, str], float]
    version: str = CRAFTED

    @property
    def about(self) -> dict[str, str]:
        return {"rule": self.name, "version": self.version}

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        return np.array([self.measure(_pixels(i), p) for i, p in zip(images, prompts, strict=True)])


_TASTES = (
    TasteScorer("world_clean", cleanness),
    TasteScorer("world_no_white_rim", no_white_rim),
    TasteScorer("world_no_pink", no_pink),
    TasteScorer("world_dark", darkness),
    TasteScorer("world_blue", blueness, f"{CRAFTED}, blueness 2"),
)
_VERSIONS = dict.fromkeys((world_fidelity, world_aesthetics, world_redness, world_utility_1), RULES_VERSION)
_VERSIONS |= dict.fromkeys((world_craft, world_utility), CRAFTED)
for _rule, _version in _VERSIONS.items():
    _rule.about = {"rule": _rule.__name__, "version": _version}  # by it stored scores are known again
WORLD_SCORERS = {rule.__name__: rule for rule in _VERSIONS} | {taste.name: taste for taste in _TASTES}
world_aesthetics.score_pixels, world_redness.score_pixels = aesthetics_pixels, redness_pixels


@dataclass(frozen=True)
class WorldCLIP(ClipScorer):
    """Cosine of image and prompt by the small CLIP, in [-1, 1].

    Attributes:
        folder: holds the networks, their tokenizer and card.json.
        name: `world_<part>` of the folder.
    """

    folder: str = str(WORLD_FOLDER)
    device: str = ""
    name: str = "world_clip"

    @property
    def about(self) -> dict[str, str]:
        return {"sha256": self._sha256(), "scale": self.scale}

    def load(self) -> ClipWithTokenizer:
        folder = Path(self.folder) / self.name.removeprefix("world_")
        check_sha256(folder / "model.safetensors", self._sha256())
        return ClipWithTokenizer.from_folder(folder, Path(self.folder) / "tokenizer")

    def _sha256(self) -> str:
        card = Path(self.folder) / "card.json"
        if not card.is_file():
            raise FileNotFoundError(
                f"scorer {self.name} needs its weights in {self.folder}: make them with `python -m dkto.workshop "
                f"preference --folder runs/scorers --output {self.folder}`"
            )
        return read_json(card, "card of weights", ["sha256"])["sha256"][self.name.removeprefix("world_")]


@dataclass(frozen=True)
class WorldPreference(WorldCLIP):
    """exp(logit_scale) * cosine by the small preference model: what simulated people choose by, noise taken away."""

    name: str = "world_preference"
    scaled: ClassVar[bool] = True
