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
from safetensors.torch import load_file, save_file
from scipy import stats
from tiny_models import make_tiny_sd3

from dkto.data.encoded import model_fingerprint
from dkto.models import SMALL_WORLD_FOLDER, load_model, make_policy, pipeline_folder, read_weights, write_weights
from dkto.models.base import T5_TOKENS
from dkto.models.system import System, draw, noise_generator
from dkto.objective.losses import denoising_error

KINDS = ("tiny_pipeline", "tiny_sdxl", "tiny_sd3", "tiny_qwen_image", "tiny_z_image", "tiny_klein")
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
    noisy = torch.nn.functional.pixel_unshuffle(noisy, 2) if model.family == "flux2-klein" else noisy
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
    assert type(pipeline).__name__ == model.pipeline_name
    drawn = getattr(pipeline, model.denoiser_part)
    for name, value in denoiser.state_dict().items():
        assert torch.equal(drawn.state_dict()[name], value), name
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(prompt="a red circle", num_inference_steps=2, height=16, width=16).images[0].size == (16, 16)


def changed_json(folder, name, **fields):
    place = folder / name
    place.write_text(json.dumps(json.loads(place.read_text()) | fields))


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "is of 'EDMEulerScheduler', whose"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is of 'FlowMatch"),
        ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "is of LCMScheduler, for a distilled"),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": True}, "whose process is not supported here; expected"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "x"}, "is no configuration of a scheduler"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction type 'sample' is not supported"),
        ("vae/config.json", {"latents_mean": [0.1] * 4}, "has latents_mean or latents_std, by which latents are"),
        ("unet/config.json", {"time_cond_proj_dim": 8}, "is distilled"),
        (
            "model_index.json",
            {"vae": ["diffusers", 3]},
            r"part 'vae' must be a library and a class, got \['diffusers', 3\]",
        ),
    ],
)
def test_what_would_train_and_draw_wrongly_is_refused(tiny_pipeline, tmp_path, name, fields, sentence):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "model")
    changed_json(folder, name, **fields)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)
    with pytest.raises(ValueError, match=sentence):
        System(model=str(folder)).load()


def test_a_schedule_without_betas_is_refused(tiny_pipeline, tiny_sd3, tmp_path):
    for source, stored in (
        (tiny_pipeline, {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000}),
        (tiny_sd3, {"_class_name": "DDIMScheduler", "beta_start": 0.1, "beta_end": 0.2}),
    ):
        folder = shutil.copytree(source, tmp_path / source.parent.name)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(stored))
        with pytest.raises(ValueError, match=r"scheduler_config\.json is of '.*', whose process is not supported here"):
            load_model(folder)


@pytest.mark.parametrize("how", ["nan", "missing", "extra", "cut", "config"])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_whole_are_refused(tiny_pipeline, tmp_path, part, how):
    """Libraries fill what is missing with random numbers and warn in a log that nobody reads."""
    folder = shutil.copytree(tiny_pipeline, tmp_path / "model")
    path = next((folder / part).glob("*.safetensors"))
    tensors = load_file(path)
    first = sorted(tensors)[0]
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "config":
        (folder / part / "config.json").write_text("{")
    else:
        tensors |= {"nan": {first: tensors[first] * float("nan")}, "extra": {"more": torch.ones(1)}}.get(how, {})
        tensors = {k: v for k, v in tensors.items() if how != "missing" or k != first}
        save_file(tensors, path, {"format": "pt"})
    if part == "text_encoder" and how == "extra":
        return  # transformers ships such tensors itself
    with pytest.raises(
        ValueError, match=rf"model/{part}.*({'not finite|lack 1|no layer for 1|can be|is no conf'})"
    ) as caught:
        model = load_model(folder)
        {"unet": model.load_denoiser, "vae": model.load_vae, "text_encoder": model.load_text}[part]()
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=part):
        System(model=str(folder)).load()


@pytest.mark.parametrize("source", ["tiny_pipeline", "tiny_sd3"])
def test_a_folder_of_half_precision_alone_is_read_as_it_is(source, request, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(source), tmp_path / "model")
    for path in list(folder.rglob("*.safetensors")):
        halves = {k: v.half() for k, v in load_file(path).items()}
        save_file(halves, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
        path.unlink()
    model = load_model(folder)
    denoiser, vae, _ = model.load_denoiser(), model.load_vae(), model.load_text()
    assert next(denoiser.parameters()).dtype == vae.dtype == torch.float32  # SDXL's VAE overflows in float16
    assert System(model=str(folder)).load().vae.dtype == torch.float32
    assert model_fingerprint(model) != model_fingerprint(load_model(request.getfixturevalue(source)))
    model.write_pipeline(denoiser, tmp_path / "out")
    written = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(next(written.vae.parameters()).float(), next(model.load_vae().parameters()))


def test_a_written_pipeline_tells_no_place(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "secret-place")
    changed_json(source, "vae/config.json", _name_or_path=str(tmp_path / "secret-place" / "vae"))
    model = load_model(source)
    denoiser = model.load_denoiser()
    for name, weights in (("one", None), ("two", denoiser.state_dict())):
        model.write_pipeline(denoiser, tmp_path / name, weights)
        texts = [path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()]
        assert len(texts) > 5 and not any(b"secret-place" in text or b"name_or_path" in text for text in texts)
    assert "_name_or_path" not in (SMALL_WORLD_FOLDER / "vae" / "config.json").read_text()


def test_read_weights_refuses_what_is_of_another_policy(tiny_pipeline, tmp_path):
    def pair(rank):
        return make_policy(load_model(tiny_pipeline).load_denoiser(), rank, seed=0)

    write_weights(pair(2), tmp_path)
    with pytest.raises(ValueError, match=r"does not fit the policy of this configuration: \d+ of \d+ "):
        read_weights(pair(4), tmp_path)
    with pytest.raises(ValueError, match="lora_rank must be at most 16, the width of the widest layer with an adapter"):
        pair(64)


def test_t5_takes_as_many_tokens_in_drawing_as_in_training(tiny_sd3, monkeypatch):
    """And a prompt that is too long by that is listed, though its tokenizer would take 512."""
    lengths = []
    pipeline = System(model=str(tiny_sd3), steps=1).load()
    encode = type(pipeline).encode_prompt

    def watched(self, *args, **options):
        lengths.append(options["max_sequence_length"])
        return encode(self, *args, **options)

    monkeypatch.setattr(type(pipeline), "encode_prompt", watched)
    draw(pipeline, ["a red circle"], [noise_generator(0, 0, 0)], System(steps=1))
    assert lengths == [T5_TOKENS] == [77]
    model = load_model(tiny_sd3)
    t5 = model.tokenizers()[2]
    assert [row for row, _ in model.cut_prompts(["a red " * 30, "a red " * 50], [t5])] == [1]


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


def test_a_large_text_encoder_is_in_bfloat16_on_a_gpu_alone(tiny_sd3, monkeypatch):
    """By the size of its files; what it says is the same to bfloat16's precision, and on a CPU to the last bit."""
    model, prompts = load_model(tiny_sd3), ["a red circle", ""]
    sizes = {
        part: (tiny_sd3 / part / "model.safetensors").stat().st_size for part in ("text_encoder", "text_encoder_3")
    }
    before = model.encode_prompts(*model.load_text(), prompts)
    monkeypatch.setattr("dkto.models.parts.LARGE_BYTES", min(sizes.values()))
    large = max(sizes, key=sizes.get)
    tokenizers, text = model.load_text("cuda")  # loaded for it, moved by who called
    kept = {name: next(part.parameters()).dtype for name, part in text.pipeline.components.items() if name in sizes}
    assert kept.pop(large) == torch.bfloat16 and set(kept.values()) == {torch.float32}
    found = model.encode_prompts(tokenizers, text, prompts)
    for name, value in model.encode_prompts(*model.load_text("cpu"), prompts).items():
        assert torch.equal(value, before[name])
        torch.testing.assert_close(found[name].float(), value, atol=0.05, rtol=0.02)
