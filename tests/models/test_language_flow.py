"""Qwen-Image, Z-Image and FLUX.2 klein: what a training takes for the model is what their pipelines do."""

import json
import shutil
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch.nn import functional as F

from dkto.data.encode import prepare_feedback
from dkto.data.encoded import PreparedFeedback
from dkto.models import load_model
from dkto.models.system import System, draw, noise_generator
from dkto.training.loop import train
from dkto.training.online import OwnImages

PROMPTS = ["a red circle", "a blue square to the left of it"]


@pytest.fixture(params=["tiny_qwen_image", "tiny_z_image", "tiny_klein"])
def folder(request):
    return request.getfixturevalue(request.param)


def unpacked(pipeline, latents):
    """Latents of the pipeline's loop as `encode_images` has them, by the pipeline's own helpers."""
    if isinstance(pipeline, diffusers.QwenImagePipeline):
        return pipeline._unpack_latents(latents, 16, 16, pipeline.vae_scale_factor)[:, :, 0]
    if isinstance(pipeline, diffusers.Flux2KleinPipeline):
        return pipeline._unpack_latents_with_ids(latents, pipeline._prepare_latent_ids(torch.zeros(2, 1, 4, 4)))
    return latents


@pytest.mark.parametrize("kind", ["tiny_sd3", "tiny_qwen_image", "tiny_z_image", "tiny_klein"])
def test_the_velocity_is_that_of_the_pipelines_own_step(kind, request, monkeypatch):
    """For the same latents, timestep and prompts, of which one is longer; without guidance."""
    source, seen = request.getfixturevalue(kind), []
    system = System(model=str(source), guidance=1.0, steps=3)
    pipeline, model = system.load(), load_model(source)
    step = pipeline.scheduler.step

    def watched(velocity, timestep, latents, **options):
        sigma = pipeline.scheduler.sigmas[len(seen)]
        seen.append((unpacked(pipeline, velocity), timestep, unpacked(pipeline, latents), sigma))
        return step(velocity, timestep, latents, **options)

    monkeypatch.setattr(pipeline.scheduler, "step", watched)
    draw(pipeline, PROMPTS, [noise_generator(0, 0, i) for i in range(2)], system)
    conditioning = model.encode_prompts(*model.load_text(), PROMPTS)
    denoiser = model.load_denoiser()
    assert len(seen) == 3
    for velocity, timestep, latents, sigma in seen:
        with torch.no_grad():
            found = model.predict(denoiser, latents, timestep.expand(2), conditioning)
        torch.testing.assert_close(found, velocity, atol=1e-5, rtol=1e-4)
        # the noise level that training gives to this timestep is the one that the sampler has there
        noise = torch.ones_like(latents)
        torch.testing.assert_close(model.add_noise(0 * noise, noise, timestep.expand(2)), sigma * noise)
        assert not torch.allclose(-found, velocity, atol=1e-2)


def test_latents_are_those_that_the_pipelines_make_of_an_image(tiny_qwen_image, tiny_z_image, tiny_klein):
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    found = {}
    for source in (tiny_qwen_image, tiny_z_image, tiny_klein):
        model = load_model(source)
        found[model.family] = mean, std = model.encode_images(model.load_vae(), pixels)
        assert mean.shape == std.shape and (std > 0).all()
    parts = DiffusionPipeline.from_pretrained(tiny_qwen_image).components
    with torch.no_grad():  # that one draws from the posterior
        expected = diffusers.QwenImageImg2ImgPipeline(**parts)._encode_vae_image(
            pixels.unsqueeze(2), torch.Generator().manual_seed(7)
        )
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7))[:, :, 0]
    mean, std = found["qwen-image"]
    torch.testing.assert_close(mean + std * noise, expected[:, :, 0])
    klein = DiffusionPipeline.from_pretrained(tiny_klein)
    torch.testing.assert_close(found["flux2-klein"][0], klein._encode_vae_image(pixels, None))
    spread = klein._patchify_latents(klein.vae.encode(pixels).latent_dist.std)
    scale = (klein.vae.bn.running_var + klein.vae.config.batch_norm_eps).sqrt().reshape(-1, 1, 1)
    torch.testing.assert_close(found["flux2-klein"][1], spread / scale)
    vae = DiffusionPipeline.from_pretrained(tiny_z_image).vae
    expected = (vae.encode(pixels).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    torch.testing.assert_close(found["z-image"][0], expected)


def test_a_prompt_that_fills_its_template_is_whole_and_one_token_more_is_cut(folder):
    model = load_model(folder)
    (tokenizer,), encoder = model.load_text()
    if model.family == "qwen-image":
        around = encoder.pipeline.prompt_template_encode.partition("{}")[2]  # what stands before is dropped
    else:
        chat = {"add_generation_prompt": True, "enable_thinking": model.family == "z-image", "tokenize": False}
        around = tokenizer.apply_chat_template([{"role": "user", "content": ""}], **chat)
    taken = 512 - len(tokenizer(around).input_ids)
    assert [row for row, _ in model.cut_prompts(["a" * taken, "a" * (taken + 1)], [tokenizer])] == [1]


def test_what_was_stopped_goes_on_to_the_same_adapter_which_plain_diffusers_draws_with(folder, likes, config, tmp_path):
    prepared = prepare_feedback(likes, tmp_path / "prepared", str(folder))
    config = replace(config, model=str(folder), prepared_dir=prepared, lora_rank=4, max_train_steps=4)
    config = replace(config, checkpoint_every=2, learning_rate=1e-2)
    whole = replace(config, output_dir=tmp_path / "whole")
    losses = [step["loss"] for step in train(whole)]
    stopped = train(config)
    assert [next(stopped)["loss"] for _ in range(3)] == losses[:3]
    stopped.close()
    assert [step["loss"] for step in train(config)] == losses[2:]
    one, two = (load_file(each.output_dir / "lora" / "pytorch_lora_weights.safetensors") for each in (config, whole))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(config.output_dir / "lora")
    model, noise = load_model(folder), [noise_generator(0, 0, 0)]
    data = PreparedFeedback(prepared, model)
    rows = data.is_desirable.nonzero()[0][:2]
    given = data.latents(rows)[0], torch.tensor([300.0, 700.0]), data.conditioning(rows)
    system = System.of_run(config.output_dir, guidance=3.0, steps=2)
    merged = system.load()
    with torch.no_grad():
        tuned, ours, base = (
            model.predict(each, *given) for each in (pipeline.transformer, merged.transformer, model.load_denoiser())
        )
    torch.testing.assert_close(tuned, ours, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(tuned, base, atol=1e-3)
    assert draw(merged, ["a picture 1"], noise, system)[0].size == (16, 16)


def test_guidance_of_one_is_off_and_more_of_it_is_the_usual_sum(folder, monkeypatch):
    """v = v_empty + scale (v_prompt - v_empty), however the pipeline counts; Qwen-Image's keeps each patch's length."""
    model, velocities = load_model(folder), {}
    for scale in (1.0, 3.0):
        system = System(model=str(folder), guidance=scale, steps=2)
        pipeline = system.load()
        step = pipeline.scheduler.step

        def watched(velocity, timestep, latents, scale=scale, pipeline=pipeline, step=step, **options):
            velocities.setdefault(scale, (velocity, timestep, unpacked(pipeline, latents)))
            return step(velocity, timestep, latents, **options)

        monkeypatch.setattr(pipeline.scheduler, "step", watched)
        draw(pipeline, PROMPTS, [noise_generator(0, 0, i) for i in range(2)], system)
    _, timestep, latents = velocities[1.0]
    denoiser, text = model.load_denoiser(), model.load_text()
    with torch.no_grad():
        prompted, empty = (
            model.predict(denoiser, latents, timestep.expand(2), model.encode_prompts(*text, prompts))
            for prompts in (PROMPTS, ["", ""])
        )
    expected = empty + 3 * (prompted - empty)
    found = unpacked(pipeline, velocities[3.0][0])
    if model.family == "qwen-image":
        found, expected = (F.normalize(F.pixel_unshuffle(each, 2), dim=1) for each in (found, expected))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_what_their_pipelines_cannot_do_is_refused(folder, tmp_path):
    model = load_model(folder)
    with pytest.raises(
        ValueError, match=r"disliked_lora must be empty for a \w+Pipeline, which takes none, got 'lora'"
    ):
        System(model=str(folder), guidance=3.0, disliked_lora="lora", dislike_strength=0.5).opened()
    if model.family == "qwen-image":  # its schedule is stretched between its first step and its last
        with pytest.raises(ValueError, match="steps must be 2 or more for the schedule of"):
            System(model=str(folder), steps=1).opened()
    if model.family != "flux2-klein":
        assert System(model=str(folder), negative_prompt="grey").opened()
        return
    with pytest.raises(ValueError, match="negative_prompt must be empty for a Flux2KleinPipeline"):
        System(model=str(folder), negative_prompt="grey").opened()
    distilled = shutil.copytree(folder, tmp_path / "distilled")
    index = json.loads((distilled / "model_index.json").read_text()) | {"is_distilled": True}
    (distilled / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"is distilled .* as 'black-forest-labs/FLUX.2-klein-base-4B'"):
        load_model(distilled)


def test_online_methods_refuse_them(folder):
    with pytest.raises(ValueError, match=r"AlignProp and D3PO must have a Stable Diffusion .* got .*, a \w+Pipeline"):
        OwnImages(load_model(folder), PROMPTS, torch.device("cpu"))
