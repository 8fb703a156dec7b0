import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from dkto.cli import main
from dkto.common.files import read_records
from dkto.evaluation.scorers import SCORERS, get_pixel_scorer, register_scorer
from dkto.evaluation.scorers.world import aesthetics_pixels
from dkto.models import load_model, make_policy
from dkto.models.system import System
from dkto.training.chain import Chain, chain_steps, log_ratio
from dkto.training.config import OnlineConfig
from dkto.training.launch import start_training
from dkto.training.loop import run_training, train
from dkto.training.online import OwnImages, d3po_loss, draw_noise, draw_rows, to_images
from dkto.training.run_folder import RunFolder
from dkto.world.painter import BAD_FINISH, GOOD_FINISH, paint
from dkto.world.scenes import parse, prompts_for
from dkto.world.truth import aesthetics, redness


@pytest.fixture
def config(tiny_pipeline, tmp_path):
    """A short online training of the tiny pipeline for red pictures."""
    (tmp_path / "prompts.txt").write_text("a star\n\na ring\na cross\n")
    return OnlineConfig(
        tmp_path / "prompts.txt",
        tmp_path / "run",
        model=str(tiny_pipeline),
        reward="world_redness",
        sampling_steps=3,
        batch_size=4,
        lora_rank=2,
        max_train_steps=5,
        checkpoint_every=2,
    )


def without_time(records):
    return [{k: v for k, v in r.items() if k not in ("samples_per_second", "peak_memory_mb")} for r in records]


def adapter(folder):
    return load_file(folder / "lora" / "pytorch_lora_weights.safetensors")


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("finish", [GOOD_FINISH, BAD_FINISH])
def test_rules_on_tensors_agree_with_the_rules_on_pictures(finish):
    rng = np.random.default_rng(0)
    pictures = np.stack([paint(parse(prompt), finish, rng) for prompt in prompts_for("train", 4)])
    pixel_values = torch.from_numpy(pictures).permute(0, 3, 1, 2).double() / 255
    for name, rule in (("world_aesthetics", aesthetics), ("world_redness", redness)):
        values = get_pixel_scorer(name)(pixel_values, [""] * 4)
        assert values.tolist() == pytest.approx([rule(picture) for picture in pictures], abs=1e-6)


def test_the_rule_on_tensors_carries_a_gradient_also_where_a_picture_is_grey():
    pixel_values = torch.full((2, 3, 8, 8), 0.5).add(0.1 * torch.rand(2, 1, 8, 8)).requires_grad_()
    aesthetics_pixels(pixel_values, ["", ""]).sum().backward()
    assert torch.isfinite(pixel_values.grad).all() and pixel_values.grad.abs().sum() > 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("eta", "clip"), [(0.0, False), (1.0, False), (1.0, True)])
def test_the_chain_is_that_of_diffusers(tiny_pipeline, eta, clip, prediction_type):
    model = load_model(tiny_pipeline)
    model.scheduler.register_to_config(prediction_type=prediction_type, clip_sample=clip, clip_sample_range=0.5)
    unet = model.load_denoiser()
    hidden = {"encoder_hidden_states": torch.randn(2, 24, 16)}
    steps = chain_steps(model, 4, eta)
    noise = torch.randn(2, 5, 4, 8, 8)
    with torch.no_grad():
        ours = list(Chain(model, steps, 1.0, hidden, {k: v[:1] for k, v in hidden.items()}).draw(unet, noise))
        scheduler = DDIMScheduler.from_config(model.scheduler.config)
        scheduler.set_timesteps(4)
        latents = noise[:, 0]
        for index, t in enumerate(scheduler.timesteps):
            output = unet(latents, t, **hidden).sample
            latents = scheduler.step(output, t, latents, eta=eta, variance_noise=noise[:, index + 1]).prev_sample
            torch.testing.assert_close(ours[index + 1], latents, rtol=1e-4, atol=1e-5)


def flow_chain(model, count, eta):
    hidden = {"encoder_hidden_states": torch.randn(2, 101, 32), "pooled_projections": torch.randn(2, 32)}
    return Chain(model, chain_steps(model, count, eta), 1.0, hidden, {k: v[:1] for k, v in hidden.items()})


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_chain_of_a_flow_is_that_of_diffusers_and_may_add_noise(tiny_sd3, dynamic):
    model = load_model(tiny_sd3)
    denoiser, noise = model.load_denoiser(), torch.randn(2, 5, 4, 8, 8)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0 if dynamic else 3.0)
    model.scheduler.register_to_config(use_dynamic_shifting=dynamic)
    scheduler.set_timesteps(4)
    latents, chain = noise[:, 0], flow_chain(model, 4, eta=0.0)
    with torch.no_grad():
        for index, (t, ours) in enumerate(zip(scheduler.timesteps, chain.draw(denoiser, noise), strict=False)):
            torch.testing.assert_close(ours, latents, rtol=1e-4, atol=1e-5)
            if index < 4:
                output = denoiser(latents, timestep=t.expand(2), **chain.conditioning).sample
                latents = scheduler.step(output, t, latents).prev_sample
    noisy = chain_steps(model, 4, eta=1.0)
    assert noisy[0].std == pytest.approx(noisy[0].after.spread), "pure noise is drawn afresh"
    assert [step.std > 0 for step in noisy] == [True, True, True, False]


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_a_short_noisy_step_of_a_flow_is_that_of_flow_grpo(tiny_sd3, eta):
    """x + (v + sigma^2 / 2s (x + (1 - s) v)) ds + sigma sqrt(-ds) noise, sigma^2 = 2 eta^2 s / (1 - s)."""
    model = load_model(tiny_sd3)
    chain, denoiser, x = flow_chain(model, 1000, eta), model.load_denoiser(), torch.randn(2, 4, 8, 8)
    step = chain.steps[500]
    s, ds = step.level.spread, step.after.spread - step.level.spread
    sigma = (2 * eta**2 * s / (1 - s)) ** 0.5
    with torch.no_grad():
        v = model.predict(denoiser, x, torch.full((2,), step.timestep), chain.conditioning)
        drift = v + sigma**2 / (2 * s) * (x + (1 - s) * v)
        torch.testing.assert_close((chain.mean(denoiser, x, step) - x) / ds, drift, rtol=0.01, atol=0.01)
    assert step.std == pytest.approx(sigma * (-ds) ** 0.5, rel=0.01)


def test_guidance_points_away_from_the_empty_prompt(tiny_pipeline):
    model = load_model(tiny_pipeline)
    unet, latents = model.load_denoiser(), torch.randn(2, 4, 8, 8)
    prompt, empty = torch.randn(2, 24, 16), torch.randn(1, 24, 16)
    step = chain_steps(model, 4, 1.0)[0]

    def mean(guidance, hidden):
        chain = Chain(model, [step], guidance, {"encoder_hidden_states": hidden}, {"encoder_hidden_states": empty})
        return chain.mean(unet, latents, step)

    with torch.no_grad():
        without, with_prompt = mean(1.0, empty.expand(2, -1, -1)), mean(1.0, prompt)
        torch.testing.assert_close(mean(3.0, prompt), without + 3 * (with_prompt - without), rtol=1e-3, atol=1e-4)


def test_log_ratio_is_that_of_two_normal_distributions():
    x, policy_mean, reference_mean = torch.randn(3, 2, 4, 4, 4, dtype=torch.float64).unbind(0)
    by_hand = torch.distributions.Normal(policy_mean, 0.3).log_prob(x)
    by_hand = (by_hand - torch.distributions.Normal(reference_mean, 0.3).log_prob(x)).mean((1, 2, 3))
    torch.testing.assert_close(log_ratio(x, policy_mean, reference_mean, 0.3), by_hand)


def test_d3po_loss_prefers_the_chosen_leaves_ties_and_clips():
    logs = torch.tensor([0.02, -0.02, 0.01, 0.0, 0.5, 0.0], requires_grad=True)
    loss, inside = d3po_loss(logs, torch.tensor([1.0, 0.0, -1.0]), beta=10.0, ratio_clip=0.1)
    loss.backward()
    assert logs.grad[0] < 0 < logs.grad[1]  # a step down the gradient makes the chosen chain likelier
    assert logs.grad[2:5].tolist() == [0, 0, 0]  # a tie, and a ratio outside its band
    assert inside.tolist() == [True, True, True, True, False, True]
    by_hand = -torch.nn.functional.logsigmoid(torch.tensor([10 * 0.04, -10 * np.log(1.1)])).mean()
    assert float(loss.detach()) == pytest.approx(float(by_hand), abs=1e-6)
    assert float(d3po_loss(logs.detach(), torch.zeros(3), beta=10.0, ratio_clip=0.1)[0]) == 0


@pytest.mark.parametrize("objective", ["alignprop", "d3po"])
def test_a_run_leaves_records_and_an_adapter_that_a_system_loads(config, objective):
    config = replace(config, objective=objective)
    records = list(train(config))
    assert [r["global_step"] for r in records] == [1, 2, 3, 4, 5]
    assert all(np.isfinite(v) for r in records for v in r.values())
    assert read_records(config.output_dir / "metrics.jsonl") == records
    about = json.loads((config.output_dir / "training.json").read_text())
    assert about["finished"] and about["config"]["objective"] == objective
    assert [path.name for path in config.output_dir.glob("checkpoint-*")] == ["checkpoint-00000005"]
    assert list(train(config)) == []
    pipeline = System.of_run(config.output_dir, steps=2).load()
    assert pipeline("a star", num_inference_steps=2).images[0].size == (16, 16)


@pytest.mark.parametrize(
    ("objective", "pipeline"),
    [
        ("alignprop", "tiny_pipeline"),
        ("d3po", "tiny_pipeline"),
        ("alignprop", "tiny_sd3"),
        pytest.param("d3po", "tiny_sd3", marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_equals_uninterrupted(config, objective, pipeline, request):
    config = replace(config, objective=objective, chain_steps=2, model=str(request.getfixturevalue(pipeline)))
    whole = replace(config, output_dir=config.output_dir.with_name("whole"))
    expected = list(train(whole))
    steps = train(config)
    for _ in range(3):
        next(steps)
    steps.close()
    assert [p.name for p in RunFolder(config).checkpoints()] == ["checkpoint-00000002"]
    assert [r["global_step"] for r in train(config)] == [3, 4, 5]
    assert without_time(read_records(config.output_dir / "metrics.jsonl")) == without_time(expected)
    assert same(adapter(config.output_dir), adapter(whole.output_dir))


@pytest.mark.slow  # fifteen seconds; the loop is that of offline training, whose own test is quick
def test_a_run_asked_to_stop_leaves_a_checkpoint_and_goes_on_from_it(config):
    """A real process that gets SIGTERM before its first checkpoint."""
    config = replace(config, max_train_steps=400, checkpoint_every=10_000)
    process = start_training(config)
    deadline = time.monotonic() + 300
    while not (config.output_dir / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(300) == 0
    assert "stopped at a checkpoint" in (config.output_dir / "train.log").read_text()
    done = len(read_records(config.output_dir / "metrics.jsonl"))
    (checkpoint,) = config.output_dir.glob("checkpoint-*")
    assert 0 < done < 400 and int(checkpoint.name.split("-")[1]) == done
    assert next(train(config))["global_step"] == done + 1


def test_full_fine_tuning_leaves_a_pipeline(config):
    run_training(replace(config, lora_rank=0, max_train_steps=1))
    assert System.of_run(config.output_dir).load().unet.config.sample_size == 8


@pytest.mark.parametrize(
    ("backprop_steps", "pipeline"), [(1, "tiny_pipeline"), (2, "tiny_pipeline"), (3, "tiny_pipeline"), (2, "tiny_sd3")]
)
def test_alignprop_passes_the_gradient_through_the_last_steps_only(config, backprop_steps, pipeline, request):
    """Gradient of the reward by hand, K steps deep, against what the training does."""
    config = replace(config, backprop_steps=backprop_steps, model=str(request.getfixturevalue(pipeline)))
    record = next(train(config))
    model = load_model(config.model)
    online = OwnImages(model, config.prompts(), torch.device("cpu"))
    pair = make_policy(model.load_denoiser(), config.lora_rank, config.seed)
    rows, noise = draw_rows(config, 3, 0), draw_noise(config, 0, (4, 8, 8))
    chain = online.chain(rows, config)
    latents = noise[:, 0]
    for index, step in enumerate(chain.steps):
        if index == config.sampling_steps - backprop_steps:
            latents = latents.detach()
        latents = chain.mean(pair.policy, latents, step) + step.std * noise[:, index + 1]
    vae = online.vae
    pictures = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample / 2 + 0.5
    loss = -get_pixel_scorer("world_redness")(pictures.clamp(0, 1), [online.prompts[row] for row in rows]).mean()
    gradients = torch.autograd.grad(loss, list(pair.trainable().values()), allow_unused=True)
    norm = sum(float(gradient.square().sum()) for gradient in gradients if gradient is not None) ** 0.5
    assert record["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-3) and norm > 0


def test_checkpointing_changes_nothing_but_memory_and_a_million_prompts_cost_none(config):
    for objective in ("alignprop", "d3po"):
        records = [
            next(train(replace(config, objective=objective, output_dir=config.output_dir / place, **more)))
            for place, more in ((f"{objective}-c", {}), (f"{objective}-p", {"gradient_checkpointing": False}))
        ]
        assert records[0]["grad_norm"] == pytest.approx(records[1]["grad_norm"], rel=1e-4)
    model = load_model(config.model)
    many = OwnImages(model, [f"prompt {number}" for number in range(1_000_000)], torch.device("cpu"))
    assert len(many.chain(np.array([999_999, 0]), config).guided["encoder_hidden_states"]) == 4


@pytest.mark.parametrize("pipeline", ["tiny_pipeline", "tiny_sd3"])
@pytest.mark.parametrize("objective", ["alignprop", pytest.param("d3po", marks=pytest.mark.slow)])  # twenty seconds
def test_the_reward_of_the_drawn_pictures_rises(config, objective, pipeline, request):
    """The same noise and prompts before and after: a brighter picture is the reward."""
    config = replace(config, model=str(request.getfixturevalue(pipeline)))
    register_scorer("brightness", Brightness())
    try:
        settings = {
            "alignprop": {"backprop_steps": 3, "batch_size": 8, "learning_rate": 1e-3},
            "d3po": {"beta": 100.0, "ratio_clip": 0.9, "batch_size": 64, "learning_rate": 3e-3},
        }[objective]
        shared = {"reward": "brightness", "max_train_steps": 12, "lora_rank": 0, "guidance": 1.0}
        learning = replace(config, objective=objective, checkpoint_every=100, **shared, **settings)
        run_training(learning)
        model = load_model(config.model)
        online = OwnImages(model, config.prompts(), torch.device("cpu"))
        noise = draw_noise(replace(config, batch_size=24, seed=7), 0, (4, 8, 8))
        rewards = {}
        for name, source in (("before", config.model), ("after", config.output_dir / "model")):
            with torch.no_grad():
                *_, last = online.chain(np.arange(24) % 3, learning).draw(load_model(source).load_denoiser(), noise)
                rewards[name] = Brightness().score_pixels(online.decode(last), [""] * 24)
        gain = rewards["after"] - rewards["before"]
        assert gain.mean() > 2 * gain.std() / 24**0.5 > 0  # above 0 with its interval
    finally:
        SCORERS.pop("brightness")


class Brightness:
    """A reward for tests: mean pixel."""

    name = "brightness"

    def __call__(self, images, prompts):
        return np.array([np.asarray(image).mean() / 255 for image in images])

    def score_pixels(self, pixel_values, prompts):
        return pixel_values.mean((1, 2, 3))


def test_pictures_are_rounded_to_bytes():
    image = to_images(torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1))[0]
    assert np.asarray(image).tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"objective": "ppo"}, "objective must be one of alignprop, d3po, got 'ppo'"),
        ({"backprop_steps": 4}, r"backprop_steps must be in \[1, 3 sampling_steps\], got 4"),
        ({"chain_steps": 9}, r"chain_steps must be in \[0, 3 sampling_steps\], got 9"),
        ({"objective": "d3po", "eta": 0.0}, r"eta must be in \(0, 1\] for d3po, .*, got 0.0"),
        ({"objective": "d3po", "eta": 1.5}, r"eta must be in \[0, 1\], got 1.5"),
        ({"eta": 1.5}, r"eta must be in \[0, 1\], got 1.5"),
        ({"objective": "d3po", "batch_size": 3}, "batch_size must be even for d3po"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"lora_rank": -1}, "lora_rank must be 0 or above, got -1"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(config, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(config, **changes)


def test_a_reward_without_gradient_a_missing_file_and_another_run_are_refused(config):
    with pytest.raises(ValueError, match="scorer world_fidelity has no gradient"):
        next(train(replace(config, reward="world_fidelity")))
    with pytest.raises(KeyError, match="unknown scorer 'world_rednes'"):
        next(train(replace(config, objective="d3po", reward="world_rednes")))
    with pytest.raises(ValueError, match="scorer world_fidelity judges the small world alone: prompt 'a star'"):
        next(train(replace(config, objective="d3po", reward="world_fidelity")))
    assert not config.output_dir.exists(), "what cannot be rewarded is known before anything is drawn"
    with pytest.raises(FileNotFoundError, match=r"prompts_file .* does not exist"):
        next(train(replace(config, prompts_file="nowhere.txt")))
    with pytest.raises(ValueError, match=r"sampling_steps must be at most 1000, as finely as .* is cut, got 1001"):
        next(train(replace(config, sampling_steps=1001)))
    config.prompts_file.with_name("empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        next(train(replace(config, prompts_file=config.prompts_file.with_name("empty.txt"))))
    steps = train(config)
    for _ in range(3):
        next(steps)
    steps.close()
    with pytest.raises(ValueError, match=r"another configuration .*guidance: 3\.0 stored, 2.0 asked"):
        next(train(replace(config, guidance=2.0)))


def test_a_reward_that_is_not_finite_stops_the_run(config):
    class Broken(Brightness):
        def score_pixels(self, pixel_values, prompts):
            return super().score_pixels(pixel_values, prompts) * float("nan")

    register_scorer("broken", Broken())
    try:
        with pytest.raises(FloatingPointError, match="not finite for 3 steps in a row, last at step 3"):
            next(train(replace(config, reward="broken")))
    finally:
        SCORERS.pop("broken")


def test_the_command_trains_online(config, capsys):
    command = ["train-online", "--prompts-file", str(config.prompts_file)]
    command += ["--output-dir", str(config.output_dir), "--model", config.model, "--reward", "world_redness"]
    command += ["--sampling-steps", "2", "--batch-size", "2", "--max-train-steps", "1", "--lora-rank", "2"]
    assert main(command) == 0
    assert "finished" in capsys.readouterr().out and (config.output_dir / "lora").is_dir()
