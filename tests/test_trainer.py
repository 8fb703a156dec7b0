import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from dkto.feedback import BiasedSampler
from dkto.launch import config_arguments, run_trainings
from dkto.models import load_model
from dkto.prepare import PreparedFeedback, prepare_feedback
from dkto.records import read_records
from dkto.trainer import CheckpointStore, draw_batch, learning_rate_at, run_training, train

MEASURES = {
    "global_step",
    "loss",
    "policy_error",
    "reference_point",
    "mean_abs_reward",
    "implicit_accuracy/sample",
    "implicit_accuracy/sample_centred",
    "grad_norm",
    "learning_rate",
    "samples_per_second",
}


def weights(folder):
    return load_file(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def without_time(records):
    return [{k: v for k, v in r.items() if k != "samples_per_second"} for r in records]


def test_a_run_leaves_records_and_a_pipeline_for_plain_diffusers(config, tiny_pipeline):
    records = list(train(config))
    assert [r["global_step"] for r in records] == list(range(1, 9))
    assert all(r.keys() >= MEASURES and all(np.isfinite(v) for v in r.values()) for r in records)
    assert read_records(config.output_dir / "metrics.jsonl") == records
    about = json.loads((config.output_dir / "run.json").read_text())
    assert about["finished"] and about["config"]["beta"] == 500.0 and "torch" in about["versions"]
    assert not list(config.output_dir.glob("checkpoint-*"))
    before = load_file(tiny_pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    assert not same(weights(config.output_dir), before)
    pipeline = StableDiffusionPipeline.from_pretrained(config.output_dir / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a picture", num_inference_steps=2).images[0].size == (16, 16)


def test_the_first_step_starts_from_equal_policies(config):
    first = next(train(config))
    assert first["mean_abs_reward"] == 0 and first["reference_point"] == 0
    assert first["loss"] == pytest.approx(0.5)  # 1 - sigmoid(0)


def test_lora_trains_an_adapter_that_diffusers_loads(config, tiny_pipeline):
    config = replace(config, lora_rank=2)
    list(train(config))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipeline.load_lora_weights(config.output_dir / "lora")
    assert any(p.abs().sum() > 0 for n, p in pipeline.unet.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("estimator", ["batch", "unrelated", "per_class", "zero"])
def test_every_estimator_runs(config, estimator):
    records = list(train(replace(config, estimator=estimator, max_train_steps=3)))
    assert records[0]["reference_point"] == 0
    assert (records[-1]["reference_point"] == 0) or estimator != "zero"


def test_sft_draws_liked_samples_only(config):
    records = list(train(replace(config, objective="sft", max_train_steps=3)))
    assert all("reward/undesirable" not in r for r in records)
    assert records[0]["loss"] == pytest.approx(records[0]["policy_error"])


def test_stopped_and_resumed_equals_uninterrupted(config):
    whole = replace(config, output_dir=config.output_dir.with_name("whole"))
    expected = list(train(whole))
    steps = train(config)
    for _ in range(5):  # two steps after the checkpoint of step 3
        next(steps)
    steps.close()
    assert [p.name for p in CheckpointStore(config).checkpoints()] == ["checkpoint-00000003"]
    resumed = list(train(config))
    assert [r["global_step"] for r in resumed] == [4, 5, 6, 7, 8]
    assert without_time(read_records(config.output_dir / "metrics.jsonl")) == without_time(expected)
    assert same(weights(config.output_dir), weights(whole.output_dir))


def test_a_finished_run_is_not_trained_again(config):
    run_training(config)
    assert list(train(config)) == []


def test_killed_in_training_and_called_again_ends_the_same(config):
    """A real process, really killed: SIGKILL after the first checkpoint has been written."""
    long = replace(config, max_train_steps=40, checkpoint_every=4)
    whole = replace(long, output_dir=config.output_dir.with_name("whole"))
    run_training(whole)
    command = [sys.executable, "-m", "dkto.cli", "train", *config_arguments(long), "--threads", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not CheckpointStore(long).checkpoints() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert CheckpointStore(long).checkpoints()
    run_trainings([long], threads=2)
    records = read_records(long.output_dir / "metrics.jsonl")
    assert without_time(records) == without_time(read_records(whole.output_dir / "metrics.jsonl"))
    assert same(weights(long.output_dir), weights(whole.output_dir))


def test_another_configuration_does_not_resume(config):
    steps = train(config)
    for _ in range(4):
        next(steps)
    steps.close()
    with pytest.raises(ValueError, match=r"belongs to another configuration \(beta: 500.0 stored, 100.0 asked\)"):
        next(train(replace(config, beta=100.0)))


def test_two_ranks_share_one_global_batch(prepared, tiny_pipeline):
    model = load_model(str(tiny_pipeline))
    data = PreparedFeedback(prepared, model)
    sampler = BiasedSampler(data.is_desirable, 0.8, 0)
    whole = draw_batch(data, sampler, model, 7, 8, slice(0, 8))
    halves = [draw_batch(data, sampler, model, 7, 8, slice(i, i + 4)) for i in (0, 4)]
    for name in ("noisy_latents", "target", "timesteps", "is_desirable"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves]))


def test_two_processes_train_as_one(config):
    """torchrun with two gloo ranks gives the losses of one process on the same global batch."""
    expected = list(train(config))
    double = replace(config, output_dir=config.output_dir.with_name("double"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "dkto.cli", "train", *config_arguments(double), "--threads", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[:4000]
    records = read_records(double.output_dir / "metrics.jsonl")
    assert [r["global_step"] for r in records] == [r["global_step"] for r in expected]
    for one, two in zip(expected, records, strict=True):
        for name in ("loss", "reference_point", "policy_error", "mean_abs_reward"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-3), (one["global_step"], name)


def test_the_rate_warms_up_and_stays(config):
    rates = [learning_rate_at(step, config) for step in range(4)]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(config, monkeypatch):
    monkeypatch.setattr(
        "dkto.trainer.denoising_error", lambda prediction, target: prediction.mean((1, 2, 3)) * float("nan")
    )
    with pytest.raises(FloatingPointError, match="not finite for 3 steps in a row, last at step 3"):
        list(train(config))


def test_one_class_and_unknown_utility_and_missing_data(config, likes, tiny_pipeline, tmp_path):
    liked = replace(likes, is_desirable=np.ones(len(likes), bool))
    folder = prepare_feedback(liked, tmp_path / "liked", str(tiny_pipeline))
    with pytest.raises(ValueError, match="one class only: no disliked image among 12"):
        next(train(replace(config, prepared_dir=folder)))
    with pytest.raises(ValueError, match="unknown utility 'kahneman'"):
        next(train(replace(config, utility="kahneman")))
    with pytest.raises(FileNotFoundError, match=r"prepared\.json is missing"):
        next(train(replace(config, prepared_dir=tmp_path)))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"beta": 0.0}, "beta must be above 0, got 0.0"),
        ({"desirable_fraction": 1.5}, r"desirable_fraction must be in \[0, 1\], got 1.5"),
        ({"objective": "ppo"}, "objective must be one of kto, sft, got 'ppo'"),
        ({"estimator": "mean"}, "estimator must be one of batch, unrelated, per_class, zero, got 'mean'"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or above, got -1"),
    ],
)
def test_configurations_out_of_range_are_refused(config, values, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(config, **values)


def test_a_failing_sub_process_is_reported_with_its_last_line(config, tmp_path):
    with pytest.raises(RuntimeError, match=r"ended with code 2: dkto: .*prepared\.json is missing"):
        run_trainings([replace(config, prepared_dir=tmp_path)])
