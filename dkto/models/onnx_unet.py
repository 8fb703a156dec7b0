"""The small world's UNet on a processor: onnxruntime computes what torch does, to rounding, in two thirds of the time.

The graph is that of the shipped UNet without its weights. A pipeline's own are handed to it, an adapter merged in, so
every model that was tuned from the small world has it. `python -m dkto.workshop.unet_graph` writes it.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

GRAPH = Path(__file__).parent / "unet.onnx.gz"
CONFIG = GRAPH.with_name("unet.json")  # of the UNet that the graph computes
INPUTS, OUTPUT = ("sample", "timestep", "context"), "noise"


def form_of(config: Any) -> dict[str, Any]:
    """A UNet's configuration as JSON holds it, without who wrote it: equal where one graph serves both."""
    return json.loads(json.dumps({key: value for key, value in dict(config).items() if not key.startswith("_")}))


def has_graph(unet: nn.Module) -> bool:
    """Whether a UNet is computed by the graph: one of the small world's form, in float32, on a processor."""
    plain = getattr(unet, "dtype", None) == torch.float32 and unet.device.type == "cpu"
    return plain and form_of(unet.config) == json.loads(CONFIG.read_text(encoding="utf-8"))


class OnnxUNet(nn.Module):
    """Takes the place of a pipeline's UNet while it draws; it cannot be trained.

    Args:
        unet: for which `has_graph` is true; its weights are read once, later changes of it are not seen.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.config = unet.config
        weights = {name: value.detach().contiguous().numpy() for name, value in unet.state_dict().items()}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other workers need the cores
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in weights.values()]
        options.add_external_initializers(list(weights), values)
        graph = gzip.decompress(GRAPH.read_bytes())
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        """Latents (B, 4, h, w), a timestep () or (B,), embeddings (B, L, D) -> the predicted noise, as the latents."""
        times = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1).expand(len(sample))
        given = (sample, times, encoder_hidden_states)
        arrays = {name: value.detach().contiguous().numpy() for name, value in zip(INPUTS, given, strict=True)}
        noise = torch.from_numpy(self.session.run([OUTPUT], arrays)[0])
        return (noise,)
