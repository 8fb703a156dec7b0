"""Fine-tune a diffusion model from likes: a generator of step records over accelerate.

    for record in train(config):
        ...   # log it, plot it, or stop

One step: draw rows with the biased sampler, noise them, predict with policy and reference on the
same noise and timestep, and let `dkto.losses` turn the two errors into a loss. Every random number
depends only on (seed, step, index in the global batch), so a resumed run repeats what an
uninterrupted one does, and the number of processes does not change the batch.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from dkto.config import TrainConfig
from dkto.feedback import BiasedSampler
from dkto.losses import (
    denoising_error,
    implicit_reward,
    kto_loss,
    reference_point,
    sft_loss,
)
from dkto.metrics import implicit_accuracy
from dkto.models import (
    PolicyAndReference,
    StableDiffusion,
    load_model,
    make_policy,
    read_weights,
    write_weights,
)
from dkto.prepare import PreparedFeedback
from dkto.progress import progress
from dkto.records import git_commit, hardware, keep_records, versions, write_json
from dkto.utilities import Utility, get_utility

NOISE_STREAM = 1  # the sampler draws from stream 0


@dataclass(frozen=True)
class Batch:
    """What one rank works on in one step; B is its share of the global batch."""

    noisy_latents: Tensor  # (B, C, h, w)
    target: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,)
    conditioning: dict[str, Tensor]  # each (B, ...)
    is_desirable: Tensor  # (B,) bool


def draw_batch(
    data: PreparedFeedback, sampler: BiasedSampler, model: StableDiffusion, step: int, size: int, share: slice
) -> Batch:
    """One rank's share of the global batch of a step: latents from their posterior, noise, timesteps."""
    rows = sampler.rows(step, size)
    rng = np.random.Generator(np.random.Philox(key=sampler.seed, counter=[0, 0, NOISE_STREAM, step]))
    timesteps = torch.from_numpy(rng.integers(0, model.num_train_timesteps, size))[share]
    mean, std = data.latents(rows[share])
    shape = (size, *mean.shape[1:])
    posterior_noise, noise = (torch.from_numpy(rng.standard_normal(shape, np.float32))[share] for _ in range(2))
    latents = mean + std * posterior_noise
    return Batch(
        noisy_latents=model.add_noise(latents, noise, timesteps),
        target=model.target(latents, noise, timesteps),
        timesteps=timesteps,
        conditioning=data.conditioning(rows[share]),
        is_desirable=torch.from_numpy(data.is_desirable[rows[share]]),
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on another device."""
    return Batch(
        batch.noisy_latents.to(device),
        batch.target.to(device),
        batch.timesteps.to(device),
        {name: value.to(device) for name, value in batch.conditioning.items()},
        batch.is_desirable.to(device),
    )


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then constant (paper A.1). `step` counts from 0."""
    return config.learning_rate * min(1.0, (step + 1) / max(config.warmup_steps, 1))


def train(config: TrainConfig) -> Iterator[dict]:
    """Train and yield one record per optimiser step.

    A run whose output folder holds checkpoints of the same configuration goes on from the last one;
    one that is finished yields nothing.
    At the end the folder holds `metrics.jsonl`, `run.json` and the weights for plain diffusers:
    `model/`, a whole pipeline, after full fine-tuning; `lora/` after training adapters.

    Raises:
        ValueError: if the feedback was prepared with another model, has one class only while both
            are asked for, the utility is unknown, or the folder belongs to another configuration.
        FloatingPointError: after `max_bad_steps` steps in a row with a non-finite loss.
    """
    utility = get_utility(config.utility)
    store = CheckpointStore(config)
    if store.is_finished():
        return
    model = load_model(config.model)
    data = PreparedFeedback(config.prepared_dir, model)
    gamma = 1.0 if config.objective == "sft" else config.desirable_fraction
    sampler = BiasedSampler(data.is_desirable, gamma, config.seed)
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=on_cpu)  # cpu=True makes gloo ranks
    if config.batch_size % accelerator.num_processes:
        raise ValueError(f"batch_size {config.batch_size} is not a multiple of {accelerator.num_processes} processes")
    per_rank = config.batch_size // accelerator.num_processes
    share = slice(accelerator.process_index * per_rank, (accelerator.process_index + 1) * per_rank)
    pair = make_policy(model.load_denoiser(), config.lora_rank, config.seed)
    pair.policy.to(accelerator.device)
    if pair.reference is not None:
        pair.reference.to(accelerator.device)
    optimizer = torch.optim.AdamW(
        list(pair.trainable().values()), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    first_step = store.restore(pair, optimizer)
    policy, prepared_optimizer = accelerator.prepare(pair.policy, optimizer)
    began, bad_steps = time.monotonic(), 0
    if accelerator.is_main_process:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        keep_records(store.records_path, first_step)
        store.describe(accelerator.num_processes)
    for step in range(first_step, config.max_train_steps):
        step_began = time.monotonic()
        for group in prepared_optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        batch = to_device(draw_batch(data, sampler, model, step, config.batch_size, share), accelerator.device)
        with accelerator.autocast():
            errors = denoising_errors(model, policy, pair, batch)
            unrelated = unrelated_errors(model, policy, pair, batch) if config.estimator == "unrelated" else None
        loss, measured = objective(config, utility, errors, unrelated, batch, accelerator)
        if not bool(torch.isfinite(accelerator.reduce(loss.detach(), "mean"))):
            bad_steps += 1
            prepared_optimizer.zero_grad()
            if bad_steps >= config.max_bad_steps:
                raise FloatingPointError(
                    f"loss was not finite for {bad_steps} steps in a row, last at step {step + 1}; "
                    f"the last checkpoint in {config.output_dir} is whole. Lower learning_rate or beta"
                )
            continue
        bad_steps = 0
        accelerator.backward(loss)
        grad_norm = accelerator.clip_grad_norm_(list(pair.trainable().values()), config.max_grad_norm)
        prepared_optimizer.step()
        prepared_optimizer.zero_grad()
        seconds = time.monotonic() - step_began
        record = {
            "global_step": step + 1,
            **measured,
            "grad_norm": float(grad_norm),
            "learning_rate": learning_rate_at(step, config),
            "samples_per_second": config.batch_size / seconds,
        }
        if accelerator.is_main_process:
            store.append(record)
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.max_train_steps:
                store.save(pair, optimizer, step + 1)
        accelerator.wait_for_everyone()
        yield record
    if accelerator.is_main_process:
        store.finish(pair, model, time.monotonic() - began)


def run_training(config: TrainConfig) -> Path:
    """Train to the end with a progress bar; returns the run's folder (see `dkto.generate.System.of_run`)."""
    with progress(total=config.max_train_steps, desc="training", unit="step") as bar:
        for record in train(config):
            bar.update(record["global_step"] - bar.n)
            bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
    return config.output_dir


def denoising_errors(
    model: StableDiffusion, policy: torch.nn.Module, pair: PolicyAndReference, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Errors of policy and reference on the same noise and timestep, each (B,) mean squared error."""
    inputs = (batch.noisy_latents, batch.timesteps, batch.conditioning)
    with pair.as_reference() as reference:
        reference_error = denoising_error(model.predict(reference, *inputs), batch.target)
    policy_error = denoising_error(model.predict(policy, *inputs), batch.target)
    return policy_error, reference_error


@torch.no_grad()
def unrelated_errors(
    model: StableDiffusion, policy: torch.nn.Module, pair: PolicyAndReference, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Errors on the same noisy latents under another sample's prompt: prompts rolled by one (paper 4.1)."""
    if len(batch.timesteps) < 2:
        raise ValueError("estimator 'unrelated' needs at least 2 samples per process, got 1")
    rolled = {name: value.roll(1, 0) for name, value in batch.conditioning.items()}
    return denoising_errors(model, policy, pair, replace(batch, conditioning=rolled))


def objective(
    config: TrainConfig,
    utility: Utility,
    errors: tuple[Tensor, Tensor],
    unrelated: tuple[Tensor, Tensor] | None,
    batch: Batch,
    accelerator: Accelerator,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one rank's share and the measures of the whole global batch.

    Args:
        errors: policy's and reference's denoising error, each (B,).
        unrelated: the same under mismatched prompts, for the estimator of that name.
    """
    policy_error = errors[0]
    reward = implicit_reward(*errors, config.beta)
    point = reference_point(
        reward,
        config.estimator,
        is_desirable=batch.is_desirable,
        unrelated_reward=None if unrelated is None else implicit_reward(*unrelated, config.beta),
        clamp=config.clamp,
        reduce=lambda sums: accelerator.reduce(sums, "sum"),
    )
    if config.objective == "sft":
        loss = sft_loss(policy_error, batch.is_desirable)
    else:
        loss = kto_loss(
            reward,
            batch.is_desirable,
            point,
            utility,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
    rewards, liked, errors = accelerator.gather((reward.detach(), batch.is_desirable, policy_error.detach()))
    measures = {
        "loss": float(accelerator.reduce(loss.detach(), "mean")),
        "policy_error": float(errors.mean()),
        "reference_point": float(point),
        "mean_abs_reward": float(rewards.abs().mean()),
        "implicit_accuracy/sample": float(implicit_accuracy(rewards, liked, definition="sample")),
        "implicit_accuracy/sample_centred": float(
            implicit_accuracy(rewards, liked, definition="sample_centred", reference_point=point)
        ),
    }
    for name, rows in (("reward/desirable", rewards[liked]), ("reward/undesirable", rewards[~liked])):
        if len(rows):
            measures[name] = float(rows.mean())
    if {"reward/desirable", "reward/undesirable"} <= measures.keys():
        measures["reward/margin"] = measures["reward/desirable"] - measures["reward/undesirable"]
    return loss, measures


class CheckpointStore:
    """The files of one run: records, checkpoints that are whole or absent, and the final weights."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        self.records_path = self.folder / "metrics.jsonl"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("checkpoint-*") if p.is_dir() and not p.name.endswith(".part"))

    def is_finished(self) -> bool:
        """Whether this very configuration was trained to its end here."""
        path = self.folder / "run.json"
        if not path.exists():
            return False
        about = json.loads(path.read_text())
        return bool(about.get("finished")) and about["fingerprint"] == self.config.fingerprint()

    def describe(self, num_processes: int, **more) -> None:
        """Write run.json."""
        about = {"config": self.config.to_dict(), "fingerprint": self.config.fingerprint()}
        about |= {"git_commit": git_commit(), "versions": versions(), "hardware": hardware()}
        write_json(self.folder / "run.json", {**about, "num_processes": num_processes, **more})

    def append(self, record: dict) -> None:
        """Add one record; each line is flushed, so that a viewer sees it at once."""
        with self.records_path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def save(self, pair: PolicyAndReference, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write `checkpoint-STEP/`: weights in diffusers' layout, optimiser moments, step number."""
        target = self.folder / f"checkpoint-{step:08d}"
        part = target.with_name(target.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write_weights(pair, part)
        save_file(_moments(pair, optimizer), part / "optimizer.safetensors")
        about = {"global_step": step, "fingerprint": self.config.fingerprint(), "config": self.config.to_dict()}
        write_json(part / "state.json", about)
        part.replace(target)
        for old in self.checkpoints()[: -self.config.keep_checkpoints]:
            shutil.rmtree(old)

    def restore(self, pair: PolicyAndReference, optimizer: torch.optim.Optimizer) -> int:
        """Load the last complete checkpoint; returns its step, 0 if there is none."""
        found = self.checkpoints()
        if not found:
            return 0
        state = json.loads((found[-1] / "state.json").read_text())
        if state["fingerprint"] != self.config.fingerprint():
            difference = self.config.difference(state["config"])
            raise ValueError(f"{found[-1]} belongs to another configuration ({difference}): choose another output_dir")
        read_weights(pair, found[-1])
        _restore_moments(pair, optimizer, load_file(found[-1] / "optimizer.safetensors"))
        return state["global_step"]

    def finish(self, pair: PolicyAndReference, model: StableDiffusion, seconds: float) -> None:
        """Write the tuned weights for plain diffusers and remove the checkpoints."""
        if pair.reference is not None:
            model.write_pipeline(pair.policy, self.folder / "model")
        else:
            write_weights(pair, self.folder / "lora")
        self.describe(num_processes=1, seconds=round(seconds, 2), finished=True)
        for old in self.checkpoints():
            shutil.rmtree(old)


def _moments(pair: PolicyAndReference, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state
    return {
        f"{name}/{key}": value.contiguous().clone()
        for name, parameter in pair.trainable().items()
        for key, value in state[parameter].items()
    }


def _restore_moments(pair: PolicyAndReference, optimizer: torch.optim.Optimizer, stored: dict[str, Tensor]) -> None:
    for name, parameter in pair.trainable().items():
        moments = {key: stored[f"{name}/{key}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": stored[f"{name}/step"], **moments}
