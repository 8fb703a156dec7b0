"""What a page takes from elsewhere: onnxruntime for browsers, from npm, known by its hash and kept in a cache."""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dkto.common.files import write_atomically
from dkto.common.names import one_line

CACHE = Path(__file__).parents[2] / "papermill_runs" / "outputs" / "npm"


@dataclass(frozen=True)
class Package:
    """A package of npm at one version, and the SHA-256 of its archive."""

    name: str
    version: str
    sha256: str

    @property
    def archive(self) -> str:
        """The file that npm makes of it."""
        return f"{self.name}-{self.version}.tgz"


ONNXRUNTIME = Package("onnxruntime-web", "1.30.0", "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71")
AXE = Package(
    "axe-core", "4.14.1", "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745"
)  # of the tests: checks of accessibility


def package_file(package: Package, name: str, cache: Path = CACHE) -> bytes:
    """A file of a package; the package is fetched once, by npm.

    Raises:
        FileNotFoundError: if it is not in the cache and cannot be fetched, with what to do.
        ValueError: if the archive is another than the pinned one.
    """
    archive = cache / package.archive
    if not archive.is_file():
        _fetch(package, archive)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(f"{archive} must have SHA-256 {package.sha256}, got {found}: remove it and rerun")
    with tarfile.open(archive) as files:
        return files.extractfile(f"package/{name}").read()


def _fetch(package: Package, archive: Path) -> None:
    wanted = f"{package.name}@{package.version}"
    if not shutil.which("npm"):
        raise FileNotFoundError(
            f"{archive} is missing, and npm, which fetches {wanted}, is not installed: install Node.js"
        )
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", wanted, "--silent", "--pack-destination", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        fetched = Path(folder) / package.archive
        if done.returncode or not fetched.is_file():
            raise FileNotFoundError(
                f"{archive} is missing, and npm could not fetch {wanted} ({one_line(done.stderr)}): "
                "rerun with a network, or put the archive there"
            )
        write_atomically(archive, lambda part: shutil.copyfile(fetched, part))
