"""Objectives that sample while they train: AlignProp and D3PO, two systems that the paper compares with.

    alignprop  maximise a differentiable reward of pictures drawn by the policy: its gradient runs back through
               the decoder and the last K steps of the chain (Prabhudesai et al. 2023; K = 1 is DRaFT-1)
    d3po       draw two pictures of a prompt, ask which is better, and take DPO's loss at every step of the two
               chains (paper eq. 9-10; Yang et al. 2023)

Like `dkto.training.loop.train`, `train_online` is a generator of step records that leaves the same files, goes on
from its last checkpoint, and draws every random number at an address (seed, step, index).
"""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dkto.common.files import keep_records
from dkto.common.processes import sole_writer
from dkto.common.progress import progress
from dkto.evaluation.scorers import check_scorers, get_pixel_scorer, score
from dkto.models import PolicyAndReference, StableDiffusion, load_model
from dkto.training.batches import stream
from dkto.training.chain import Chain, chain_steps, log_ratio
from dkto.training.engine import Engine
from dkto.training.loop import learning_rate_at, stop_on_sigterm
from dkto.training.online_config import OnlineConfig
from dkto.training.run_folder import CheckpointStore

PROMPTS, NOISE, CHAIN_STEPS = 21, 22, 23  # streams of random numbers


class OnlineModel:
    """A latent diffusion model with everything that sampling needs, on one device.

    Args:
        model: epsilon or v prediction.
        prompts: those of a step are encoded when it is their turn, so that their number costs no memory.
        device: where it runs.

    Raises:
        ValueError: if the model predicts neither; flows have another chain.
    """

    def __init__(self, model: StableDiffusion, prompts: Sequence[str], device: torch.device) -> None:
        if not isinstance(model, StableDiffusion):
            known = "Stable Diffusion 1.x, 2.x and XL"
            raise ValueError(f"AlignProp and D3PO draw by DDIM, which {model.folder} cannot; expected {known}")
        self.model, self.prompts, self.device = model, list(prompts), device
        self._tokenizer, encoder = model.load_text()
        self._encoder = encoder.to(device)
        self._empty = self._encode([""])
        self.vae = model.load_vae().to(device)

    def latent_shape(self, denoiser: torch.nn.Module) -> tuple[int, int, int]:
        """(C, h, w) of the latents."""
        size = denoiser.config.sample_size
        return (denoiser.config.in_channels, size, size)

    def chain(self, rows: np.ndarray, config: OnlineConfig) -> Chain:
        """A chain for the prompts of some rows."""
        conditioning = self._encode([self.prompts[row] for row in rows])
        steps = chain_steps(self.model, config.sampling_steps, config.eta)
        return Chain(self.model, steps, config.guidance, conditioning, self._empty)

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        encoded = self.model.encode_prompts(self._tokenizer, self._encoder, prompts)
        return {name: value.to(self.device) for name, value in encoded.items()}

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) latents to (B, 3, H, W) pictures in [0, 1], with gradient."""
        scaled = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        if torch.is_grad_enabled():
            pictures = checkpoint(lambda x: self.vae.decode(x).sample, scaled, use_reentrant=False)
        else:
            pictures = self.vae.decode(scaled).sample
        return (pictures / 2 + 0.5).clamp(0, 1)


def to_images(pixel_values: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] to pictures, rounded to 8 bits."""
    pixels = (pixel_values.detach().cpu() * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in pixels]


def train_online(config: OnlineConfig, should_stop: Callable[[], bool] = lambda: False) -> Iterator[dict]:
    """Train and yield one record per optimiser step; each samples anew from the policy as it is then.

    A run whose output folder holds checkpoints of the same configuration goes on from the last one; one that
    is finished yields nothing. At the end the folder holds `metrics.jsonl`, `run.json` and `lora/` or `model/`.

    Args:
        config: what to train.
        should_stop: asked after every step; once it is true, a checkpoint is written and the run ends there, to go on
            when it is called again.

    Raises:
        KeyError: if no scorer has the reward's name.
        FileNotFoundError: if the reward's weights or the prompts are missing.
        ValueError: if AlignProp's reward has no gradient, the reward cannot read a prompt, the model is a flow, or the
            folder belongs to another configuration.
        BlockingIOError: if another process trains into the folder.
        FloatingPointError: if loss or gradient is not finite; the checkpoints are whole.
    """
    store = CheckpointStore(config)
    if store.is_finished():
        return
    # a reward that cannot be had stops the run before anything is loaded or drawn for it
    pixel_scorer = get_pixel_scorer(config.reward) if config.objective == "alignprop" else None
    check_scorers([config.reward], config.prompts())
    model = load_model(config.model)
    engine = Engine(config, model)
    online = OnlineModel(model, config.prompts(), engine.device)
    with sole_writer(config.output_dir):
        store.restore(engine)
        state, pair = store.state, engine.pair
        keep_records(store.records_path, state["global_step"])
        store.describe(num_processes=1)
        for step in range(state["global_step"], config.max_train_steps):
            began = time.monotonic()
            engine.set_rate(learning_rate_at(step, config))
            if pixel_scorer is not None:
                measured = alignprop_step(config, online, pair, pixel_scorer, step)
            else:
                measured = d3po_step(config, online, pair, step)
            grad_norm = engine.clip()
            if not np.isfinite([grad_norm, *measured.values()]).all():
                raise FloatingPointError(
                    f"loss or gradient was not finite at step {step + 1}; the last checkpoint in {config.output_dir} "
                    "is whole. Lower learning_rate"
                )
            engine.step(True)
            state["global_step"], state["seconds"] = step + 1, state["seconds"] + time.monotonic() - began
            record = {"global_step": step + 1, **measured, "grad_norm": grad_norm}
            record["learning_rate"] = learning_rate_at(step, config)
            record["samples_per_second"] = config.batch_size / (time.monotonic() - began)
            store.append(record)
            last = step + 1 == config.max_train_steps
            stopping = should_stop() and not last
            if stopping or ((step + 1) % config.checkpoint_every == 0 and not last):
                store.save(engine)
            yield record
            if stopping:
                return
        pair.policy.disable_gradient_checkpointing()
        store.finish(engine, model)


def run_online(config: OnlineConfig):
    """Train to the end with a progress bar; returns the run's folder (see `dkto.models.system.System.of_run`).

    SIGTERM stops it as it stops `dkto.training.loop.run_training`.
    """
    bar = progress(total=config.max_train_steps, desc=config.objective, unit="step")
    with bar, stop_on_sigterm() as should_stop:
        for record in train_online(config, should_stop):
            bar.update(record["global_step"] - bar.n)
            bar.set_postfix(reward=f"{record['reward']:.3f}", refresh=False)
    return config.output_dir


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


def alignprop_step(config: OnlineConfig, online: OnlineModel, pair: PolicyAndReference, scorer, step: int) -> dict:
    """One batch of pictures and the gradient of minus their mean reward; returns the measures."""
    rows = draw_rows(config, len(online.prompts), step)
    noise = draw_noise(config, step, online.latent_shape(pair.policy)).to(online.device)
    chain = online.chain(rows, config)
    for last in chain.draw(pair.policy, noise, config.backprop_steps):
        latents = last
    rewards = scorer(online.decode(latents), [online.prompts[row] for row in rows])
    if rewards.shape != (config.batch_size,) or not rewards.requires_grad:
        raise ValueError(
            f"reward {config.reward} must return ({config.batch_size},) values with gradient, "
            f"got shape {tuple(rewards.shape)}, gradient {rewards.requires_grad}"
        )
    loss = -rewards.mean()
    loss.backward()
    return {"loss": float(loss.detach()), "reward": float(rewards.detach().mean())}


def d3po_step(config: OnlineConfig, online: OnlineModel, pair: PolicyAndReference, step: int) -> dict:
    """One batch of pairs and the gradient of D3PO's loss over their chains; returns the measures.

    Of each pair the picture with the higher reward is chosen; a tie teaches nothing.

        loss = -log sigmoid(beta * (log ratio(chosen) - log ratio(rejected))), mean over pairs and steps
    """
    rows = draw_rows(config, len(online.prompts), step)
    noise = draw_noise(config, step, online.latent_shape(pair.policy)).to(online.device)
    chain = online.chain(rows, config)
    with torch.no_grad():
        states = list(chain.draw(pair.policy, noise))
        images = to_images(online.decode(states[-1]))
    rewards = score(config.reward, images, [online.prompts[row] for row in rows])
    sign = torch.from_numpy(np.sign(rewards[0::2] - rewards[1::2])).float().to(online.device)
    probable = [index for index, which in enumerate(chain.steps) if which.std > 0]  # a last step may add no noise
    order = stream(config.seed, step, CHAIN_STEPS).permutation(probable)[: config.chain_steps or None]
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
