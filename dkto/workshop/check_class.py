"""Is this machine ready for the class? `make check-class` says so, one line a check, in under a minute."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from re import match

import psutil

from dkto.common.names import shown

ROOT = Path(__file__).parents[2]
LEAST_PYTHON = (3, 11)
LEAST_DISK, LEAST_MEMORY = 2.0, 1.5  # GB: what a class leaves on disk, and what the largest of its lessons needs
PATIENCE = 45  # seconds for JupyterLab, then for its kernel
DEFAULTS = ("papermill_runs/paper_settings.json", "papermill_runs/reference/sweep")  # what lessons read unless asked
SETUP = "call make setup"


def python() -> str:
    """Python's version, which must be 3.11 or newer."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < LEAST_PYTHON:
        raise RuntimeError(f"expected Python 3.11 or newer, got {found}: call make PYTHON=/path/to/python3.11 setup")
    return found


def packages() -> str:
    """Every package that the lessons need is installed; those of another version than the pinned one are counted."""
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split() if "==" in line
    )
    needed = [match(r"[\w.-]+", line)[0] for line in requires("dkto") or () if "extra ==" not in line]
    missing, other = [], []
    for name in needed:
        try:
            if version(name).partition("+")[0] != pins.get(name, version(name)):
                other.append(name)
        except PackageNotFoundError:
            missing.append(name)
    if missing or not needed:
        raise RuntimeError(f"expected the packages of pyproject.toml, got none of {shown(', '.join(missing))}: {SETUP}")
    return f"{len(needed)} installed" + (f", other versions than tested: {', '.join(other)}" if other else "")


def room(folder: Path = ROOT) -> str:
    """Free disk and free memory."""
    disk, memory = shutil.disk_usage(folder).free / 1e9, psutil.virtual_memory().available / 1e9
    for what, found, least in (("disk", disk, LEAST_DISK), ("memory", memory, LEAST_MEMORY)):
        if found < least:
            raise RuntimeError(f"expected {least:g} GB of free {what}, got {found:.1f}: close or remove something")
    return f"{disk:.0f} GB of disk and {memory:.1f} GB of memory are free"


def weights() -> str:
    """The shipped model loads and draws one image that shows what its prompt asks."""
    import numpy as np

    from dkto.models.system import System, draw, noise_generator
    from dkto.world.truth import judge

    prompt, system, began = "an icon of a large red star on a navy background", System(), time.monotonic()
    (image,) = draw(system.load(), [prompt], [noise_generator(0, 0, 0)], system)
    fidelity = judge(np.asarray(image), prompt)["fidelity"]
    if fidelity < 0.5:
        raise RuntimeError(f"expected an image of {shown(prompt)}, got another (fidelity {fidelity:.2f}): {SETUP}")
    return f"loaded, and drew an image in {time.monotonic() - began:.0f} s"


def lab() -> str:
    """JupyterLab starts as `make lab` starts it, and a kernel of a lesson finds what lessons read by default."""
    with tempfile.TemporaryDirectory() as folder:
        token, runtime = secrets.token_hex(16), Path(folder) / "runtime"
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0"]
        command += [f"--IdentityProvider.token={token}", "--allow-root", str(ROOT / "notebooks")]
        places = {"JUPYTER_RUNTIME_DIR": str(runtime), "JUPYTER_CONFIG_DIR": str(Path(folder) / "config")}
        with (Path(folder) / "log").open("wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | places)
        try:
            address = _address(server, runtime, Path(folder) / "log")
            lesson = {"path": "61_teach_by_likes.ipynb", "name": "", "type": "notebook", "kernel": {"name": "python3"}}
            ask = urllib.request.Request(
                f"{address}api/sessions?token={token}",
                json.dumps(lesson).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(ask, timeout=PATIENCE) as answer:
                kernel = json.load(answer)["kernel"]["id"]
            return _in_kernel(runtime / f"kernel-{kernel}.json")
        finally:
            server.terminate()
            server.wait(30)


def _address(server: subprocess.Popen, runtime: Path, log: Path) -> str:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and server.poll() is None:
        for about in runtime.glob("jpserver-*.json"):
            with contextlib.suppress(ValueError, OSError):  # the file is being written, or nobody listens yet
                url = json.loads(about.read_text(encoding="utf-8"))["url"]
                urllib.request.urlopen(f"{url}api", timeout=PATIENCE).close()
                return url
        time.sleep(0.2)
    last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"])[-1]
    raise RuntimeError(f"expected JupyterLab to start within {PATIENCE} s, its last line is {shown(last)}: {SETUP}")


def _in_kernel(connection: Path) -> str:
    from jupyter_client import BlockingKernelClient

    client = BlockingKernelClient(connection_file=str(connection))
    client.load_connection_file()
    client.start_channels(hb=False)  # on a busy machine a late heartbeat would count as death
    try:
        client.wait_for_ready(timeout=PATIENCE)
        code = f"from dkto.runs import project_path\nprint(all(project_path(p).exists() for p in {DEFAULTS!r}))"
        said: list[str] = []
        client.execute_interactive(
            code, timeout=PATIENCE, output_hook=lambda message: said.append(str(message["content"].get("text", "")))
        )
    finally:
        client.stop_channels()
    if "True" not in "".join(said):
        raise RuntimeError(
            f"expected {' and '.join(DEFAULTS)} from a lesson's kernel, got none: open the whole checkout"
        )
    return "JupyterLab starts, and a lesson's kernel finds what it reads"


CHECKS: dict[str, Callable[[], str]] = {
    "Python": python,
    "packages": packages,
    "room": room,
    "model": weights,
    "JupyterLab": lab,
}


def check_class(checks: dict[str, Callable[[], str]] = CHECKS) -> bool:
    """Do all checks, print a line for each, and say whether all are well."""
    well = True
    for name, check in checks.items():
        try:
            print(f"ok    {name}: {check()}", flush=True)
        except Exception as trouble:  # of any kind: the line says what to do, and the other checks follow
            well = False
            print(f"WRONG {name}: {trouble}", flush=True)
    print("ready for the class" if well else "not ready: mend what is WRONG and call make check-class again")
    return well


if __name__ == "__main__":
    sys.exit(not check_class())
