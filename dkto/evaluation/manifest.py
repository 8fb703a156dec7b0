"""What a folder of generated images holds: prompts, seeds, where each image lies. Nothing here draws."""

from collections.abc import Mapping
from pathlib import Path

from dkto.common.files import Fields, check_fields, read_json

MANIFEST = "manifest.json"
MOST = 10**6  # images of one folder
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"


def image_path(folder: Path, prompt_number: int, image_number: int) -> Path:
    """Where the image of one prompt and image number lies."""
    return folder / f"p{prompt_number:05d}-s{image_number}.png"


def is_whole_png(path: Path) -> bool:
    """Whether a PNG is there and has its end: one that a power cut left empty or cut short has not."""
    try:
        with path.open("rb") as file:
            start = file.read(len(PNG_START))
            file.seek(-len(PNG_END), 2)
            return start == PNG_START and file.read() == PNG_END
    except OSError:
        return False


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
    check_fields(found, _MANIFEST_HOLDS, f"{path} is no manifest of generated images")
    if len(found["prompts"]) * found["images_per_prompt"] > MOST:
        raise ValueError(
            f"{path} is no manifest of generated images: images_per_prompt must be at most "
            f"{MOST // len(found['prompts'])} for {len(found['prompts'])} prompts, got {found['images_per_prompt']}"
        )
    return found


def check_comparable(folders: Mapping[str, str | Path]) -> dict:
    """Check that all methods drew the same prompts, number of images and seeds; returns the manifest of the first.

    Raises:
        FileNotFoundError: if a folder holds no images.
        ValueError: if one of the three differs (the sentence names it, and the first prompt that differs), or there is
            no method.
    """
    if not folders:
        raise ValueError("folders must hold at least one method, got none")
    manifests = {name: read_manifest(folder) for name, folder in folders.items()}
    first_name, first = next(iter(manifests.items()))
    for name, other in manifests.items():
        differs = [key for key in ("prompts", "images_per_prompt", "seed") if first[key] != other[key]]
        if differs:
            where = _first_difference(first["prompts"], other["prompts"]) if differs[0] == "prompts" else ""
            raise ValueError(
                f"{folders[first_name]} and {folders[name]} cannot be compared: {', '.join(differs)} differ{where}"
            )
    return first


def _first_difference(ours: list[str], theirs: list[str]) -> str:
    if len(ours) != len(theirs):
        return f" ({len(ours)} and {len(theirs)} prompts)"
    row = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
    return f" (first at prompt {row}: {ours[row]!r} and {theirs[row]!r})"


_MANIFEST_HOLDS: Fields = {
    "prompts": (lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value), "a list of texts"),
    "images_per_prompt": (lambda value: type(value) is int and value > 0, "a number of at least 1"),
    "seed": (lambda value: type(value) is int, "a whole number"),
}
