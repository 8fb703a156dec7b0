"""Likes and dislikes as one table: image, prompt, is_desirable, and the pair they came from where known.

Three sources are read: a CSV, JSONL or Parquet file with the columns `image`, `prompt` and `liked`;
a folder with the sub-folders `liked/` and `disliked/`; or lists made in a notebook. Whatever the
source, each image stays in its folder: a file name that points outside is refused.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

COLUMN_ALIASES = {"file_name": "image", "caption": "prompt", "is_desirable": "liked", "label": "liked"}
LIKED = frozenset({"1", "1.0", "true", "like", "liked"})
DISLIKED = frozenset({"0", "0.0", "false", "dislike", "disliked"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
MAX_PIXELS = 64_000_000  # an image larger than this is refused before it is decoded


@dataclass(frozen=True)
class FeedbackTable:
    """Binary feedback on single images.

    Attributes:
        images: absolute path of each image, one per row.
        prompts: the prompt of each image.
        is_desirable: (N,) bool, True where the image was liked.
        pair_ids: (N,) int, equal for the images of one comparison; -1 where there was none.
    """

    images: tuple[Path, ...]
    prompts: tuple[str, ...]
    is_desirable: np.ndarray
    pair_ids: np.ndarray

    def __post_init__(self) -> None:
        sizes = {len(self.images), len(self.prompts), len(self.is_desirable), len(self.pair_ids)}
        if len(sizes) != 1:
            raise ValueError(
                f"images, prompts, is_desirable and pair_ids must have one length, got {len(self.images)}, "
                f"{len(self.prompts)}, {len(self.is_desirable)} and {len(self.pair_ids)}"
            )
        if self.is_desirable.dtype != np.bool_:
            raise ValueError(f"is_desirable must be bool, got {self.is_desirable.dtype}")

    def __len__(self) -> int:
        return len(self.images)

    def __str__(self) -> str:
        liked = int(self.is_desirable.sum())
        return f"{len(self)} images, {liked} liked, {len(self) - liked} disliked, {len(set(self.prompts))} prompts"

    def shuffled_likes(self, seed: int) -> "FeedbackTable":
        """The same images with their likes permuted: the control that carries no preference."""
        order = np.random.default_rng(seed).permutation(len(self))
        return FeedbackTable(self.images, self.prompts, self.is_desirable[order], np.full(len(self), -1))

    def to_frame(self) -> pd.DataFrame:
        """As a data frame with the columns image, prompt, is_desirable, pair_id."""
        return pd.DataFrame(
            {
                "image": [str(path) for path in self.images],
                "prompt": self.prompts,
                "is_desirable": self.is_desirable,
                "pair_id": self.pair_ids,
            }
        )


def make_feedback(
    images: Iterable[str | Path], prompts: Iterable[str], liked: Iterable, pair_ids: Iterable[int] | None = None
) -> FeedbackTable:
    """Build a table from lists; `liked` may hold bools, 0/1 or "like"/"dislike".

    >>> str(make_feedback(["a.png", "b.png"], ["a star", "a star"], ["like", "dislike"]))
    '2 images, 1 liked, 1 disliked, 1 prompts'
    """
    paths = tuple(Path(image).absolute() for image in images)
    labels = np.array([_label(value, f"row {row}") for row, value in enumerate(liked)], dtype=bool)
    pairs = np.full(len(paths), -1) if pair_ids is None else np.array(list(pair_ids), dtype=np.int64)
    return FeedbackTable(paths, tuple(prompts), labels, pairs)


def read_feedback(source: str | Path) -> FeedbackTable:
    """Read likes and dislikes from a file or a folder.

    A file (.csv, .jsonl, .parquet) needs the columns `image` (path relative to the file's folder),
    `prompt` and `liked` (0/1, true/false, like/dislike); `file_name`, `caption` and `label` are taken
    as their synonyms; `pair_id` is kept where present. A folder needs `liked/` and `disliked/`; the
    prompt of `x.png` stands in `x.txt` beside it.

    Raises:
        FileNotFoundError: if the source or an image does not exist.
        ValueError: if a column is missing, a label is neither like nor dislike, a prompt is not
            text, a file name leaves its folder, or the table is empty. The message names the row.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"feedback source {source} does not exist")
    table = _read_folder(source) if source.is_dir() else _read_file(source)
    if len(table) == 0:
        raise ValueError(f"{source} holds no feedback: expected at least one image")
    return table


def write_feedback(table: FeedbackTable, path: str | Path) -> Path:
    """Write a table as CSV with image paths relative to the file's folder (inside which they must lie)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    root = path.parent.resolve()
    frame = table.to_frame()
    frame["image"] = [str(image.resolve().relative_to(root)) for image in table.images]
    frame["liked"] = np.where(frame.pop("is_desirable"), "like", "dislike")
    frame[["image", "prompt", "liked", "pair_id"]].to_csv(path, index=False)
    return path


def load_image(path: str | Path) -> Image.Image:
    """Decode one image as RGB.

    Raises:
        ValueError: if the file is no image, is damaged, or has more than `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"image {path} has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"image {path} does not exist") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error


def _label(value: object, where: str) -> bool:
    text = str(value).strip().lower()
    if text in LIKED or text in DISLIKED:
        return text in LIKED
    raise ValueError(f"{where}: liked must be 0/1, true/false or like/dislike, got {value!r}")


def _inside(root: Path, name: object, where: str) -> Path:
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: image must be a file name, got {name!r}")
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"{where}: image {name!r} leaves the folder {root}")
    if not path.is_file():
        raise FileNotFoundError(f"{where}: image {name!r} does not exist in {root}")
    return path


def _read_file(source: Path) -> FeedbackTable:
    frame = _read_frame(source).rename(columns=lambda name: COLUMN_ALIASES.get(str(name), str(name)))
    missing = [column for column in ("image", "prompt", "liked") if column not in frame.columns]
    if missing:
        raise ValueError(
            f"{source} needs the columns image, prompt, liked; missing: {', '.join(missing)}; "
            f"found: {', '.join(map(str, frame.columns))}"
        )
    root = source.parent.resolve()
    images, prompts, labels = [], [], []
    for row, (image, prompt, liked) in enumerate(zip(frame["image"], frame["prompt"], frame["liked"], strict=True)):
        where = f"{source.name}, row {row + 1}"
        images.append(_inside(root, image, where))
        if not isinstance(prompt, str):
            raise ValueError(f"{where}: prompt must be text, got {prompt!r}")
        prompts.append(prompt)
        labels.append(_label(liked, where))
    pairs = frame["pair_id"].to_numpy(np.int64) if "pair_id" in frame else np.full(len(frame), -1)
    return FeedbackTable(tuple(images), tuple(prompts), np.array(labels, dtype=bool), pairs)


def _read_frame(source: Path) -> pd.DataFrame:
    try:
        match source.suffix.lower():
            case ".csv":
                return pd.read_csv(source, dtype={"liked": str, "label": str}, keep_default_na=False)
            case ".jsonl":
                return pd.DataFrame([json.loads(line) for line in source.read_text().splitlines() if line.strip()])
            case ".parquet":
                return pd.read_parquet(source)
    except (ValueError, OSError) as error:
        raise ValueError(f"{source} cannot be read as {source.suffix[1:].upper()}: {error}") from error
    raise ValueError(f"{source} must be a .csv, .jsonl or .parquet file or a folder, got {source.suffix!r}")


def _read_folder(source: Path) -> FeedbackTable:
    images, prompts, labels = [], [], []
    for name in ("liked", "disliked"):
        folder = source / name
        if not folder.is_dir():
            raise ValueError(f"{source} must hold the folders liked/ and disliked/; {name}/ is missing")
        for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES):
            text = path.with_suffix(".txt")
            if not text.is_file():
                raise FileNotFoundError(f"{path} has no prompt: expected it in {text.name} beside the image")
            images.append(_inside(source.resolve(), str(path.relative_to(source)), str(folder)))
            prompts.append(text.read_text().strip())
            labels.append(name == "liked")
    return FeedbackTable(tuple(images), tuple(prompts), np.array(labels, dtype=bool), np.full(len(images), -1))


class BiasedSampler:
    """Draw rows so that a row is desirable with probability `desirable_fraction` (paper 4.3).

    Within a class every row is equally likely. The draw depends only on (seed, step, index in the
    global batch): any rank can compute its share, and a resumed run sees what it would have seen.

    Args:
        is_desirable: (N,) bool.
        desirable_fraction: gamma, in [0, 1]; the paper's best is 0.8.
        seed: non-negative integer.

    Raises:
        ValueError: if gamma is outside [0, 1], or asks for a class that has no row.

    >>> sampler = BiasedSampler(np.array([True, False, False]), desirable_fraction=1.0, seed=0)
    >>> sampler.rows(step=3, batch_size=4).tolist()
    [0, 0, 0, 0]
    """

    def __init__(self, is_desirable: np.ndarray, desirable_fraction: float, seed: int) -> None:
        if not 0 <= desirable_fraction <= 1:
            raise ValueError(f"desirable_fraction must be in [0, 1], got {desirable_fraction}")
        is_desirable = np.asarray(is_desirable)
        self.desirable = np.flatnonzero(is_desirable)
        self.undesirable = np.flatnonzero(~is_desirable)
        for name, rows, wanted in (
            ("liked", self.desirable, desirable_fraction > 0),
            ("disliked", self.undesirable, desirable_fraction < 1),
        ):
            if wanted and len(rows) == 0:
                raise ValueError(
                    f"feedback of one class only: no {name} image among {len(is_desirable)}, "
                    f"but desirable_fraction={desirable_fraction} asks for both"
                )
        self.desirable_fraction, self.seed = desirable_fraction, seed

    def rows(self, step: int, batch_size: int) -> np.ndarray:
        """Row numbers of the whole global batch of one step, (batch_size,) int64."""
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, step]))
        from_desirable = rng.random(batch_size) < self.desirable_fraction
        position = rng.random(batch_size)
        pick = [
            (position * len(rows)).astype(np.int64) if len(rows) else np.zeros(batch_size, np.int64)
            for rows in (self.desirable, self.undesirable)
        ]
        chosen = [rows[p] if len(rows) else p for rows, p in zip((self.desirable, self.undesirable), pick, strict=True)]
        return np.where(from_desirable, *chosen)
