"""Where the weights of published scorers lie, how they are checked, and how a published pickle becomes safetensors.

Weights are looked for in a folder of that path, then under `$DKTO_WEIGHTS` (by default ~/.cache/dkto/weights), then
fetched from the hub. Every file whose hash is known is checked against it before its first use; what the hub stores
carries its own sha256, in its cache as in a folder that `hf download --local-dir` filled. Three scorers are published
as pickles only; they are converted once, after their hash was compared, and only safetensors are read afterwards:

    python -m dkto.evaluation.scorers convert hps_v2 HPS_v2_compressed.pt --sha256 <from the file's page on the hub>
"""

import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from dkto.common.files import file_sha256, read_json, write_json
from dkto.common.names import SHOWN, printable
from dkto.common.tensors import check_fits, read_tensors, weights_fingerprint, write_tensors

WEIGHTS_VARIABLE = "DKTO_WEIGHTS"


@dataclass(frozen=True)
class PublishedFile:
    """A weights file that its authors publish as a pickle."""

    file: str
    url: str  # the page to download it from
    size: str  # for the message
    sha256: str = ""  # "" where no source for it was found


HUB = "https://huggingface.co"
PUBLISHED_FILES = {
    "hps_v2": PublishedFile("HPS_v2_compressed.pt", f"{HUB}/xswu/HPSv2", "2 GB"),
    "hps_v2_1": PublishedFile("HPS_v2.1_compressed.pt", f"{HUB}/xswu/HPSv2", "2 GB"),
    "clip_h14": PublishedFile("open_clip_pytorch_model.bin", f"{HUB}/laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "3.9 GB"),
    "image_reward": PublishedFile("ImageReward.pt", f"{HUB}/zai-org/ImageReward", "1.8 GB"),
    "laion_aesthetics": PublishedFile(
        "sac+logos+ava1-l14-linearMSE.pth",
        "https://github.com/christophschuhmann/improved-aesthetic-predictor",
        "4 MB",
        sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    ),
}


def weights_folder() -> Path:
    """Where converted and hand-copied weights are kept."""
    return Path(os.environ.get(WEIGHTS_VARIABLE) or Path.home() / ".cache" / "dkto" / "weights")


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file with another hash; it is hashed once for as long as it does not change."""
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    stamp = weights_folder() / "checked" / f"{expected}-{place}.json"
    about = {"path": str(path.resolve()), "bytes": path.stat().st_size, "changed": path.stat().st_mtime_ns}
    with suppress(OSError, ValueError):  # a stamp that is missing or cannot be read: the file is hashed
        if json.loads(stamp.read_text()) == about:
            return
    found = file_sha256(path)
    if found != expected:
        expected = printable(expected, SHOWN)
        raise ValueError(f"{path} is damaged or another file: its sha256 is {found}, expected {expected}")
    with suppress(OSError):  # where no stamp can be kept, the next call hashes again
        stamp.parent.mkdir(parents=True, exist_ok=True)
        write_json(stamp, about)


def model_folder(
    source: str, scorer: str, files: tuple[str, ...], optional: tuple[str, ...] = (), size: str = ""
) -> Path:
    """The folder of a model: a path, a folder of that name under the weights folder, or a hub id (fetched once).

    Args:
        source: path or hub id "owner/name".
        scorer, size: who needs it and the size of the download, for the message.
        files, optional: names and patterns that are needed, and those that some models have too.

    Raises:
        FileNotFoundError: if it is in none of the three, or lacks a file; the sentence says what to download and where
            to put it.
        ValueError: if a file differs from the hash that the hub announced for it.
    """
    wanted = " ".join(f"--include '{pattern}'" for pattern in (*files, *optional))
    advice = f"run `hf download {source} {wanted} --local-dir {weights_folder() / source}`"
    local = _local_folder(source)
    try:
        folder = local or Path(snapshot_download(source, allow_patterns=[*files, *optional]))
    except Exception as error:
        raise FileNotFoundError(
            f"scorer {scorer} needs the model {source!r}{f' ({size})' if size else ''}, which is neither a folder nor "
            f"a hub id that can be reached ({type(error).__name__}): with network call it once, or {advice}"
        ) from error
    for pattern in files:
        if not any(folder.glob(pattern)):
            end = "" if folder == Path(source) else f": {advice}"
            raise FileNotFoundError(f"scorer {scorer} needs {pattern} of the model {source!r}, {folder} has none{end}")
    for path in folder.rglob("*.safetensors"):
        announced = _announced_sha256(folder, path)
        if re.fullmatch(r"[0-9a-f]{64}", announced):
            check_sha256(path, announced)
    return folder


def model_about(source: str) -> dict[str, str | None]:
    """Identity of a scorer's model: its name and, for a local folder, a hash of its weights; None for a hub id."""
    folder = _local_folder(source)
    found = sorted(folder.rglob("*.safetensors")) if folder else []
    return {"model": source, "weights": weights_fingerprint(found) if found else None}


def _local_folder(source: str) -> Path | None:
    return next((folder for folder in (Path(source), weights_folder() / source) if os.path.isdir(folder)), None)


def _announced_sha256(folder: Path, path: Path) -> str:
    """What the hub announced: its cache names a large file by its sha256, a local folder keeps it in a note beside."""
    note = folder / ".cache" / "huggingface" / "download" / f"{path.relative_to(folder)}.metadata"
    lines = note.read_text().splitlines() if note.is_file() else []
    return lines[1] if len(lines) > 1 else path.resolve().name


def read_converted(name: str, weights: str = "") -> dict[str, Tensor]:
    """The weights of a scorer that is published as a pickle, from its converted safetensors file.

    Args:
        name: key of `PUBLISHED_FILES`.
        weights: path of the converted file, or "" for its place in the weights folder.

    Raises:
        FileNotFoundError: if it is not there, or not its note with the hash; the sentence says what to download and
            how to convert it.
        ValueError: if it is a pickle, or differs from what `convert` wrote.
    """
    published, path = PUBLISHED_FILES[name], _converted(name, weights)
    file = published.file if not path.is_file() else path.name
    command = f"`python -m dkto.evaluation.scorers convert {name} {file}`"
    if not published.sha256:
        command = f"{command[:-1]} --sha256 HASH` (HASH stands at {published.url})"
    if not path.is_file():
        raise FileNotFoundError(
            f"scorer {name} needs its weights: download {file} ({published.size}) from {published.url} and "
            f"convert it once with {command}; expected in {path}"
        )
    if path.suffix != ".safetensors":
        raise ValueError(f"{file} is a pickle, which is not loaded: run {command}")
    expected = converted_about(name, weights)["sha256"]
    if not expected:
        raise FileNotFoundError(f"{path.with_suffix('.json')}, which `convert` writes with its hash, is missing")
    check_sha256(path, expected)
    return read_tensors(path, "scorer")


def converted_about(name: str, weights: str = "") -> dict[str, str | None]:
    """Identity of a scorer's converted weights: their name or path, and their hash, None where they are not at hand."""
    card = _converted(name, weights).with_suffix(".json")
    found = read_json(card, "card of weights", ["sha256"])["sha256"] if card.is_file() else None
    return {"weights": weights or name, "sha256": found}


def _converted(name: str, weights: str) -> Path:
    return Path(weights) if weights else weights_folder() / f"{name}.safetensors"


def convert(name: str, source: Path, sha256: str = "") -> Path:
    """Turn a published pickle into safetensors in the weights folder, after comparing its hash.

    The pickle is read with torch's `weights_only=True`, which builds tensors and plain containers and runs no code.

    Args:
        name: hps_v2, hps_v2_1, clip_h14, image_reward or laion_aesthetics.
        source: the downloaded file.
        sha256: its hash as its page shows; needed where the project does not know it.

    Returns:
        The safetensors file; beside it a .json with both hashes.

    Raises:
        ValueError: if the hash is unknown, differs, or is given other than it is known; if the file holds anything but
            weights.
    """
    if name not in PUBLISHED_FILES:
        raise KeyError(f"no published file {name!r}; known: {', '.join(PUBLISHED_FILES)}")
    published = PUBLISHED_FILES[name]
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist: download {published.file} from {published.url}")
    if sha256 and published.sha256 and sha256.lower() != published.sha256:
        raise ValueError(f"the sha256 of {published.file} is known to be {published.sha256}, got --sha256 {sha256}")
    expected = published.sha256 or sha256.lower()
    if not expected:
        raise ValueError(
            f"the sha256 of {published.file} is not known here: pass the one that {published.url} shows for it "
            f"with --sha256 (this file has {file_sha256(source)})"
        )
    check_sha256(source, expected)
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{source} holds something else than weights, or is damaged") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{source} holds something else than weights by name")
    path = weights_folder() / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    copied = {key: value.clone() for key, value in state.items()}  # some share memory
    write_tensors(path, copied, {"format": "pt"})
    about = {"published": published.file, "published_sha256": expected, "sha256": file_sha256(path)}
    write_json(path.with_suffix(".json"), about)
    return path


def fill(network: nn.Module, state: dict[str, Tensor], source: object) -> nn.Module:
    """Put weights into a network, frozen, in float32; what `check_fits` refuses, is."""
    check_fits(state, network.state_dict(), source, type(network).__name__)
    network.load_state_dict({name: value.float() for name, value in state.items()})
    return network.eval().requires_grad_(False)
