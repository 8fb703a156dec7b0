"""Which beta? Measure the gap of errors that a short training makes, and see where the utility still has a slope.

    loss = 1 - U(w (beta g - z)),    g = e_ref - e_theta

The gradient is scaled by U'(beta g - z): where |beta g| is far above 1 the utility is saturated and the sample
counts no more; where it is far below, the utility is a straight line and its shape does nothing. g grows
with the training and with the model, so beta is measured, not remembered.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from dkto.common.files import write_json
from dkto.common.names import check_name
from dkto.common.progress import progress
from dkto.common.settings import checked_number
from dkto.data.encoded import PreparedFeedback
from dkto.objective.losses import effective_weight, reference_point
from dkto.objective.methods import METHODS
from dkto.objective.utilities import get_utility
from dkto.training.config import TrainConfig
from dkto.training.loop import train
from dkto.training.rewards import error_gaps, load_run

LINEAR, SATURATED = 0.95, 0.05  # of the slope where nothing is learned yet

# What neighbouring codes call beta, as a factor from ours, which multiplies the mean squared error (no half).
# "sum": they add up the squared error over the latents' elements instead of averaging it.
CONVENTIONS = {
    "dkto": (1.0, "mean", "this project; Diffusion-KTO's text and code: beta * g"),
    "diffusion_dpo": (2.0, "mean", "Diffusion-DPO's released code, diffusers' SDXL example: beta / 2 * g"),
    "diffusers_sd15": (1.0, "mean", "diffusers' Stable Diffusion 1.5 DPO example: the half is folded into its 2500"),
    "simpletuner_flow": (2.0, "sum", "SimpleTuner's Flow-DPO with norm_type=sum: beta / 2 * g, g summed over elements"),
    "sum": (1.0, "sum", "codes that sum the squared error over elements: beta * g"),
}


def convert_beta(beta: float, source: str, target: str, *, elements: int = 4 * 64 * 64) -> float:
    """The number that says in one code's convention what `beta` says in another's.

    Args:
        beta: > 0, in the convention `source`.
        source, target: keys of `CONVENTIONS`.
        elements: of one sample's latents; 4 x 64 x 64 for Stable Diffusion 1.5 at 512 pixels.

    Raises:
        ValueError: for a convention that is not known, or a beta that is not positive.

    >>> convert_beta(5000, "diffusion_dpo", "dkto")
    2500.0
    >>> round(convert_beta(5000, "dkto", "sum"), 3)
    0.305
    """
    for name in (source, target):
        check_name("convention", name, CONVENTIONS)
    beta, elements = checked_number("beta", beta, float, above=0), checked_number("elements", elements, least=1)

    units = {name: factor / (elements if how == "sum" else 1) for name, (factor, how, _) in CONVENTIONS.items()}
    return beta * units[target] / units[source]


@dataclass(frozen=True)
class SlopeAt:
    """What a utility makes of the measured gaps at one beta."""

    beta: float  # reward scale, multiplies the mean-squared-error gap
    mean_slope: float  # mean |U'| relative to |U'(0)|: 1 where nothing is saturated
    linear: float  # share of samples whose slope differs by less than 5 % from that at 0
    saturated: float  # share of samples with less than 5 % of it


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found."""

    utility: str  # whose slope
    steps: int  # of the trial training
    rows: int  # of the feedback that were measured
    draws: int  # noises for each row
    gap_quantiles: tuple[float, ...]  # |g| at 5, 25, 50, 75, 95 % of the samples, in mean squared error
    table: tuple[SlopeAt, ...]  # at betas a factor of 2 apart
    wanted_slope: float  # mean slope that was asked for
    beta: float  # proposed

    def __str__(self) -> str:
        lines = [
            f"|g| after {self.steps} steps over {self.rows} rows x {self.draws} noises: "
            + ", ".join(f"{p} % {q:.2e}" for p, q in zip((5, 25, 50, 75, 95), self.gap_quantiles, strict=True)),
            f"{'beta':>10}  {'mean slope':>10}  {'linear':>7}  {'saturated':>9}",
        ]
        for row in self.table:
            lines.append(f"{row.beta:>10.4g}  {row.mean_slope:>10.2f}  {row.linear:>7.0%}  {row.saturated:>9.0%}")
        lines.append(f"proposed beta for a mean slope of {self.wanted_slope:g}: {self.beta:.3g} ({self.utility})")
        return "\n".join(lines)


def slope_at(gaps: np.ndarray, is_desirable: np.ndarray, beta: float, config: TrainConfig) -> SlopeAt:
    """Slopes of the configuration's utility at one beta, each row counted as often as training draws it.

        weight of a row = gamma / n_liked   or   (1 - gamma) / n_disliked

    Args:
        gaps: (N,) errors of reference minus policy.
        is_desirable: (N,) bool.
        beta: > 0.
        config: for its utility, estimator, clamp and gamma; "unrelated" and "running" are judged by the matched mean.
    """
    utility = get_utility(config.utility)
    share = drawn_shares(is_desirable, config)
    rows = np.flatnonzero(share)  # a class that training never draws is left out
    reward, liked = torch.from_numpy(np.asarray(gaps, np.float64)[rows] * beta), torch.from_numpy(is_desirable[rows])
    weight = torch.from_numpy(share[rows])
    estimator = "batch" if config.estimator in ("unrelated", "running") else config.estimator
    averaged = reward * weight * len(rows) if estimator == "batch" else reward  # within a class all count alike
    point = reference_point(averaged, estimator, is_desirable=liked, clamp=config.clamp)
    at_zero = effective_weight(torch.zeros_like(reward), liked, torch.zeros_like(point), utility).abs()
    relative = effective_weight(reward, liked, point, utility).abs() / at_zero
    linear, saturated = (relative - 1).abs() < 1 - LINEAR, relative < SATURATED
    return SlopeAt(float(beta), *(round(float((weight * each).sum()), 12) for each in (relative, linear, saturated)))


def drawn_shares(is_desirable: np.ndarray, config: TrainConfig) -> np.ndarray:
    """(N,) chances of the rows in training, of sum 1: by gamma where the method draws so, else alike.

    A class that is not there leaves all to the other.
    """
    liked = np.asarray(is_desirable, bool)
    if METHODS[config.objective].draws != "biased" or liked.all() or not liked.any():
        return np.full(len(liked), 1 / len(liked))
    gamma = config.desirable_fraction
    return np.where(liked, gamma / liked.sum(), (1 - gamma) / (~liked).sum())


def propose_beta(gaps: np.ndarray, is_desirable: np.ndarray, config: TrainConfig, wanted_slope: float) -> float:
    """The largest beta at which the mean slope is still `wanted_slope` of that at 0; bisection over 12 decades.

    Raises:
        ValueError: if `wanted_slope` is not in (0, 1), the utility is flat at 0, every gap is 0, or no beta gives
            that slope.
    """
    wanted_slope = checked_number("wanted_slope", wanted_slope, float, above=0, below=1)
    scale = float(np.abs(gaps).mean())
    flat = slope_at(np.zeros(1), np.ones(1, bool), 1.0, config)
    if not np.isfinite(flat.mean_slope):
        raise ValueError(f"utility {config.utility!r} is flat where nothing is learned yet: no slope to relate beta to")
    if not scale > 0:
        raise ValueError("every gap is 0: policy and reference are still the same, train more steps or faster")
    low, high = np.log(1e-6 / scale), np.log(1e6 / scale)
    if slope_at(gaps, is_desirable, np.exp(high), config).mean_slope > wanted_slope:
        raise ValueError(f"utility {config.utility!r} keeps a mean slope above {wanted_slope} at every beta")
    for _ in range(60):
        middle = (low + high) / 2
        above = slope_at(gaps, is_desirable, np.exp(middle), config).mean_slope > wanted_slope
        low, high = (middle, high) if above else (low, middle)
    return float(np.exp(low))


def calibrate(
    config: TrainConfig, *, steps: int = 50, samples: int = 512, wanted_slope: float = 0.7, draws: int = 4
) -> Calibration:
    """Train a trial for a few steps, measure |g|, and propose beta; also written to `output_dir/calibration.json`.

    AdamW divides a gradient by its own size, so while the utility is near its straight part the trial's weights, and
    with them g, hardly depend on the beta that it was run with.

    Args:
        config: of the training to come; `max_train_steps` is not used. The trial lands in `output_dir/trial`.
        steps: of the trial, with the warm-up cut to a tenth of them if it is longer.
        samples: rows that are measured at most, spread evenly over the feedback.
        wanted_slope: mean slope relative to that at 0, in (0, 1).
        draws: noises for each row.

    Raises:
        ValueError: as `dkto.training.loop.train` and `propose_beta`, or if a number is out of its range.
    """
    get_utility(config.utility)
    samples, draws = checked_number("samples", samples, least=1), checked_number("draws", draws, least=1)
    steps = checked_number("steps", steps, least=1)
    wanted_slope = checked_number("wanted_slope", wanted_slope, float, above=0, below=1)  # known before the trial
    shorter = {"max_train_steps": steps, "warmup_steps": min(config.warmup_steps, steps // 10)}
    trial = replace(config, output_dir=config.output_dir / "trial", **shorter, checkpoint_every=steps, tracker="none")
    for _ in progress(train(trial), total=steps, desc="trial", unit="step"):
        pass
    _, model, pair = load_run(trial.output_dir)
    pair.to("cuda" if torch.cuda.is_available() else "cpu")
    data = PreparedFeedback(config.prepared_dir, model)
    rows = np.unique(np.linspace(0, len(data) - 1, min(samples, len(data))).astype(np.int64))
    gaps = error_gaps(model, pair, data, trial, rows=rows, draws=draws)
    flat, liked = gaps.reshape(-1), np.repeat(data.is_desirable[rows], draws)
    beta = propose_beta(flat, liked, config, wanted_slope)
    quantiles = np.quantile(np.abs(flat), (0.05, 0.25, 0.5, 0.75, 0.95))
    table = [slope_at(flat, liked, beta * 2.0**power, config) for power in range(-6, 7)]
    found = Calibration(
        config.utility, steps, len(rows), draws, tuple(quantiles.tolist()), tuple(table), wanted_slope, beta
    )
    write_json(config.output_dir / "calibration.json", asdict(found))
    np.save(config.output_dir / "gaps.npy", gaps, allow_pickle=False)
    return found
