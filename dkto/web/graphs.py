"""What a page computes, as functions of tensors: text encoder, a UNet with a flat LoRA, decoder, the KTO step."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import CLIPTextModel

from dkto.models import SMALL_WORLD, load_model
from dkto.objective.losses import denoising_error, implicit_reward
from dkto.web.blob import BATCH, KNOTS, REACH
from dkto.web.lora import LoraLayer, folded, lora_layers


class Call(nn.Module):
    """A function of a network and tensors, as a module whose parameters the exporter finds."""

    def __init__(self, network: nn.Module, function) -> None:
        super().__init__()
        self.network, self.function = network, function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(self.network, *tensors)


@dataclass(frozen=True)
class Parts:
    """The networks of the small world in float32, with attention in parts that have a backward form in ONNX."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text: CLIPTextModel

    @classmethod
    def load(cls) -> "Parts":
        """Those that ship."""
        pipeline = load_model(SMALL_WORLD).load_pipeline()
        parts = cls(pipeline.unet, pipeline.vae, pipeline.text_encoder)
        for network in vars(parts).values():
            network.float().eval().requires_grad_(False)
        parts.unet.set_attn_processor(AttnProcessor())
        parts.vae.set_attn_processor(AttnProcessor())
        return parts

    @cached_property
    def layers(self) -> list[LoraLayer]:
        """Of the flat LoRA."""
        return lora_layers(self.unet)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight that a page needs, by its name in the pipeline; the VAE's encoder stays behind."""
        for part, network in (("unet", self.unet), ("vae", self.vae), ("text_encoder", self.text)):
            for name, value in network.state_dict().items():
                if value.is_floating_point() and not (part == "vae" and name.startswith(("encoder", "quant"))):
                    yield f"{part}.{name}", value.detach().contiguous()

    def encode(self) -> Call:
        """Token ids (B, L) int64 -> the prompt's embedding (B, L, D)."""
        return Call(self.text, lambda network, ids: network(ids, return_dict=False)[0])

    def predict(self) -> Call:
        """(latents, timesteps, embedding, flat LoRA, its scale) -> the predicted noise, as the latents."""

        def call(network: nn.Module, x: Tensor, t: Tensor, c: Tensor, lora: Tensor, scale: Tensor) -> Tensor:
            pairs = [layer.matrices(lora) for layer in self.layers]
            weights = dict(folded(self.layers, network, pairs, scale))
            return functional_call(network, weights, (x, t, c), {"return_dict": False})[0]

        return Call(self.unet, call)

    def decode(self) -> Call:
        """Latents (B, 4, h, w) -> images (B, 3, 4h, 4w) in [-1, 1]."""
        return Call(self.vae, lambda vae, z: vae.decode(z / vae.config.scaling_factor, return_dict=False)[0])

    def step(
        self, x_t, t, c, target, reference_error, sign, weight, beta, table, inside, batch_point, given_point, lora
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Errors of the policy, reference point, pull on each sample, and the gradient of the flat LoRA.

        By the identity of `dkto.objective.losses.effective_weight`: the gradient is that of
        mean(beta * pull * error), with pull = sign * weight * U' taken from the table. Gains beyond its ends have the
        slope of the end.

        Args:
            x_t, t, c, target: of the batch, as `dkto.training.batches.Batch`.
            reference_error: (BATCH,) of the untuned model on the same noise.
            sign, weight: (BATCH,) 1 for liked and -1 for disliked samples; the weight of their class.
            beta: () reward scale.
            table: (KNOTS,) the utility's slope.
            inside: () 1 if the sign is inside the utility, else 0.
            batch_point, given_point: () the reference point is batch_point * max(0, batch mean) + given_point.
            lora: the flat vector.
        """
        with torch.enable_grad():
            pairs = [layer.matrices(lora) for layer in self.layers]
            # leaves of their own: the gradient of a slice would be a scatter into the whole vector
            leaves = [tuple(matrix.detach().requires_grad_(True) for matrix in pair) for pair in pairs]
            weights = dict(folded(self.layers, self.unet, leaves, 1.0))
            error = denoising_error(functional_call(self.unet, weights, (x_t, t, c), {"return_dict": False})[0], target)
            reward = implicit_reward(error.detach(), reference_error, beta)
            point = batch_point * reward.mean().clamp(min=0) + given_point
            felt = (inside * sign + (1 - inside)) * (reward - point)
            at = ((felt + REACH) * ((KNOTS - 1) / (2 * REACH))).clamp(0, KNOTS - 1)
            low = at.floor().clamp(max=KNOTS - 2)
            index = low.long()
            pull = sign * weight * (table[index] + (at - low) * (table[index + 1] - table[index]))
            gradients = torch.autograd.grad((beta * pull * error).mean(), [leaf for pair in leaves for leaf in pair])
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        return error.detach(), point.detach(), pull.detach(), flat

    def example(self) -> dict[str, Tensor]:
        """Arguments of a step, of the right shapes."""
        size, tokens = self.unet.config.sample_size, self.text.config.max_position_embeddings
        latents = (BATCH, self.unet.config.in_channels, size, size)
        grid = torch.linspace(-REACH, REACH, KNOTS)
        return {
            "x_t": torch.randn(latents),
            "t": torch.randint(0, 1000, (BATCH,)).float(),
            "c": torch.randn(BATCH, tokens, self.unet.config.cross_attention_dim),
            "target": torch.randn(latents),
            "reference_error": torch.ones(BATCH),
            "sign": torch.tensor([1.0, -1.0] * (BATCH // 2)),
            "weight": torch.ones(BATCH),
            "beta": torch.tensor(30.0),
            "table": torch.sigmoid(grid) * torch.sigmoid(-grid),
            "inside": torch.tensor(1.0),
            "batch_point": torch.tensor(1.0),
            "given_point": torch.tensor(0.0),
            "lora": torch.randn(self.layers[-1].end) * 0.02,
        }

    def traced_step(self) -> torch.fx.GraphModule:
        """`step` with its backward pass written out, of operations that ONNX has."""
        decompositions = dict(core_aten_decompositions())
        decompositions[torch.ops.aten.convolution_backward.default] = _convolution_backward
        decompositions[torch.ops.aten.upsample_nearest2d_backward.default] = _upsample_backward
        traced = make_fx(lambda *given: self.step(*given), decomposition_table=decompositions)(*self.example().values())
        traced.graph.eliminate_dead_code()
        traced.recompile()
        return traced


def _convolution_backward(grad, x, weight, _, stride, padding, dilation, transposed, __, groups, mask):
    assert not transposed and groups == 1 and not mask[1], "the convolutions are frozen"
    rest = x.shape[2] - ((grad.shape[2] - 1) * stride[0] - 2 * padding[0] + weight.shape[2])
    back = torch.ops.aten.convolution(grad, weight, None, stride, padding, dilation, True, [rest, rest], groups)
    return back, None, None


def _upsample_backward(grad, output_size, input_size, scales_h=None, scales_w=None):
    b, c, h, w = input_size
    return grad.reshape(b, c, h, grad.shape[2] // h, w, grad.shape[3] // w).sum((3, 5))
