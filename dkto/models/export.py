"""A tuned adapter as one file: under diffusers' names, or kohya's, which ComfyUI and AUTOMATIC1111 read."""

import re
import shutil
from pathlib import Path
from typing import Literal

from dkto.common.files import Fields, check_fields, read_json, write_atomically
from dkto.common.names import check_choice
from dkto.common.tensors import read_tensors, write_tensors
from dkto.models.hub import load_model, lora_file
from dkto.models.stable_diffusion import StableDiffusionXL
from dkto.models.system import System

DEPTH: Fields = {"layers_per_block": (lambda value: type(value) is int, "a whole number")}
BASES = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}  # kohya's names, by the width of the conditioning


def export_lora(
    run: str | Path, output: str | Path, *, format: Literal["diffusers", "kohya"] = "kohya", model: str = ""
) -> Path:
    """Write the LoRA of a finished run as one safetensors file, which is returned.

    Args:
        run: folder of a training with `lora_rank` above 0.
        output: file to write; its name is what ComfyUI and AUTOMATIC1111 list.
        format: kohya, with alpha and for SDXL the original names of its blocks; or diffusers, as the run has it, which
            ComfyUI reads too, and the only one for Stable Diffusion 3.
        model: the run's model, where its folder has moved since.

    Raises:
        FileNotFoundError: if the run is not finished, or trained all weights.
        ValueError: if `output` is no .safetensors file, or kohya's names are asked for a model without a UNet.
    """
    check_choice("format", format, ("diffusers", "kohya"))
    output, system = Path(output), System.of_run(run)
    if output.suffix != ".safetensors":
        raise ValueError(f"output must be a .safetensors file, got {output.name!r}")
    if not system.lora:
        raise FileNotFoundError(f"{run} holds no lora/: all weights were trained, and {run}/model is a whole pipeline")
    output.parent.mkdir(parents=True, exist_ok=True)
    source = lora_file(system.lora)
    if format == "diffusers":
        write_atomically(output, lambda part: shutil.copyfile(source, part))
        return output
    from diffusers.utils import convert_state_dict_to_kohya

    faced = load_model(model or system.model)
    if faced.denoiser_part != "unet":
        raise ValueError(f"format must be diffusers for {faced.pipeline_name}, which ComfyUI reads so, got 'kohya'")
    tensors = convert_state_dict_to_kohya(read_tensors(source, "adapter"))
    place = faced.folder / "unet" / "config.json"
    check_fields(unet := read_json(place, "configuration of a UNet"), DEPTH, str(place))
    if isinstance(faced, StableDiffusionXL):
        tensors = {original_name(name, unet["layers_per_block"]): tensor for name, tensor in tensors.items()}
    rank = str(len(next(tensor for name, tensor in tensors.items() if ".lora_down." in name)))
    about = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
    if base := BASES.get(unet.get("cross_attention_dim")):
        about["ss_base_model_version"] = base  # by which AUTOMATIC1111 lists what fits the model
    write_tensors(output, tensors, about)
    return output


def original_name(name: str, depth: int) -> str:
    """An attention layer's name in SDXL's original UNet, from diffusers' name under kohya's prefix.

    Args:
        name: of a tensor.
        depth: diffusers' `layers_per_block`.

    >>> original_name("lora_unet_up_blocks_1_attentions_2_proj_in.alpha", 2)
    'lora_unet_output_blocks_5_1_proj_in.alpha'
    """
    name = name.replace("lora_unet_mid_block_attentions_0_", "lora_unet_middle_block_1_")
    if not (found := re.fullmatch(r"lora_unet_(down|up)_blocks_(\d+)_attentions_(\d+)_(.+)", name)):
        return name
    way, rest = found[1], found[4]
    block = int(found[2]) * (depth + 1) + int(found[3]) + (way == "down")
    return f"lora_unet_{'input' if way == 'down' else 'output'}_blocks_{block}_1_{rest}"
