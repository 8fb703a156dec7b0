"""Images and prompts to latents and embeddings on disk, once, so that no VAE or text encoder trains.

    prepared/
      prepared.json            what it was made from: model, sizes, hash of the feedback
      feedback.parquet         image, prompt, is_desirable, pair_id, prompt_id
      prompts.safetensors      the distinct prompts' conditioning, one row each; row 0 is the empty prompt
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
from dkto.models import StableDiffusion, load_model
from dkto.progress import progress
from dkto.records import claim

SHARD_ROWS = 512


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


def model_fingerprint(model: StableDiffusion) -> str:
    """Hash of the VAE's and the text encoder's weights: the parts that prepared data depend on."""
    digest = hashlib.sha256()
    for part in ("vae", "text_encoder"):
        for path in sorted((model.folder / part).glob("*.safetensors")):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def prepare_feedback(
    feedback: FeedbackTable, output_dir: str | Path, model: str = "small-world", *, batch_size: int = 16
) -> Path:
    """Encode the images and prompts of a feedback table with a model's VAE and text encoder.

    Args:
        feedback: see `dkto.feedback.read_feedback`.
        output_dir: folder for the encoded data; completed shards in it are kept.
        model: "small-world", a diffusers pipeline folder or a hub id.
        batch_size: images per pass of the VAE.

    Returns:
        `output_dir`.

    Raises:
        ValueError: if an image cannot be read (the sentence names it), or the folder holds the
            encoding of other feedback or of another model.
    """
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

    def __init__(self, folder: str | Path, model: StableDiffusion) -> None:
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
        frame = pd.read_parquet(self.folder / "feedback.parquet", columns=["is_desirable", "prompt_id"])
        self.is_desirable = frame["is_desirable"].to_numpy(bool)
        self.prompt_ids = frame["prompt_id"].to_numpy(np.int64)
        self._conditioning = load_file(self.folder / "prompts.safetensors")
        self._shards: dict[int, safe_open] = {}

    def __len__(self) -> int:
        return len(self.is_desirable)

    def latents(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation of some rows, each (B, C, h, w) float32."""
        pairs = [self._row(int(row)) for row in rows]
        mean, std = (torch.stack(parts).float() for parts in zip(*pairs, strict=True))
        return mean, std

    def conditioning(self, rows: np.ndarray) -> dict[str, Tensor]:
        """The prompts' conditioning of some rows, first dimension B."""
        ids = torch.from_numpy(self.prompt_ids[rows])
        return {name: values[ids].float() for name, values in self._conditioning.items()}

    def _row(self, row: int) -> tuple[Tensor, Tensor]:
        number, offset = divmod(row, SHARD_ROWS)
        if number not in self._shards:
            self._shards[number] = safe_open(_shard_path(self.folder, number * SHARD_ROWS), framework="pt")
        shard = self._shards[number]
        return shard.get_slice("mean")[offset], shard.get_slice("std")[offset]


def _shard_path(folder: Path, start: int) -> Path:
    return folder / f"latents-{start // SHARD_ROWS:05d}.safetensors"


def _feedback_hash(feedback: FeedbackTable) -> str:
    digest = hashlib.sha256(feedback.is_desirable.tobytes())
    for image, prompt in zip(feedback.images, feedback.prompts, strict=True):
        digest.update(f"{image.name}\0{image.stat().st_size}\0{prompt}\0".encode())
    return digest.hexdigest()[:16]


def _encode_prompts(model: StableDiffusion, prompts: list[str]) -> dict[str, Tensor]:
    tokenizer, encoder = model.load_text()
    parts = [model.encode_prompts(tokenizer, encoder, prompts[i : i + 64]) for i in range(0, len(prompts), 64)]
    return {name: torch.cat([part[name] for part in parts]).half().contiguous() for name in parts[0]}


def _encode_images(model: StableDiffusion, vae, images: tuple[Path, ...], batch_size: int) -> dict[str, Tensor]:
    parts = []
    for start in range(0, len(images), batch_size):
        batch = [to_pixel_values(load_image(path), model.image_size) for path in images[start : start + batch_size]]
        parts.append(model.encode_images(vae, torch.stack(batch)))
    means, stds = zip(*parts, strict=True)
    return {"mean": torch.cat(means).half().contiguous(), "std": torch.cat(stds).half().contiguous()}
