"""Prompts x seeds to images on disk, with the same starting noise for every method, resumable.

    images/
      manifest.json        model, hash of its weights, sampler settings, prompts and seeds
      p00003-s1.png        image of prompt 3, seed number 1

The noise of an image depends only on (seed, prompt number, image number): methods are compared on equal
noise, and batch size or number of processes change no more than the last digits of a sum (one grey level of 255 in
float32, two or three in bfloat16).
"""

from dkto.common import quiet  # noqa: F401  (before diffusers, which speaks while it is imported)

# isort: split
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from diffusers import DiffusionPipeline

from dkto.common.files import claim, write_png
from dkto.common.processes import worker_pool
from dkto.common.progress import progress
from dkto.evaluation.manifest import MANIFEST, image_path
from dkto.models.system import System, computes_bfloat16, draw, noise_generator

CHUNK = 50  # images per task handed to a worker


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
        output_dir: folder for images and manifest; it is returned.
        images_per_prompt: n; the paper compares the median of 5.
        seed: of all starting noise; equal seeds compare methods on equal noise.
        batch_size: images per pass.
        num_processes: workers, each with its own copy of the pipeline on one thread.

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
    numbers = (("images_per_prompt", images_per_prompt, 1), ("seed", seed, 0), ("batch_size", batch_size, 1))
    for name, value, least in numbers:
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
    with progress(total=sum(len(task.wanted) for task in tasks), desc="drawing", unit="image") as bar:
        for count in _perform(tasks, min(num_processes, len(tasks))):
            bar.update(count)
    return folders


def _check_unclaimed(folder: Path) -> None:
    """Pictures without a manifest could be of anything: they are not taken for those that are asked for."""
    if not (folder / MANIFEST).exists() and any(folder.glob("p*-s*.png")):
        missing = f"no {MANIFEST} that says what they were drawn for"
        raise ValueError(f"{folder} holds images but {missing}: choose another folder")


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


_PIPELINES: dict[tuple[str | None, ...], DiffusionPipeline] = {}  # the last one, by what it was loaded from


def _draw_chunk(task: _Task) -> int:
    source = task.system.model, task.system.unet, task.system.lora  # the sampler's settings are read at each batch
    if source not in _PIPELINES:
        _PIPELINES.clear()
        _PIPELINES[source] = task.system.load()
    for start in range(0, len(task.wanted), task.batch_size):
        batch = task.wanted[start : start + task.batch_size]
        generators = [noise_generator(task.seed, p, i) for p, i in batch]
        images = draw(_PIPELINES[source], [task.prompts[p] for p, _ in batch], generators, task.system)
        for key, image in zip(batch, images, strict=True):
            write_png(image_path(task.folder, *key), image)
    return len(task.wanted)
