"""Write the graph with which the small world draws: `python -m dkto.workshop.unet_graph`, 20 seconds, needs `.[web]`.

It holds no weights, so that it changes only with the form of the network or with torch's exporter.
"""

import gzip
import json
import sys

import torch

from dkto.common.ends import guarded
from dkto.common.files import write_atomically
from dkto.models import SMALL_WORLD, load_model
from dkto.models.onnx_unet import CONFIG, GRAPH, INPUTS, OUTPUT, form_of
from dkto.web.export import exported, without_notes

LARGEST_BATCH = 4096


def write_graph() -> None:
    """Write the graph beside `dkto.models.onnx_unet`, and the configuration of its UNet.

    Raises:
        ModuleNotFoundError: without onnx and onnxscript.
    """
    import onnx

    model = load_model(SMALL_WORLD)
    unet = model.load_denoiser().eval()
    side, batch = unet.config.sample_size, torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    tokens = model.tokenizers()[0].model_max_length
    given = (
        torch.randn(3, unet.config.in_channels, side, side),
        torch.full((3,), 500.0),
        torch.randn(3, tokens, unet.config.cross_attention_dim),
    )
    free = ({0: batch},) * len(INPUTS)
    with torch.no_grad():
        graph = exported(unet, given, list(INPUTS), [OUTPUT], free, optimize=False)
    offset = 0
    for tensor in graph.graph.initializer:
        size = unet.state_dict()[tensor.name].numel() * 4
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "weights"), ("offset", str(offset)), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
        offset += size
    packed = gzip.compress(without_notes(graph), 9, mtime=0)
    write_atomically(GRAPH, lambda part: part.write_bytes(packed))
    text = json.dumps(form_of(unet.config), indent=1, sort_keys=True) + "\n"
    write_atomically(CONFIG, lambda part: part.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(guarded(write_graph, "dkto"))
