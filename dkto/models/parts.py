"""The parts of a pipeline on disk: loaded whole, finite and of a supported family, or refused in one sentence."""

import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from torch import nn

from dkto.common.files import read_json
from dkto.common.names import shown
from dkto.common.tensors import check_finite_weights, check_header, weight_files, weights_variant

DISTILLED = ("LCMScheduler", "TCDScheduler")
# what the libraries raise for a file that is not what they expect; all of it becomes one sentence with its place
UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, ZeroDivisionError)
PLACES = ("_name_or_path", "name_or_path")  # fields of configurations that say where a part lay on somebody's disk
COPIED = ("**/*.json", "**/*.txt", "**/*.safetensors", "**/*.model", "**/*.jinja")
LARGE_BYTES = 4 * 2**30  # of files: CLIP's encoders have less, T5-XXL and language models have more


def kept_in(folder: Path, device: str) -> torch.dtype:
    """Precision of a frozen network that works on a device: bfloat16 for a large one on a GPU, else float32."""
    if device == "cpu" or not folder.is_dir():
        return torch.float32
    return torch.bfloat16 if sum(path.stat().st_size for path in weight_files(folder)) > LARGE_BYTES else torch.float32


def load_part(kind: type, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One network of a pipeline in a precision, each of whose tensors was in its file and is finite.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if its files are damaged, made for another network, or not finite; the sentence names the folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}, which model_index.json names, does not exist")
    read_json(folder / "config.json", f"configuration of a {kind.__name__}")
    options = {"use_safetensors": True, "dtype": dtype, "variant": weights_variant(folder)}
    for path in weight_files(folder):
        check_header(path, f"weights of a {kind.__name__}")
    try:
        network, told = kind.from_pretrained(folder, **options, output_loading_info=True)
    except (*UNREADABLE, SafetensorError) as error:
        raise ValueError(f"{folder} holds no {kind.__name__} that can be loaded ({first_line(error)})") from error
    extra = told["unexpected_keys"] if isinstance(network, diffusers.ModelMixin) else ()
    for names, why in ((told["missing_keys"], "lack"), (extra, "have no layer for")):
        if names := sorted(names):
            raise ValueError(
                f"the weights in {folder} {why} {len(names)} tensors, the first {shown(names[0])}: expected those of "
                f"the {kind.__name__} that config.json describes"
            )
    check_finite_weights(network.state_dict(), folder)
    return network


def first_line(error: BaseException) -> str:
    """What a library says, as far as it fits into a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip()[:160].rstrip(".: ")


def copy_part(source: Path, target: Path) -> None:
    """Copy a part: its weights under the names without a variant, which plain diffusers loads, and no place in it."""
    weights = weight_files(source) if any(source.glob("*.safetensors")) else []
    variant = weights_variant(source) if weights else None
    for path in (path for pattern in COPIED for path in source.glob(pattern)):
        index = ".safetensors.index." in path.name
        if (path.suffix == ".safetensors" and path not in weights) or (
            index and path.name.count(".") != 3 + bool(variant)
        ):
            continue
        place = target / path.relative_to(source).with_name(path.name.replace(f".{variant}", ""))
        place.parent.mkdir(parents=True, exist_ok=True)
        if index:
            place.write_text(path.read_text().replace(f".{variant}", ""))
        elif path.name.endswith("config.json"):
            copy_config(path, place)
        else:
            shutil.copyfile(path, place)


def copy_config(source: Path, target: Path) -> None:
    """Copy a configuration without the fields that say where a part lay on somebody's disk."""
    config = read_json(source, "configuration")
    if config.keys() & set(PLACES):
        target.write_text(json.dumps({k: v for k, v in config.items() if k not in PLACES}, indent=2) + "\n")
    elif source != target:
        shutil.copyfile(source, target)


def check_family(stored: Mapping[str, Any], kind: "type[diffusers.SchedulerMixin]", path: Path) -> None:
    """Refuse a stored schedule of another family of processes than `kind`'s, or of a distilled model."""
    name = str(stored["_class_name"])
    cls = getattr(diffusers, name, None)
    if kind.__name__.startswith("FlowMatch"):
        right, expected = name.startswith("FlowMatch"), "a rectified flow, as FlowMatchEulerDiscreteScheduler"
    else:
        betas = stored.get("trained_betas") or {"beta_start", "beta_end"} <= stored.keys()
        takes = inspect.isclass(cls) and "beta_start" in inspect.signature(cls.__init__).parameters
        right = betas and takes and not stored.get("use_flow_sigmas")
        expected = "a variance-preserving schedule with beta_start and beta_end, as DDIM's, Euler's or DPM-Solver's"
    if not right:
        raise ValueError(f"{path} is of {shown(name)}, whose process is not supported here; expected {expected}")
    if name in DISTILLED:
        raise ValueError(
            f"{path} is of {name}, for a distilled model, which is neither drawn by DPM-Solver++ nor trained here: "
            "expected the scheduler of the model that it was distilled from"
        )
