"""Implicit rewards of a trained policy on any prepared feedback: what held-out margins and `dkto calibrate` rest on."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from dkto.common.progress import progress
from dkto.data.encoded import PreparedFeedback
from dkto.models import DiffusionModel, PolicyAndReference, load_model, make_policy, read_weights
from dkto.models.system import TRAINING_RECORD, read_training
from dkto.objective.losses import denoising_error
from dkto.training.batches import GlobalBatches
from dkto.training.config import TrainConfig


def config_of_run(folder: str | Path) -> TrainConfig:
    """Configuration of a finished run on prepared feedback; FileNotFoundError if there is none."""
    record = Path(folder) / TRAINING_RECORD
    about = read_training(record, {}) if record.exists() else {}
    if not about.get("finished"):
        raise FileNotFoundError(f"{record.parent} holds no finished training ({TRAINING_RECORD} is missing or says so)")
    try:
        return TrainConfig(**about["config"])
    except TypeError as error:
        raise ValueError(f"{record}, config is none of a training on prepared feedback: {error}") from error


def load_run(folder: str | Path) -> tuple[TrainConfig, DiffusionModel, PolicyAndReference]:
    """Configuration, model, and policy with its reference, of a finished run; FileNotFoundError if there is none."""
    folder, config = Path(folder), config_of_run(folder)
    model = load_model(config.model)
    precision = getattr(torch, config.precision)
    pair = make_policy(model.load_denoiser(), config.lora_rank, config.seed, frozen_dtype=precision)
    read_weights(pair, folder / ("lora" if config.lora_rank else "model"))
    return config, model, pair


@torch.no_grad()
def error_gaps(
    model: DiffusionModel,
    pair: PolicyAndReference,
    data: PreparedFeedback,
    config: TrainConfig,
    *,
    draws: int = 4,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Gap of the denoising errors, g = e_ref - e_theta, of every row: the implicit reward is beta g (paper 3.4).

    Noise, timesteps, precision and micro-batches are those of training, from streams of their own; policy and reference
    meet the same.

    Args:
        model: noises and predicts.
        pair: policy and reference.
        data: prepared feedback.
        config: seed, batch size, precision and timestep sampling.
        draws: noises and timesteps for each row.
        rows: (N,) which rows; all of them if left out.

    Returns:
        (N, draws) mean-squared-error gap; positive where the policy denoises better.
    """
    rows = np.arange(len(data)) if rows is None else rows
    tiled = np.tile(rows, draws)
    plain = {"objective": "sft_all", "estimator": "batch", "prompt_dropout": 0.0, "random_flip": False}
    plain |= {"noise_bank": 0}  # new noises: those of a bank were trained on
    batches = GlobalBatches(replace(config, **plain), data, model)
    device = next(pair.policy.parameters()).device
    size, gaps = config.batch_size // config.gradient_accumulation, []
    fast = torch.autocast(device.type, getattr(torch, config.precision), enabled=config.precision != "float32")
    for start in progress(range(0, len(tiled), size), desc="measuring", unit="batch"):
        batch = batches.draw_rows(tiled[start : start + size], HELD_OUT_STEP + start).to(device)
        inputs = (batch.noisy_latents, batch.timesteps, batch.conditioning)
        with fast:
            with pair.as_reference() as reference:
                reference_error = denoising_error(model.predict(reference, *inputs), batch.target)
            gaps.append(reference_error - denoising_error(model.predict(pair.policy, *inputs), batch.target))
    return torch.cat(gaps).cpu().numpy().reshape(draws, len(rows)).T


HELD_OUT_STEP = 2**40  # no training reaches this step, so its noise is never met again


class Margin(NamedTuple):
    """Mean reward of liked minus disliked rows with its interval, in the unit of the rewards."""

    mean: float
    low: float
    high: float
    liked: int
    disliked: int


def margin_interval(rewards: np.ndarray, is_desirable: np.ndarray, confidence: float = 0.95) -> Margin:
    """Margin over rows, each counted once by its mean over draws; Welch's interval.

    Args:
        rewards: (N, draws) rewards or gaps.
        is_desirable: (N,) bool; fewer than 2 rows of a class are a ValueError.
        confidence: of the interval, in (0, 1).

    >>> margin_interval(np.array([[3.0], [5.0], [0.0], [2.0]]), np.array([True, True, False, False])).mean
    3.0
    """
    rows = rewards.mean(1)
    liked, disliked = rows[is_desirable], rows[~is_desirable]
    if min(len(liked), len(disliked)) < 2:
        raise ValueError(f"a margin needs 2 rows of each class, got {len(liked)} liked and {len(disliked)} disliked")
    interval = stats.ttest_ind(liked, disliked, equal_var=False).confidence_interval(confidence)
    ends = float(interval.low), float(interval.high)
    return Margin(float(liked.mean() - disliked.mean()), *ends, len(liked), len(disliked))
