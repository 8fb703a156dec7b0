"""The small world's AutoencoderKL, started so that colour passes through it.

With default initialisation a narrow VAE sticks near 18 dB: group norm over few channels removes
absolute colour. Here the main path carries the picture itself from the first step, as pairs of
channels (+x, -x), for which silu(x) - silu(-x) = x undoes the last activation, beside channels of
constant value that hold the norm's statistics steady; residual branches start damped.
"""

import torch
from diffusers import AutoencoderKL
from torch import nn

PAIRS = 3  # RGB
CONSTANT = 3.0  # value of the steadying channels, in units of pixel_values


def new_autoencoder(channels=(16, 32, 48), latent_channels: int = 4, layers: int = 1) -> AutoencoderKL:
    """An untrained AutoencoderKL whose reconstruction starts as a blurred copy of the picture."""
    vae = AutoencoderKL(
        block_out_channels=tuple(channels),
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=latent_channels,
        layers_per_block=layers,
        norm_num_groups=1,
        sample_size=64,
    )
    with torch.no_grad():
        _carry(vae, latent_channels)
    return vae


def _centre(conv: nn.Conv2d, rows: slice, values: torch.Tensor) -> None:
    """Set some output rows of a convolution to a pointwise map."""
    conv.weight[rows] = 0
    k = conv.kernel_size[0] // 2
    conv.weight[rows, : values.shape[1], k, k] = values
    conv.bias[rows] = 0


def _carry(vae: AutoencoderKL, latent_channels: int) -> None:
    carried = 2 * PAIRS + 2  # +RGB, -RGB, +constant, -constant
    identity = torch.eye(carried)
    encoder, decoder = vae.encoder, vae.decoder
    for module in vae.modules():
        if hasattr(module, "conv_shortcut"):  # a residual block
            module.conv2.weight *= 0.1
            if module.conv_shortcut is not None:
                _centre(module.conv_shortcut, slice(0, carried), identity)
        if hasattr(module, "to_out"):
            module.to_out[0].weight *= 0.1
    for norm in (encoder.conv_norm_out, decoder.conv_norm_out):
        norm.weight[:] = CONSTANT * (2 / norm.num_channels) ** 0.5
    pick = torch.cat([torch.eye(3), -torch.eye(3), torch.zeros(2, 3)])  # (8, 3)
    _centre(encoder.conv_in, slice(0, carried), pick)
    encoder.conv_in.bias[6], encoder.conv_in.bias[7] = CONSTANT, -CONSTANT
    for block in encoder.down_blocks:
        if block.downsamplers is not None:
            conv = block.downsamplers[0].conv
            conv.weight[:carried] = 0
            conv.bias[:carried] = 0
            conv.weight[torch.arange(carried), torch.arange(carried), :2, :2] = 0.25
    for block in decoder.up_blocks:
        if block.upsamplers is not None:
            _centre(block.upsamplers[0].conv, slice(0, carried), identity)
    encoder.conv_out.weight *= 0.3
    _centre(encoder.conv_out, slice(0, 3), pick.T)
    for square, size in ((vae.quant_conv, 2 * latent_channels), (vae.post_quant_conv, latent_channels)):
        _centre(square, slice(0, size), torch.eye(size))
    encoder.conv_out.bias[latent_channels:] = -6.0  # log-variance
    _centre(decoder.conv_in, slice(0, carried), pick)
    decoder.conv_in.bias[6], decoder.conv_in.bias[7] = CONSTANT, -CONSTANT
    _centre(decoder.conv_out, slice(0, 3), pick.T)
