"""Noise predictors, many at once: MLPs whose parameters are stacked, one row a member.

A member never sees another one: each product is a batched matrix product over members. One model is an
ensemble of one, and runs through the same lines.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import silu

from dkto.common.settings import checked_number

TIME_FEATURES = 16  # 8 sine and cosine pairs
INPUTS = 2 + 1 + TIME_FEATURES  # the point, the label (0, or +1 and -1 in CSFT), the time


def stream(seed: int, purpose: str) -> torch.Generator:
    """The random stream of one seed for one purpose; streams of other seeds or purposes are independent of it."""
    state = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the body on one thread of torch: sharing out work this small costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Architecture:
    """Shape of one noise predictor: 2-D point, label and time in, `depth` hidden layers of `width`, 2-D noise out."""

    num_train_timesteps: int
    width: int = 32
    depth: int = 3

    def __post_init__(self) -> None:
        for name in ("num_train_timesteps", "width", "depth"):
            checked_number(name, getattr(self, name), least=1)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Inputs and outputs of each layer."""
        return list(pairwise([INPUTS, *[self.width] * self.depth, 2]))

    @property
    def count(self) -> int:
        """Parameters of one member.

        >>> Architecture(50, width=32).count
        2818
        """
        return sum((rows + 1) * columns for rows, columns in self.sizes)

    def time_features(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(T, 16): sines and cosines of t/T at 8 frequencies from 1 to 64 radians, evenly spaced in logarithm."""
        time = torch.arange(self.num_train_timesteps, dtype=torch.float64) / self.num_train_timesteps
        angle = time[:, None] * torch.logspace(0, math.log10(64), TIME_FEATURES // 2, dtype=torch.float64)
        return torch.cat([angle.sin(), angle.cos()], dim=1).to(dtype)


class Ensemble:
    """Noise predictors of one architecture, with a backward pass written by hand.

    Attributes:
        architecture: of every member.
        parameters: (M, P), one row a member; what an optimiser steps.
        gradient: (M, P), filled by `backward`, or None before.
    """

    def __init__(self, architecture: Architecture, parameters: Tensor) -> None:
        if parameters.ndim != 2 or parameters.shape[1] != architecture.count:
            raise ValueError(f"parameters must have shape (M, {architecture.count}), got {tuple(parameters.shape)}")
        self.architecture = architecture
        self.parameters = parameters
        self.gradient: Tensor | None = None
        self._layers = self._views(parameters)
        self._slots: list[tuple[Tensor, Tensor]] = []
        self._time = architecture.time_features(parameters.dtype)

    @classmethod
    def initial(
        cls, architecture: Architecture, seeds: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> "Ensemble":
        """Fresh members, one a seed: uniform within 1/sqrt(inputs); the last layer starts near zero."""
        rows = []
        for seed in seeds:
            generator = stream(seed, "initial weights")
            parts = []
            for layer, (inputs, outputs) in enumerate(architecture.sizes):
                bound = inputs**-0.5 * (0.01 if layer == architecture.depth else 1.0)
                parts.append((torch.rand((inputs + 1) * outputs, generator=generator) * 2 - 1) * bound)
            rows.append(torch.cat(parts))
        return cls(architecture, torch.stack(rows).to(dtype))

    @property
    def members(self) -> int:
        """M, how many models this is."""
        return len(self.parameters)

    def copy(self, times: int = 1) -> "Ensemble":
        """A copy that can be trained; with `times`, so many copies of all members, one after the other."""
        return Ensemble(self.architecture, self.parameters.repeat(times, 1))

    def select(self, members: slice | Sequence[int]) -> "Ensemble":
        """The named members as an ensemble of their own."""
        return Ensemble(self.architecture, self.parameters[members].clone())

    def inputs(self, noisy: Tensor, timesteps: Tensor, label: Tensor | None = None) -> Tensor:
        """What the first layer reads, (..., B, 19): points (..., B, 2), timesteps and labels (..., B), None for 0."""
        label = torch.zeros_like(noisy[..., :1]) if label is None else label[..., None].to(noisy)
        return torch.cat([noisy, label, self._time[timesteps]], dim=-1)

    def __call__(self, noisy: Tensor, timestep: int, label: Tensor | None = None) -> Tensor:
        """Predicted noise (M, B, 2) of points (M, B, 2) at one timestep; `label` is (M,), or None for 0."""
        (weight, bias), *rest = self._layers
        hidden = torch.baddbmm(self._bias_at(timestep, label), noisy, weight[:, :2])
        for weight, bias in rest:
            hidden = torch.baddbmm(bias, silu(hidden, inplace=True), weight)
        return hidden

    def forward(self, inputs: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Predicted noise (M, B, 2), and for each layer what it read and what its activation read, for `backward`."""
        read, hidden, trace = inputs, inputs, []
        for layer, (weight, bias) in enumerate(self._layers):
            if layer:
                read = silu(hidden)
            trace.append((read, hidden))
            hidden = torch.baddbmm(bias, read, weight)
        return hidden, trace

    def backward(self, trace: list[tuple[Tensor, Tensor]], output_gradient: Tensor) -> Tensor:
        """Gradient of a loss by every parameter, (M, P), from its gradient by the predicted noise, (M, B, 2).

        `trace` comes from `forward`; the result is also kept in `gradient`.
        """
        if self.gradient is None:
            self.gradient = torch.empty_like(self.parameters)
            self._slots = self._views(self.gradient)
        upstream = output_gradient
        for layer in reversed(range(len(self._layers))):
            (read, before), (weight, bias) = trace[layer], self._slots[layer]
            weight.copy_(torch.bmm(read.mT, upstream))
            torch.sum(upstream, dim=1, keepdim=True, out=bias)
            if layer:
                upstream = torch.ops.aten.silu_backward(torch.bmm(upstream, self._layers[layer][0].mT), before)
        return self.gradient

    def _bias_at(self, timestep: int, label: Tensor | None) -> Tensor:
        """First layer's bias with the inputs in it that a batch shares: (M, 1, width)."""
        weight, bias = self._layers[0]
        shared = bias + self._time[timestep : timestep + 1] @ weight[:, 3:]
        return shared if label is None else shared + label.to(weight)[:, None, None] * weight[:, 2:3]

    def _views(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weight (M, inputs, outputs) and bias (M, 1, outputs) of each layer, in the memory of `flat`."""
        layers, start = [], 0
        for inputs, outputs in self.architecture.sizes:
            middle, end = start + inputs * outputs, start + (inputs + 1) * outputs
            weight = flat[:, start:middle].unflatten(1, (inputs, outputs))
            layers.append((weight, flat[:, middle:end].unsqueeze(1)))
            start = end
        return layers
