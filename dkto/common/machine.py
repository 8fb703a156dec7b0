"""The machine and the software that a result was computed with, for its record."""

import os
import platform
import resource
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

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
    here = str(Path(__file__).parent)
    return said("git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


def said(*command: str) -> str:
    """What a program prints; nothing if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


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
    return said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor() or "unknown"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def peak_memory_mb() -> float:
    """Most resident memory that this program ever held, MB of 2^20 bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux getrusage begins with what the program held that started this one
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return largest_resident_mb(resource.RUSAGE_SELF)


def largest_resident_mb(who: int) -> float:
    """The largest resident set that `getrusage` knows of, MB of 2^20 bytes; RUSAGE_CHILDREN: of one that has ended."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(who).ru_maxrss * unit / 2**20
