import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from dkto.models import load_model, make_policy, pipeline_folder, read_weights, write_weights


def inputs():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([10, 900]),
        {"encoder_hidden_states": torch.randn(2, 24, 16, generator=generator)},
    )


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_policy_starts_as_its_reference_and_training_leaves_the_reference(tiny_pipeline, lora_rank):
    model = load_model(str(tiny_pipeline))
    pair = make_policy(model.load_denoiser(), lora_rank, seed=0)
    noisy, timesteps, conditioning = inputs()
    with pair.as_reference() as reference:
        before = model.predict(reference, noisy, timesteps, conditioning)
    assert torch.equal(model.predict(pair.policy, noisy, timesteps, conditioning), before)
    optimizer = torch.optim.AdamW(pair.trainable().values(), 1e-2)
    for _ in range(2):  # the first step moves an adapter's second factor only
        model.predict(pair.policy, noisy, timesteps, conditioning).square().mean().backward()
        optimizer.step()
    with pair.as_reference() as reference:
        assert torch.equal(model.predict(reference, noisy, timesteps, conditioning), before)
    assert not torch.allclose(model.predict(pair.policy, noisy, timesteps, conditioning), before, atol=1e-3)


def test_the_reference_carries_no_gradient_and_the_adapter_comes_back(tiny_pipeline):
    model = load_model(str(tiny_pipeline))
    pair = make_policy(model.load_denoiser(), 4, seed=0)
    with pair.as_reference() as reference:
        assert not model.predict(reference, *inputs()).requires_grad
    assert model.predict(pair.policy, *inputs()).requires_grad


def test_only_the_adapters_train_with_lora(tiny_pipeline):
    denoiser = load_model(str(tiny_pipeline)).load_denoiser()
    total = sum(p.numel() for p in denoiser.parameters())
    pair = make_policy(denoiser, 2, seed=0)
    assert all("lora" in name for name in pair.trainable())
    assert 0 < sum(p.numel() for p in pair.trainable().values()) < total / 4


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_written_weights_read_back_the_same(tiny_pipeline, tmp_path, lora_rank):
    model = load_model(str(tiny_pipeline))
    one, two = (make_policy(model.load_denoiser(), lora_rank, seed) for seed in (0, 1))
    with torch.no_grad():
        for parameter in one.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    write_weights(one, tmp_path)
    read_weights(two, tmp_path)
    for name, parameter in one.trainable().items():
        assert torch.equal(parameter, two.trainable()[name]), name


def test_written_weights_load_in_plain_diffusers(tiny_pipeline, tmp_path):
    model = load_model(str(tiny_pipeline))
    for rank in (0, 4):
        pair = make_policy(model.load_denoiser(), rank, seed=0)
        with torch.no_grad():
            for parameter in pair.trainable().values():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        write_weights(pair, tmp_path)
        expected = model.predict(pair.policy, *inputs())
        if rank:
            pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
            pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
            unet = pipeline.unet
        else:
            unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
        torch.testing.assert_close(model.predict(unet, *inputs()), expected, atol=1e-5, rtol=1e-4)


def test_target_follows_the_prediction_type(tiny_pipeline, tmp_path):
    model = load_model(str(tiny_pipeline))
    latents, noise, timesteps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    assert torch.equal(model.target(latents, noise, timesteps), noise)
    model.scheduler.register_to_config(prediction_type="v_prediction")
    a = model.scheduler.alphas_cumprod[timesteps].reshape(2, 1, 1, 1)
    expected = a.sqrt() * noise - (1 - a).sqrt() * latents
    torch.testing.assert_close(model.target(latents, noise, timesteps), expected)
    torch.testing.assert_close(model.add_noise(latents, noise, timesteps), a.sqrt() * latents + (1 - a).sqrt() * noise)


def test_folders_that_are_no_pipeline_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"is not a diffusers pipeline: model_index\.json is missing"):
        pipeline_folder(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(ValueError, match="is a KandinskyPipeline; supported: StableDiffusionPipeline"):
        load_model(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="neither 'small-world', a folder that exists, nor a hub id"):
        load_model("nobody/no-such-model")
