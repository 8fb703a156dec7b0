"""What draws images: a model, an adapter and the sampler's settings; and the noise that it starts from."""

from dkto.common import quiet  # noqa: F401  (before diffusers, which speaks while it is imported)

# isort: split
import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import nn

from dkto.common.files import Fields, check_fields, read_json
from dkto.common.names import not_known, shown
from dkto.common.settings import check_settings, setting
from dkto.common.tensors import weights_fingerprint
from dkto.models import SMALL_WORLD, pipeline_folder
from dkto.models.adapters import merge_adapter
from dkto.models.base import DiffusionModel
from dkto.models.dislike_guidance import DislikeGuided
from dkto.models.hub import MODEL_CLASSES, PUBLISHED, load_model, lora_file, unet_folder
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
    """Something that draws images from prompts.

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
        disliked_lora: adapter of disliked images, from which the drawing is led away (`dkto.models.dislike_guidance`);
            `lora`, if there is one, is then that of liked images. Or "" for none.
        dislike_strength: how strongly, no unit; 0 without such an adapter, for "negative" at most 1.
        dislike_form: "contrast" (cPGD), which takes twice the time, or "negative" (Diffusion-NPO), half as much again.

    Raises:
        ValueError: if a number is out of its range, a name is unknown, or settings of the guidance by dislikes do not
            fit together.
    """

    model: str = SMALL_WORLD
    lora: str = ""
    guidance: float = setting(3.0, 1)
    steps: int = setting(15, 1)
    prefix: str = ""
    unet: str = ""
    negative_prompt: str = ""
    precision: Literal["float32", "bfloat16"] = "float32"
    disliked_lora: str = ""
    dislike_strength: float = setting(0.0, 0)
    dislike_form: Literal["contrast", "negative"] = "contrast"

    def __post_init__(self):
        check_settings(self)
        if bool(self.disliked_lora) is not bool(self.dislike_strength):
            raise ValueError(
                "disliked_lora and a dislike_strength above 0 must be given together, got "
                f"{shown(self.disliked_lora)} and {self.dislike_strength:g}"
            )
        if self.disliked_lora and self.dislike_form == "negative" and not (self.guidance > 1 >= self.dislike_strength):
            raise ValueError(
                "dislike_form 'negative' must have a guidance above 1 and a dislike_strength of at most 1, got "
                f"{self.guidance:g} and {self.dislike_strength:g}"
            )

    @property
    def source(self) -> tuple[str, ...]:
        """What `load` depends on; systems that share it differ in the sampler's settings alone."""
        return self.model, self.unet, self.lora, self.disliked_lora, self.dislike_form, self.precision

    def record(self) -> dict[str, object]:
        """The settings by name, for a manifest; what guides by dislikes only where it does."""
        found = asdict(self)
        return found if self.disliked_lora else {key: found[key] for key in found if "dislike" not in key}

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
        return weights_fingerprint([*files, *(lora_file(each) for each in (self.lora, self.disliked_lora) if each)])

    def opened(self) -> DiffusionModel:
        """The model, when it is known that the settings fit it and nothing heavy was loaded yet.

        Raises:
            FileNotFoundError: if there is no such model, UNet or adapter.
            ValueError: if it is not supported, is no Stable Diffusion with a UNet though one is given, its pipeline
                cannot be led by what is given, or its schedule has not so many steps.
        """
        model = load_model(self.model)
        for name in ("negative_prompt", "disliked_lora"):
            if (given := getattr(self, name)) and name not in model.led_by:
                raise ValueError(
                    f"{name} must be empty for a {model.pipeline_name}, which takes none, got {shown(given)}"
                )
        if self.unet and model.denoiser_part != "unet":
            raise ValueError(f"unet must be empty for {model.folder}, whose denoiser is a {model.denoiser_part}")
        if self.steps > model.num_train_timesteps:
            raise ValueError(
                f"steps must be at most {model.num_train_timesteps}, as finely as the schedule of {model.folder} is "
                f"cut, got {self.steps}"
            )
        if self.steps == 1 and model.scheduler.config.get("shift_terminal"):
            raise ValueError(f"steps must be 2 or more for the schedule of {model.folder}, which is stretched, got 1")
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
        return load_model(self.model).cut_prompts(texts)

    def load(self, compiled: bool = True) -> "diffusers.DiffusionPipeline":
        """The pipeline, adapter merged in, with a DPM-Solver++ sampler (flows keep their own) and no progress bar.

        Without a GPU the UNet of the small world, and of what was tuned from it, is one that only draws
        (`dkto.models.onnx_unet`): equal to torch's to rounding, so images differ by one grey level of 255 at most, and
        faster. Not so in bfloat16, or if it is not to be `compiled`.

        No system has a safety checker, whatever its model ships: it returns black images for those it objects to, and
        would do so for a base but not for what was tuned from it, whose pipeline is written without one.
        """
        model = self.opened()
        unet = {"unet": load_part(diffusers.UNet2DConditionModel, unet_folder(self.unet))} if self.unet else {}
        pipeline = model.load_pipeline(**unet)
        if sampler := self._sampler(model):
            pipeline.scheduler = sampler
        part = model.denoiser_part
        networks = {name: each for name, each in pipeline.components.items() if isinstance(each, nn.Module)}
        denoisers = [networks[part]]
        if self.disliked_lora:
            denoisers += [_adapted(networks[part], part, each) for each in (self.lora, self.disliked_lora)]
        elif self.lora:
            merge_adapter({name: networks[name] for name in networks if name != "vae"}, part, lora_file(self.lora))
        if self.precision == "bfloat16":  # autocast would cast them in every pass, from twice the memory
            for each in (*networks.values(), *denoisers[1:]):
                keep_in(each.requires_grad_(False), torch.bfloat16)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        if compiled and self.precision == "float32" and part == "unet" and has_graph(networks[part]):
            made = {each: OnnxUNet(each) for each in denoisers}  # the base may be there twice
            denoisers = [made[each] for each in denoisers]
        guided = DislikeGuided(*denoisers, self.dislike_form).to(pipeline.device) if self.disliked_lora else None
        setattr(pipeline, part, guided or denoisers[0])
        return pipeline


def _adapted(denoiser: nn.Module, part: str, adapter: str) -> nn.Module:
    """A copy of the denoiser with an adapter, or itself without one."""
    if not adapter:
        return denoiser
    found = copy.deepcopy(denoiser)
    merge_adapter({part: found}, part, lora_file(adapter))
    return found


def computes_bfloat16() -> bool:
    """Whether images are drawn faster in bfloat16 here: on a GPU, or a processor with instructions for it."""
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
    for part in (each for each in pipeline.components.values() if isinstance(each, DislikeGuided)):
        part.strength, part.guided = system.dislike_strength, system.guidance > 1
    negative = [system.negative_prompt] * len(prompts)
    options = MODEL_CLASSES[type(pipeline).__name__].call_options(pipeline, system.guidance, negative)
    fast = torch.autocast(pipeline.device.type, torch.bfloat16, enabled=system.precision == "bfloat16")
    with torch.inference_mode(), fast:
        return pipeline(
            prompt=[system.prefix + prompt for prompt in prompts],
            num_inference_steps=system.steps,
            generator=generators,
            **options,
        ).images
