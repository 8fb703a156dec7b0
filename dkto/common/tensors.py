"""Tensors on disk: safetensors files that are whole or absent, read as data, and known again by a hash."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dkto.common.files import refuse_other_than_file, write_atomically
from dkto.common.names import SHOWN, printable, shown

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS, BLOCK_BYTES = 256, 4096  # of a file that its fingerprint reads


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all, readable by whom the umask lets read.

    Raises:
        OSError: if it cannot be written, for instance on a full disk; the sentence names the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        write_atomically(path, lambda part: save_file(held, part, metadata))
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def read_tensors(path: Path, what: str) -> "dict[str, Tensor]":
    """The tensors in a safetensors file that should hold a `what`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is cut or damaged; the sentence names the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_header(path, what)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        text = printable(error, 200)
        raise ValueError(f"{path} holds no {what} that can be read ({text}): remove it, or write it again") from error


def check_tensors(
    path: Path, what: str, shapes: Mapping[str, list[int]] | None = None, dtype: str | None = None
) -> dict[str, list[int]]:
    """The shapes of the tensors in a safetensors file, which is read tensor by tensor.

    Args:
        path, what: as in `read_tensors`.
        shapes: what it should hold, if that is known.
        dtype: the type of each tensor in the format's words, such as "F32", if that is known.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is cut or damaged, holds other tensors, or one that is not finite or of another type.
    """
    from safetensors import SafetensorError, safe_open

    check_header(path, what)
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            bad = [name for name in found if not bool(file.get_tensor(name).isfinite().all())]
            types = {name: file.get_slice(name).get_dtype() for name in found}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} holds no {what} that can be read ({printable(error, 200)})") from error
    if bad:
        raise ValueError(f"{path} holds no {what}: {shown(bad[0])} is not finite")
    if other := [name for name in found if dtype not in (None, types[name])]:
        raise ValueError(f"{path} holds no {what}: {shown(other[0])} should be {dtype}, got {types[other[0]]}")
    if shapes is not None and found != shapes:
        other = next(name for name in sorted(found.keys() | shapes.keys()) if found.get(name) != shapes.get(name))
        raise ValueError(
            f"{path} holds no {what}: {shown(other)} should have shape {shapes.get(other)}, got {found.get(other)}"
        )
    return found


def check_header(path: Path, what: str) -> int:
    """Length in bytes of a safetensors file's header, its own eight bytes apart.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is shorter than what it says; the sentence names it.
    """
    refuse_other_than_file(path, f"file of {what}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected a file of {what}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(
            f"{path} holds no {what} that can be read (it has {size} bytes, and its header should have {length}): "
            "remove it, or write it again"
        )
    return length


def check_finite_weights(tensors: "Mapping[str, Tensor]", place: object) -> None:
    """Refuse weights that are not finite; the sentence names the first."""
    import torch

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float64)):
            raise ValueError(f"{place} holds weights that are not finite, first in {shown(name)}: get the file again")


def check_fits(stored: "Mapping[str, Tensor]", own: "Mapping[str, Tensor]", place: object, what: str) -> None:
    """Refuse weights that lack a tensor of a `what`'s `own`, have one more, one of another shape, or not finite."""
    given, wanted = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (stored, own))
    if wrong := sorted(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name)):
        raise ValueError(
            f"{place} does not fit {what}: {len(wrong)} of {len(wanted)} names differ, first {wrong[0][: SHOWN * 2]} "
            f"(expected {wanted.get(wrong[0], 'nothing')}, got {given.get(wrong[0], 'nothing')})"
        )
    check_finite_weights(stored, place)


def weights_variant(folder: Path) -> str | None:
    """Which files of a part are read: those without a variant, else fp16's, else those of the only variant there is.

    Raises:
        ValueError: if the folder holds no safetensors weights under the names of diffusers or transformers.
    """
    pattern = re.compile(r"(?:diffusion_pytorch_|adapter_)?model(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors")
    found = {match[1] for path in folder.glob("*.safetensors") if (match := pattern.fullmatch(path.name))}
    if not found or (len(found) > 1 and not found & {None, "fp16"}):
        kinds = ", ".join(sorted(map(str, found))) or "no safetensors weights"
        raise ValueError(f"{folder} must hold model weights as .safetensors, found {kinds}; pickles are not loaded")
    return None if None in found else "fp16" if "fp16" in found else next(iter(found))


def weight_files(folder: Path) -> list[Path]:
    """The files that a part's weights are read from; see `weights_variant`."""
    ending = f".{weights_variant(folder)}"
    return [
        path
        for path in sorted(folder.glob("*.safetensors"))
        if (ending in path.name if ending != ".None" else path.name.count(".") == 1)
    ]


def weights_fingerprint(files: Iterable[Path]) -> str:
    """Hash over safetensors files in this order, the same wherever the folders lie that hold their folders.

    Of each file it reads the size, the header with every tensor's name and shape, and 256 blocks spread evenly over
    it, so that models of many gigabytes cost no wait.

    Raises:
        ValueError: if a file is cut short within its header.

    >>> len(weights_fingerprint([]))
    16
    """
    digest = hashlib.sha256()
    for path in files:
        header, size = check_header(path, "weights"), path.stat().st_size
        digest.update(f"{path.parent.name}/{path.name}/{size}".encode())
        with path.open("rb") as file:
            file.seek(8)
            digest.update(file.read(header + 8))
            for start in np.linspace(0, max(0, size - BLOCK_BYTES), BLOCKS).astype(int):
                file.seek(int(start))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]
