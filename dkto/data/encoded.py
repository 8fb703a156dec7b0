"""What `dkto.data.encode` wrote: an index in memory, latents and embeddings mapped from disk row by row."""

import json
import os
import zlib
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dkto.common.files import file_sha256, read_json, refuse_other_than_file
from dkto.common.frames import read_frame
from dkto.common.names import printable, shown
from dkto.common.tensors import weight_files, weights_fingerprint
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
    """The record of what a folder was prepared from, checked."""
    path, counts = folder / "prepared.json", ("rows", "shard_rows", "prompts", "prompt_shard_rows")
    about = read_json(path, "record of prepared feedback", ("model", "flip", *counts))
    for name, kind in {"model": str, "flip": bool, **dict.fromkeys(counts, int)}.items():
        if type(about[name]) is not kind or (kind is int and about[name] < 1):
            expected = {str: "text", bool: "true or false", int: "a whole number from 1 on"}[kind]
            raise ValueError(
                f"{path}: {name} must be {expected}, got {shown(about[name])}: prepare into another folder"
            )
    return about


def preparing_model(folder: Path) -> str:
    """The model that a folder was prepared with: "small-world", a hub id, or where a pipeline lay.

    Raises:
        FileNotFoundError: if the folder was never prepared.
        ValueError: if its record does not say so.
    """
    if not (folder / "prepared.json").is_file():
        raise FileNotFoundError(f"{folder} holds no prepared feedback (prepared.json is missing): run prepare")
    if not isinstance(source := read_about(folder).get("source"), str) or not source:
        raise ValueError(f"{folder / 'prepared.json'}: source must name a model, got {shown(source)}: give the model")
    return source


def shard_numbers(about: dict, kind: str) -> range:
    """Numbers of the shards of a set, those of the images being "latents"."""
    rows, per_shard = ("rows", "shard_rows") if kind == "latents" else ("prompts", "prompt_shard_rows")
    return range(-(-about[rows] // about[per_shard]))


def rows_of_shard(about: dict, kind: str, number: int) -> int:
    """How many rows a shard holds; the last one of a set may hold fewer."""
    rows, per_shard = ("rows", "shard_rows") if kind == "latents" else ("prompts", "prompt_shard_rows")
    return min(about[per_shard], about[rows] - number * about[per_shard])


def row_checksum(row: Tensor) -> int:
    """Of one row of a shard, with its type and shape: it shows what a damaged disk changes."""
    content = row.contiguous().view(torch.uint8).numpy().tobytes()  # numpy knows no bfloat16
    return zlib.crc32(content, zlib.crc32(f"{row.dtype} {tuple(row.shape)}".encode()))


def shard_notes(path: Path, shard: safe_open) -> dict:
    """What was written about the rows of a shard."""
    try:
        notes = json.loads((shard.metadata() or {}).get("notes", "{}"))
        if not isinstance(notes, dict):
            raise ValueError(f"expected an object, got {shown(notes)}")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} has notes that cannot be read ({printable(error, 200)}): run prepare again"
        ) from error
    return notes


def open_shard(path: Path, rows: int) -> safe_open:
    """A shard of so many rows, mapped from disk.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is cut, empty or damaged, or of other rows; the sentence names the file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run prepare again")
    refuse_other_than_file(path, "shard")
    try:
        shard = safe_open(path, framework="pt")
        lengths = {shard.get_slice(name).get_shape()[0] for name in shard.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, IndexError) as error:
        raise ValueError(
            f"{path} cannot be read ({printable(error, 200)}): run prepare again, which makes it again"
        ) from error
    if lengths != {rows}:
        raise ValueError(
            f"{path} should hold {rows} rows, got {shown(lengths)}: run prepare again, which makes it again"
        )
    return shard


def model_fingerprint(model: DiffusionModel) -> str:
    """Hash over the VAE's and the text encoders' weights: the parts that prepared data depend on."""
    folders = sorted(p for p in model.folder.iterdir() if p.name == "vae" or p.name.startswith("text_encoder"))
    return weights_fingerprint([path for folder in folders for path in weight_files(folder)])


class PreparedFeedback:
    """A prepared folder. Starting reads two columns and a list of files; a row is read when it is asked for.

    Attributes:
        is_desirable: (N,) bool, True where the image was liked.
        prompt_ids: (N,) int, row of each image's prompt in `prompts.parquet`.
        weights: (N,) float32, how much each row counts in a method that weighs its samples; None for all alike.
        has_flips: whether the mirrored images were encoded as well.

    Raises:
        FileNotFoundError: if the folder was never prepared, or not to the end.
        ValueError: if it was prepared with another model's VAE or text encoder, or one of its files is damaged; the
            sentence names it.
    """

    def __init__(self, folder: str | Path, model: DiffusionModel) -> None:
        self.folder, self._model = Path(folder), model
        if not (self.folder / "prepared.json").is_file():
            raise FileNotFoundError(f"{self.folder} holds no prepared feedback (prepared.json is missing): run prepare")
        self._about = read_about(self.folder)
        if self._about["model"] != (mine := model_fingerprint(model)):
            source = self._about.get("source")
            raise ValueError(
                f"{self.folder} was prepared with the VAE and text encoder {shown(self._about['model'])}"
                f"{f' of {shown(source)}' if source else ''}, but {model.folder} has {mine}: leave the model out, or "
                "prepare again with this one"
            )
        there = set(os.listdir(self.folder))
        kinds = ("latents", "prompts")
        needed = (shard_path(self.folder, kind, n).name for kind in kinds for n in shard_numbers(self._about, kind))
        missing = next((name for name in chain(needed, ("index.parquet", "pairs.npy")) if name not in there), None)
        if missing:
            raise FileNotFoundError(f"{self.folder} is not complete ({missing} is missing): run prepare again")
        self.is_desirable, self.prompt_ids, self._slots, *more = self._index()  # slots: where rows lie in the shards
        self.weights: np.ndarray | None = more[0].astype(np.float32) if more else None
        self.has_flips: bool = self._about["flip"]
        self._open: dict[tuple[str, int], safe_open] = {}
        self._checks: dict[tuple[str, int], dict | None] = {}

    def _index(self) -> list[np.ndarray]:
        path, bounds = self.folder / "index.parquet", {"prompt_id": "prompts", "row": "rows"}
        try:
            kinds = {"is_desirable": "boolean", **dict.fromkeys(bounds, "integer"), "weight": "floating"}
            index, self._index_about = read_frame(path, "index", kinds, ("weight",))
            found = [index[name].to_numpy() for name in index]
            if "weight" in index and not (np.isfinite(index["weight"]) & (index["weight"] >= 0)).all():
                raise ValueError(f"{path}: weight must be a finite number from 0 on")
            for values, (name, limit) in zip(found[1:], bounds.items(), strict=False):
                if len(values) and not 0 <= values.min() <= values.max() < self._about[limit]:
                    raise ValueError(f"{path}: {name} must be in [0, {self._about[limit]})")
            if (np.diff(found[2]) <= 0).any():
                raise ValueError(f"{path}: row must increase")
            self._check_count(path, "kept", len(index), "rows")
            self._check_count(path, "desirable", int(found[0].sum()), "likes")
        except ValueError as error:
            raise ValueError(f"{error}: run prepare again") from error
        return found

    def _check_count(self, path: Path, name: str, count: int, what: str) -> None:
        """Refuse what another program shortened or changed; a folder without its summary is taken as it is."""
        summary = self.folder / "summary.json"
        if summary.exists() and (expected := read_json(summary, "summary of prepared feedback", [name])[name]) != count:
            raise ValueError(f"{path} must hold {shown(expected)} {what} as summary.json says, got {count}")

    def __len__(self) -> int:
        return len(self.is_desirable)

    @cached_property
    def pairs(self) -> np.ndarray:
        """(P, 2) int64, rows of the chosen and the rejected image of each comparison; mapped from disk."""
        path = self.folder / "pairs.npy"
        try:
            refuse_other_than_file(path, "table of pairs")  # a pipe would be waited for
            pairs = np.load(path, mmap_mode="r", allow_pickle=False)
            if pairs.dtype != np.int64 or pairs.shape[1:] != (2,):
                raise ValueError(f"expected int64 of shape (pairs, 2), got {pairs.dtype} of {pairs.shape}")
            if self._index_about.get("pairs", told := file_sha256(path)) != told:
                raise ValueError("they are not those that were written with index.parquet")
            if len(pairs) and not 0 <= pairs.min() <= pairs.max() < len(self):
                raise ValueError(f"they name rows outside [0, {len(self)})")
            self._check_count(path, "pairs", len(pairs), "pairs")
        except Exception as error:  # numpy raises whatever the bytes lead it to
            raise ValueError(
                f"{path} holds no pairs that can be read ({printable(error, 200)}): run prepare again"
            ) from error
        return pairs

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
        mean, std = (torch.stack([self._row(place, prefix + n) for place, prefix in places]) for n in ("mean", "std"))
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
            raise FileNotFoundError(f"{error}{f' with csft={csft!r}' if csft else ''}") from None
        names = self._model.prompt_tensors
        found = {name: torch.stack([self._row(place, name) for place in places]).float() for name in names}
        if hasattr(self._model, "image_conditioning"):
            found |= self._model.image_conditioning(self.sizes(rows))
        return found

    def sizes(self, rows: np.ndarray) -> Tensor:
        """(B, 4) int32: height and width of the original image, top and left of the crop after resizing, in pixels."""
        return torch.stack([self._row(place, "sizes") for place in self._images(rows)])

    def _images(self, rows: np.ndarray) -> list[tuple[tuple[str, int], int]]:
        return [self._place("latents", int(slot), "shard_rows") for slot in self._slots[rows]]

    def _place(self, kind: str, row: int, per_shard: str) -> tuple[tuple[str, int], int]:
        """The shard that holds a row, which is mapped then, and the row's number in it."""
        number, offset = divmod(row, self._about[per_shard])
        if (kind, number) not in self._open:
            rows = rows_of_shard(self._about, kind, number)
            path = shard_path(self.folder, kind, number)
            shard = open_shard(path, rows)
            self._checks[kind, number] = shard_notes(path, shard).get("checks")
            self._open[kind, number] = shard
        return (kind, number), offset

    def _row(self, place: tuple[tuple[str, int], int], name: str) -> Tensor:
        shard, offset = place
        try:
            row = self._open[shard].get_slice(name)[offset]
            if (checks := self._checks[shard]) is not None and checks[name][offset] != row_checksum(row):
                raise ValueError("its checksum is another")
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            path = shard_path(self.folder, *shard)
            text = f"{path}, row {offset + 1}: {name} cannot be read ({error})"
            raise ValueError(f"{text}: remove that file and run prepare again") from error
        return row
