"""Checkpoints: whole or absent, the last few kept, resumed bit by bit, whatever interrupts."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from dkto.common.files import read_records
from dkto.data.encode import prepare_feedback
from dkto.models.policy import LORA_FILE
from dkto.training.engine import Engine
from dkto.training.launch import config_arguments
from dkto.training.loop import open_run, run_training, train
from dkto.training.run_folder import RunFolder

TIMED = {"samples_per_second", "peak_memory_mb"}


def weights(folder):
    adapter = folder / "lora" / LORA_FILE
    return load_file(adapter if adapter.exists() else folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def assert_same_run(one, two):
    for a, b in zip(*(read_records(folder / "metrics.jsonl") for folder in (one, two)), strict=True):
        assert {k: v for k, v in a.items() if k not in TIMED} == {k: v for k, v in b.items() if k not in TIMED}
    expected = weights(two)
    assert all(torch.equal(value, expected[name]) for name, value in weights(one).items())


def stop_after(config, steps):
    run = train(config)
    for _ in range(steps):
        next(run)
    run.close()


def test_the_last_few_are_kept_and_latest_points_at_the_newest(config, tiny_pipeline):
    config = replace(config, checkpoint_every=2, keep_checkpoints=2, max_train_steps=8)
    stop_after(config, 7)
    folder = config.output_dir
    assert [p.name for p in RunFolder(config).checkpoints()] == ["checkpoint-00000004", "checkpoint-00000006"]
    assert (folder / "latest").resolve().name == "checkpoint-00000006"
    UNet2DConditionModel.from_pretrained(folder / "latest" / "unet")
    run_training(config)
    assert (folder / "latest").resolve().name == "model"
    DiffusionPipeline.from_pretrained(folder / "latest")
    assert not list(folder.glob("checkpoint-*")) and not list(folder.glob("*.part"))


@pytest.mark.parametrize(
    "more",
    [
        {"lora_rank": 2},
        {"ema_decay": 0.9},
        {"precision": "bfloat16", "gradient_checkpointing": True},
        {"precision": "float16", "max_train_steps": 12},  # its first steps find the scale of the loss
        {"gradient_accumulation": 2, "estimator": "unrelated", "prompt_dropout": 0.5},
        {"objective": "bco", "beta": 100.0, "gradient_accumulation": 2},  # its reference point remembers every step
    ],
    ids=str,
)
def test_every_way_of_training_resumes_bit_by_bit(config, more):
    config = replace(config, **{"max_train_steps": 5, "checkpoint_every": 2, **more})
    whole = replace(config, output_dir=config.output_dir.with_name("whole"))
    run_training(whole)
    for record in train(config):
        if record["global_step"] >= config.max_train_steps - 2:
            break
    resumed = list(train(config))
    assert resumed[0]["global_step"] > 2 and resumed[-1]["global_step"] == config.max_train_steps
    part = "lora" if config.lora_rank else "model"
    for path in sorted((whole.output_dir / part).rglob("*.safetensors")):
        expected, found = load_file(path), load_file(config.output_dir / path.relative_to(whole.output_dir))
        assert all(torch.equal(expected[name], found[name]) for name in expected), path


def test_a_save_that_is_cut_short_leaves_the_former_checkpoint(config, monkeypatch):
    """The kill falls between the weights and the optimiser's moments."""
    stop_after(config, 5)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "write_state", killed)
    with pytest.raises(KeyboardInterrupt):
        list(train(config))
    assert [p.name for p in RunFolder(config).checkpoints()] == ["checkpoint-00000003"]
    monkeypatch.undo()
    assert [r["global_step"] for r in train(config)] == [4, 5, 6, 7, 8]


def test_a_full_disk_ends_in_one_sentence_and_costs_no_checkpoint(config):
    """The limit on the size of a file stands in for a full disk: writes really fail."""
    stop_after(config, 4)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    steps = train(config)
    next(steps)
    next(steps)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(RuntimeError, match=r"checkpoint-00000006 could not be written \(.*\); checkpoint-00000003"):
            next(steps)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in RunFolder(config).checkpoints()] == ["checkpoint-00000003"]
    assert not list(config.output_dir.glob("*.part"))
    assert len(list(train(config))) == 5


@pytest.mark.parametrize("file", ["optimizer.safetensors", LORA_FILE, "ema.safetensors"])
def test_a_checkpoint_of_another_type_is_passed_over(config, file):
    config = replace(config, lora_rank=2, checkpoint_every=2, max_train_steps=6, ema_decay=0.9)
    stop_after(replace(config, keep_checkpoints=2), 5)
    path = config.output_dir / "checkpoint-00000004" / file
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].half()}, path)
    sentence = r"checkpoint-00000004 is broken \(.* should be F32, got F16\): going on from checkpoint-00000002"
    with pytest.warns(UserWarning, match=sentence):
        next(train(config))


def test_a_broken_newest_checkpoint_is_passed_over(config):
    """The run goes on from the one before, with a warning, ends the same, and keeps what is whole."""
    config = replace(config, lora_rank=2, checkpoint_every=2, max_train_steps=6, keep_checkpoints=1)
    whole = replace(config, output_dir=config.output_dir.with_name("whole"))
    run_training(whole)
    stop_after(replace(config, keep_checkpoints=2), 5)
    damage(config.output_dir / "checkpoint-00000004" / "optimizer.safetensors", b"")
    sentence = r"checkpoint-00000004 is broken \(.*optimizer.*\): going on from checkpoint-00000002"
    with pytest.warns(UserWarning, match=sentence):
        stop_after(replace(config, checkpoint_every=1), 1)
    assert [p.name for p in RunFolder(config).checkpoints()] == ["checkpoint-00000003"]
    assert [record["global_step"] for record in train(config)] == [4, 5, 6]
    lora = "lora/pytorch_lora_weights.safetensors"
    assert (config.output_dir / lora).read_bytes() == (whole.output_dir / lora).read_bytes()


def test_what_is_broken_in_a_checkpoint_is_found(config):
    """Empty, cut, not finite, of other weights or missing: without a whole one a sentence says what to do."""
    config = replace(config, lora_rank=2, checkpoint_every=2)
    stop_after(config, 3)
    folder, check = RunFolder(config), open_run(config).engine.check_checkpoint
    checkpoint = config.output_dir / "checkpoint-00000002"
    assert folder.last_checkpoint(check)[1]["global_step"] == 2
    kept = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    broken = [(name, content) for name in kept for content in (b"", None)]
    broken += [("optimizer.safetensors", 1000), ("state.json", b'{"fingerprint": 1, "config": {}}')]
    broken += [("pytorch_lora_weights.safetensors", what) for what in (400, "nan", "name", "shape")]
    for name, content in broken:
        damage(checkpoint / name, content)
        with pytest.raises(
            ValueError, match=rf"no checkpoint in .*run is whole: .*{name}.*: remove them to train from"
        ):
            folder.last_checkpoint(check)
        (checkpoint / name).write_bytes(kept[name])


def damage(path, content):
    """Make a file of this content, of so many of its bytes, with another first tensor, or absent."""
    if content is None:
        path.unlink()
    elif isinstance(content, str):
        (name, first), *others = load_file(path).items()
        changed = {"nan": first * float("nan"), "name": first, "shape": first[:1].contiguous()}[content]
        save_file({f"x{name}" if content == "name" else name: changed, **dict(others)}, path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else path.read_bytes()[:content])


def test_a_damaged_record_is_never_rewritten_away(config):
    stop_after(config, 4)
    path = config.output_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    damaged = "".join([lines[0], lines[1][:9] + "\n", *lines[2:]])
    path.write_text(damaged)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is no record .*: remove this line, or restore"):
        next(train(config))
    assert path.read_text() == damaged


def test_records_are_on_disk_before_the_checkpoint_that_follows_them(config, monkeypatch):
    forced = []
    monkeypatch.setattr("dkto.training.run_folder.force_to_disk", lambda path: forced.append(path.read_text()))
    stop_after(config, 4)
    assert [len(text.splitlines()) for text in forced] == [3]


def test_a_full_disk_at_the_end_is_one_sentence_and_the_next_call_ends(config, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dkto.training.run_folder.write_card", full)
        with pytest.raises(
            RuntimeError, match=r"^model could not be written \(.*No space left.*\); checkpoint-00000006"
        ):
            list(train(config))
    assert not list(config.output_dir.glob("*.part"))
    assert [record["global_step"] for record in train(config)] == [7, 8]


def test_checkpoints_that_a_kill_left_of_a_finished_run_go_with_the_next_call(config):
    list(train(config))
    (config.output_dir / "checkpoint-00000006").mkdir()
    assert list(train(config)) == []
    assert not list(config.output_dir.glob("checkpoint-*"))


def test_without_links_latest_is_a_file(config, monkeypatch):
    def refused(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("pathlib.Path.symlink_to", refused)
    stop_after(config, 4)
    assert (config.output_dir / "latest").read_text() == "checkpoint-00000003\n"
    list(train(config))
    assert (config.output_dir / "latest").read_text() == "model\n"


def test_a_run_that_has_not_ended_can_be_made_longer(config):
    """As many steps from the start give the same weights; a run that has ended, or one too short, says what to do."""
    whole = replace(config, output_dir=config.output_dir.with_name("whole"), max_train_steps=9)
    run_training(whole)
    stop_after(config, 7)
    with pytest.raises(ValueError, match=r"has done 6 steps, more than max_train_steps 5: ask for more"):
        next(train(replace(config, max_train_steps=5)))
    run_training(replace(config, max_train_steps=9))
    assert_same_run(config.output_dir, whole.output_dir)
    with pytest.raises(ValueError, match=r"9 steps of all weights, and keeps no checkpoint of them: train 12 steps in"):
        next(train(replace(config, max_train_steps=12)))


def test_finished_adapters_go_on_when_only_their_length_grows(config):
    """Also in another place, and with an average of the weights: each ends as one long run."""
    config = replace(config, lora_rank=2, max_train_steps=4, ema_decay=0.9)
    longer = replace(config, output_dir=config.output_dir.with_name("moved"), max_train_steps=7)
    whole = replace(longer, output_dir=config.output_dir.with_name("whole"))
    run_training(config)
    assert [path.name for path in config.output_dir.glob("checkpoint-*")] == ["checkpoint-00000004"]
    config.output_dir.rename(longer.output_dir)
    assert [record["global_step"] for record in train(longer)] == [5, 6, 7]
    run_training(whole)
    assert_same_run(longer.output_dir, whole.output_dir)
    with pytest.raises(ValueError, match=r"7 steps and cannot be made shorter: train 4 steps in another output_dir"):
        next(train(replace(longer, max_train_steps=4)))


def test_modes_of_a_training_follow_the_umask(config):
    config, before = replace(config, max_train_steps=2, checkpoint_every=1), os.umask(0o027)
    seen = {}
    try:
        for _ in train(config):
            seen |= {path: path.lstat().st_mode for path in config.output_dir.rglob("*") if not path.is_symlink()}
        seen |= {path: path.stat().st_mode for path in config.output_dir.rglob("*")}
    finally:
        os.umask(before)
    assert any("checkpoint-" in str(path) for path in seen) and any("model" in str(path) for path in seen)
    for path, mode in seen.items():
        assert oct(mode)[-3:] == ("750" if oct(mode).startswith("0o4") else "640"), path


def test_another_configuration_does_not_resume(config):
    stop_after(config, 4)
    other = replace(config, beta=100.0, batch_size=8)
    with pytest.raises(ValueError, match=r"\(batch_size: 4 stored, 8 asked, beta: 500.0 stored, 100.0 asked\)"):
        next(train(other))


def test_another_configuration_is_refused_also_before_the_first_checkpoint(config):
    stop_after(replace(config, checkpoint_every=100), 2)
    records = (config.output_dir / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"beta: 500.0 stored, 100.0 asked"):
        next(train(replace(config, beta=100.0)))
    assert (config.output_dir / "metrics.jsonl").read_text() == records != ""


@pytest.mark.gpu
def test_a_run_resumes_on_a_graphics_card(config):
    """There the optimiser's kernel keeps its step count beside the weights."""
    stop_after(config, 4)
    assert [record["global_step"] for record in train(config)][-1] == config.max_train_steps


def test_what_a_kill_left_of_a_save_is_gone_at_the_end(config):
    (config.output_dir / "checkpoint-00000009.part").mkdir(parents=True)
    list(train(config))
    assert not list(config.output_dir.glob("checkpoint-*"))


def test_other_feedback_does_not_resume_or_pass_for_finished(config, likes, tiny_pipeline, tmp_path):
    other = replace(likes, is_desirable=~likes.is_desirable)
    elsewhere = replace(config, prepared_dir=prepare_feedback(other, tmp_path / "other", str(tiny_pipeline)))
    stop_after(config, 4)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"was trained on other feedback \(\w+ stored, \w+ in .*other\)"):
            next(train(elsewhere))
        list(train(config))
    moved = replace(config, prepared_dir=shutil.copytree(config.prepared_dir, tmp_path / "moved"))
    assert list(train(moved)) == [], "the same feedback in another place"


def test_a_step_with_nan_in_its_batch_is_skipped_and_counted(config, monkeypatch):
    """Step 3 sees a NaN; the weights pass it by, and a resumed run remembers."""
    config = replace(config, checkpoint_every=4, max_train_steps=6)
    from dkto.training import batches

    draw = batches.GlobalBatches.draw

    def poisoned(self, step, *rest):
        batch = draw(self, step, *rest)
        return replace(batch, noisy_latents=batch.noisy_latents * float("nan")) if step == 2 else batch

    monkeypatch.setattr(batches.GlobalBatches, "draw", poisoned)
    stop_after(config, 4)
    records = read_records(config.output_dir / "metrics.jsonl")
    assert [(r["global_step"], r["skipped_steps"]) for r in records] == [(1, 0), (2, 0), (4, 1), (5, 1)]
    assert [r["skipped_steps"] for r in train(config)] == [1, 1]
    about = json.loads((config.output_dir / "training.json").read_text())
    assert about["skipped_steps"] == 1
    assert all(torch.isfinite(value).all() for value in weights(config.output_dir).values())
    assert "6 steps, of which 1 were skipped" in (config.output_dir / "model" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_five_random_moments_ends_the_same(config):
    """SIGKILL to a real process, five times, wherever it is; the sixth call ends with bitwise the same run."""
    long = replace(config, max_train_steps=60, checkpoint_every=3)
    whole = replace(long, output_dir=config.output_dir.with_name("whole"))
    command = [sys.executable, "-m", "dkto.cli", "train", "--threads", "1"]
    subprocess.run([*command, *config_arguments(whole)], check=True, capture_output=True)
    moments = random.Random(0)
    kills = []
    for _ in range(5):
        process = subprocess.Popen([*command, *config_arguments(long)], stdout=subprocess.DEVNULL, stderr=-1)
        path, seen = long.output_dir / "metrics.jsonl", len(read_records(whole.output_dir / "metrics.jsonl"))
        before = read_records(path)[-1]["global_step"] if path.exists() and read_records(path) else 0
        target = min(before + moments.randint(2, 12), seen - 2)
        while process.poll() is None and not (path.exists() and _last(path) >= target):
            time.sleep(0.002)
        time.sleep(moments.random() * 0.2)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        kills.append(_last(path))
    subprocess.run([*command, *config_arguments(long)], check=True, capture_output=True)
    assert len(kills) == 5
    assert_same_run(long.output_dir, whole.output_dir)


def _last(path):
    records = read_records(path)
    return records[-1]["global_step"] if records else 0


def test_the_card_is_read_by_the_hub_and_says_what_was_done(config, tiny_pipeline):
    from huggingface_hub import ModelCard

    run_training(replace(config, lora_rank=2))
    text = (config.output_dir / "lora" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.base_model == tiny_pipeline.name and "lora" in card.data.tags
    for said in (
        "| beta | 500.0 |",
        "12 rated images; 8 steps",
        "load_lora_weights",
        "inherits the biases",
        "reward/margin",
    ):
        assert said in text, said
    assert str(tiny_pipeline) not in text, "no place on this machine"


def test_records_that_are_lost_are_counted_when_a_run_goes_on(config):
    """Steps that were skipped have none, which is no loss."""
    stop_after(config, 4)
    path, state = config.output_dir / "metrics.jsonl", config.output_dir / "checkpoint-00000003" / "state.json"
    lines = path.read_text().splitlines(keepends=True)
    for kept, sentence in (
        ([0, 2], r"metrics\.jsonl should hold 3 records of the first 3 steps, got 2: steps \['2'\] have none, the run"),
        ([2], r"got 1: steps \['1-2'\] have none, the run goes on"),
        ([], r"got 0: steps \['1-3'\] have none, the run goes on"),
    ):
        path.write_text("".join(lines[number] for number in kept))
        with pytest.warns(UserWarning, match=sentence):
            next(train(config))
    path.write_text(lines[0] + lines[2])
    state.write_text(json.dumps(json.loads(state.read_text()) | {"skipped_steps": 1}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(train(config))
