import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from dkto.common.files import read_records
from dkto.data.encode import prepare_feedback
from dkto.training import loop
from dkto.training.launch import config_arguments, run_trainings, start_training
from dkto.training.loop import learning_rate_at, run_training, train
from dkto.training.run_folder import RunFolder

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
    "peak_memory_mb",
    "skipped_steps",
    "utility_slope",
}


def weights(folder):
    return load_file(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def without_time(records):
    return [{k: v for k, v in r.items() if k not in ("samples_per_second", "peak_memory_mb")} for r in records]


def test_a_run_leaves_records_and_a_pipeline_for_plain_diffusers(config, tiny_pipeline):
    records = list(train(config))
    assert [r["global_step"] for r in records] == list(range(1, 9))
    assert records[0]["peak_memory_mb"] > 50
    assert all(r.keys() >= MEASURES and all(np.isfinite(v) for v in r.values()) for r in records)
    assert read_records(config.output_dir / "metrics.jsonl") == records
    about = json.loads((config.output_dir / "training.json").read_text())
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


@pytest.mark.parametrize("estimator", ["batch", "unrelated", "per_class", "running", "zero"])
def test_every_estimator_runs(config, estimator):
    points = [record["reference_point"] for record in train(replace(config, estimator=estimator, max_train_steps=6))]
    assert points[0] == 0 and min(points) >= 0
    assert any(points) == (estimator != "zero"), points


def test_sft_draws_liked_samples_only(config):
    records = list(train(replace(config, objective="sft", max_train_steps=3)))
    assert all("reward/undesirable" not in r and "reference_point" not in r for r in records)
    assert records[0]["loss"] == pytest.approx(records[0]["policy_error"])


def test_sft_on_everything_meets_both_classes(config):
    records = list(train(replace(config, objective="sft_all", max_train_steps=6)))
    assert {"reward/desirable", "reward/undesirable"} <= set().union(*records)
    assert all(r["loss"] == pytest.approx(r["policy_error"]) for r in records)


@pytest.mark.parametrize("style", ["prefix", "negative"])
def test_csft_trains_on_prefixed_prompts(config, likes, tiny_pipeline, style):
    csft = replace(config, objective="csft", csft_style=style, max_train_steps=3)
    with pytest.raises(FileNotFoundError, match=f"run prepare again with csft='{style}'"):
        next(train(replace(csft, prepared_dir=prepare_feedback(likes, config.output_dir / "p", str(tiny_pipeline)))))
    prepare_feedback(likes, config.output_dir / "p", str(tiny_pipeline), csft=style)
    csft = replace(csft, prepared_dir=config.output_dir / "p")
    records = list(train(csft))
    plain = list(train(replace(csft, objective="sft_all", output_dir=config.output_dir / "plain")))
    assert records[0]["policy_error"] != plain[0]["policy_error"]
    assert records[0]["policy_error"] == pytest.approx(plain[0]["policy_error"], rel=0.05)


def test_dpo_runs_on_pairs(config, paired):
    records = list(train(replace(config, prepared_dir=paired, objective="dpo", max_train_steps=3)))
    assert records[0]["loss"] == pytest.approx(np.log(2)) and records[0]["implicit_accuracy/pair"] == 0.5
    assert records[0]["utility_slope"] == pytest.approx(0.5)
    assert records[1]["reward/margin"] != 0 and "reference_point" not in records[1]


@pytest.mark.parametrize("objective", ["bco", "tgo", "nft", "awm", "dgpo", "dmpo", "sdpo"])
def test_a_newer_method_trains_with_brakes(config, paired, objective):
    brakes = {"anchor": 0.1, "sft_weight": 0.1}
    changes = {"beta": 100.0, "group_size": 2, "max_train_steps": 4, "batch_size": 8, **brakes}
    records = list(train(replace(config, prepared_dir=paired, objective=objective, **changes)))
    margins = [record["reward/margin"] for record in records if "reward/margin" in record]
    assert margins[0] == 0 and any(margins[1:]), "it starts at the reference and leaves it"
    assert all(np.isfinite(record["loss"]) for record in records)
    assert ("reference_point" in records[0]) == (objective in ("bco", "tgo"))


def test_weights_of_one_change_no_bit_and_others_do(config, likes, tiny_pipeline, tmp_path):
    """The weights of the likes reach TGO; KTO, which does not read them, says so and trains as without."""
    runs = {}
    for name, weights in {"none": None, "ones": np.ones(12), "some": np.linspace(1, 3, 12)}.items():
        folder = prepare_feedback(replace(likes, weights=weights), tmp_path / name, str(tiny_pipeline))
        more = {"prepared_dir": folder, "max_train_steps": 3, "output_dir": tmp_path / f"run-{name}"}
        runs[name] = without_time(train(replace(config, objective="tgo", **more)))
    assert runs["none"] == runs["ones"]
    assert runs["some"][0]["loss"] > runs["none"][0]["loss"]
    with pytest.warns(UserWarning, match="objective kto does not read the weights in .*some; tgo does"):
        kto = without_time(train(replace(config, **(more | {"output_dir": tmp_path / "kto"}))))
    plain = replace(config, **(more | {"prepared_dir": tmp_path / "none", "output_dir": tmp_path / "plain"}))
    assert kto == without_time(train(plain))


def test_dpo_without_pairs_is_refused(config):
    with pytest.raises(ValueError, match="objective 'dpo' needs pairs, but no liked and disliked image of"):
        next(train(replace(config, objective="dpo")))


@pytest.mark.parametrize("objective", ["kto", "dpo"])
def test_micro_batches_add_up_to_the_whole_step(config, paired, objective):
    """With a reference point that does not hang on the micro-batch, splitting a step changes rounding only."""
    config = replace(config, prepared_dir=paired, objective=objective, estimator="zero", beta=5.0)
    whole = list(train(config))
    split = list(train(replace(config, gradient_accumulation=2, output_dir=config.output_dir.with_name("split"))))
    for one, two in zip(whole, split, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"warmup_steps": 100, "max_train_steps": 100}, "warmup_steps 100 is not below max_train_steps 100"),
        ({"desirable_fraction": 0.0}, "desirable_fraction 0 draws no liked sample"),
        ({"desirable_fraction": 1.0}, "desirable_fraction 1 draws no disliked sample"),
        ({"prompt_dropout": 1.0}, "prompt_dropout 1 trains on no prompt"),
    ],
)
def test_what_is_mostly_a_mistake_is_warned_of(config, changes, sentence):
    assert not replace(config, warmup_steps=0).doubts()
    with pytest.warns(UserWarning, match=sentence):
        next(train(replace(config, **{"warmup_steps": 0, **changes})))


def test_a_beta_that_saturates_the_loss_is_warned_of_once(config):
    with pytest.warns(UserWarning, match="at beta 1e.09 it is saturated") as warned:
        list(train(replace(config, beta=1e9, warmup_steps=0, max_train_steps=25)))
    assert sum("saturated" in str(each.message) for each in warned) == 1


@pytest.mark.parametrize("estimator", ["batch", "per_class", "unrelated"])
def test_a_sample_is_not_its_own_reference(config, estimator):
    alone = {"batch_size": 4, "gradient_accumulation": 4}
    with pytest.raises(ValueError, match="needs at least 2 samples in a micro-batch"):
        replace(config, **alone, estimator=estimator)
    assert replace(config, **alone, estimator="zero").samples_per_rank(1) == 1


@pytest.mark.filterwarnings("ignore:prompt_dropout 1 trains on no prompt")
def test_prompt_dropout_trains_on_the_empty_prompt(config):
    with_prompt, without = (
        list(
            train(replace(config, prompt_dropout=p, max_train_steps=2, output_dir=config.output_dir.with_name(str(p))))
        )
        for p in (0.0, 1.0)
    )
    assert with_prompt[0]["policy_error"] != without[0]["policy_error"]


def test_stopped_and_resumed_equals_uninterrupted(config):
    whole = replace(config, output_dir=config.output_dir.with_name("whole"))
    expected = list(train(whole))
    steps = train(config)
    for _ in range(5):  # two steps after the checkpoint of step 3
        next(steps)
    steps.close()
    assert [p.name for p in RunFolder(config).checkpoints()] == ["checkpoint-00000003"]
    resumed = list(train(config))
    assert [r["global_step"] for r in resumed] == [4, 5, 6, 7, 8]
    assert without_time(read_records(config.output_dir / "metrics.jsonl")) == without_time(expected)
    assert same(weights(config.output_dir), weights(whole.output_dir))


def test_a_finished_run_is_not_trained_again(config):
    run_training(config)
    assert list(train(config)) == []


def test_a_finished_run_of_another_configuration_is_not_overwritten(config):
    run_training(config)
    before = weights(config.output_dir)
    with pytest.raises(ValueError, match=r"run belongs to another configuration \(beta: 500.0 stored, 7.0 asked\)"):
        list(train(replace(config, beta=7.0)))
    assert same(weights(config.output_dir), before)


def test_killed_in_training_and_called_again_ends_the_same(config, one_thread):
    """A real process, really killed: SIGKILL after the first checkpoint has been written."""
    long = replace(config, max_train_steps=40, checkpoint_every=4)
    whole = replace(long, output_dir=config.output_dir.with_name("whole"))
    list(train(whole))
    command = [sys.executable, "-m", "dkto.cli", "train", *config_arguments(long), "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not RunFolder(long).checkpoints() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert RunFolder(long).checkpoints()
    list(train(long))
    records = read_records(long.output_dir / "metrics.jsonl")
    assert without_time(records) == without_time(read_records(whole.output_dir / "metrics.jsonl"))
    assert same(weights(long.output_dir), weights(whole.output_dir))


def test_a_run_asked_to_stop_leaves_a_checkpoint_and_goes_on_from_it(config):
    """A real process that gets SIGTERM between two checkpoints: it ends by itself, and the rest is the same run."""
    config = replace(config, max_train_steps=400, checkpoint_every=10_000)
    process = start_training(config)
    deadline = time.monotonic() + 300
    while not (config.output_dir / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(300) == 0
    assert "stopped at a checkpoint" in (config.output_dir / "train.log").read_text()
    records = read_records(config.output_dir / "metrics.jsonl")
    (checkpoint,) = config.output_dir.glob("checkpoint-*")
    assert 0 < len(records) < 400 and int(checkpoint.name.split("-")[1]) == records[-1]["global_step"]
    rest = list(itertools.islice(train(config), 2))
    assert [record["global_step"] for record in rest] == [len(records) + 1, len(records) + 2]


def test_two_trainings_do_not_write_one_folder(config):
    first = train(config)
    next(first)
    with pytest.raises(BlockingIOError, match=r"is being written by process \d+ on .*: wait for it, or choose another"):
        next(train(config))
    assert [record["global_step"] for record in first][-1] == config.max_train_steps


def test_a_caller_stops_a_run_at_a_checkpoint(config):
    records = list(train(config, lambda: True))
    assert [record["global_step"] for record in records] == [1]
    assert [path.name for path in config.output_dir.glob("checkpoint-*")] == ["checkpoint-00000001"]


def test_the_rate_warms_up_and_stays(config):
    rates = [learning_rate_at(step, config) for step in range(4)]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(config, monkeypatch):
    monkeypatch.setattr(
        "dkto.training.step.denoising_error", lambda prediction, target: prediction.mean((1, 2, 3)) * float("nan")
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
        (
            {"objective": "ppo"},
            "objective must be one of kto, dpo, sft, sft_all, csft, bco, tgo, nft, awm, dgpo, dmpo, sdpo, got 'ppo'",
        ),
        ({"estimator": "mean"}, "estimator must be one of batch, unrelated, per_class, running, zero, got 'mean'"),
        ({"prompt_dropout": -0.1}, r"prompt_dropout must be in \[0, 1\], got -0.1"),
        ({"csft_style": "suffix"}, "csft_style must be one of prefix, negative, got 'suffix'"),
        (
            {"batch_size": 6, "objective": "dpo", "gradient_accumulation": 2},
            r"multiple of 1 processes x 2 .* x 2 \(dpo",
        ),
        ({"batch_size": 7, "gradient_accumulation": 2}, "batch_size 7 is not a multiple of 1 processes x 2 gradient"),
        (
            {"batch_size": 2, "gradient_accumulation": 2, "estimator": "unrelated"},
            "at least 2 samples in a micro-batch",
        ),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or above, got -1"),
    ],
)
def test_configurations_out_of_range_are_refused(config, values, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(config, **values)


def test_a_failing_sub_process_is_reported_with_its_last_line(config, monkeypatch):
    """A process that ends as the command does when it refuses something; launchers write pages after the sentence."""
    code = "import sys; print('dkto: prepared.json is missing'); print('a page'); sys.exit(2)"
    monkeypatch.setattr("dkto.training.launch.training_command", lambda *_, **options: [sys.executable, "-c", code])
    with pytest.raises(
        RuntimeError, match=r"run ended with code 2: dkto: prepared\.json is missing \(see .*train\.log"
    ):
        run_trainings([config])


NEW_METHOD = """
import sys
import torch
from dkto.objective import methods
from dkto.objective.methods import Felt, Method
from dkto.objective import implicit_reward

def squared(errors, is_desirable, *, beta):
    reward = implicit_reward(errors.policy, errors.reference, beta)
    gap = reward - torch.where(is_desirable, 1.0, -1.0)
    return Felt((gap**2).mean(-1), reward.detach(), slope=2 * gap.abs().detach())

methods.METHODS["squared"] = Method("least squares", "on single likes", "biased", squared, ("desirable_fraction",))
methods.OFFLINE += ("squared",)  # as an entry in the file is

from dkto.training import TrainConfig, run_training
folder = run_training(TrainConfig(sys.argv[1], sys.argv[2], model=sys.argv[3], objective="squared", beta=500.0,
                                  batch_size=4, max_train_steps=2, lora_rank=2))
assert "tuned with least squares" in (folder / "lora" / "README.md").read_text()
from toy import Method as Tuning
from toy.objectives import Errors, group_methods, loss_of
(objective,) = group_methods([Tuning("squared")])
errors = Errors(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
print("toy", loss_of(objective, errors, torch.ones(1, 2, 4, dtype=torch.bool)).loss.tolist())
"""


def test_a_new_method_is_one_function_and_one_entry(config, tmp_path):
    """What CONTRIBUTING promises: trainer, card and laboratory take it from the table."""
    arguments = [str(config.prepared_dir), str(tmp_path / "new"), config.model]
    done = subprocess.run([sys.executable, "-c", NEW_METHOD, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "toy [[1.0, 1.0]]"
    records = read_records(tmp_path / "new" / "metrics.jsonl")
    assert records[0]["loss"] == pytest.approx(1.0)


def test_batches_that_are_drawn_ahead_are_the_same(config, monkeypatch):
    """As on a GPU: another thread draws the next micro-batch; a run that stops and goes on sees the same ones too."""
    config = replace(config, gradient_accumulation=2, estimator="zero", max_train_steps=6)
    plain = [record["loss"] for record in train(config)]
    drawn, draw = [], loop.GlobalBatches.draw

    def noted(self, step, micro=0, *rest):
        drawn.append((step, micro, threading.current_thread() is threading.main_thread()))
        return draw(self, step, micro, *rest)

    def opened(config, open_run=loop.open_run):
        run = open_run(config)
        run.ahead = ThreadPoolExecutor(1)
        return run

    monkeypatch.setattr(loop.GlobalBatches, "draw", noted)
    monkeypatch.setattr(loop, "open_run", opened)
    config = replace(config, output_dir=config.output_dir.with_name("ahead"))
    run = train(config)
    assert [next(run)["loss"] for _ in range(4)] == plain[:4]
    run.close()
    assert [record["loss"] for record in train(config)] == plain[3:], "from the checkpoint of step 3"
    assert [where for *where, main in drawn if main] == [[0, 0], [3, 0]], "all others were on their way"
