"""What every command promises of a kill: the next call ends, with the same files, and leaves no `.part`."""

import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dkto.common.files import write_json
from fuzz.crash_points import crash_points, random_kills

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="an operation dies in a fork of this process"),
]
NAMES = ("write_feedback", "study", "unpack", "score", "generate", "prepare", "train LoRA", "train all", "sweep")
QUICK = NAMES[:4]


def draw_folder(folder, level, prompts=4):
    """A folder as `dkto generate` leaves it, of tiny images."""
    folder.mkdir(exist_ok=True)
    about = {"system": {}, "prompts": [f"prompt {p}" for p in range(prompts)], "images_per_prompt": 1, "seed": 0}
    for p in range(prompts):
        Image.new("RGB", (8, 8), (level, 10 * p, 0)).save(folder / f"p{p:05d}-s0.png")
    write_json(folder / "manifest.json", about)
    return folder


def write_pairs(path):
    """Two pairs in the schema of Pick-a-Pic v2."""
    rows = []
    for number in range(2):
        images = []
        for level in (50, 200):
            pixels = np.full((8, 8, 3), level + number, np.uint8)
            Image.fromarray(pixels).save(path.with_suffix(".png"))
            images.append(path.with_suffix(".png").read_bytes())
        about = {"caption": f"a star {number}", "label_0": 0.0, "label_1": 1.0, "has_label": True}
        names = {"image_0_uid": f"a{number}", "image_1_uid": f"b{number}"}
        rows.append({"jpg_0": images[0], "jpg_1": images[1], **about, **names})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def operation(tmp_path, request, monkeypatch):
    """`operation(name)`: a command that writes, into `tmp_path / "out"`."""

    def make(name):
        out = tmp_path / "out"
        if name == "study":
            from dkto.evaluation.study import make_study

            monkeypatch.setattr("secrets.randbits", lambda _: 7)  # sides are drawn by lot
            folders = {method: draw_folder(tmp_path / method, level) for method, level in (("ours", 200), ("base", 60))}
            return lambda: make_study(folders, out, ["ann"], ["photo"] * 4, per_style=3)
        if name == "unpack":
            from dkto.data.pairs import convert_pairs

            pairs = write_pairs(tmp_path / "pairs.parquet")
            return lambda: convert_pairs(pairs, out)
        if name == "score":
            from dkto.evaluation.scoring import score_images

            return lambda: score_images(out, "world_redness")
        if name == "sweep":
            from dkto.runs.runner import run_sweep
            from dkto.runs.sweeps import read_sweep

            notebook = str(Path(__file__).parents[1] / "files" / "tiny_train.ipynb")
            write_json(tmp_path / "tiny.yaml", {"notebook": notebook, "grid": {"seed": [0, 1]}})
            return lambda: run_sweep(read_sweep(tmp_path / "tiny.yaml", out), in_turn=True)
        likes = request.getfixturevalue("likes")
        if name == "write_feedback":
            from dkto.data.feedback import make_feedback, write_feedback

            def write():
                table = make_feedback([out / "p00000-s0.png"], ["a star"], [True])
                write_feedback(table, out / "likes.csv")

            return write
        model = str(request.getfixturevalue("tiny_pipeline"))
        if name == "generate":
            from dkto.evaluation.generate import generate_images
            from dkto.models import System

            system = System(model, steps=1)
            # one image a batch: larger ones regroup after a kill, which rounds differently
            return lambda: generate_images(system, ["a star", "a moon"], out, images_per_prompt=1, batch_size=1)
        if name == "prepare":
            from dkto.data.encode import prepare_feedback

            return lambda: prepare_feedback(likes, out, model)
        from dkto.training.config import TrainConfig
        from dkto.training.loop import run_training

        shape = {"model": model, "learning_rate": 1e-3, "warmup_steps": 1, "batch_size": 2}
        shape |= {"max_train_steps": 2, "checkpoint_every": 1, "keep_checkpoints": 1}  # one checkpoint replaces another
        shape |= {"lora_rank": 2} if name == "train LoRA" else {"ema_decay": 0.9}
        prepared = request.getfixturevalue("prepared")
        return lambda: run_training(TrainConfig(prepared, out, **shape))

    return make


def begin(name, out):
    """What is in the folder before: images, for what reads them there."""
    return lambda: draw_folder(out, 200) if name in ("score", "write_feedback") else None


ELSEWHERE = {"sweep": ["metrics.json"]}  # its kernel writes them


def of_the_second_run(count):
    """Points of a sweep's beginning, of its second run and of its end: those of the first run are alike, and slow."""
    return [point for point in range(1, count + 1) if point <= 4 or point > count // 2 - 2]


POINTS = {"sweep": {"points": of_the_second_run}}


@pytest.mark.parametrize("power_cut", [False, True], ids=["kill", "power cut"])
@pytest.mark.parametrize("name", QUICK)
def test_a_command_that_died_ends_with_the_next_call(name, power_cut, operation, tmp_path, one_thread):
    """Three of its points; all of all commands are slow."""
    out, chance = tmp_path / "out", random.Random(name)

    def points(count):
        return chance.sample(range(1, count + 1), 3)

    tried, failures = crash_points(operation(name), out, points, power_cut=power_cut, begin=begin(name, out))
    assert tried == 3 and not failures


@pytest.mark.slow
@pytest.mark.parametrize("power_cut", [False, True], ids=["kill", "power cut"])
@pytest.mark.parametrize("name", NAMES)
def test_every_crash_point_of_every_command(name, power_cut, operation, tmp_path, one_thread):
    out = tmp_path / "out"
    more = {"begin": begin(name, out), "elsewhere": ELSEWHERE.get(name, ()), **POINTS.get(name, {})}
    tried, failures = crash_points(operation(name), out, power_cut=power_cut, **more)
    print(f"{name}: {tried - len(failures)} of {tried}")
    assert tried > 3 and not failures


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[:-1])
def test_two_hundred_kills_at_random_moments(name, operation, tmp_path, one_thread):
    """25 of each of the first eight commands; the ninth starts kernels, which takes its time."""
    out = tmp_path / "out"
    trials, failures = random_kills(operation(name), out, 25, seed=0, begin=begin(name, out))
    print(f"{name}: {trials - len(failures)} of {trials}")
    assert trials > 7 and not failures


def test_the_harness_finds_what_is_wrong(tmp_path):
    """A file that is not written atomically, and one that is not forced to disk, are found."""
    out = tmp_path / "out"

    def careless():
        out.mkdir(exist_ok=True)
        if not (out / "a.txt").exists():
            (out / "a.txt.part").write_text("whole")
            (out / "a.txt.part").replace(out / "a.txt")
        if not (out / "b.txt").exists():
            with (out / "b.txt").open("w") as file:
                file.write("half")
                file.flush()
                (out / "c.txt").write_text("")
                file.write("whole")

    tried, failures = crash_points(careless, out)
    assert tried >= 4 and any("b.txt" in each for each in failures)
    assert not any("a.txt" in each for each in failures)
    assert any("a.txt" in each for each in crash_points(careless, out, power_cut=True)[1])
