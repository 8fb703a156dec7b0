"""What the data side costs: starting at the size of Pick-a-Pic, a step at a million rows, preparing an image.

Step times are wall clock, in alternating pairs of one run; the rest is CPU time, which other programs disturb less.
"""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dkto.data.decode import to_pixel_values
from dkto.data.encode import prepare_feedback
from dkto.data.feedback import make_feedback, read_feedback
from dkto.data.images import load_image
from dkto.models import SMALL_WORLD_FOLDER, load_model
from dkto.training.config import TrainConfig
from dkto.training.loop import train

from .measures import interval

LIKES = Path(__file__).parents[2] / "notebooks" / "likes"
PICK_A_PIC_ROWS = 928_068  # images that the paper counts
PAIRS_OF_STEPS = 40
START = """
import re, sys, time
from pathlib import Path
from dkto.data.sampler import BiasedSampler
from dkto.models import load_model
from dkto.data.encoded import PreparedFeedback
model = load_model(sys.argv[2])
read = lambda key: int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before, began = read("VmRSS"), time.perf_counter()
data = PreparedFeedback(sys.argv[1], model)
BiasedSampler(data.is_desirable, 0.8, 0).rows(0, 32)
print(time.perf_counter() - began, read("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def small_world_data(tmp_path_factory):
    """The example likes, encoded by the small world's model."""
    from dkto import read_feedback

    return prepare_feedback(read_feedback(LIKES / "likes.csv"), tmp_path_factory.mktemp("small") / "prepared")


def test_start_up_at_the_size_of_pick_a_pic(small_world_data, sparse_copy, tmp_path, record_ratio):
    folder = sparse_copy(small_world_data, tmp_path / "million", PICK_A_PIC_ROWS)
    call = [sys.executable, "-c", START, str(folder), str(SMALL_WORLD_FOLDER)]
    runs = [subprocess.run(call, check=True, capture_output=True, text=True).stdout.split() for _ in range(5)]
    seconds, megabytes = np.array(runs, float).T
    record_ratio("sampler_startup_seconds", **interval(seconds))
    record_ratio("sampler_startup_mb", **interval(megabytes), at_most=150.0)


def test_a_step_at_a_million_rows_over_one_at_a_thousand(small_world_data, sparse_copy, tmp_path, record_ratio):
    """The real trainer on both, one step of each in turn, the order changing."""
    torch.set_num_threads(1)
    settings = {"beta": 100.0, "learning_rate": 1e-5, "warmup_steps": 1, "batch_size": 16, "checkpoint_every": 10**6}
    base = TrainConfig(small_world_data, tmp_path, max_train_steps=PAIRS_OF_STEPS + 4, **settings)
    runs = {}
    for rows in (10**3, 10**6):
        folder = sparse_copy(small_world_data, tmp_path / f"{rows}", rows)
        runs[rows] = train(replace(base, prepared_dir=folder, output_dir=tmp_path / f"run{rows}"))
    ratios = []
    for pair in range(PAIRS_OF_STEPS + 3):
        seconds = {}
        for rows in sorted(runs, reverse=bool(pair % 2)):
            began = time.perf_counter()
            next(runs[rows])
            seconds[rows] = time.perf_counter() - began
        if pair >= 3:  # the first steps allocate
            ratios.append(seconds[10**6] / seconds[10**3])
    record_ratio("step_time_1e6_over_1e3_rows", **interval(ratios), at_most=1.05)


def test_a_million_scores_to_likes_over_a_million_likes(tmp_path, record_ratio):
    """One judgement a row, of 2,000 images by 500 users: what the rule costs beside reading."""
    rng, rows = np.random.default_rng(0), 10**6
    for i in range(2000):
        (tmp_path / f"{i}.png").touch()
    frame = pd.DataFrame({"image": rng.integers(0, 2000, rows), "prompt": rng.integers(0, 10**4, rows)})
    frame = frame.assign(image=frame["image"].astype(str) + ".png", prompt="prompt " + frame["prompt"].astype(str))
    frame = frame.assign(liked=rng.integers(0, 2, rows), rating=rng.normal(size=rows), user=rng.integers(0, 500, rows))
    frame.to_csv(tmp_path / "all.csv", index=False)
    seconds = {"likes": [], "scores": []}
    for _ in range(3):
        for name, options in (("likes", {}), ("scores", {"score": "rating", "rule": "user_z", "weight_scale": 1.0})):
            began = time.process_time()
            assert len(read_feedback(tmp_path / "all.csv", **options)) == rows
            seconds[name].append(time.process_time() - began)
    ratios, cpu_seconds = np.divide(seconds["scores"], seconds["likes"]), float(np.median(seconds["scores"]))
    record_ratio("scores_over_likes_1e6_rows", **interval(ratios), at_most=2.0, cpu_seconds=cpu_seconds)


def sd15_vae(folder):
    """A pipeline folder with the real autoencoder of Stable Diffusion 1.5 (84 million random weights), 512 px."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    small = StableDiffusionPipeline.from_pretrained(SMALL_WORLD_FOLDER)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )
    unet = UNet2DConditionModel.from_config({**small.unet.config, "sample_size": 64})
    StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=small.text_encoder,
        tokenizer=small.tokenizer,
        scheduler=small.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def plain(model, paths, batch_size):
    """Decode and encode, nothing else."""
    vae = model.load_vae()
    for start in range(0, len(paths), batch_size):
        batch = [to_pixel_values(load_image(path), model.image_size) for path in paths[start : start + batch_size]]
        model.encode_images(vae, torch.stack(batch))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("size", "count", "rounds"), [("sd15", 1, 3), ("small", 512, 5)])
def test_preparing_over_plain_decoding_and_encoding(size, count, rounds, tmp_path, record_ratio):
    """Images per CPU second of `dkto prepare` over those of a bare loop; files, index and bookkeeping are its cost."""
    torch.set_num_threads(1)
    source = sd15_vae(tmp_path / "sd15") if size == "sd15" else SMALL_WORLD_FOLDER
    model, side, batch_size = load_model(source), 768 if size == "sd15" else 64, 1 if size == "sd15" else 16
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i:04d}.jpg" for i in range(count)]
    for path in paths:
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=92)
    table = make_feedback(paths, ["a star"] * count, [i % 2 for i in range(count)])
    ratios = []
    for number in range(rounds):
        seconds = {}
        for name in ("plain", "prepare") if number % 2 else ("prepare", "plain"):
            began = time.process_time()
            if name == "plain":
                plain(model, paths, batch_size)
            else:
                prepare_feedback(table, tmp_path / f"prepared{number}", str(source), batch_size=batch_size)
            seconds[name] = time.process_time() - began
        ratios.append(seconds["plain"] / seconds["prepare"])
    key = "prepare_over_plain_decode_encode" + ("" if size == "sd15" else f"/{size}")
    rate = count / float(np.median(seconds["prepare"]))
    record_ratio(key, **interval(ratios), at_least=0.9, images_per_cpu_second=rate)
