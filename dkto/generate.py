"""Prompts x seeds to images on disk, with the same starting noise for every method, resumable.

    images/
      manifest.json        model, hash of its weights, sampler settings, prompts and seeds
      p00003-s1.png        image of prompt 3, seed number 1

The noise of an image depends only on (seed, prompt number, image number): methods are compared on equal
noise, and batch size or number of processes change no more than the last digits of a sum (one grey level of 255 in
float32, two or three in bfloat16).
"""

from dkto import quiet  # noqa: F401  (before diffusers, which speaks while it is imported)

# isort: split
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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

from dkto.models import LEFT_OUT, SMALL_WORLD, pipeline_folder, weights_fingerprint
from dkto.prepared import CSFT_PREFIXES
from dkto.processes import worker_pool
from dkto.progress import progress
from dkto.published import PUBLISHED, lora_file, unet_folder
from dkto.records import claim, read_json, write_png

MANIFEST = "manifest.json"
CHUNK = 50  # images per task handed to a worker
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
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    @classmethod
    def published(cls, name: str, **settings) -> "System":
        """A released checkpoint that the paper compares, by method: base, dpo, kto or alignprop on SD v1.5.

        Args:
            name: key of `dkto.published.PUBLISHED`.
            settings: fields that differ, for example `model` as a local folder; 50 steps and guidance 7.5
                unless given (the paper does not state its own).

        Raises:
            KeyError: for another name.

        >>> System.published("kto", steps=25).unet
        'jacklishufan/diffusion-kto'
        """
        if name not in PUBLISHED:
            raise KeyError(f"no published checkpoint {name!r}; known: {', '.join(PUBLISHED)}")
        return cls(**{"guidance": 7.5, "steps": 50, **PUBLISHED[name], **settings})

    @classmethod
    def of_run(cls, folder: str | Path, **settings) -> "System":
        """The system that a finished training left in its folder; CSFT asks for a good picture as it was trained to.

        Args:
            folder: of the run.
            settings: fields that differ.

        Raises:
            FileNotFoundError: if the folder holds no finished run.
        """
        folder = Path(folder)
        record, parts = folder / "run.json", [part for part in ("model", "lora") if (folder / part).is_dir()]
        if not record.is_file() or not parts:
            raise FileNotFoundError(f"{folder} holds no finished training (run.json and model/ or lora/)")
        config = read_json(record, "record of a training", ["config"])["config"]
        found = {"model": config["model"], parts[0]: str(folder / parts[0])}
        if config.get("objective") == "csft":
            liked, disliked = CSFT_PREFIXES[config["csft_style"]]
            found |= {"prefix": liked, "negative_prompt": "" if liked else disliked.strip()}
        return cls(**{**found, **settings})

    def fingerprint(self) -> str:
        """Hash over the weights that it draws with: a folder that was trained anew is another model."""
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


def image_path(folder: Path, prompt_number: int, image_number: int) -> Path:
    """Where the image of one prompt and image number lies."""
    return folder / f"p{prompt_number:05d}-s{image_number}.png"


def generate_images(
    system: System,
    prompts: Sequence[str],
    output_dir: str | Path,
    *,
    images_per_prompt: int = 5,
    seed: int = 0,
    batch_size: int = 25,
    num_processes: int = 1,
) -> Path:
    """Draw `images_per_prompt` images of every prompt; images already on disk are kept.

    Args:
        system: model, adapter and sampler settings.
        prompts: P prompts.
        output_dir: folder for images and manifest.
        images_per_prompt: n; the paper compares the median of 5.
        seed: of all starting noise; equal seeds compare methods on equal noise.
        batch_size: images per pass.
        num_processes: workers, each with its own copy of the pipeline on one thread.

    Returns:
        `output_dir`.

    Raises:
        ValueError: if there is no prompt or a number is too small (nothing is written then), or the folder holds images
            of another system, prompt list or seed, or of other weights, or images that no manifest tells of.
    """
    output_dir = Path(output_dir)
    options = {"images_per_prompt": images_per_prompt, "seed": seed, "batch_size": batch_size}
    generate_all({output_dir.name: system}, prompts, output_dir.parent, **options, num_processes=num_processes)
    return output_dir


def generate_all(
    systems: Mapping[str, System],
    prompts: Sequence[str],
    output_dir: str | Path,
    *,
    images_per_prompt: int = 5,
    seed: int = 0,
    batch_size: int = 25,
    num_processes: int = 1,
) -> dict[str, Path]:
    """`generate_images` for several systems with one set of workers; system `name` draws into `output_dir/name`."""
    prompts = list(prompts)
    if not prompts:
        raise ValueError("prompts must hold at least one, got none")
    for name, value, least in (
        ("images_per_prompt", images_per_prompt, 1),
        ("seed", seed, 0),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    folders = {name: Path(output_dir) / name for name in systems}
    sources = {(system.model, system.unet, system.lora): system for system in systems.values()}
    weights = {source: system.fingerprint() for source, system in sources.items()}  # once, at however many scales
    if any(system.precision == "bfloat16" for system in systems.values()) and not computes_bfloat16():
        warnings.warn("this processor does not compute in bfloat16: float32 is many times as fast here", stacklevel=2)
    tasks = []
    for name, system in systems.items():
        folder = folders[name]
        folder.mkdir(parents=True, exist_ok=True)
        about = {"system": asdict(system), "prompts": prompts, "images_per_prompt": images_per_prompt, "seed": seed}
        about["weights"] = weights[system.model, system.unet, system.lora]
        _check_unclaimed(folder)
        claim(folder / MANIFEST, about, "images")
        keys = [(p, i) for p in range(len(prompts)) for i in range(images_per_prompt)]
        wanted = [key for key in keys if not image_path(folder, *key).exists()]
        for start in range(0, len(wanted), CHUNK):
            tasks.append(_Task(system, prompts, folder, seed, batch_size, wanted[start : start + CHUNK]))
    bar = progress(total=sum(len(task.wanted) for task in tasks), desc="drawing", unit="image")
    for count in _perform(tasks, min(num_processes, len(tasks))):
        bar.update(count)
    bar.close()
    return folders


def _check_unclaimed(folder: Path) -> None:
    """Pictures without a manifest could be of anything: they are not taken for those that are asked for."""
    if not (folder / MANIFEST).exists() and any(folder.glob("p*-s*.png")):
        raise ValueError(
            f"{folder} holds images but no {MANIFEST} that says what they were drawn for: choose another folder"
        )


@dataclass(frozen=True)
class _Task:
    system: System
    prompts: list[str]
    folder: Path
    seed: int
    batch_size: int
    wanted: list[tuple[int, int]]


def _perform(tasks: list[_Task], workers: int) -> Iterator[int]:
    _PIPELINES.clear()  # weights on disk may have changed since the last call
    if workers < 2:
        yield from map(_draw_chunk, tasks)
        return
    with worker_pool(workers) as pool:
        yield from pool.map(_draw_chunk, tasks)


def read_manifest(folder: str | Path) -> dict:
    """The manifest of a folder written by `generate_images`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not one; the sentence names the file and what is wrong with it.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no generated images ({MANIFEST} is missing)")
    found = read_json(path, "manifest of generated images")
    for key, (holds, expected) in _MANIFEST_HOLDS.items():
        if key not in found or not holds(found[key]):
            got = f"{found[key]!r:.80}" if key in found else "nothing"
            raise ValueError(f"{path} is no manifest of generated images: {key} must be {expected}, got {got}")
    return found


_MANIFEST_HOLDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "prompts": (lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value), "a list of texts"),
    "images_per_prompt": (lambda value: type(value) is int and value > 0, "a number of at least 1"),
    "seed": (lambda value: type(value) is int, "a whole number"),
}
_PIPELINES: dict[System, DiffusionPipeline] = {}


def _draw_chunk(task: _Task) -> int:
    if task.system not in _PIPELINES:
        _PIPELINES.clear()
        _PIPELINES[task.system] = task.system.load()
    for start in range(0, len(task.wanted), task.batch_size):
        batch = task.wanted[start : start + task.batch_size]
        generators = [noise_generator(task.seed, p, i) for p, i in batch]
        images = draw(_PIPELINES[task.system], [task.prompts[p] for p, _ in batch], generators, task.system)
        for key, image in zip(batch, images, strict=True):
            write_png(image_path(task.folder, *key), image)
    return len(task.wanted)
