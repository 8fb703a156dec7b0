"""What draws images: a model, an adapter and the sampler's settings; and the noise that it starts from."""

from dkto.common import quiet  # noqa: F401  (before diffusers, which speaks while it is imported)

# isort: split
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from PIL import Image

from dkto.common.files import read_json
from dkto.common.names import check_choice, not_known
from dkto.common.tensors import weights_fingerprint
from dkto.models import LEFT_OUT, SMALL_WORLD, pipeline_folder
from dkto.models.hub import PUBLISHED, lora_file, unet_folder
from dkto.objective.methods import CSFT_PREFIXES

TRAINING_RECORD = "training.json"  # what a training leaves in its folder
PRECISIONS = ("float32", "bfloat16")


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
            fast again where the machine computes in it, and many times as slow where it does not.

    Raises:
        ValueError: if the precision is another.
    """

    model: str = SMALL_WORLD
    lora: str = ""
    guidance: float = 3.0
    steps: int = 15
    prefix: str = ""
    unet: str = ""
    negative_prompt: str = ""
    precision: str = "float32"

    def __post_init__(self):
        check_choice("precision", self.precision, PRECISIONS)

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
        """
        folder = Path(folder)
        record, parts = folder / TRAINING_RECORD, [part for part in ("model", "lora") if (folder / part).is_dir()]
        if not record.is_file() or not parts:
            raise FileNotFoundError(f"{folder} holds no finished training ({TRAINING_RECORD} and model/ or lora/)")
        config = read_json(record, "record of a training", ["config"])["config"]
        found = {"model": config["model"], parts[0]: str(folder / parts[0])}
        if config.get("objective") == "csft":
            liked, disliked = CSFT_PREFIXES[config["csft_style"]]
            found |= {"prefix": liked, "negative_prompt": "" if liked else disliked.strip()}
        return cls(**{**found, **settings})

    def fingerprint(self) -> str:
        """Hash over the weights that it draws with: a folder that was trained again is another model."""
        files = sorted(pipeline_folder(self.model).rglob("*.safetensors"))
        files += sorted(unet_folder(self.unet).glob("*.safetensors")) if self.unet else []
        return weights_fingerprint([*files, *([lora_file(self.lora)] if self.lora else [])])

    def load(self) -> DiffusionPipeline:
        """The pipeline, adapter merged in, with a DPM-Solver++ sampler (flows keep their own) and no progress bar.

        No system has a safety checker, whatever its model ships: it returns black pictures for those it objects to, and
        would do so for a base but not for what was tuned from it, whose pipeline is written without one.
        """
        folder = pipeline_folder(self.model)
        index = read_json(folder / "model_index.json", "index of a pipeline")
        empty = {name for name, value in index.items() if isinstance(value, list) and value[0] is None}
        absent = dict.fromkeys(empty | (index.keys() & set(LEFT_OUT)))
        if "safety_checker" in absent:
            absent["requires_safety_checker"] = False
        options = {"use_safetensors": True, "dtype": torch.float32}
        parts = {"unet": UNet2DConditionModel.from_pretrained(unet_folder(self.unet), **options)} if self.unet else {}
        pipeline = DiffusionPipeline.from_pretrained(folder, **options, **absent, **parts)
        if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        if self.lora:
            path = lora_file(self.lora)
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def computes_bfloat16() -> bool:
    """Whether pictures are drawn faster in bfloat16 here: on a GPU, or a processor with instructions for it."""
    found = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    return torch.cuda.is_available() or any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def noise_generator(seed: int, prompt_number: int, image_number: int) -> torch.Generator:
    """The generator of one image's starting noise."""
    state = np.random.SeedSequence([seed, prompt_number, image_number]).generate_state(1, np.uint64)[0]
    return torch.Generator("cpu").manual_seed(int(state >> 1))


def draw(
    pipeline: DiffusionPipeline, prompts: list[str], generators: list[torch.Generator], system: System
) -> list[Image.Image]:
    """One batch of images, one per prompt and generator."""
    fast = torch.autocast(pipeline.device.type, torch.bfloat16, enabled=system.precision == "bfloat16")
    with torch.inference_mode(), fast:
        return pipeline(
            [system.prefix + prompt for prompt in prompts],
            negative_prompt=[system.negative_prompt] * len(prompts) if system.negative_prompt else None,
            num_inference_steps=system.steps,
            guidance_scale=system.guidance,
            generator=generators,
        ).images
