"""The adapter of a page: every matrix of a LoRA behind one another in one flat vector."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dkto.models.policy import LORA_TARGETS

RANK = 8


@dataclass(frozen=True)
class LoraLayer:
    """Where the two matrices of one layer are in the flat vector: A (RANK, columns) at `a`, B (rows, RANK) at `b`."""

    name: str
    a: int
    b: int
    rows: int
    columns: int

    @property
    def end(self) -> int:
        """Where the next layer begins."""
        return self.b + self.rows * RANK

    def matrices(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """A (RANK, columns) and B (rows, RANK) of a flat vector."""
        return flat[self.a : self.b].reshape(RANK, self.columns), flat[self.b : self.end].reshape(self.rows, RANK)


def lora_layers(denoiser: nn.Module) -> list[LoraLayer]:
    """The layers that `dkto train` adapts, in the order of the network."""
    found: list[LoraLayer] = []
    for name, layer in denoiser.named_modules():
        if name.endswith(LORA_TARGETS):
            start = found[-1].end if found else 0
            rows, columns = layer.weight.shape
            found.append(LoraLayer(name, start, start + RANK * columns, rows, columns))
    return found


def flat_lora(layers: Iterable[LoraLayer], weights: Mapping[str, Tensor]) -> Tensor:
    """The flat vector of an adapter's tensors, those of a safetensors file or of a policy; a lower rank leaves zeros.

    Raises:
        ValueError: if not one A and one B of a layer is there.
    """
    layers = list(layers)
    flat = torch.zeros(layers[-1].end)
    for layer in layers:
        for kind, matrix in zip(("lora_A", "lora_B"), layer.matrices(flat), strict=True):
            found = [value for name, value in weights.items() if f"{layer.name}.{kind}." in name]
            if len(found) != 1:
                raise ValueError(f"an adapter must have one {kind} of {layer.name}, got {len(found)}")
            rows, columns = found[0].shape
            matrix[:rows, :columns] = found[0].detach()
    return flat


def folded(layers: Iterable[LoraLayer], denoiser: nn.Module, pairs: Iterable, scale: Tensor | float) -> Iterator:
    """Names and matrices of the adapted layers, W + scale * B @ A, with an (A, B) a layer."""
    for layer, (a, b) in zip(layers, pairs, strict=True):
        yield f"{layer.name}.weight", denoiser.get_submodule(layer.name).weight + scale * (b @ a)
