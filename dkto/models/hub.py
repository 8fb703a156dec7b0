"""From a name to weights: a model, a UNet or an adapter by folder, file or hub id, and those that the paper compares.

Only safetensors are loaded; a checkpoint that is published as a pickle is refused with a sentence.
"""

import os
from pathlib import Path

from dkto.common.files import read_json
from dkto.common.names import PATH_SHOWN, shown
from dkto.common.tensors import weights_variant
from dkto.models.adapters import PEFT_CONFIG
from dkto.models.base import DiffusionModel, fetched_folder, pipeline_folder
from dkto.models.flow import StableDiffusion3
from dkto.models.language_flow import Flux2Klein, QwenImage, ZImage
from dkto.models.policy import LORA_FILE
from dkto.models.stable_diffusion import StableDiffusion, StableDiffusionXL

MODEL_CLASSES: dict[str, type[DiffusionModel]] = {
    kind.pipeline_name: kind
    for kind in (StableDiffusion, StableDiffusionXL, StableDiffusion3, QwenImage, ZImage, Flux2Klein)
}
STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PUBLISHED = {
    "base": {"model": STABLE_DIFFUSION},
    "dpo": {"model": STABLE_DIFFUSION, "unet": "mhdang/dpo-sd1.5-text2image-v1"},
    "kto": {"model": STABLE_DIFFUSION, "unet": "jacklishufan/diffusion-kto"},
    "alignprop": {"model": STABLE_DIFFUSION, "lora": "mihirpd/alignprop-trl-aesthetics"},
}
"""Weights that the paper's tables compare, as fields of `dkto.models.system.System`, by the name of the method."""
WEIGHTS = [f"diffusion_pytorch_model{rest}" for rest in (".safetensors", "-*.safetensors", ".safetensors.index.json")]
"""Files of a UNet's weights; a pattern that begins with * would fetch those of the other parts and half precision."""
TUNED_ON = {"alignprop": "laion_aesthetics"}
"""Scorer that a published checkpoint was tuned on, by the name of the method: it may have been hacked."""


def load_model(source: str | Path) -> DiffusionModel:
    """The model behind `source`, its parts loaded when they are first asked for.

    Raises:
        ValueError: if the pipeline is of a class that no face is written for.
    """
    folder = pipeline_folder(source)
    kind = read_json(folder / "model_index.json", "index of a pipeline").get("_class_name")
    if kind not in MODEL_CLASSES:
        raise ValueError(f"{folder} is a {kind}; supported: {', '.join(MODEL_CLASSES)}")
    return MODEL_CLASSES[kind](folder)


def unet_folder(source: str | Path) -> Path:
    """The folder of a UNet in diffusers' layout: `source` itself, its sub-folder `unet`, or the same on the hub.

    Raises:
        ValueError: if it holds no UNet, or one without safetensors weights.
    """
    files = ["config.json", *WEIGHTS]
    folder = fetched_folder(source, "unet", [*files, *(f"unet/{name}" for name in files)])
    for place in (folder / "unet", folder):
        config = place / "config.json"
        about = read_json(config, "configuration of a UNet") if config.is_file() else {}
        if about.get("_class_name") == "UNet2DConditionModel":
            weights_variant(place)
            return place
    raise ValueError(f"unet {str(source)!r} holds no UNet2DConditionModel (no config.json of one in {folder} or unet/)")


def lora_file(source: str | Path) -> Path:
    """The file of an adapter: `source` itself, the one safetensors file in that folder, or the same on the hub.

    Raises:
        ValueError: if it is no safetensors file, or the folder holds none or several, none of the usual name.
    """
    path = Path(source)
    if path.suffix == ".safetensors" and not os.path.exists(path):
        raise FileNotFoundError(f"lora {shown(str(source), PATH_SHOWN)} does not exist")
    if os.path.isfile(path):
        if path.suffix != ".safetensors":
            raise ValueError(f"lora must be a .safetensors file, got {path.name}; pickles are not loaded")
        return path
    folder = fetched_folder(source, "lora", ["*.safetensors", PEFT_CONFIG])
    files = sorted(folder.glob("*.safetensors"))
    if (folder / LORA_FILE) in files:
        return folder / LORA_FILE
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"lora {str(source)!r} must hold {LORA_FILE} or one other .safetensors file, found {found}")
    return files[0]
