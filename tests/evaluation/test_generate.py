import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from dkto.common.processes import sole_writer
from dkto.evaluation.generate import generate_all, generate_images
from dkto.evaluation.manifest import image_path, read_manifest
from dkto.models.system import PRECISIONS, System, computes_bfloat16, draw, noise_generator
from dkto.training.loop import run_training

PROMPTS = ["a picture 0", "a picture 1", "a picture 2"]


def pixels(folder, prompt, image):
    return np.asarray(Image.open(image_path(folder, prompt, image)))


def test_images_do_not_depend_on_batches_or_processes(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("dkto.evaluation.generate.CHUNK", 2)
    system = System(model=str(tiny_pipeline), steps=2)
    one = generate_images(system, PROMPTS, tmp_path / "one", images_per_prompt=2, batch_size=6)
    two = generate_images(system, PROMPTS, tmp_path / "two", images_per_prompt=2, batch_size=1, num_processes=2)
    for p in range(3):
        for i in range(2):
            assert np.abs(pixels(one, p, i).astype(int) - pixels(two, p, i)).max() <= 1
    assert (pixels(one, 0, 0) != pixels(one, 0, 1)).any()
    assert sorted(f.name for f in one.iterdir() if f.name != ".lock") == [
        "manifest.json",
        *(f"p{p:05d}-s{i}.png" for p in range(3) for i in (0, 1)),
    ]


def test_images_on_disk_are_kept(tiny_pipeline, tmp_path):
    system = System(model=str(tiny_pipeline), steps=2)
    folder = generate_images(system, PROMPTS, tmp_path / "x", images_per_prompt=1)
    kept, lost = image_path(folder, 0, 0), image_path(folder, 1, 0)
    before, stamp = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    generate_images(system, PROMPTS, folder, images_per_prompt=1)
    assert kept.stat().st_mtime_ns == stamp and lost.read_bytes() == before


def test_a_batch_is_the_same_after_a_kill_and_what_is_cut_short_is_drawn_again(tiny_pipeline, tmp_path, monkeypatch):
    """A batch that a kill left half done is drawn with the neighbours of the first call: files are equal bit by bit."""
    system, drawn = System(model=str(tiny_pipeline), steps=2), []

    def watched(pipeline, prompts, generators, system):
        drawn.append(len(prompts))
        return draw(pipeline, prompts, generators, system)

    monkeypatch.setattr("dkto.evaluation.generate.draw", watched)
    folder = generate_images(system, PROMPTS, tmp_path / "x", images_per_prompt=2, batch_size=4)
    before = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert drawn == [4, 2] and len(before) == 6
    image_path(folder, 0, 1).unlink()
    image_path(folder, 1, 0).write_bytes(b"")
    cut = image_path(folder, 1, 1)
    cut.write_bytes(cut.read_bytes()[:-5])
    kept = image_path(folder, 0, 0).stat().st_mtime_ns
    generate_images(system, PROMPTS, folder, images_per_prompt=2, batch_size=4)
    assert drawn == [4, 2, 4] and image_path(folder, 0, 0).stat().st_mtime_ns == kept
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == before


def test_of_two_at_once_one_is_refused_and_what_failed_frees_its_folder(tiny_pipeline, tmp_path, monkeypatch):
    system, folder = System(model=str(tiny_pipeline), steps=1), tmp_path / "x"
    with sole_writer(folder), pytest.raises(BlockingIOError, match=r"x is being written by process \d+"):
        generate_images(system, PROMPTS, folder, images_per_prompt=1)

    def fails(self):
        raise ValueError("weights that are not finite")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="not finite"):
        patch.setattr(System, "load", fails)
        generate_images(system, PROMPTS, folder, images_per_prompt=1)
    assert not (folder / "manifest.json").exists()
    generate_images(system, PROMPTS[:1], folder, images_per_prompt=1, seed=3)


def test_prompts_that_are_cut_are_said_and_listed(tiny_pipeline, tmp_path):
    prompts = ["a picture 0", "a red circle " * 40]
    system = System(model=str(tiny_pipeline), steps=1, negative_prompt="bad " * 100)
    with pytest.warns(
        UserWarning, match=r"2 of 3 prompts are longer than the text encoder takes and are cut, see .*cated"
    ):
        folder = generate_images(system, prompts, tmp_path / "x", images_per_prompt=1)
    rows = [json.loads(line) for line in (folder / "truncated.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [1, "negative"] and "are taken: a red circle" in rows[0]["tokens"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 0}, "steps must be 1 or above, got 0"),
        ({"steps": 2000}, "steps must be at most 1000, as finely as the schedule of .* is cut, got 2000"),
        ({"steps": 1000}, "steps must be fewer for the schedule of .*, got 1000"),
        ({"guidance": -3.0}, "guidance must be 1 or above, got -3.0"),
        ({"guidance": float("nan")}, "guidance must be a finite number, got nan"),
        ({"unet": 3}, "unet must be text without NUL, got 3"),
    ],
)
def test_settings_of_a_system_have_ranges(tiny_pipeline, tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        generate_images(System(model=str(tiny_pipeline), **change), PROMPTS, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "Expecting property name"),
        ("[1]", r"expected an object, got \[1\]"),
        (
            '{"prompts": ["a", 3], "images_per_prompt": 1, "seed": 0}',
            r"prompts must be a list of texts, got \['a', 3\]",
        ),
        (
            '{"prompts": ["a"], "images_per_prompt": 0, "seed": 0}',
            "images_per_prompt must be a number of at least 1, got 0",
        ),
        (
            '{"prompts": ["a"], "images_per_prompt": 1000000000, "seed": 0}',
            "images_per_prompt must be at most 1000000 for 1 prompts, got 1000000000",
        ),
        ('{"prompts": ["a"], "images_per_prompt": 1}', "seed must be a whole number, got nothing"),
    ],
)
def test_a_broken_manifest_is_named(tmp_path, text, sentence):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=rf"manifest\.json is no manifest of generated images: {sentence}"):
        read_manifest(tmp_path)


def test_images_that_no_manifest_tells_of_are_not_taken(tiny_pipeline, tmp_path):
    system = System(model=str(tiny_pipeline), steps=1)
    folder = generate_images(system, tuple(PROMPTS), tmp_path / "x", images_per_prompt=1)
    before = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert generate_images(system, PROMPTS, folder, images_per_prompt=1) == folder, "a tuple is a list of prompts too"
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is no record of what .*x holds: Expecting"):
        generate_images(system, PROMPTS, folder, images_per_prompt=1)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"x holds images but no manifest\.json that says what they were drawn for"):
        generate_images(system, PROMPTS, folder, images_per_prompt=1)
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == before


def test_bfloat16_is_advised_against_where_the_processor_lacks_it(tiny_pipeline, tmp_path, monkeypatch):
    system = System(model=str(tiny_pipeline), steps=1, precision="bfloat16")
    for found, gpu, expected in (
        ({"avx2": True}, False, False),
        ({"avx512_bf16": True}, False, True),
        ({"bf16": True}, False, True),
        ({"avx2": True}, True, True),
    ):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda found=found: found)
        monkeypatch.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
        assert computes_bfloat16() == expected
    monkeypatch.undo()
    monkeypatch.setattr("dkto.evaluation.generate.computes_bfloat16", lambda: False)
    with pytest.warns(UserWarning, match="this processor does not compute in bfloat16: float32 is many times as fast"):
        generate_images(system, PROMPTS[:1], tmp_path / "slow", images_per_prompt=1)


def test_bfloat16_draws_nearly_the_same_pictures(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("dkto.evaluation.generate.computes_bfloat16", lambda: True)  # slow elsewhere, and the same
    drawn = {}
    for precision in PRECISIONS:
        system = System(model=str(tiny_pipeline), steps=4, precision=precision)
        drawn[precision] = generate_images(system, PROMPTS, tmp_path / precision, images_per_prompt=1)
        assert read_manifest(drawn[precision])["system"]["precision"] == precision
    apart = [
        np.abs(pixels(drawn["float32"], p, 0).astype(int) - pixels(drawn["bfloat16"], p, 0)).mean() for p in range(3)
    ]
    other = np.abs(pixels(drawn["float32"], 0, 0).astype(int) - pixels(drawn["float32"], 1, 0)).mean()
    assert 0 < max(apart) < other / 4
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, got 'float8'"):
        System(precision="float8")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"images_per_prompt": 0}, r"images_per_prompt must be in \[1, 333333\], got 0"),
        ({"seed": -1}, "seed must be 0 or above, got -1"),
        ({"batch_size": 0}, "batch_size must be 1 or above, got 0"),
        ({"images_per_prompt": 10**9}, r"images_per_prompt must be in \[1, 333333\], got 1000000000"),
        ({"seed": 2**64}, r"seed must be in \[0, 9223372036854775807\], got 18446744073709551616"),
        ({"batch_size": 1.5}, "batch_size must be a whole number, got 1.5"),
        ({"prompts": []}, "prompts must hold at least one, got none"),
    ],
)
def test_impossible_numbers_are_refused_before_the_folder_is_claimed(tiny_pipeline, tmp_path, change, sentence):
    arguments = {"prompts": PROMPTS, **change}
    with pytest.raises(ValueError, match=sentence):
        generate_images(System(model=str(tiny_pipeline)), output_dir=tmp_path / "x", **arguments)
    assert not (tmp_path / "x").exists()


def test_a_folder_of_another_run_is_refused(tiny_pipeline, tmp_path):
    system = System(model=str(tiny_pipeline), steps=2)
    folder = generate_images(system, PROMPTS[:1], tmp_path / "x", images_per_prompt=1)
    with pytest.raises(ValueError, match=r"holds images of another run \(seed differ\): choose another folder"):
        generate_images(system, PROMPTS[:1], folder, images_per_prompt=1, seed=3)


def test_pictures_of_a_model_that_was_trained_anew_are_not_taken_for_its_own(tiny_pipeline, tmp_path):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "model")
    system = System(model=str(folder), steps=2)
    drawn = generate_images(system, PROMPTS[:1], tmp_path / "x", images_per_prompt=1)
    before = image_path(drawn, 0, 0).read_bytes()
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 0.01 for name, value in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match=r"holds images of another run \(weights differ\): choose another folder"):
        generate_images(system, PROMPTS[:1], tmp_path / "x", images_per_prompt=1)
    assert image_path(drawn, 0, 0).read_bytes() == before


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"manifest\.json is missing"):
        read_manifest(tmp_path)


def test_noise_depends_on_all_three_numbers():
    import torch

    draws = {
        torch.rand(1, generator=noise_generator(*key)).item() for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    }
    assert len(draws) == 4


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_finished_training_becomes_a_system(config, tiny_pipeline, lora_rank):
    from dataclasses import replace

    folder = run_training(replace(config, lora_rank=lora_rank, max_train_steps=3, learning_rate=1e-2))
    system = System.of_run(folder, steps=2)
    tuned = draw(system.load(), PROMPTS[:1], [noise_generator(0, 0, 0)], system)[0]
    base = System(model=str(tiny_pipeline), steps=2)
    plain = draw(base.load(), PROMPTS[:1], [noise_generator(0, 0, 0)], base)[0]
    assert (np.asarray(tuned) != np.asarray(plain)).any()
    with pytest.raises(FileNotFoundError, match="holds no finished training"):
        System.of_run(folder / "nothing")
    path = folder / "training.json"
    about = json.loads(path.read_text())
    for config, sentence in (
        ([1], r"training\.json: config must be an object, got \[1\]"),
        ({"objective": "kto"}, r"training\.json, config: model must be text, got nothing"),
        (about["config"] | {"objective": 1}, r"training\.json, config: objective must be text, got 1"),
        (about["config"] | {"objective": "csft", "csft_style": []}, r"config: csft_style must be one of .*, got \[\]"),
    ):
        path.write_text(json.dumps(about | {"config": config}))
        with pytest.raises(ValueError, match=sentence):
            System.of_run(folder)


def test_no_system_has_a_safety_checker(tiny_pipeline, tmp_path):
    """One that objects to everything blackens a base's pictures in plain diffusers, but here none's."""
    model = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None, requires_safety_checker=False)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    seen = {**small, "image_size": 16, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=small, vision_config=seen, projection_dim=8))
    torch.nn.init.constant_(checker.concept_embeds_weights, -1.0)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    model.register_modules(safety_checker=checker, feature_extractor=processor)
    model.save_pretrained(tmp_path)
    plain = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert not np.asarray(plain("a star", num_inference_steps=2, generator=noise_generator(0, 0, 0)).images[0]).any()
    systems = [System(model=str(folder), steps=2) for folder in (tmp_path, tiny_pipeline)]
    drawn = [draw(system.load(), PROMPTS[:1], [noise_generator(0, 0, 0)], system)[0] for system in systems]
    assert np.asarray(drawn[0]).any() and (np.asarray(drawn[0]) == np.asarray(drawn[1])).all()


def test_several_systems_share_workers_and_say_what_they_are(tiny_pipeline, tmp_path):
    systems = {name: System(model=str(tiny_pipeline), steps=2, guidance=g) for name, g in (("low", 1.0), ("high", 6.0))}
    folders = generate_all(systems, PROMPTS[:1], tmp_path, images_per_prompt=1)
    assert json.loads((folders["high"] / "manifest.json").read_text())["system"]["guidance"] == 6.0
    assert (pixels(folders["low"], 0, 0) != pixels(folders["high"], 0, 0)).any()
