"""Policy and reference, made from one denoiser, and what was trained on disk.

With LoRA the reference is the policy with its adapter switched off, with full fine-tuning it is a frozen
copy; weights of the policy are never swapped or re-typed. Both compute in the same precision: the
objective multiplies a small difference of their errors by thousands.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from torch import Tensor, nn

from dkto.common.tensors import check_fits, read_tensors
from dkto.models.base import WEIGHTS_FILE, save_denoiser

LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
LORA_TARGETS += ("to_qkv_mlp_proj", "attn.to_out")  # FLUX.2's blocks of one stream, whose projections are joined
OURS = "the policy of this configuration"
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass
class PolicyAndReference:
    """The trained model and what it is measured against."""

    policy: "diffusers.ModelMixin"  # in training; with LoRA it carries the adapter
    reference: "diffusers.ModelMixin | None"  # the frozen copy, or None when the adapter switched off is the reference

    @property
    def part(self) -> str:
        """Name of the denoiser in its pipeline: "unet" or "transformer"."""
        return "unet" if isinstance(self.policy, diffusers.UNet2DConditionModel) else "transformer"

    @contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        """The reference policy, without gradient, for the length of a `with` block."""
        with torch.no_grad():
            if self.reference is not None:
                yield self.reference
                return
            self.policy.disable_adapters()
            try:
                yield self.policy
            finally:
                self.policy.enable_adapters()

    def to(self, device: str | torch.device) -> "PolicyAndReference":
        """Both on one device; returns itself."""
        self.policy.to(device)
        if self.reference is not None:
            self.reference.to(device)
        return self

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training may change, by name."""
        return {name: p for name, p in self.policy.named_parameters() if p.requires_grad}


def make_policy(
    denoiser: "diffusers.ModelMixin", lora_rank: int, seed: int, *, frozen_dtype: torch.dtype = torch.float32
) -> PolicyAndReference:
    """Turn a loaded denoiser into policy and reference.

    Args:
        denoiser: in float32; becomes the policy. Its dropout, if any, is switched off: policy and
            reference have to see the same network.
        lora_rank: 0 trains every weight against a frozen copy; above 0, low-rank adapters on the
            attention projections are trained and the reference is the adapter switched off.
        seed: fixes the adapters' initial values.
        frozen_dtype: precision in which frozen matrices are kept, that of the mixed-precision passes:
            they would be cast to it in every pass. What is trained stays in float32.
    """
    for module in denoiser.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if lora_rank == 0:
        reference = copy.deepcopy(denoiser).eval().requires_grad_(False)
        keep_in(reference, frozen_dtype)
        # as the policy's weights: torch picks the kernel of a matrix product by it, and kernels round differently.
        # The reference runs under no_grad and is in no optimiser, so nothing can change it.
        reference.requires_grad_(True)
        return PolicyAndReference(denoiser.train().requires_grad_(True), reference)
    from peft import LoraConfig

    denoiser.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        named = [each for each in denoiser.named_modules() if each[0].endswith(LORA_TARGETS)]
        layers = {name: layer for name, layer in named if isinstance(layer, nn.Linear)}
        widest = max((min(layer.weight.shape) for layer in layers.values()), default=0)
        if lora_rank > widest:
            raise ValueError(
                f"lora_rank must be at most {widest}, the width of the widest layer with an adapter, got {lora_rank}: "
                "0 trains every weight"
            )
        denoiser.add_adapter(
            LoraConfig(r=lora_rank, lora_alpha=lora_rank, init_lora_weights="gaussian", target_modules=list(layers))
        )
    keep_in(denoiser, frozen_dtype)
    return PolicyAndReference(denoiser.train(), None)


def keep_in(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Re-type what autocast would re-type anyway, of what is frozen: matrices and convolutions, but no norm."""
    for module in denoiser.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def write_weights(pair: PolicyAndReference, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Save what was trained in diffusers' layout: `unet/` or `transformer/`, or `pytorch_lora_weights.safetensors`.

    `weights` are the policy's, if they are not to be found in it as a whole.
    """
    if pair.reference is not None:
        save_denoiser(pair.policy, folder / pair.part, weights)
        return
    from diffusers.loaders import SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin  # the pipelines take seconds
    from peft import get_peft_model_state_dict

    layers = get_peft_model_state_dict(pair.policy, state_dict=weights)
    if pair.part == "unet":  # the file of every UNet pipeline is the same
        StableDiffusionLoraLoaderMixin.save_lora_weights(folder, unet_lora_layers=layers)
    else:
        SD3LoraLoaderMixin.save_lora_weights(folder, transformer_lora_layers=layers)


def read_weights(pair: PolicyAndReference, folder: Path) -> None:
    """Put weights saved by `write_weights` back into a policy made in the same way.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, of another policy, or not finite; the sentence names the file.
    """
    if pair.reference is not None:
        path, own = folder / pair.part / WEIGHTS_FILE, pair.policy.state_dict()
        check_fits(stored := read_tensors(path, "weights"), own, path, OURS)
        pair.policy.load_state_dict(stored)
        return
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    path = folder / LORA_FILE
    stored = {name.removeprefix(f"{pair.part}."): each for name, each in read_tensors(path, "adapter").items()}
    check_fits(stored, get_peft_model_state_dict(pair.policy), path, OURS)
    set_peft_model_state_dict(pair.policy, stored)
