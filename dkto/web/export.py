"""Write the graphs of the page into the package: `python -m dkto.web.export`, a minute, needs `.[web]`.

They hold no weights, so that they change only with the form of the networks or with torch's exporter.
"""

import gzip
import hashlib
import json
import logging
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from dkto.common.ends import guarded
from dkto.common.files import write_atomically
from dkto.web.blob import BLOB, GRAPHS, LAYOUT, configs_hash
from dkto.web.graphs import Parts

OPSET = 20
FEWEST = 32  # smaller constants stay in their graph


def export(folder: Path = GRAPHS) -> None:
    """Write the four graphs and the layout of their weights.

    Raises:
        ModuleNotFoundError: without onnx and onnxscript.
    """
    torch.manual_seed(0)
    parts = Parts.load()
    layout = _Placed()
    for name, value in parts.state():
        layout.place(name, value.numpy())
    folder.mkdir(exist_ok=True)
    for name, model in _graphs(parts):
        packed = gzip.compress(_without_weights(model, layout), 9, mtime=0)
        write_atomically(folder / f"{name}.onnx.gz", lambda part, data=packed: part.write_bytes(data))
    found = {"configs": configs_hash(), "lora": [asdict(layer) for layer in parts.layers], "tensors": layout.tensors}
    text = json.dumps(found, separators=(",", ":")).replace("{", "\n{") + "\n"
    write_atomically(folder / LAYOUT, lambda part: part.write_text(text))


class _Placed:
    """Weights behind one another, each once; a constant of a graph is found again by its bytes."""

    def __init__(self) -> None:
        self.tensors: list[dict] = []
        self._known: dict[str, int] = {}
        self._size = 0

    def place(self, name: str, array: np.ndarray, **more: int) -> int:
        key = hashlib.sha256(array.tobytes()).hexdigest()
        if key not in self._known:
            self._known[key] = self._size
            self.tensors.append({"name": name, "shape": list(array.shape), "offset": self._size, **more})
            self._size += array.size
        return self._known[key]

    def find(self, name: str, array: np.ndarray) -> int | None:
        """Where a constant is; the transpose of a weight gets a place of its own. None if it is no weight."""
        if (at := self._known.get(hashlib.sha256(array.tobytes()).hexdigest())) is not None:
            return at
        turned = hashlib.sha256(np.ascontiguousarray(array.T).tobytes()).hexdigest()
        if array.ndim == 2 and turned in self._known:
            return self.place(name, array, transposed=self._known[turned])
        return None


def _graphs(parts: Parts):
    """Names and ONNX models, one after another."""
    batch = torch.export.Dim("batch", min=1, max=64)
    given = parts.example()
    latents, times, context = given["x_t"][:3], given["t"][:3], given["c"][:3]
    ids = torch.zeros(3, context.shape[1], dtype=torch.long)
    adapter = (given["lora"], torch.tensor(1.0))
    some, fixed = {0: batch}, None
    with torch.no_grad():
        yield "text", _onnx(parts.encode(), (ids,), ["ids"], ["context"], (some,))
        names, free = ["x", "t", "c", "lora", "scale"], (some, some, some, fixed, fixed)
        yield "unet", _onnx(parts.predict(), (latents, times, context, *adapter), names, ["noise"], free)
        yield "vae", _onnx(parts.decode(), (latents,), ["z"], ["image"], (some,))
    step = torch.export.export(parts.traced_step(), tuple(given.values()), strict=False)
    yield "step", _onnx(step, (), list(given), ["error", "point", "pull", "gradient"], None)


def _onnx(model, arguments: tuple, inputs: list[str], outputs: list[str], free: tuple | None):
    return exported(model, arguments, inputs, outputs, free and {"tensors": free})


def exported(model, arguments: tuple, inputs: list[str], outputs: list[str], free, optimize: bool = True):
    """A module, or an exported program, as an ONNX model with its weights.

    Args:
        model: what computes.
        arguments: tensors of the right shapes; of an exported program none.
        inputs, outputs: names in the graph.
        free: dynamic shapes of the arguments.
        optimize: whether constants are folded; else every weight keeps its form and its name.
    """
    import onnx

    names = {"input_names": inputs, "output_names": outputs, "dynamic_shapes": free}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter speaks of its own future
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        file = str(Path(folder) / "graph.onnx")
        torch.onnx.export(
            model,
            arguments,
            file,
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            verbose=False,
            optimize=optimize,
            **names,
        )
        return onnx.load(file)


def _without_weights(model, layout: _Placed) -> bytes:
    """A graph whose weights are places of the blob; the exporter's notes are gone."""
    import onnx

    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype != np.float32 or array.size < FEWEST:
            continue
        if (at := layout.find(tensor.name, array)) is None:
            continue
        tensor.ClearField("raw_data")
        tensor.ClearField("float_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in (("location", BLOB), ("offset", at * 4), ("length", array.size * 4)):
            tensor.external_data.add(key=key, value=str(value))
    return without_notes(model)


def without_notes(model) -> bytes:
    """A serialised model without the notes of the exporter, which hold paths."""
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces of the exporter
        node.ClearField("doc_string")
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
    del model.graph.value_info[:]
    del model.metadata_props[:]
    return model.SerializeToString(deterministic=True)


if __name__ == "__main__":
    sys.exit(guarded(export, "dkto"))
