"""The rules of `dkto.world.truth` as functions of tensors, with gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor


def aesthetics_pixels(pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
    """`dkto.world.truth.aesthetics` of (B, 3, H, W) pictures in [0, 1], with gradient; returns (B,)."""
    red, green, blue = (pixel_values * 255).unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    across, along = red - 0.5 * (green + blue), 3**0.5 / 2 * (green - blue)
    chroma = (across.square() + along.square()).clamp(min=1e-6).sqrt()
    low, high = torch.quantile(luma.flatten(1), luma.new_tensor([0.02, 0.98]), dim=1)
    steps = torch.maximum(luma.diff(dim=1).abs()[:, :, :-1], luma.diff(dim=2).abs()[:, :-1])
    parts = torch.stack(
        [
            torch.quantile(chroma.flatten(1), 0.95, dim=1) / 150,
            (high - low) / 130,
            torch.quantile(steps.flatten(1), 0.98, dim=1) / 60,
        ]
    )
    return parts.clamp(max=1).mean(0)
