"""Images and prompts to latents and embeddings on disk, once, so that no VAE or text encoder trains.

    prepared/
      prepared.json            what it was made from: model, sizes, hash of the feedback
      feedback.parquet         image, prompt, is_desirable, pair_id, prompt_id
      prompts.safetensors      the distinct prompts' conditioning, one row each; row 0 is the empty prompt
      prompts-csft-prefix.safetensors  on demand: as "good image, ..." (first half), as "bad image, ..." (second half)
      latents-00000.safetensors  posterior `mean` and `std` of up to SHARD_ROWS images, float16

Each file is written whole or not at all; a second call does only what is missing.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dkto.feedback import FeedbackTable, load_image
from dkto.models import DiffusionModel, load_model
from dkto.progress import progress
from dkto.records import claim

SHARD_ROWS = 512
# what CSFT writes before the prompt of a liked and of a disliked image: the paper's 5.1.2; HPS v1's released code
CSFT_PREFIXES = {"prefix": ("good image, ", "bad image, "), "negative": ("", "Weird image. ")}


def to_pixel_values(image: Image.Image, size: int) -> Tensor:
    """Resize the shorter side to `size`, crop the centre, scale to [-1, 1]; (3, size, size)."""
    scale = size / min(image.size)
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a neighbour of `path`, then rename it: `path` is whole or absent."""
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


def model_fingerprint(model: DiffusionModel) -> str:
    """Hash of the VAE's and the text encoders' weights: the parts that prepared data depend on."""
    digest = hashlib.sha256()
    for part in model.encoder_parts:
        for path in sorted((model.folder / part).glob("*.safetensors")):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def prepare_feedback(
    feedback: FeedbackTable,
    output_dir: str | Path,
    model: str = "small-world",
    *,
    batch_size: int = 16,
    csft: str | None = None,
) -> Path:
    """Encode the images and prompts of a feedback table with a model's VAE and text encoder.

    Args:
        feedback: see `dkto.feedback.read_feedback`.
        output_dir: folder for the encoded data; completed shards in it are kept.
        model: "small-world", a diffusers pipeline folder or a hub id.
        batch_size: images per pass of the VAE.
        csft: also encode the prompts for the objective "csft", in a style of `CSFT_PREFIXES`; may be asked
            for later as well.

    Returns:
        `output_dir`.

    Raises:
        ValueError: if an image cannot be read (the sentence names it), or the folder holds the
            encoding of other feedback or of another model.
    """
    if csft is not None and csft not in CSFT_PREFIXES:
        raise ValueError(f"csft must be one of {', '.join(CSFT_PREFIXES)}, got {csft!r}")
    loaded, output_dir = load_model(model), Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    about = {
        "model": model_fingerprint(loaded),
        "image_size": loaded.image_size,
        "rows": len(feedback),
        "feedback": _feedback_hash(feedback),
    }
    claim(output_dir / "prepared.json", about, "encoded feedback")
    prompts = list(dict.fromkeys(["", *feedback.prompts]))
    number = {prompt: index for index, prompt in enumerate(prompts)}
    frame = feedback.to_frame().assign(prompt_id=[number[p] for p in feedback.prompts])
    write_atomically(output_dir / "feedback.parquet", lambda path: frame.to_parquet(path, index=False))
    if not (output_dir / "prompts.safetensors").exists():
        conditioning = _encode_prompts(loaded, prompts)
        write_atomically(output_dir / "prompts.safetensors", lambda path: save_file(conditioning, path))
    if csft is not None and not _csft_path(output_dir, csft).exists():
        prefixed = _encode_prompts(loaded, [prefix + prompt for prefix in CSFT_PREFIXES[csft] for prompt in prompts])
        write_atomically(_csft_path(output_dir, csft), lambda path: save_file(prefixed, path))
    starts = [s for s in range(0, len(feedback), SHARD_ROWS) if not _shard_path(output_dir, s).exists()]
    vae = loaded.load_vae() if starts else None
    for start in progress(starts, desc="encoding images", unit="shard"):
        images = feedback.images[start : start + SHARD_ROWS]
        shard = _encode_images(loaded, vae, images, batch_size)
        write_atomically(_shard_path(output_dir, start), lambda path, shard=shard: save_file(shard, path))
    return output_dir


class PreparedFeedback:
    """Read access to a prepared folder; latents stay on disk and are mapped row by row.

    Raises:
        FileNotFoundError: if the folder was never prepared, or not to the end.
        ValueError: if it was prepared with another model's VAE or text encoder.
    """

    def __init__(self, folder: str | Path, model: DiffusionModel) -> None:
        self.folder = Path(folder)
        if not (self.folder / "prepared.json").is_file():
            raise FileNotFoundError(f"{self.folder} holds no prepared feedback (prepared.json is missing): run prepare")
        about = json.loads((self.folder / "prepared.json").read_text())
        if about["model"] != (mine := model_fingerprint(model)):
            raise ValueError(
                f"{self.folder} was prepared with the VAE and text encoder {about['model']}, "
                f"but {model.folder} has {mine}: prepare again with this model"
            )
        missing = [
            p.name for s in range(0, about["rows"], SHARD_ROWS) if not (p := _shard_path(self.folder, s)).exists()
        ]
        if missing:
            raise FileNotFoundError(f"{self.folder} is not complete ({missing[0]} is missing): run prepare again")
        frame = pd.read_parquet(self.folder / "feedback.parquet", columns=["is_desirable", "prompt_id", "pair_id"])
        self.is_desirable = frame["is_desirable"].to_numpy(bool)
        self.prompt_ids = frame["prompt_id"].to_numpy(np.int64)
        self.pairs = _pair_rows(frame["pair_id"].to_numpy(np.int64), self.is_desirable)
        self._csft: dict[str, dict[str, Tensor]] = {}
        self._conditioning = load_file(self.folder / "prompts.safetensors")
        self._shards: dict[int, safe_open] = {}

    def __len__(self) -> int:
        return len(self.is_desirable)

    def latents(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation of some rows, each (B, C, h, w) float32."""
        pairs = [self._row(int(row)) for row in rows]
        mean, std = (torch.stack(parts).float() for parts in zip(*pairs, strict=True))
        return mean, std

    def conditioning(
        self, rows: np.ndarray, dropped: np.ndarray | None = None, *, csft: str | None = None
    ) -> dict[str, Tensor]:
        """The prompts' conditioning of some rows, first dimension B.

        Args:
            rows: (B,) row numbers.
            dropped: (B,) bool, rows that get the empty prompt instead.
            csft: style of `CSFT_PREFIXES`: the like is written into the prompt.

        Raises:
            FileNotFoundError: if the prefixed prompts were not prepared.
        """
        dropped = np.zeros(len(rows), bool) if dropped is None else dropped
        ids = np.where(dropped, 0, self.prompt_ids[rows])
        if csft is None:
            return {name: values[torch.from_numpy(ids)].float() for name, values in self._conditioning.items()}
        if csft not in self._csft:
            if not (path := _csft_path(self.folder, csft)).exists():
                raise FileNotFoundError(f"{path} is missing: run prepare again with csft={csft!r}")
            self._csft[csft] = load_file(path)
        where, plain = torch.from_numpy(dropped), torch.from_numpy(ids)
        found = {}
        for name, values in self._csft[csft].items():
            prefixed = torch.from_numpy(np.where(self.is_desirable[rows], ids, ids + len(values) // 2))
            chosen = values[prefixed].float()
            chosen[where] = self._conditioning[name][plain[where]].float()
            found[name] = chosen
        return found

    def _row(self, row: int) -> tuple[Tensor, Tensor]:
        number, offset = divmod(row, SHARD_ROWS)
        if number not in self._shards:
            self._shards[number] = safe_open(_shard_path(self.folder, number * SHARD_ROWS), framework="pt")
        shard = self._shards[number]
        return shard.get_slice("mean")[offset], shard.get_slice("std")[offset]


def _shard_path(folder: Path, start: int) -> Path:
    return folder / f"latents-{start // SHARD_ROWS:05d}.safetensors"


def _csft_path(folder: Path, style: str) -> Path:
    return folder / f"prompts-csft-{style}.safetensors"


def _pair_rows(pair_ids: np.ndarray, is_desirable: np.ndarray) -> np.ndarray:
    """(P, 2) rows (chosen, rejected) of the pairs with one liked and one disliked side."""
    sides = pd.DataFrame({"pair_id": pair_ids, "row": np.arange(len(pair_ids))})[pair_ids >= 0]
    liked = is_desirable[pair_ids >= 0]
    return sides[liked].merge(sides[~liked], on="pair_id")[["row_x", "row_y"]].to_numpy(np.int64)


def _feedback_hash(feedback: FeedbackTable) -> str:
    digest = hashlib.sha256(feedback.is_desirable.tobytes())
    for image, prompt in zip(feedback.images, feedback.prompts, strict=True):
        digest.update(f"{image.name}\0{image.stat().st_size}\0{prompt}\0".encode())
    return digest.hexdigest()[:16]


def _encode_prompts(model: DiffusionModel, prompts: list[str]) -> dict[str, Tensor]:
    tokenizer, encoder = model.load_text()
    parts = [model.encode_prompts(tokenizer, encoder, prompts[i : i + 64]) for i in range(0, len(prompts), 64)]
    return {name: torch.cat([part[name] for part in parts]).half().contiguous() for name in parts[0]}


def _encode_images(model: DiffusionModel, vae, images: tuple[Path, ...], batch_size: int) -> dict[str, Tensor]:
    parts = []
    for start in range(0, len(images), batch_size):
        batch = [to_pixel_values(load_image(path), model.image_size) for path in images[start : start + batch_size]]
        parts.append(model.encode_images(vae, torch.stack(batch)))
    means, stds = zip(*parts, strict=True)
    return {"mean": torch.cat(means).half().contiguous(), "std": torch.cat(stds).half().contiguous()}
