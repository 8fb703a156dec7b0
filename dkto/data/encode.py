"""Images and prompts to latents and embeddings on disk, once, so that no VAE or text encoder trains.

    prepared/
      prepared.json               what it was made from: model, sizes, hash of the feedback
      feedback.parquet            image, prompt, is_desirable, pair_id, prompt_id, weight of every row
      prompts.parquet             the distinct prompts; row 0 is the empty one
      prompts-00000.safetensors   their conditioning, float16 or bfloat16, up to PROMPT_SHARD_ROWS each
      csft-prefix-liked-00000.safetensors  on demand: the same with the like written before the prompt
      latents-00000.safetensors   posterior `mean` and `std` of up to SHARD_ROWS images, float16, and their sizes
      index.parquet, pairs.npy    the rows that could be encoded and their pairs, for `dkto.data.encoded`
      skipped.jsonl               rows that `read_feedback` set aside (source_row) and images that could not be read
                                  (row of feedback.parquet, from 1), with their reason
      .lock                       held by the call that writes here: a second one is refused
      truncated.jsonl             prompts longer than the text encoder takes
      summary.json                all of it in numbers

Each file is written whole or not at all; a second call does only what is missing or damaged, and refuses a table or an
image whose content is not what it was. Several processes share the shards, started here (`num_processes`) or by
`accelerate launch`. Images are put on white where they are transparent; `summary.json` counts those.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from dkto.common.files import claim, file_sha256, read_json, write_atomically, write_json, write_records
from dkto.common.frames import read_frame, write_frame
from dkto.common.names import check_choice
from dkto.common.processes import sole_writer, worker_pool
from dkto.common.progress import progress
from dkto.common.settings import checked_number
from dkto.common.tensors import write_tensors
from dkto.data.decode import DECODING_THREADS, decoded
from dkto.data.encoded import (
    PROMPT_SETS,
    csft_set,
    model_fingerprint,
    open_shard,
    read_about,
    row_checksum,
    rows_of_shard,
    shard_notes,
    shard_numbers,
    shard_path,
)
from dkto.data.feedback import FeedbackTable
from dkto.data.images import open_image
from dkto.data.tables import open_parquet
from dkto.models import SMALL_WORLD, DiffusionModel, load_model
from dkto.models.base import EXAMPLE, cut_sentence
from dkto.objective.methods import CSFT_PREFIXES

LOOKED_AT = 64  # images whose size is looked at where no model is given
SHARD_ROWS = 512
PROMPT_SHARD_ROWS = 512


def prepare_feedback(
    feedback: FeedbackTable,
    output_dir: str | Path,
    model: str = "",
    *,
    batch_size: int = 16,
    flip: bool = False,
    csft: str | None = None,
    strict: bool = False,
    num_processes: int = 1,
) -> Path:
    """Encode the images and prompts of a feedback table with a model's VAE and text encoder.

    Images that cannot be read are set aside in `skipped.jsonl`; prompts longer than the text encoder
    takes are cut by it and listed in `truncated.jsonl`. A warning counts both.

    Args:
        output_dir: folder for the encoded data, which is returned; completed shards in it are kept.
        model: "small-world", a diffusers pipeline folder or a hub id. Left out, it is the small world, whose images
            have 64 x 64 pixels: much larger ones are refused.
        batch_size: images per pass of the VAE.
        flip: encode each image mirrored as well, for training that flips at random.
        csft: also encode the prompts for the objective "csft", in a style of `CSFT_PREFIXES`; may be asked
            for later as well.
        strict: raise at the first image that cannot be read.
        num_processes: processes that share the work, over the GPUs if there are any.

    Raises:
        ValueError: if `model` is left out and the images are large, no image can be read or, with `strict`, one of
            them cannot (the sentence names it), or the folder holds the encoding of other feedback, of images that
            have changed since, or of another model.
        BlockingIOError: if another call writes there.
    """
    if csft is not None:
        check_choice("csft", csft, CSFT_PREFIXES)
    if len(feedback) == 0:
        raise ValueError("feedback must hold at least one image to encode, got none")
    batch_size = checked_number("batch_size", batch_size, least=1)
    num_processes = checked_number("num_processes", num_processes, least=0)
    model = model or _small_enough(feedback)
    output_dir, launch = Path(output_dir), _Launch()
    if launch.count > 1 and num_processes > 1:
        raise ValueError(f"num_processes must be 1 among {launch.count} launched processes, got {num_processes}")
    with sole_writer(output_dir) if launch.rank == 0 else nullcontext():
        if launch.rank == 0:
            _write_plan(feedback, output_dir, model, flip)
        launch.wait()
        job = _Job(output_dir, model, batch_size, strict)
        # every count-th task, done or not: the shares stay the same while others work on theirs
        mine = _all_tasks(output_dir, csft)[launch.rank :: launch.count]
        tasks = [task for task in mine if not _is_whole(output_dir, job.about, task)]
        for _ in progress(job.encode(tasks, num_processes), total=len(tasks), desc="encoding", unit="shard"):
            pass
        launch.wait()
        if launch.rank == 0:
            _finish(feedback, output_dir, strict)
        launch.wait()
    return output_dir


def shuffle_prepared(folder: str | Path, output_dir: str | Path, *, seed: int = 0) -> Path:
    """Prepared feedback with its likes permuted: the control that carries no preference. Nothing is encoded again.

    What was held out is permuted by itself, in `output_dir/held_out`.

    Args:
        folder: written by `prepare_feedback`.
        output_dir: folder for the control, which is returned; it shares the encoded files, as links where it can.
        seed: of the permutation.

    Raises:
        FileNotFoundError: if a file of the prepared folder is missing.
        ValueError: if one is damaged, or the other folder holds something else.
    """
    folder, output_dir = Path(folder), Path(output_dir)
    about = read_json(folder / "prepared.json", "record of prepared feedback", ["feedback"])
    name = hashlib.sha256(f"{about['feedback']} shuffled {seed}".encode()).hexdigest()[:16]
    with sole_writer(output_dir):
        claim(output_dir / "prepared.json", about | {"feedback": name}, "prepared feedback")
        for path in (*folder.glob("*.safetensors"), folder / "prompts.parquet"):
            if not (target := output_dir / path.name).exists():
                write_atomically(target, lambda part, path=path: _link_or_copy(path, part))
        kinds = {"is_desirable": "boolean", "prompt_id": "integer", "row": "integer", "weight": "floating"}
        frame, _ = read_frame(folder / "index.parquet", "index", kinds, ("weight",))
        order = np.random.default_rng(seed).permutation(len(frame))
        for column in {"is_desirable", "weight"} & set(frame):  # what a judgement says
            frame[column] = frame[column].to_numpy()[order]
        write_atomically(output_dir / "pairs.npy", lambda path: _save_array(np.zeros((0, 2), np.int64), path))
        write_frame(output_dir / "index.parquet", frame, {"pairs": file_sha256(output_dir / "pairs.npy")})
        write_json(output_dir / "summary.json", read_json(folder / "summary.json", "summary") | {"pairs": 0})
    if (folder / "held_out" / "prepared.json").is_file():
        shuffle_prepared(folder / "held_out", output_dir / "held_out", seed=seed)
    return output_dir


def _link_or_copy(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(path, target)


class _Launch:
    """This process among those of `accelerate launch` or `torchrun`; alone outside of them."""

    def __init__(self) -> None:
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", 1)), 0
        self.wait = lambda: None
        if self.count > 1:
            from accelerate import PartialState

            self.rank = int(os.environ.get("RANK", 0))
            self.wait = PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone


def _small_enough(feedback: FeedbackTable) -> str:
    """The small world, if most of the images are not much larger than its own; looks at the size of some of them."""
    sides, own = [], load_model(SMALL_WORLD).image_size
    for row in np.unique(np.linspace(0, len(feedback) - 1, LOOKED_AT).astype(int)):
        with suppress(ValueError, FileNotFoundError), open_image(feedback.images[row], "") as image:
            sides.append(min(image.size))
    if (side := int(np.median(sides or [0]))) > 2 * own:
        raise ValueError(
            f"model must be given, as {EXAMPLE}, for images of {side} pixels on the shorter side: left out, it is "
            f"{SMALL_WORLD!r}, which would shrink them to {own}"
        )
    return SMALL_WORLD


def _write_plan(feedback: FeedbackTable, folder: Path, source: str, flip: bool) -> None:
    """What is to be encoded, as files that any process reads its share of; row groups are shards."""
    model = load_model(source)
    prompts = list(dict.fromkeys(["", *feedback.prompts]))
    about = {
        "model": model_fingerprint(model),
        "image_size": model.image_size,
        "rows": len(feedback),
        "prompts": len(prompts),
        "shard_rows": SHARD_ROWS,
        "prompt_shard_rows": (prompt_rows := min(PROMPT_SHARD_ROWS, 16 * model.prompts_at_once)),
        "flip": flip,
        **_content(feedback),
    }
    place = str(Path(source).absolute()) if Path(source).is_dir() else source
    claim(folder / "prepared.json", about, "encoded feedback", {"source": place})
    number = {prompt: index for index, prompt in enumerate(prompts)}
    frame = feedback.to_frame().assign(prompt_id=np.array([number[p] for p in feedback.prompts], np.int32))
    for name, table, rows in (
        ("feedback.parquet", pa.Table.from_pandas(frame, preserve_index=False), SHARD_ROWS),
        ("prompts.parquet", pa.table({"prompt": prompts}), prompt_rows),
    ):
        write_atomically(folder / name, lambda path, t=table, n=rows: pq.write_table(t, path, row_group_size=n))


def _content(feedback: FeedbackTable) -> dict[str, str]:
    """Hashes of the images' bytes, and of the whole table with them."""
    images = list(dict.fromkeys(feedback.images))
    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        found = pool.map(lambda path: file_sha256(path) if path.is_file() else "-", images)
        hashes = dict(zip(images, progress(found, total=len(images), desc="hashing", unit="image"), strict=True))
    content = hashlib.sha256("".join(hashes[image] for image in feedback.images).encode())
    digest = hashlib.sha256(feedback.is_desirable.tobytes())
    for image, prompt in zip(feedback.images, feedback.prompts, strict=True):
        digest.update(f"{image.name}\0{hashes[image]}\0{prompt}\0".encode())
    digest.update(np.ascontiguousarray(feedback.pairs, np.int64).tobytes())
    if feedback.weights is not None:
        digest.update(np.ascontiguousarray(feedback.weights, np.float64).tobytes())
    return {"images": content.hexdigest()[:16], "feedback": digest.hexdigest()[:16]}


def _all_tasks(folder: Path, csft: str | None) -> list[tuple[str, int]]:
    """Every shard that should be there: its set and number."""
    about = read_about(folder)
    sets = {"prompts", *_sets_there(folder)} | ({csft_set(csft, liked) for liked in (True, False)} if csft else set())
    return [(kind, n) for kind in (*sorted(sets), "latents") for n in shard_numbers(about, kind)]


def _sets_there(folder: Path) -> list[str]:
    """Sets of prompts that this or a former call asked for."""
    return sorted(kind for kind in PROMPT_SETS if next(folder.glob(f"{kind}-*.safetensors"), None))


def _is_whole(folder: Path, about: dict, task: tuple[str, int]) -> bool:
    """Whether a shard is there with all that it should hold; a power cut may have left it empty."""
    try:
        _read_notes(folder, about, *task)
    except (FileNotFoundError, ValueError):
        return False
    return True


@dataclass
class _Job:
    """A model's VAE and text encoder, loaded when first needed, with the folder that they fill."""

    folder: Path
    source: str
    batch_size: int
    strict: bool
    device: str = ""

    def encode(self, tasks: list[tuple[str, int]], processes: int) -> Iterator[None]:
        """Encode the shards one after another, or in several processes that each take the next one."""
        if min(processes, len(tasks)) < 2:
            yield from map(self.run, tasks)
            return
        threads = max(1, (os.cpu_count() or 1) // processes)
        with worker_pool(processes, _start_worker, (self,), threads) as pool:
            yield from pool.map(_work, tasks)

    def run(self, task: tuple[str, int]) -> None:
        """Encode one shard into its file."""
        kind, number = task
        shard, notes = (self._latents if kind == "latents" else self._prompts)(kind, number)
        notes["checks"] = {name: list(map(row_checksum, values)) for name, values in shard.items()}
        metadata = {"notes": json.dumps(notes)}  # one entry: several would come in any order
        write_tensors(shard_path(self.folder, kind, number), shard, metadata)

    @cached_property
    def about(self) -> dict:
        return read_about(self.folder)

    @cached_property
    def model(self) -> DiffusionModel:
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return load_model(self.source)

    @cached_property
    def vae(self) -> nn.Module:
        self.__dict__.pop("text", None)  # which is done by now, and would take the memory of the images
        return self.model.load_vae().to(self.device)

    @cached_property
    def text(self) -> tuple:
        """What the model's `load_text` gives: tokenizer and encoder, or several of each."""
        parts = self.model.load_text(self.device)
        for part in _flat(parts):
            if isinstance(part, nn.Module):
                part.to(self.device)
        return parts

    def _prompts(self, kind: str, number: int) -> tuple[dict[str, Tensor], dict]:
        prompts = [PROMPT_SETS[kind] + prompt for prompt in self._planned("prompts.parquet", number, "prompt")]
        model, parts = self.model, []
        for start in range(0, len(prompts), model.prompts_at_once):
            found = model.encode_prompts(*self.text, prompts[start : start + model.prompts_at_once])
            parts.append({name: values.to(model.prompt_dtype).cpu() for name, values in found.items()})
        shard = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
        return shard, {"rows": model.cut_prompts(prompts, _flat(self.text[:1])), "on_white": 0}

    def _latents(self, kind: str, number: int) -> tuple[dict[str, Tensor], dict]:
        rows = self._planned("feedback.parquet", number, "image")
        paths = list(dict.fromkeys(rows))  # of an image that was compared several times, one is encoded
        shard: dict[str, Tensor] = {"sizes": torch.zeros(len(paths), 4, dtype=torch.int32)}
        reasons: dict[str, str] = {}
        transparent: set[str] = set()
        for start, batch in decoded(paths, self.model.image_size, self.batch_size):
            good = [start + i for i, (pixels, *_) in enumerate(batch) if pixels is not None]
            reasons |= {paths[start + i]: why for i, (pixels, why, _) in enumerate(batch) if pixels is None}
            transparent |= {paths[start + i] for i, (*_, on_white) in enumerate(batch) if on_white}
            self._refuse(reasons)
            if not good:
                continue
            pixel_values = torch.stack([pixels for pixels, *_ in batch if pixels is not None]).to(self.device)
            shard["sizes"][good] = torch.tensor([about for pixels, about, _ in batch if pixels is not None]).int()
            for prefix in ("", "flipped_") if self.about["flip"] else ("",):
                side = pixel_values.flip(-1) if prefix else pixel_values
                for name, values in zip(("mean", "std"), self.model.encode_images(self.vae, side), strict=True):
                    whole = shard.setdefault(prefix + name, torch.zeros(len(paths), *values.shape[1:]).half())
                    whole[good] = values.half().cpu()
        reasons |= {paths[i]: f"image {paths[i]}: the VAE's output is not finite" for i in _not_finite(shard)}
        self._refuse(reasons)
        place = {path: i for i, path in enumerate(paths)}
        index = torch.tensor([place[path] for path in rows])
        notes = [(row, reasons[path]) for row, path in enumerate(rows) if path in reasons]
        on_white = sum(path in transparent and path not in reasons for path in rows)
        return {name: values[index] for name, values in shard.items()}, {"rows": notes, "on_white": on_white}

    def _planned(self, name: str, number: int, column: str) -> list[str]:
        """A column of the rows of one shard, in a file of `_write_plan`."""
        with open_parquet(self.folder / name, str(self.folder / name)) as file:
            return file.read_row_group(number, [column])[column].to_pylist()

    def _refuse(self, reasons: dict[str, str]) -> None:
        if reasons and self.strict:
            raise ValueError(next(iter(reasons.values())))


_worker_job: _Job | None = None


def _start_worker(job: _Job) -> None:
    global _worker_job
    if torch.cuda.is_available():
        number = int(multiprocessing.current_process().name.rpartition("-")[2])  # workers are numbered in turn
        job.device = f"cuda:{number % torch.cuda.device_count()}"
    _worker_job = job


def _work(task: tuple[str, int]) -> None:
    _worker_job.run(task)


def _not_finite(shard: dict[str, Tensor]) -> list[int]:
    values = [tensor for tensor in shard.values() if tensor.is_floating_point()]
    finite = [tensor.flatten(1).isfinite().all(1) for tensor in values]
    return torch.nonzero(~torch.stack(finite).all(0)).flatten().tolist() if finite else []


def _flat(parts: object) -> Iterator:
    yield from chain.from_iterable(map(_flat, parts)) if isinstance(parts, tuple | list) else (parts,)


def _read_notes(folder: Path, about: dict, kind: str, number: int) -> tuple[list[tuple[int, str]], int]:
    """A shard's notes on its rows, by their numbers in the table, and how many images in it were put on white."""
    path = shard_path(folder, kind, number)
    first = number * about["shard_rows" if kind == "latents" else "prompt_shard_rows"]
    shard = open_shard(path, rows_of_shard(about, kind, number))
    told = shard_notes(path, shard)
    try:
        return [(first + int(row), str(text)) for row, text in told["rows"]], int(told["on_white"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not say what became of its rows ({error}): remove it") from error


def _notes(folder: Path, about: dict, kind: str) -> tuple[dict[int, str], int]:
    found = [_read_notes(folder, about, kind, number) for number in shard_numbers(about, kind)]
    return dict(chain.from_iterable(notes for notes, _ in found)), sum(on_white for _, on_white in found)


def _finish(feedback: FeedbackTable, folder: Path, strict: bool) -> None:
    """Gather the shards' notes on their rows, and write the index of those that can be trained on."""
    about = read_about(folder)
    reasons, on_white = _notes(folder, about, "latents")
    kept = np.setdiff1d(np.arange(len(feedback)), list(reasons)).astype(np.int32)
    lines = [{"row": row + 1, "image": str(feedback.images[row]), "reason": why} for row, why in reasons.items()]
    write_records(folder / "skipped.jsonl", [*feedback.set_aside, *lines])
    cut = [(kind, row, text) for kind in _sets_there(folder) for row, text in _notes(folder, about, kind)[0].items()]
    write_records(folder / "truncated.jsonl", [{"set": k, "prompt_id": row, "tokens": text} for k, row, text in cut])
    if reasons and (strict or not len(kept)):
        raise ValueError(f"{len(reasons)} of {len(feedback)} images cannot be used; the first: {lines[0]['reason']}")
    columns = {"is_desirable": "boolean", "prompt_id": "integer", "weight": "floating"}
    frame, _ = read_frame(folder / "feedback.parquet", "plan of what is prepared", columns, ("weight",))
    frame = frame.iloc[kept].assign(row=kept)
    pairs = feedback.subset(kept).pairs if reasons else feedback.pairs
    write_atomically(folder / "pairs.npy", lambda path: _save_array(pairs, path))
    write_frame(folder / "index.parquet", frame, {"pairs": file_sha256(folder / "pairs.npy")})
    truncated = len({row for _, row, _ in cut})
    skipped = len(feedback.set_aside) + len(reasons)
    summary = {"rows": len(kept) + skipped, "kept": len(kept), "skipped": skipped, "pairs": len(pairs)}
    summary |= {"desirable": int(frame["is_desirable"].sum()), "prompts": about["prompts"], "truncated": truncated}
    summary |= {"composited on white": on_white}
    write_json(folder / "summary.json", summary)
    if reasons:
        text = f"{len(reasons)} of {len(feedback)} images are set aside, see {folder / 'skipped.jsonl'}"
        warnings.warn(text, stacklevel=3)
    if cut:
        warnings.warn(cut_sentence(truncated, about["prompts"], folder / "truncated.jsonl"), stacklevel=3)


def _save_array(values: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, values)
