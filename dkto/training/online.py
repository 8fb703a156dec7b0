"""Objectives that sample while they train: AlignProp and D3PO, two methods that the paper compares with.

    alignprop  maximise a differentiable reward of images drawn by the policy: its gradient runs back through
               the decoder and the last K steps of the chain (Prabhudesai et al. 2023; K = 1 is DRaFT-1)
    d3po       draw two images of a prompt, ask which is better, and take DPO's loss at every step of the two
               chains (paper eq. 9-10; Yang et al. 2023)

`dkto.training.loop.train` runs them as every other method: the same records, files and checkpoints. Every random number
is drawn at an address (seed, step, index).
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dkto.evaluation.metrics import gaps
from dkto.evaluation.scorers import PixelScorer, check_scorers, get_pixel_scorer, score
from dkto.models import DiffusionModel, load_model
from dkto.models.language_flow import LanguageFlow
from dkto.training.batches import stream
from dkto.training.chain import Chain, chain_steps, log_ratio
from dkto.training.config import OnlineConfig
from dkto.training.engine import Engine
from dkto.training.step import Run

PROMPTS, NOISE, CHAIN_STEPS = 21, 22, 23  # streams of random numbers


class OwnImages:
    """What an online step learns from: images that the policy draws, with everything that drawing needs, on one device.

    The prompts of a step are encoded when it is their turn, so that their number costs no memory.

    Raises:
        ValueError: for a model whose latents are packed or normalised in another way.
    """

    def __init__(
        self, model: DiffusionModel, prompts: Sequence[str], device: torch.device, scorer: PixelScorer | None = None
    ) -> None:
        if isinstance(model, LanguageFlow):
            known = "Stable Diffusion 1.x, 2.x, XL or 3"
            raise ValueError(f"AlignProp and D3PO must have a {known}, got {model.folder}, a {model.pipeline_name}")
        self.model, self.prompts, self.device, self.scorer = model, list(prompts), device, scorer
        self._tokenizer, self._encoder = model.load_text(device.type)
        self._encoder.to(device)
        self._empty = self._encode([""])
        self.vae = model.load_vae().to(device)

    def open_step(self, run: Run) -> tuple[Chain, list[str], Tensor]:
        """Chain and prompts of a step, one an image, and the noise, see `draw_noise`."""
        config, step, shape = run.config, run.progress.global_step, run.engine.pair.policy.config
        rows = draw_rows(config, len(self.prompts), step)
        noise = draw_noise(config, step, (shape.in_channels, shape.sample_size, shape.sample_size))
        return self.chain(rows, config), [self.prompts[row] for row in rows], noise.to(self.device)

    def chain(self, rows: np.ndarray, config: OnlineConfig) -> Chain:
        """A chain for the prompts of some rows."""
        conditioning = self._encode([self.prompts[row] for row in rows])
        steps = chain_steps(self.model, config.sampling_steps, config.eta)
        return Chain(self.model, steps, config.guidance, conditioning, self._empty)

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        encoded = self.model.encode_prompts(self._tokenizer, self._encoder, prompts)
        return {name: value.to(self.device) for name, value in encoded.items()}

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) latents to (B, 3, H, W) images in [0, 1], with gradient."""
        scaled = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        images = checkpoint(lambda x: self.vae.decode(x).sample, scaled, use_reentrant=False)
        return (images / 2 + 0.5).clamp(0, 1)


def to_images(pixel_values: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] to images, rounded to 8 bits."""
    pixels = (pixel_values.detach().cpu() * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in pixels]


def open_online(config: OnlineConfig) -> Run:
    """An online run at its beginning; a reward that cannot be had is refused before anything is loaded for it."""
    pixel_scorer = get_pixel_scorer(config.reward) if config.objective == "alignprop" else None
    check_scorers([config.reward], config.prompts())
    model = load_model(config.model)
    engine = Engine(config, model)
    images = OwnImages(model, config.prompts(), engine.device, pixel_scorer)
    chain_steps(model, config.sampling_steps, config.eta)  # refused now where the schedule has not so many
    return Run(config, model, engine, images)


def online_step(run: Run) -> dict[str, float]:
    """The gradients of one step of AlignProp or D3PO; returns its measures."""
    return (alignprop_step if run.config.objective == "alignprop" else d3po_step)(run)


def draw_rows(config: OnlineConfig, count: int, step: int) -> np.ndarray:
    """Rows of the prompts of one step, (batch_size,); for d3po each stands twice in a row."""
    images = 2 if config.objective == "d3po" else 1
    rows = stream(config.seed, step, PROMPTS).integers(count, size=config.batch_size // images)
    return np.repeat(rows, images)


def draw_noise(config: OnlineConfig, step: int, shape: tuple[int, ...]) -> Tensor:
    """(batch_size, N + 1, C, h, w): start and steps' noise of every image."""
    size = (config.sampling_steps + 1, *shape)
    rngs = [stream(config.seed, step, NOISE, index) for index in range(config.batch_size)]
    return torch.from_numpy(np.stack([rng.standard_normal(size, np.float32) for rng in rngs]))


def alignprop_step(run: Run) -> dict[str, float]:
    """One batch of images and the gradient of minus their mean reward; returns the measures."""
    config, online, pair = run.config, run.batches, run.engine.pair
    chain, prompts, noise = online.open_step(run)
    for last in chain.draw(pair.policy, noise, config.backprop_steps):
        latents = last
    rewards = online.scorer(online.decode(latents), prompts)
    if rewards.shape != (config.batch_size,) or not rewards.requires_grad:
        raise ValueError(
            f"reward {config.reward} must return ({config.batch_size},) values with gradient, "
            f"got shape {tuple(rewards.shape)}, gradient {rewards.requires_grad}"
        )
    loss = -rewards.mean()
    loss.backward()
    return {"loss": float(loss.detach()), "reward": float(rewards.detach().mean())}


def d3po_step(run: Run) -> dict[str, float]:
    """One batch of pairs and the gradient of D3PO's loss over their chains; returns the measures.

    Of each pair the image with the higher reward is chosen; a tie teaches nothing.

        loss = -log sigmoid(beta * (log ratio(chosen) - log ratio(rejected))), mean over pairs and steps
    """
    config, online, pair = run.config, run.batches, run.engine.pair
    chain, prompts, noise = online.open_step(run)
    with torch.no_grad():
        states = list(chain.draw(pair.policy, noise))
        images = to_images(online.decode(states[-1]))
    rewards = score(config.reward, images, prompts)
    sign = torch.from_numpy(np.sign(gaps(rewards[0::2], rewards[1::2]))).float().to(online.device)
    probable = [index for index, which in enumerate(chain.steps) if which.std > 0]  # a last step may add no noise
    shuffled = stream(config.seed, run.progress.global_step, CHAIN_STEPS).permutation(probable)
    order = shuffled[: config.chain_steps or None]
    losses, right, clipped = [], [], []
    for index in sorted(order.tolist()):
        before, after, which = states[index], states[index + 1], chain.steps[index]
        with pair.as_reference() as reference:
            reference_mean = chain.mean(reference, before, which)
        logs = log_ratio(after, chain.mean(pair.policy, before, which), reference_mean, which.std)
        loss, inside = d3po_loss(logs, sign, config.beta, config.ratio_clip)
        (loss / len(order)).backward()
        losses.append(float(loss.detach()))
        decided = sign != 0
        gap = (logs[0::2] - logs[1::2]).detach() * sign
        right.append(float((0.5 * (1 + gap.sign()))[decided].mean()) if decided.any() else 0.5)
        clipped.append(1 - float(inside.float().mean()))
    return {
        "loss": float(np.mean(losses)),
        "reward": float(rewards.mean()),
        "ties": float((sign == 0).float().mean()),
        "implicit_accuracy/pair": float(np.mean(right)),
        "clipped": float(np.mean(clipped)),
    }


def d3po_loss(logs: Tensor, sign: Tensor, beta: float, ratio_clip: float) -> tuple[Tensor, Tensor]:
    """D3PO's loss of one step of pairs of chains (paper eq. 10).

        loss = -log sigmoid(beta * sign * (log rho_1 - log rho_2)),  rho = clip(exp(log ratio), 1 - c, 1 + c)

    Args:
        logs: (2 P,) log-ratios of policy to reference: first, second image of a pair, first, second, ...
        sign: (P,) 1 if the first is chosen, -1 if the second, 0 for a tie, which is left out.
        beta: > 0, weight of the log-ratio.
        ratio_clip: c, above 0; outside its band a ratio carries no gradient.

    Returns:
        The mean over decided pairs (0 with gradient 0 if there is none), and (2 P,) bool: inside the band.

    >>> loss, _ = d3po_loss(torch.tensor([0.05, -0.05]), torch.tensor([1.0]), beta=10.0, ratio_clip=0.1)
    >>> round(float(loss), 4)  # log(1 + exp(-10 * 0.1))
    0.3133
    """
    low, high = np.log(max(1 - ratio_clip, 1e-6)), np.log(1 + ratio_clip)
    inside = (logs >= low) & (logs <= high)
    kept = logs.clamp(low, high)
    losses = -torch.nn.functional.logsigmoid(beta * sign * (kept[0::2] - kept[1::2]))
    decided = (sign != 0).to(losses.dtype)
    return (losses * decided).sum() / decided.sum().clamp(min=1), inside
