"""Prompts x seeds to images on disk, with the same starting noise for every method, resumable.

    images/
      manifest.json        model, hash of its weights, sampler settings, prompts and seeds
      p00003-s1.png        image of prompt 3, seed number 1
      truncated.jsonl      prompts longer than the text encoder takes, if there are any

The noise of an image depends only on (seed, prompt number, image number): methods are compared on equal
noise, and batch size or number of processes change no more than the last digits of a sum (one grey level of 255 in
float32, two or three in bfloat16).
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from dkto.common.files import claim, write_png, write_records
from dkto.common.processes import sole_writer, worker_pool
from dkto.common.progress import progress
from dkto.common.settings import checked_number
from dkto.evaluation.manifest import MANIFEST, MOST, image_path, is_whole_png
from dkto.models.base import cut_sentence
from dkto.models.system import System, computes_bfloat16, draw, noise_generator

CHUNK = 50  # images per task handed to a worker, about; this process counts every batch
RATE = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"  # images/s, however few
TRUNCATED = "truncated.jsonl"


def generate_images(
    system: System,
    prompts: Sequence[str],
    output_dir: str | Path,
    *,
    images_per_prompt: int = 5,
    seed: int = 0,
    batch_size: int = 25,
    num_processes: int = 1,
    vae_slicing: bool = False,
) -> Path:
    """Draw `images_per_prompt` images of every prompt; images that lie whole on disk are kept.

    Prompts longer than the text encoder takes are cut by it; a warning counts them.

    Args:
        system: model, adapter and sampler settings.
        prompts: P prompts.
        output_dir: folder for images and manifest; it is returned.
        images_per_prompt: n; the paper compares the median of 5.
        seed: of all starting noise; equal seeds compare methods on equal noise.
        batch_size: images per pass.
        num_processes: workers (0: this process), each with its own copy of the pipeline on one thread.
        vae_slicing: decode image by image: large ones take far less memory.

    Raises:
        ValueError: if there is no prompt or a number is too small (nothing is written then), or the folder holds images
            of another system, prompt list or seed, or of other weights, or images that no manifest tells of.
        BlockingIOError: if another process draws into the folder.
    """
    output_dir = Path(output_dir)
    options = {"images_per_prompt": images_per_prompt, "seed": seed, "batch_size": batch_size}
    options |= {"num_processes": num_processes, "vae_slicing": vae_slicing}
    generate_all({output_dir.name: system}, prompts, output_dir.parent, **options)
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
    vae_slicing: bool = False,
) -> dict[str, Path]:
    """`generate_images` for several systems with one set of workers; system `name` draws into `output_dir/name`."""
    prompts = list(prompts)
    if not prompts:
        raise ValueError("prompts must hold at least one, got none")
    images_per_prompt = checked_number("images_per_prompt", images_per_prompt, least=1, most=MOST // len(prompts))
    seed, batch_size = checked_number("seed", seed, least=0), checked_number("batch_size", batch_size, least=1)
    num_processes = checked_number("num_processes", num_processes, least=0)
    folders = {name: Path(output_dir) / name for name in systems}
    sources = {system.source: system for system in systems.values()}
    weights = {source: system.fingerprint() for source, system in sources.items()}  # once, at however many scales
    for system in systems.values():
        system.opened()
    written = {name: (system.model, system.prefix, system.negative_prompt) for name, system in systems.items()}
    each = {written[name]: system for name, system in systems.items()}
    cut = {texts: system.cut_prompts(prompts) for texts, system in each.items()}
    if any(system.precision == "bfloat16" for system in systems.values()) and not computes_bfloat16():
        warnings.warn("this processor does not compute in bfloat16: float32 is many times as fast here", stacklevel=2)
    tasks = []
    with ExitStack() as stack:
        for name, system in systems.items():
            folder = folders[name]
            stack.enter_context(sole_writer(folder))
            about = {
                "system": system.record(),
                "prompts": prompts,
                "images_per_prompt": images_per_prompt,
                "seed": seed,
            }
            about["weights"] = weights[system.source]
            _check_unclaimed(folder)
            stack.enter_context(_claimed(folder, about))
            if cut[written[name]]:
                _note_cut(folder, prompts, cut[written[name]], bool(system.negative_prompt))
            task = _Task(system, prompts, folder, seed, vae_slicing)
            tasks += _tasks(task, batch_size, images_per_prompt, 1 if num_processes < 2 else CHUNK // batch_size)
        total = sum(len(task.missing) for task in tasks)
        with progress(total=total, desc="drawing", unit="image", bar_format=RATE) as bar:
            for count in _perform(tasks, min(num_processes, len(tasks))):
                bar.update(count)
    return folders


@contextmanager
def _claimed(folder: Path, about: dict) -> Iterator[None]:
    """Claim a folder; if the first drawing fails before there is an image, it is free again."""
    claim(folder / MANIFEST, about, "images")
    try:
        yield
    except Exception:
        if not any(folder.glob("p*-s*.png")):
            (folder / MANIFEST).unlink(missing_ok=True)
            (folder / TRUNCATED).unlink(missing_ok=True)
        raise


def _note_cut(folder: Path, prompts: list[str], cut: list[tuple[int, str]], negative: bool) -> None:
    """List and say the prompts that the text encoder cuts, as `dkto.data.encode` does for training."""
    rows = [{"prompt": row if row < len(prompts) else "negative", "tokens": text} for row, text in cut]
    write_records(folder / TRUNCATED, rows)
    warnings.warn(cut_sentence(len(cut), len(prompts) + negative, folder / TRUNCATED), stacklevel=4)


def _tasks(task: "_Task", batch_size: int, images_per_prompt: int, few: int) -> list["_Task"]:
    """The batches that lack an image, a few in a task.

    A batch is the same in every call: a sum over other neighbours would differ in its last digits, so of one that a
    kill left half done the missing images are drawn again in the company of all.
    """
    keys = [(p, i) for p in range(len(task.prompts)) for i in range(images_per_prompt)]
    missing = {key for key in keys if not is_whole_png(image_path(task.folder, *key))}
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    batches = [batch for batch in batches if not missing.isdisjoint(batch)]
    shares = [batches[start : start + max(1, few)] for start in range(0, len(batches), max(1, few))]
    return [
        replace(task, batches=share, missing={key for batch in share for key in batch} & missing) for share in shares
    ]


def _check_unclaimed(folder: Path) -> None:
    """Images without a manifest could be of anything: they are not taken for those that are asked for."""
    if not (folder / MANIFEST).exists() and any(folder.glob("p*-s*.png")):
        missing = f"no {MANIFEST} that says what they were drawn for"
        raise ValueError(f"{folder} holds images but {missing}: choose another folder")


@dataclass(frozen=True)
class _Task:
    system: System
    prompts: list[str]
    folder: Path
    seed: int
    vae_slicing: bool
    batches: Sequence[list[tuple[int, int]]] = ()
    missing: Set[tuple[int, int]] = frozenset()


def _perform(tasks: list[_Task], workers: int) -> Iterator[int]:
    _PIPELINES.clear()  # weights on disk may have changed since the last call
    if workers < 2:
        yield from map(_draw_chunk, tasks)
        return
    with worker_pool(workers) as pool:
        yield from pool.map(_draw_chunk, tasks)


_PIPELINES: dict[tuple[str, ...], object] = {}  # the last one, by what it was loaded from


def _draw_chunk(task: _Task) -> int:
    system = task.system  # the sampler's settings are read at each batch
    source = system.source
    if source not in _PIPELINES:
        _PIPELINES.clear()
        _PIPELINES[source] = system.load()
        if task.vae_slicing:
            _PIPELINES[source].vae.enable_slicing()
    for batch in task.batches:
        generators = [noise_generator(task.seed, p, i) for p, i in batch]
        images = draw(_PIPELINES[source], [task.prompts[p] for p, _ in batch], generators, system)
        for key, image in zip(batch, images, strict=True):
            if key in task.missing:
                write_png(image_path(task.folder, *key), image)
    return len(task.missing)
