"""What a run leaves behind: `run.json` once, `metrics.jsonl` line by line, both readable by anything."""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from PIL import Image

PACKAGES = ("dkto", "torch", "diffusers", "transformers", "accelerate", "peft")


def versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on, and of Python."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with -dirty after changes; None without one or git."""
    if shutil.which("git") is None:
        return None
    here = Path(__file__).parent
    call = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    result = subprocess.run(call, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def hardware() -> dict[str, str | int | float]:
    """This machine, without loading torch: processor, cores, memory, accelerators and those that are hidden."""
    found = {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerators": ", ".join(accelerators()) or "none",
    }
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else found | {"visible_accelerators": visible or "none"}


def accelerators() -> list[str]:
    """Names of this machine's CUDA devices, from torch where it is loaded, from nvidia-smi otherwise."""
    if "torch" in sys.modules:
        cuda = sys.modules["torch"].cuda
        return [cuda.get_device_name(i) for i in range(cuda.device_count())]
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    call = [command, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor() or "unknown"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def peak_memory_mb() -> float:
    """Most resident memory that this program ever held, MB of 2^20 bytes.

    On Linux by /proc: getrusage there begins with what the program held that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return largest_resident_mb(resource.RUSAGE_SELF)


def largest_resident_mb(who: int) -> float:
    """The largest resident set that `getrusage` knows of, MB of 2^20 bytes.

    Args:
        who: resource.RUSAGE_SELF, or resource.RUSAGE_CHILDREN for the largest of the children that have ended.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(who).ru_maxrss * unit / 2**20


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a neighbour of `path`, then rename it: `path` is whole or absent, whoever else writes it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    write(part)
    part.replace(path)


def write_png(path: Path, image: "Image.Image") -> None:
    """Write a picture whole or not at all."""
    write_atomically(path, lambda part: image.save(part, format="PNG"))


def write_json(path: Path, values: dict) -> None:
    """Write JSON whole or not at all."""
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda part: part.write_text(text))


def read_json(path: Path, what: str, keys: Iterable[str] = ()) -> dict:
    """The object in a JSON file.

    Args:
        path: the file.
        what: what the file should be, for the sentence of an error.
        keys: what it must hold.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no JSON, no object, or lacks a key; the sentence names the file.

    >>> read_json(Path(__file__), "record of a run")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ...records.py is no record of a run: Extra data: line 1 column 3 (char 2)
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no {what}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no {what}: expected an object, got {found!r:.80}")
    for key in keys:
        if key not in found:
            raise ValueError(f"{path} is no {what}: {key} is missing")
    return found


def claim(path: Path, about: dict, what: str) -> None:
    """Mark a folder by a JSON file that says what it holds, or check that it holds just that.

    Raises:
        ValueError: if the folder was claimed for something else, or the file cannot be read; the sentence names what
            differs.
    """
    if not path.exists():
        write_json(path, about)
        return
    stored = read_json(path, f"record of what {path.parent} holds")
    differs = [key for key in about if stored.get(key) != about[key]]
    if differs:
        raise ValueError(
            f"{path.parent} holds {what} of another run ({', '.join(differs)} differ): choose another folder"
        )


def read_records(path: str | Path) -> list[dict]:
    """The step records of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    records = []
    for line in Path(path).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def keep_records(path: Path, last_step: int) -> None:
    """Drop the records after `last_step`: a resumed run writes them again."""
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in read_records(path) if record["global_step"] <= last_step]
    write_atomically(path, lambda part: part.write_text("".join(kept)))
