import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from scipy import stats
from tiny_models import make_tiny_sd3

from dkto.models import load_model, make_policy, pipeline_folder, read_weights, write_weights
from dkto.objective.losses import denoising_error

KINDS = ("tiny_pipeline", "tiny_sdxl", "tiny_sd3")
BETA = 5000.0


@pytest.fixture(params=KINDS)
def folder(request):
    """One tiny pipeline of each supported class."""
    return request.getfixturevalue(request.param)


def inputs():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([10, 900]),
        {"encoder_hidden_states": torch.randn(2, 24, 16, generator=generator)},
    )


def inputs_of(model):
    """A batch with prompts encoded by the model itself."""
    noisy, timesteps, _ = inputs()
    return noisy, timesteps, model.encode_prompts(*model.load_text(), ["a red circle", "a blue square"])


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


def test_a_written_pipeline_draws_in_plain_diffusers(folder, tmp_path):
    model = load_model(folder)
    denoiser = model.load_denoiser()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    model.write_pipeline(denoiser, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    assert type(pipeline) is model.pipeline_class
    drawn = getattr(pipeline, model.denoiser_part)
    for name, value in denoiser.state_dict().items():
        assert torch.equal(drawn.state_dict()[name], value), name
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red circle", num_inference_steps=2, height=16, width=16).images[0].size == (16, 16)


def test_a_downloaded_index_leads_out_of_no_folder(tiny_pipeline, tmp_path):
    hostile = Path(shutil.copytree(tiny_pipeline, tmp_path / "in" / "model"))
    (tmp_path / "in" / "secret").mkdir()
    (tmp_path / "in" / "secret" / "config.json").write_text("{}")
    index = json.loads((hostile / "model_index.json").read_text()) | {"../secret": ["diffusers", "AutoencoderKL"]}
    (hostile / "model_index.json").write_text(json.dumps(index))
    model = load_model(str(hostile))
    model.write_pipeline(model.load_denoiser(), tmp_path / "out" / "model")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


def test_noise_levels_are_drawn_as_asked_and_no_other_way(tiny_pipeline):
    model = load_model(str(tiny_pipeline))
    uniform, middle = (
        model.draw_timesteps(np.random.default_rng(0), 4000, how).float() for how in ("uniform", "logit_normal")
    )
    last = model.timesteps_at(torch.tensor([0.999])).item()
    inner = [((drawn > last / 4) & (drawn < 3 * last / 4)).float().mean().item() for drawn in (uniform, middle)]
    assert inner[0] == pytest.approx(0.5, abs=0.03) and inner[1] == pytest.approx(0.728, abs=0.03)
    with pytest.raises(ValueError, match="sampling must be one of default, uniform, logit_normal, got 'cosine'"):
        model.draw_timesteps(np.random.default_rng(0), 4, "cosine")


def test_a_written_adapter_loads_in_plain_diffusers(folder, tmp_path):
    model = load_model(folder)
    pair = make_policy(model.load_denoiser(), 4, seed=0)
    with torch.no_grad():
        for parameter in pair.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    write_weights(pair, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    noisy, timesteps, conditioning = inputs_of(model)
    expected = model.predict(pair.policy, noisy, timesteps, conditioning)
    found = model.predict(getattr(pipeline, model.denoiser_part), noisy, timesteps, conditioning)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_equal_policies_give_no_reward_in_any_precision(folder, dtype, lora_rank):
    """With policy = reference, |beta * g| < 0.01 at the paper's beta: both compute in the same precision."""
    model = load_model(folder)
    denoiser = model.load_denoiser()
    for module in denoiser.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1  # a model with dropout must not see two different networks either
    pair = make_policy(denoiser, lora_rank, seed=0, frozen_dtype=dtype)
    assert {p.dtype for p in pair.trainable().values()} == {torch.float32}, "master weights"
    frozen = pair.policy if lora_rank else pair.reference
    assert dtype in {p.dtype for p in frozen.parameters()}
    noisy, timesteps, conditioning = inputs_of(model)
    target = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(2))

    def error(denoiser):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return denoising_error(model.predict(denoiser, noisy, timesteps, conditioning), target)

    with pair.as_reference() as reference:
        reference_error = error(reference)
    policy_error = error(pair.policy)
    assert policy_error.requires_grad and torch.isfinite(policy_error).all()
    assert (BETA * (reference_error - policy_error)).abs().max() < 0.01


def test_prompts_of_sdxl_are_encoded_as_the_pipeline_does(tiny_sdxl):
    prompts = ["a red circle", ""]
    pipeline, model = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl), load_model(tiny_sdxl)
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    found = model.encode_prompts(*model.load_text(), prompts)
    torch.testing.assert_close(found["encoder_hidden_states"][0], embeds[0])
    torch.testing.assert_close(found["text_embeds"][0], pooled[0])
    assert not found["encoder_hidden_states"][1].any() and not found["text_embeds"][1].any(), "forced zeros"


@pytest.mark.parametrize("with_t5", [True, False])
def test_prompts_of_sd3_are_encoded_as_the_pipeline_does(tmp_path, with_t5):
    folder, prompts = make_tiny_sd3(tmp_path, with_t5), ["a red circle", ""]
    absent = {} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline, model = StableDiffusion3Pipeline.from_pretrained(folder, **absent), load_model(folder)
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=77
    )
    found = model.encode_prompts(*model.load_text(), prompts)
    torch.testing.assert_close(found["encoder_hidden_states"], embeds)
    torch.testing.assert_close(found["pooled_projections"], pooled)
    assert bool(embeds[:, 24:].any()) == with_t5


def test_the_size_condition_of_sdxl_is_the_pipelines_own(tiny_sdxl):
    pipeline, model = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl), load_model(tiny_sdxl)
    noisy, timesteps, conditioning = inputs_of(model)
    ids = pipeline._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, text_encoder_projection_dim=16)
    added = {"text_embeds": conditioning["text_embeds"], "time_ids": ids.expand(2, -1)}
    hidden = conditioning["encoder_hidden_states"]
    expected = pipeline.unet(noisy, timesteps, encoder_hidden_states=hidden, added_cond_kwargs=added).sample
    torch.testing.assert_close(model.predict(model.load_denoiser(), noisy, timesteps, conditioning), expected)


def test_flow_noises_along_a_straight_line_and_predicts_its_slope(tiny_sd3):
    model = load_model(tiny_sd3)
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    timesteps = torch.tensor([250.0, 1000.0])
    noisy = model.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy[0], 0.75 * latents[0] + 0.25 * noise[0])
    torch.testing.assert_close(noisy[1], noise[1])
    step = model.add_noise(latents, noise, timesteps + 1) - noisy
    torch.testing.assert_close(step, model.target(latents, noise, timesteps) / 1000, atol=1e-5, rtol=1e-3)


def test_flow_timesteps_follow_the_shifted_schedule(tiny_sd3):
    """At shift 3: uniform levels land where the scheduler has its own; logit-normal ones are those of SD 3."""
    model = load_model(tiny_sd3)
    own = model.scheduler.timesteps  # descending, 1000 levels
    quantiles = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(model.timesteps_at(quantiles), own, atol=1e-2, rtol=1e-5)
    drawn = model.draw_timesteps(np.random.default_rng(0), 20_000).numpy() / 1000
    undone = drawn / (3 - 2 * drawn)  # the shift taken back
    normal = np.log(undone / (1 - undone))
    assert stats.kstest(normal, "norm").pvalue > 0.01


def test_uniform_timesteps_cover_the_schedule(tiny_pipeline):
    drawn = load_model(tiny_pipeline).draw_timesteps(np.random.default_rng(0), 100_000)
    assert drawn.dtype == torch.int64 and drawn.min() == 0 and drawn.max() == 999
    assert stats.chisquare(torch.bincount(drawn // 100).numpy()).pvalue > 0.01


def test_latents_are_shifted_and_scaled(tiny_sd3):
    model = load_model(tiny_sd3)
    vae, pixels = model.load_vae(), torch.rand(1, 3, 16, 16) * 2 - 1
    mean, std = model.encode_images(vae, pixels)
    posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, (posterior.mean - 0.0609) * 0.5)
    torch.testing.assert_close(std, posterior.std * 0.5)
    torch.testing.assert_close(vae.decode(mean / 0.5 + 0.0609).sample, vae.decode(posterior.mean).sample)
