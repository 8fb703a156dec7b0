"""Adapters (LoRA) from a file into the weights of a pipeline: every tensor finds its layer, or the file is refused.

Names of four kinds are read: those of diffusers ("unet." or "transformer.", "text_encoder."), also their older forms
(".lora.up.", "processor.to_q_lora.up."); PEFT's ("base_model.model."); kohya's ("lora_unet_", "lora_te_"), with
".alpha", for Stable Diffusion XL also with the original names of its blocks.

    W' = W + alpha / rank * B A
"""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor, nn

from dkto.common.files import read_json
from dkto.common.names import shown
from dkto.common.tensors import check_finite_weights, read_tensors

PEFT = "base_model.model."
METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration
PEFT_CONFIG = "adapter_config.json"
KINDS = {"lora_A": "down", "lora_down": "down", "lora.down": "down"}
KINDS |= {"lora_B": "up", "lora_up": "up", "lora.up": "up"}
KINDS |= {"lora_linear_layer.down": "down", "lora_linear_layer.up": "up"}
_TENSOR = re.compile(rf"(.+)\.({'|'.join(map(re.escape, KINDS))})(?:\.\w+)?\.weight")
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_\w+?)_lora\.(down|up)\.weight")
_KOHYA = {"lora_unet_": "", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
_KOHYA |= {"lora_te3_": "text_encoder_3"}
_INNER = {"in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_3": "conv2"}
_INNER |= {"skip_connection": "conv_shortcut"}


class Found(NamedTuple):
    """Where a tensor belongs: the part, the layer in it, and "down", "up" or "alpha"."""

    part: str
    layer: str
    kind: str


def merge_adapter(networks: Mapping[str, nn.Module], denoiser: str, path: Path) -> None:
    """Add an adapter to the weights of a pipeline's networks.

    Args:
        networks: by the name of their part; those of text encoders too.
        denoiser: "unet" or "transformer".
        path: a safetensors file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, a tensor has no layer in these networks or does not fit it, lacks its other half
            or is not finite. The sentence names the first such tensor; nothing was changed then.
    """
    tensors = read_tensors(path, "adapter")
    if not tensors:
        raise ValueError(f"{path} holds no tensor: it is no adapter")
    check_finite_weights(tensors, path)
    names = {part: _layers(network) for part, network in networks.items()}
    depth = getattr(networks[denoiser].config, "layers_per_block", None)
    layers: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        found = _find(name, names, denoiser, depth)
        if found is None:
            raise ValueError(
                f"{path} is no adapter for this model: {shown(name, 160)} is of no layer of its {', '.join(networks)}; "
                f"expected names that begin with '{denoiser}.', PEFT's 'base_model.model.' or kohya's 'lora_unet_'"
            )
        halves = layers.setdefault(found[:2], {})
        if found.kind in halves:
            raise ValueError(f"{path} holds two tensors for one place, the second is {shown(name, 160)}")
        halves[found.kind] = tensor
    about = _peft_config(path)
    if not about and any(name.startswith(PEFT) for name in tensors):
        warnings.warn(f"{path} has no {PEFT_CONFIG} beside it: its lora_alpha is taken to be its rank", stacklevel=2)
    deltas = {place: _delta(path, networks, place, halves, about) for place, halves in layers.items()}
    for (part, layer), delta in deltas.items():
        networks[part].get_submodule(layer).weight.data += delta


def _layers(network: nn.Module) -> dict[str, str]:
    """Names of a network's layers that have weights, by these names and by those that kohya's trainers make of them."""
    names = [name for name, module in network.named_modules() if getattr(module, "weight", None) is not None]
    return {name.replace(".", "_"): name for name in names} | {name: name for name in names}


def _find(name: str, names: Mapping[str, Mapping[str, str]], denoiser: str, depth: int | None) -> Found | None:
    """Where a tensor belongs by its name, or None."""
    if name.endswith((".alpha", ".lora_alpha")):
        layer, kind = name.rpartition(".")[0], "alpha"
    elif match := _PROCESSOR.fullmatch(name):
        layer, kind = f"{match[1]}.{match[2]}", match[3]
    elif match := _TENSOR.fullmatch(name):
        layer, kind = match[1], KINDS[match[2]]
    else:
        return None
    for prefix, part in _KOHYA.items():
        if layer.startswith(prefix):
            part, layer = part or denoiser, layer.removeprefix(prefix)
            tried = [layer, layer.removeprefix("text_model_"), f"text_model_{layer}", _original(layer, depth)]
            break
    else:
        part, _, rest = layer.removeprefix(PEFT).partition(".")
        if part not in names and layer.startswith(PEFT):
            part, rest = denoiser, layer.removeprefix(PEFT)
        tried = [rest, f"{rest}.0", rest.removeprefix("text_model."), f"text_model.{rest}"]
    found = next((names[part][each] for each in tried if each in names[part]), None) if part in names else None
    return Found(part, found, kind) if found else None


def _original(layer: str, depth: int | None) -> str:
    """A layer of a UNet by diffusers' name, from the original's; `depth` is diffusers' `layers_per_block`.

    >>> _original("output_blocks_5_1_transformer_blocks_0_attn1_to_q", 2)
    'up_blocks_1_attentions_2_transformer_blocks_0_attn1_to_q'
    """
    match = re.fullmatch(r"(input_blocks|middle_block|output_blocks)_(\d+)_(?:(\d+)_)?(.+)", layer)
    if not match or not isinstance(depth, int):
        return layer
    side, block, inner, rest = match[1], int(match[2]), match[3], match[4]
    if side == "middle_block":
        rest = layer.removeprefix(f"{side}_{block}_")
        return (
            f"mid_block_attentions_0_{rest}"
            if block == 1
            else f"mid_block_resnets_{block // 2}_{_INNER.get(rest, rest)}"
        )
    place, at = divmod(block - (side == "input_blocks"), depth + 1)
    way = "down" if side == "input_blocks" else "up"
    if rest in ("op", "conv"):
        return f"{way}_blocks_{place}_{way}samplers_0_conv"
    return f"{way}_blocks_{place}_{'attentions' if inner == '1' else 'resnets'}_{at}_{_INNER.get(rest, rest)}"


def _peft_config(path: Path) -> dict[str, Any]:
    """PEFT's configuration of the adapter, as the file or `adapter_config.json` beside it holds it; {} for none."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(METADATA)
    beside = path.with_name(PEFT_CONFIG)
    try:
        found = json.loads(text) if text else {}
    except ValueError as error:
        raise ValueError(f"{path} holds {METADATA} that is no JSON ({error}): save the adapter again") from error
    if not found and beside.is_file():
        found = read_json(beside, "configuration of an adapter")
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {METADATA} that is no object, got {shown(found)}")
    return found


def _scale(path: Path, found: Mapping[str, Any], part: str, layer: str, rank: int) -> float:
    """alpha / rank of a layer by PEFT's configuration, 1 where it says nothing."""
    own = {key.removeprefix(f"{part}."): value for key, value in found.items() if key.startswith(f"{part}.")} or found
    if own.get("use_dora"):
        raise ValueError(f"{path} is a DoRA, which is not supported; expected a LoRA")
    from peft.utils.other import get_pattern_key

    pattern = own.get("alpha_pattern") or {}
    alpha = (
        pattern.get(get_pattern_key(pattern, layer), own.get("lora_alpha", rank)) if pattern else own.get("lora_alpha")
    )
    alpha = rank if alpha is None else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e9:
        raise ValueError(f"{path}: lora_alpha must be a number above 0, got {shown(alpha)}")
    return alpha / (rank**0.5 if own.get("use_rslora") else rank)


def _delta(
    path: Path, networks: Mapping[str, nn.Module], place: tuple[str, str], halves: Mapping[str, Tensor], found: dict
) -> Tensor:
    """What a layer's weights gain."""
    part, layer = place
    weight = networks[part].get_submodule(layer).weight
    if not {"down", "up"} <= halves.keys():
        raise ValueError(f"{path} holds {' and '.join(sorted(halves))} alone of {part}.{layer}: a half is missing")
    down, up = (halves[kind].float() for kind in ("down", "up"))
    rank = len(down)
    if not rank or down[0].numel() != weight[0].numel() or up.flatten(1).shape != (len(weight), rank):
        raise ValueError(
            f"{path} was made for another model: {part}.{layer} is {tuple(weight.shape)} here, and the adapter "
            f"multiplies {tuple(up.shape)} with {tuple(down.shape)}"
        )
    scale = _scale(path, found, part, layer, rank)
    if "alpha" in halves:
        alpha = halves["alpha"].float()
        if alpha.numel() != 1 or not float(alpha) > 0:
            raise ValueError(f"{path}: alpha of {part}.{layer} must be one number above 0, got {shown(alpha.tolist())}")
        scale = float(alpha) / rank
    return (up.flatten(1) @ down.flatten(1) * scale).reshape(weight.shape)
