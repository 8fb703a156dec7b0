"""What draws images: a model, an adapter and the sampler's settings; and the noise that it starts from."""

from dkto.common import quiet  # noqa: F401  (before diffusers, which speaks while it is imported)

# isort: split
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import nn

from dkto.common.files import Fields, check_fields, read_json
from dkto.common.names import not_known
from dkto.common.settings import check_settings, setting
from dkto.common.tensors import weights_fingerprint
from dkto.models import SMALL_WORLD, pipeline_folder
from dkto.models.adapters import merge_adapter
from dkto.models.base import T5_TOKENS, DiffusionModel, cut_prompts
from dkto.models.hub import PUBLISHED, load_model, lora_file, unet_folder
from dkto.models.onnx_unet import OnnxUNet, has_graph
from dkto.models.parts import load_part
from dkto.models.policy import keep_in
from dkto.objective.methods import CSFT_PREFIXES

TRAINING_RECORD = "training.json"  # what a training leaves in its folder
CONFIG: Fields = {
    "model": (lambda value: isinstance(value, str), "text"),
    "objective": (lambda value: isinstance(value, str), "text"),
}
STYLE: Fields = {"csft_style": (lambda value: value in list(CSFT_PREFIXES), f"one of {', '.join(CSFT_PREFIXES)}")}
"""What a record of a training must say of its configuration to draw from it, and what one of CSFT."""
PRECISIONS = ("float32", "bfloat16")


def read_training(path: Path, config: Fields) -> dict:
    """The record of a training, whose configuration must hold these fields; a ValueError where it does not."""
    about = read_json(path, "record of a training", ["fingerprint"])
    check_fields(about, {"config": (lambda value: isinstance(value, dict), "an object")}, str(path))
    check_fields(about["config"], config, f"{path}, config")
    return about


@dataclass(frozen=True)
class System:
    """Something that draws pictures from prompts.

    Attributes:
        model: "small-world", a diffusers pipeline folder, or a hub id.
        lora: adapter to load on top (a safetensors file, a folder or a hub id), or "" for none.
        guidance: classifier-free guidance scale, no unit; 1 is off.
        steps: DPM-Solver++ steps.
        prefix: text put before every prompt (CSFT samples with "good image, ").
        unet: UNet to use instead of the model's (a folder or a hub id), or "" for the model's own.
        negative_prompt: what guidance leads away from (CSFT in its "negative" style: "Weird image. "), or "" for
            nothing; it does nothing at guidance 1.
        precision: "float32", or "bfloat16" for autocast of the networks (noise and sampler stay in float32), half as
            fast again where the machine computes in it, and many times as slow where it does not. The weights of their
            matrices are kept in it too.

    Raises:
        ValueError: if a number is out of its range, or the precision is another.
    """

    model: str = SMALL_WORLD
    lora: str = ""
    guidance: float = setting(3.0, 1)
    steps: int = setting(15, 1)
    prefix: str = ""
    unet: str = ""
    negative_prompt: str = ""
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_settings(self)

    @classmethod
    def published(cls, name: str, **settings) -> "System":
        """A released checkpoint that the paper compares, by method: base, dpo, kto or alignprop on SD v1.5.

        Args:
            name: key of `dkto.models.hub.PUBLISHED`.
            settings: fields that differ, for example `model` as a local folder; 50 steps and guidance 7.5
                unless given (the paper does not state its own).

        >>> System.published("kto", steps=25).unet
        'jacklishufan/diffusion-kto'
        """
        if name not in PUBLISHED:
            raise KeyError(not_known(f"no published checkpoint {name!r}", name, PUBLISHED))
        return cls(**{"guidance": 7.5, "steps": 50, **PUBLISHED[name], **settings})

    @classmethod
    def of_run(cls, folder: str | Path, **settings) -> "System":
        """The system, `settings` aside, that a finished training left in its folder; CSFT asks for a good image.

        Raises:
            FileNotFoundError: if the folder holds no finished run.
            ValueError: if its record is damaged.
        """
        folder = Path(folder)
        record, parts = folder / TRAINING_RECORD, [part for part in ("model", "lora") if (folder / part).is_dir()]
        if not record.is_file() or not parts:
            raise FileNotFoundError(f"{folder} holds no finished training ({TRAINING_RECORD} and model/ or lora/)")
        config = read_training(record, CONFIG)["config"]
        found = {"model": config["model"], parts[0]: str(folder / parts[0])}
        if config["objective"] == "csft":
            check_fields(config, STYLE, f"{record}, config")
            liked, disliked = CSFT_PREFIXES[config["csft_style"]]
            found |= {"prefix": liked, "negative_prompt": "" if liked else disliked.strip()}
        return cls(**{**found, **settings})

    @staticmethod
    def model_trained(weights: str) -> str:
        """The model that a run of this machine tuned to a LoRA or a UNet; "" for other weights."""
        folder = Path(weights).parent if Path(weights).suffix else Path(weights)
        records = [place / TRAINING_RECORD for place in (folder.parent, folder.parent.parent)] if weights else []
        return next((read_training(path, CONFIG)["config"]["model"] for path in records if path.is_file()), "")

    def fingerprint(self) -> str:
        """Hash over the weights that it draws with: a folder that was trained again is another model."""
        files = sorted(pipeline_folder(self.model).rglob("*.safetensors"))
        files += sorted(unet_folder(self.unet).glob("*.safetensors")) if self.unet else []
        return weights_fingerprint([*files, *([lora_file(self.lora)] if self.lora else [])])

    def opened(self) -> DiffusionModel:
        """The model, when it is known that the settings fit it and nothing heavy was loaded yet.

        Raises:
            FileNotFoundError: if there is no such model, UNet or adapter.
            ValueError: if it is not supported, is no Stable Diffusion with a UNet though one is given, or its schedule
                has not so many steps.
        """
        model = load_model(self.model)
        if self.unet and model.denoiser_part != "unet":
            raise ValueError(f"unet must be empty for {model.folder}, whose denoiser is a {model.denoiser_part}")
        if self.steps > model.num_train_timesteps:
            raise ValueError(
                f"steps must be at most {model.num_train_timesteps}, as finely as the schedule of {model.folder} is "
                f"cut, got {self.steps}"
            )
        if sampler := self._sampler(model):
            try:
                sampler.set_timesteps(self.steps)
                fits = self.steps == 1 or sampler.timesteps[0] > sampler.timesteps[-1]
            except (ValueError, IndexError, RuntimeError):
                fits = False
            if not fits:
                raise ValueError(f"steps must be fewer for the schedule of {model.folder}, got {self.steps}")
        return model

    def _sampler(self, model: DiffusionModel) -> "diffusers.DPMSolverMultistepScheduler | None":
        """DPM-Solver++ on the model's schedule, or None for a flow."""
        return model.load_scheduler(diffusers.DPMSolverMultistepScheduler) if model.denoiser_part == "unet" else None

    def cut_prompts(self, prompts: list[str]) -> list[tuple[int, str]]:
        """Rows of the prompts, the negative one after them, that are longer than a text encoder takes; how much."""
        texts = [self.prefix + prompt for prompt in prompts] + [self.negative_prompt] * bool(self.negative_prompt)
        return list(cut_prompts(load_model(self.model).tokenizers(), texts))

    def load(self, compiled: bool = True) -> "diffusers.DiffusionPipeline":
        """The pipeline, adapter merged in, with a DPM-Solver++ sampler (flows keep their own) and no progress bar.

        Without a GPU the UNet of the small world, and of what was tuned from it, is one that only draws
        (`dkto.models.onnx_unet`): equal to torch's to rounding, so images differ by one grey level of 255 at most, and
        faster. Not so in bfloat16, or if it is not to be `compiled`.

        No system has a safety checker, whatever its model ships: it returns black pictures for those it objects to, and
        would do so for a base but not for what was tuned from it, whose pipeline is written without one.
        """
        model = self.opened()
        unet = {"unet": load_part(diffusers.UNet2DConditionModel, unet_folder(self.unet))} if self.unet else {}
        pipeline = model.load_pipeline(**unet)
        if sampler := self._sampler(model):
            pipeline.scheduler = sampler
        if self.lora:
            networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
            networks.pop("vae")
            merge_adapter(networks, model.denoiser_part, lora_file(self.lora))
        if self.precision == "bfloat16":  # autocast would cast them in every pass, from twice the memory
            for part in (each for each in pipeline.components.values() if isinstance(each, nn.Module)):
                keep_in(part.requires_grad_(False), torch.bfloat16)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        if compiled and self.precision == "float32" and model.denoiser_part == "unet" and has_graph(pipeline.unet):
            pipeline.unet = OnnxUNet(pipeline.unet)
        return pipeline


def computes_bfloat16() -> bool:
    """Whether pictures are drawn faster in bfloat16 here: on a GPU, or a processor with instructions for it."""
    found = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    return torch.cuda.is_available() or any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def noise_generator(seed: int, prompt_number: int, image_number: int) -> torch.Generator:
    """The generator of one image's starting noise."""
    state = np.random.SeedSequence([seed, prompt_number, image_number]).generate_state(1, np.uint64)[0]
    return torch.Generator("cpu").manual_seed(int(state >> 1))


def draw(
    pipeline: "diffusers.DiffusionPipeline", prompts: list[str], generators: list[torch.Generator], system: System
) -> list[Image.Image]:
    """One batch of images, one per prompt and generator."""
    length = {"max_sequence_length": T5_TOKENS} if isinstance(pipeline, diffusers.StableDiffusion3Pipeline) else {}
    fast = torch.autocast(pipeline.device.type, torch.bfloat16, enabled=system.precision == "bfloat16")
    with torch.inference_mode(), fast:
        return pipeline(
            [system.prefix + prompt for prompt in prompts],
            negative_prompt=[system.negative_prompt] * len(prompts) if system.negative_prompt else None,
            num_inference_steps=system.steps,
            guidance_scale=system.guidance,
            generator=generators,
            **length,
        ).images
