"""One blob of weights that all graphs of a page point into, and how it travels."""

import gzip
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dkto.common.files import read_json
from dkto.common.tensors import read_tensors
from dkto.models.base import SMALL_WORLD_FOLDER
from dkto.web.lora import LoraLayer

GRAPHS = Path(__file__).parent / "graphs"
NAMES = ("text", "unet", "vae", "step")
LAYOUT = "layout.json"
BATCH = 8  # of the step's graph, whose reference point is a mean over it; the other graphs take any
KNOTS, REACH = 2049, 16.0  # the utility's slope is a table of KNOTS points of [-REACH, REACH]
BLOB = "weights.bin"  # what the graphs call the blob
FILES = {
    "unet": "unet/diffusion_pytorch_model",
    "vae": "vae/diffusion_pytorch_model",
    "text_encoder": "text_encoder/model",
}
CONFIGS = ("unet", "vae", "text_encoder")


@dataclass(frozen=True)
class Layout:
    """Where each weight is in the blob, and the matrices of the flat LoRA.

    A tensor has a `name`, its `shape` and `offset`, counted in numbers. One that is another's transpose has that one's
    offset as `transposed`, and does not travel.
    """

    tensors: list[dict]
    lora: list[LoraLayer]
    configs: str  # hash of the networks' configurations: others need other graphs

    @property
    def size(self) -> int:
        """Numbers in the blob."""
        return self.tensors[-1]["offset"] + int(np.prod(self.tensors[-1]["shape"]))


def read_layout(folder: Path = GRAPHS) -> Layout:
    """The layout that belongs to a folder of graphs.

    Raises:
        ValueError: if the graphs were made for networks of another form.
    """
    found = read_json(folder / LAYOUT, "layout of a page's weights", ("tensors", "lora", "configs"))
    if found["configs"] != configs_hash():
        raise ValueError(
            f"{folder} holds graphs of other networks: rerun python -m dkto.web.export, which needs .[web]"
        )
    return Layout(found["tensors"], [LoraLayer(**each) for each in found["lora"]], found["configs"])


def configs_hash(folder: Path = SMALL_WORLD_FOLDER) -> str:
    """Hash over the configurations of the networks."""
    return hashlib.sha256(b"".join((folder / part / "config.json").read_bytes() for part in CONFIGS)).hexdigest()[:16]


def read_graph(name: str, folder: Path = GRAPHS) -> bytes:
    """One of the graphs, as ONNX."""
    return gzip.decompress((folder / f"{name}.onnx.gz").read_bytes())


def weights_of(layout: Layout, folder: Path = SMALL_WORLD_FOLDER) -> np.ndarray:
    """The weights of a pipeline in their layout, (size,) float32; all in half precision, as they travel."""
    stored = {
        f"{part}.{name.removeprefix('text_model.')}": tensor.float().numpy().astype(np.float16)
        for part, file in FILES.items()
        for name, tensor in read_tensors(folder / f"{file}.safetensors", "weights").items()
    }
    return fill(layout.tensors, stored, layout.size)


def fill(tensors: Iterable[dict], stored: Mapping[str, np.ndarray], size: int) -> np.ndarray:
    """The blob, (size,) float32, of arrays by name."""
    blob = np.zeros(size, np.float32)
    for entry in tensors:
        rows, columns = (*entry["shape"], 1)[:2]
        at, length = entry["offset"], int(np.prod(entry["shape"]))
        if "transposed" in entry:
            from_ = entry["transposed"]
            blob[at : at + length] = blob[from_ : from_ + length].reshape(columns, rows).T.ravel()
        else:
            blob[at : at + length] = stored[entry["name"]].ravel()
    return blob


def wire_bytes(layout: Layout, blob: np.ndarray) -> bytes:
    """The blob as it travels: half precision without transposes, first all low bytes and then all high ones.

    Apart they pack better, since the high bytes, sign and exponent, resemble one another.
    """
    kept = [blob[t["offset"] : t["offset"] + int(np.prod(t["shape"]))] for t in layout.tensors if "transposed" not in t]
    return np.concatenate(kept).astype("<f2").view(np.uint8).reshape(-1, 2).T.tobytes()
