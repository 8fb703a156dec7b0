"""What `dkto.data.encode` wrote: an index in memory, latents and embeddings mapped from disk row by row."""

import os
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from torch import Tensor

from dkto.common.files import read_json
from dkto.common.tensors import weights_fingerprint
from dkto.models import DiffusionModel
from dkto.objective.methods import CSFT_PREFIXES


def shard_path(folder: Path, kind: str, number: int) -> Path:
    """File of one shard of a set: "latents", "prompts" or a set named by `csft_set`."""
    return folder / f"{kind}-{number:05d}.safetensors"


def csft_set(style: str, liked: bool) -> str:
    """Set of prompts for liked or disliked images in a style of `CSFT_PREFIXES`.

    >>> csft_set("prefix", True), csft_set("negative", True)
    ('csft-prefix-liked', 'prompts')
    """
    prefix = CSFT_PREFIXES[style][0 if liked else 1]
    return f"csft-{style}-{'liked' if liked else 'disliked'}" if prefix else "prompts"


PROMPT_SETS = {csft_set(style, liked): CSFT_PREFIXES[style][not liked] for style in CSFT_PREFIXES for liked in (1, 0)}
PROMPT_SETS["prompts"] = ""
"""What is written before the prompts of each set: nothing, or the like."""


def read_about(folder: Path) -> dict:
    """The record of what a folder was prepared from."""
    keys = ("model", "flip", "rows", "shard_rows", "prompts", "prompt_shard_rows")
    return read_json(folder / "prepared.json", "record of prepared feedback", keys)


def shard_numbers(about: dict, kind: str) -> range:
    """Numbers of the shards of a set, those of the images being "latents"."""
    rows, per_shard = ("rows", "shard_rows") if kind == "latents" else ("prompts", "prompt_shard_rows")
    return range(-(-about[rows] // about[per_shard]))


def model_fingerprint(model: DiffusionModel) -> str:
    """Hash over the VAE's and the text encoders' weights: the parts that prepared data depend on."""
    folders = sorted(p for p in model.folder.iterdir() if p.name == "vae" or p.name.startswith("text_encoder"))
    found = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    return weights_fingerprint([path for path in found if ".fp16." not in path.name])


class PreparedFeedback:
    """A prepared folder. Starting reads two columns and a list of files; a row is read when it is asked for.

    Attributes:
        is_desirable: (N,) bool, True where the image was liked.
        prompt_ids: (N,) int, row of each image's prompt in `prompts.parquet`.
        has_flips: whether the mirrored images were encoded as well.

    Raises:
        FileNotFoundError: if the folder was never prepared, or not to the end.
        ValueError: if it was prepared with another model's VAE or text encoder.
    """

    def __init__(self, folder: str | Path, model: DiffusionModel) -> None:
        self.folder, self._model = Path(folder), model
        if not (self.folder / "prepared.json").is_file():
            raise FileNotFoundError(f"{self.folder} holds no prepared feedback (prepared.json is missing): run prepare")
        self._about = read_about(self.folder)
        if self._about["model"] != (mine := model_fingerprint(model)):
            raise ValueError(
                f"{self.folder} was prepared with the VAE and text encoder {self._about['model']}, "
                f"but {model.folder} has {mine}: prepare again with this model"
            )
        there = set(os.listdir(self.folder))
        kinds = ("latents", "prompts")
        needed = [shard_path(self.folder, kind, n).name for kind in kinds for n in shard_numbers(self._about, kind)]
        missing = next((name for name in (*needed, "index.parquet", "pairs.npy") if name not in there), None)
        if missing:
            raise FileNotFoundError(f"{self.folder} is not complete ({missing} is missing): run prepare again")
        index = pq.read_table(self.folder / "index.parquet")
        self.is_desirable = index["is_desirable"].to_numpy()
        self.prompt_ids = index["prompt_id"].to_numpy()
        self._slots = index["row"].to_numpy()  # where each row lies in the shards
        self.has_flips: bool = self._about["flip"]
        self._open: dict[tuple[str, int], safe_open] = {}

    def __len__(self) -> int:
        return len(self.is_desirable)

    @cached_property
    def pairs(self) -> np.ndarray:
        """(P, 2) int64, rows of the chosen and the rejected image of each comparison; mapped from disk."""
        return np.load(self.folder / "pairs.npy", mmap_mode="r", allow_pickle=False)

    def latents(self, rows: np.ndarray, flipped: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation of some rows, each (B, C, h, w) float32.

        Args:
            rows: (B,) int.
            flipped: (B,) bool, rows whose mirrored image is wanted; they must have been prepared.
        """
        prefixes = [""] * len(rows)
        if flipped is not None and np.any(flipped):
            if not self.has_flips:
                raise ValueError(f"{self.folder} holds no mirrored images: prepare it with flip=True")
            prefixes = ["flipped_" if flip else "" for flip in flipped]
        places = list(zip(self._images(rows), prefixes, strict=True))
        mean, std = (torch.stack([_row(place, prefix + n) for place, prefix in places]) for n in ("mean", "std"))
        return mean.float(), std.float()

    def conditioning(
        self, rows: np.ndarray, dropped: np.ndarray | None = None, *, csft: str | None = None
    ) -> dict[str, Tensor]:
        """What the denoiser gets for some rows, each tensor with first dimension B.

        Per prompt: all that the model's `encode_prompts` gives. Per image, if the model has the method
        `image_conditioning`: what it makes of (B, 4) int32, height and width of the original image, top and left of
        the crop (SDXL's time ids).

        Args:
            rows: (B,) int.
            dropped: (B,) bool, rows that get the empty prompt instead.
            csft: style of `CSFT_PREFIXES`: the like is written into the prompt, which must have been prepared.
        """
        dropped = np.zeros(len(rows), bool) if dropped is None else np.asarray(dropped)
        sets = ["prompts"] * len(rows)
        if csft is not None:
            liked = self.is_desirable[rows]
            sets = ["prompts" if d else csft_set(csft, like) for d, like in zip(dropped, liked, strict=True)]
        ids = np.where(dropped, 0, self.prompt_ids[rows])
        try:
            places = [self._place(name, int(i), "prompt_shard_rows") for name, i in zip(sets, ids, strict=True)]
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}: run prepare again with csft={csft!r}") from None
        names = places[0][0].keys()
        found = {name: torch.stack([_row(place, name) for place in places]).float() for name in names}
        if hasattr(self._model, "image_conditioning"):
            found |= self._model.image_conditioning(self.sizes(rows))
        return found

    def sizes(self, rows: np.ndarray) -> Tensor:
        """(B, 4) int32: height and width of the original image, top and left of the crop after resizing, in pixels."""
        return torch.stack([_row(place, "sizes") for place in self._images(rows)])

    def _images(self, rows: np.ndarray) -> list[tuple[safe_open, int]]:
        return [self._place("latents", int(slot), "shard_rows") for slot in self._slots[rows]]

    def _place(self, kind: str, row: int, per_shard: str) -> tuple[safe_open, int]:
        """The mapped shard that holds a row, and the row's number in it."""
        number, offset = divmod(row, self._about[per_shard])
        if (kind, number) not in self._open:
            path = shard_path(self.folder, kind, number)
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing")
            self._open[kind, number] = safe_open(path, framework="pt")
        return self._open[kind, number], offset


def _row(place: tuple[safe_open, int], name: str) -> Tensor:
    shard, offset = place
    return shard.get_slice(name)[offset]
