"""Every test runs offline, without a display, from the same seeds; what the machine lacks is skipped, not failed."""

import json
import multiprocessing.process
import os
import random
import shutil
import subprocess

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
# several workers share the cores: what a test starts gets one thread, or all wait for each other
os.environ.update({"OMP_NUM_THREADS": "1"} if "PYTEST_XDIST_WORKER" in os.environ else {})

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_models import (
    make_tiny_klein,
    make_tiny_qwen_image,
    make_tiny_sd,
    make_tiny_sd3,
    make_tiny_sdxl,
    make_tiny_z_image,
)

from dkto.common import quick_nbformat  # noqa: F401, before a test imports nbformat
from dkto.objective.utilities import UTILITIES

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


def pytest_collection_modifyitems(items):
    no_chromium = "" if BROWSER else "chromium is missing: apt-get install chromium"
    lacks = {
        "gpu": "" if torch.cuda.is_available() else "this machine has no gpu",
        "browser": no_chromium,
        "chromium": no_chromium,
    }
    for item in items:
        for name, reason in lacks.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def browser():
    """A real Chromium, one for all tests: Playwright's synchronous interface runs once in a process."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=BROWSER, headless=True, args=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(autouse=True, scope="session")
def processes_are_marked(request):
    """`make check` starts no other process: what would is marked `process`, and fails there without the mark."""
    with pytest.MonkeyPatch.context() as patch:
        if "not process" in request.config.option.markexpr:

            def refuse(self, *arguments, **options):
                raise AssertionError("this test starts a process: mark it with pytest.mark.process")

            patch.setattr(subprocess.Popen, "__init__", refuse)
            patch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
        yield


@pytest.fixture
def one_thread():
    """As many CPU threads as a training that a test starts has, so that the numbers are bitwise the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeds():
    """The global generators start each test at the same place, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


class AroundEveryTest:
    """Around the doctests of the package too, which a fixture of this folder would not reach."""

    @pytest.fixture(autouse=True)
    def known_utilities_are_restored(self):
        """One that a test registers is unknown to the next."""
        before = dict(UTILITIES)
        yield
        UTILITIES.clear()
        UTILITIES.update(before)


def pytest_configure(config):
    config.pluginmanager.register(AroundEveryTest())


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory):
    """A real Stable Diffusion pipeline of a few thousand random weights: 16 px images, 8x8 latents."""
    return make_tiny_sd(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """A real Stable Diffusion XL pipeline of that size."""
    return make_tiny_sdxl(tmp_path_factory.mktemp("tiny-sdxl"))


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory):
    """A real Stable Diffusion 3 pipeline of that size."""
    return make_tiny_sd3(tmp_path_factory.mktemp("tiny-sd3"))


@pytest.fixture(scope="session")
def tiny_qwen_image(tmp_path_factory):
    """A real Qwen-Image pipeline of that size."""
    return make_tiny_qwen_image(tmp_path_factory.mktemp("tiny-qwen-image"))


@pytest.fixture(scope="session")
def tiny_z_image(tmp_path_factory):
    """A real Z-Image pipeline of that size."""
    return make_tiny_z_image(tmp_path_factory.mktemp("tiny-z-image"))


@pytest.fixture(scope="session")
def tiny_klein(tmp_path_factory):
    """A real FLUX.2 klein pipeline of that size: its latents are patches, 4x4."""
    return make_tiny_klein(tmp_path_factory.mktemp("tiny-klein"))


@pytest.fixture(scope="session")
def likes(tmp_path_factory):
    """Twelve pictures: bright ones liked, dark ones disliked."""
    from dkto.data.feedback import make_feedback

    folder = tmp_path_factory.mktemp("likes")
    rng = np.random.default_rng(0)
    paths = []
    for index in range(12):
        level = 200 if index % 2 == 0 else 40
        pixels = np.clip(level + rng.normal(0, 12, (20, 24, 3)), 0, 255).astype(np.uint8)
        paths.append(folder / f"{index:02d}.png")
        Image.fromarray(pixels).save(paths[-1])
    return make_feedback(paths, [f"a picture {i % 3}" for i in range(12)], [i % 2 == 0 for i in range(12)])


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, likes, tiny_pipeline):
    """The twelve pictures, encoded by the tiny pipeline."""
    from dkto.data.encode import prepare_feedback

    return prepare_feedback(likes, tmp_path_factory.mktemp("prepared"), str(tiny_pipeline))


@pytest.fixture(scope="session")
def paired(tmp_path_factory, likes, tiny_pipeline):
    """The twelve pictures as six pairs of a bright and a dark one, encoded by the tiny pipeline."""
    from dkto.data.encode import prepare_feedback
    from dkto.data.feedback import make_feedback

    prompts = [f"a picture {i // 2 % 3}" for i in range(12)]
    table = make_feedback(likes.images, prompts, likes.is_desirable.tolist(), pair_ids=[i // 2 for i in range(12)])
    return prepare_feedback(table, tmp_path_factory.mktemp("paired"), str(tiny_pipeline))


@pytest.fixture(scope="session")
def sparse_copy():
    """`sparse_copy(prepared, target, rows)`: a prepared folder blown up to any number of rows in sparse files."""

    def copy(prepared, target, rows):
        target.mkdir()
        about = json.loads((prepared / "prepared.json").read_text()) | {"rows": rows}
        per_shard = about["shard_rows"]
        (target / "prepared.json").write_text(json.dumps(about))
        for path in prepared.glob("prompts-*"):
            shutil.copy(path, target)
        rng = np.random.default_rng(0)
        index = {
            "is_desirable": rng.random(rows) < 237_530 / 928_068,
            "prompt_id": rng.integers(0, about["prompts"], rows).astype(np.int32),
            "row": np.arange(rows, dtype=np.int32),
        }
        pd.DataFrame(index).to_parquet(target / "index.parquet", index=False)
        np.save(target / "pairs.npy", np.arange(rows // 2 * 2).reshape(-1, 2))
        with safe_open(prepared / "latents-00000.safetensors", framework="pt") as shard:
            shapes = {name: shard.get_slice(name).get_shape()[1:] for name in shard.keys()}  # noqa: SIM118
        for number, start in enumerate(range(0, rows, per_shard)):
            path = target / f"latents-{number:05d}.safetensors"
            _write_sparse(path, shapes, min(per_shard, rows - start))
        return target

    return copy


def _write_sparse(path, shapes, rows):
    header, end = {}, 0
    for name, shape in sorted(shapes.items(), key=lambda item: item[0] != "sizes"):
        kind, width = ("I32", 4) if name == "sizes" else ("F16", 2)
        begin, end = end, end + rows * int(np.prod(shape)) * width
        header[name] = {"dtype": kind, "shape": [rows, *shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture
def config(prepared, tiny_pipeline, tmp_path):
    """A short training of the tiny pipeline."""
    from dkto.training.config import TrainConfig

    return TrainConfig(
        prepared,
        tmp_path / "run",
        model=str(tiny_pipeline),
        beta=500.0,
        learning_rate=1e-3,
        warmup_steps=2,
        max_train_steps=8,
        batch_size=4,
        checkpoint_every=3,
    )
