from dataclasses import replace

import pytest
import torch

from dkto.models import load_model
from dkto.training.engine import Engine, check_packages
from dkto.training.loop import train


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_first_step_has_no_reward_in_any_precision(config, precision, lora_rank):
    """Policy = reference through the whole trainer, at the paper's beta: |beta * g| < 0.01."""
    config = replace(config, beta=5000.0, precision=precision, lora_rank=lora_rank, estimator="unrelated")
    first = next(train(config))
    assert first["mean_abs_reward"] < 0.01 and first["reference_point"] < 0.01
    assert first["grad_norm"] > 0


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_what_is_trained_stays_in_float32_and_the_rest_does_not(config, precision):
    engine = Engine(replace(config, precision=precision, lora_rank=2), load_model(config.model))
    engine.start()
    assert {p.dtype for p in engine.parameters} == {torch.float32}
    assert engine.dtype in {p.dtype for p in engine.pair.policy.parameters()}


def test_gradient_checkpointing_changes_nothing_but_memory(config):
    plain = list(train(replace(config, max_train_steps=4)))
    saving = list(
        train(replace(config, max_train_steps=4, gradient_checkpointing=True, output_dir=config.output_dir / "c"))
    )
    for one, two in zip(plain, saving, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_the_average_is_written_and_the_trained_weights_go_on(config):
    """The average lags behind the weights, and training goes on from the weights, not from the average."""
    from safetensors.torch import load_file

    config = replace(config, max_train_steps=6, checkpoint_every=5)
    list(train(replace(config, ema_decay=0.5)))
    other = replace(config, output_dir=config.output_dir / "plain")
    list(train(other))
    name = "model/unet/diffusion_pytorch_model.safetensors"
    averaged, plain = load_file(config.output_dir / name), load_file(other.output_dir / name)
    start = load_model(config.model).load_denoiser().state_dict()
    distance = {k: sum((v[n] - start[n]).square().sum() for n in start) for k, v in (("a", averaged), ("p", plain))}
    assert 0 < distance["a"] < distance["p"]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"optimizer": "adamw8bit"}, "optimizer 'adamw8bit' needs the package bitsandbytes, which is not installed"),
        ({"tracker": "wandb"}, "tracker 'wandb' needs the package wandb, which is not installed: pip install wandb"),
    ],
)
def test_missing_packages_are_named(config, values, sentence, monkeypatch):
    monkeypatch.setattr("dkto.training.engine.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=sentence):
        check_packages(replace(config, **values))


def test_records_go_to_tensorboard_too(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = list(train(replace(config, tracker="tensorboard", max_train_steps=3)))
    files = list(config.output_dir.rglob("events.out.tfevents*"))
    events = {}
    for path in files:
        found = EventAccumulator(str(path)).Reload()
        events |= {tag: found.Scalars(tag) for tag in found.Tags()["scalars"]}
    assert [round(e.value, 5) for e in events["loss"]] == [pytest.approx(r["loss"], abs=1e-5) for r in records]
    assert [e.step for e in events["reward/margin"]] == [r["global_step"] for r in records if "reward/margin" in r]


def test_accelerates_own_mixed_precision_is_refused(config, monkeypatch):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    try:
        with pytest.raises(ValueError, match="accelerate's own mixed precision is 'bf16' and would reach the policy"):
            Engine(config, load_model(config.model))
    finally:
        AcceleratorState._reset_state()


def test_compiling_is_refused_without_a_gpu(config, monkeypatch):
    """On a CPU the gradient of the first step came out a quarter smaller than without (121.7 against 154.8)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="compile needs a GPU and there is none here"):
        check_packages(replace(config, compile=True))


@pytest.mark.gpu
def test_a_compiled_policy_trains_the_same(config):
    """Rounding apart: Adam's first steps have the size of the rate whatever the gradient's, so that it grows."""
    plain = list(train(replace(config, max_train_steps=3)))
    compiled = list(train(replace(config, max_train_steps=3, compile=True, output_dir=config.output_dir / "compiled")))
    assert compiled[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-3)
    assert compiled[0]["mean_abs_reward"] < 0.01
    for one, two in zip(plain, compiled, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=0.05)


@pytest.mark.gpu
def test_moments_of_eight_bits_train_and_resume(config):
    pytest.importorskip("bitsandbytes")
    config = replace(config, optimizer="adamw8bit", precision="float16")
    run = train(config)
    for _ in range(5):
        next(run)
    run.close()
    assert [r["global_step"] for r in train(config)] == [4, 5, 6, 7, 8]


@pytest.mark.gpu
def test_memory_is_that_of_the_gpu(config):
    assert 0 < next(train(config))["peak_memory_mb"] < 1000
