"""The denoising chain of DDIM as something to train through: each step's mean and standard deviation, with gradient.

diffusers' pipelines draw without gradient and do not say how probable a step was. AlignProp needs the
first, D3PO the second.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import diffusers
import torch
from torch import Tensor, nn

from dkto.models import StableDiffusion


@dataclass(frozen=True)
class ChainStep:
    """One step x_t -> x_{t-1} of a chain."""

    timestep: int  # t
    alpha: float  # abar_t
    alpha_next: float  # abar of the step it goes to
    std: float  # standard deviation of the noise it adds, in latent units


def chain_steps(model: StableDiffusion, count: int, eta: float) -> list[ChainStep]:
    """The N = `count` steps of a DDIM chain on the model's schedule and spacing of timesteps, noisiest first.

        std = eta * sqrt((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)),  s the step after t

    An `eta` of 0 adds no noise, 1 as much as DDPM does; a ValueError for more steps than the schedule has.
    """
    scheduler = diffusers.DDIMScheduler.from_config(model.scheduler.config)
    if count > (most := scheduler.config.num_train_timesteps):
        where = f"as finely as the schedule of {model.folder} is cut"
        raise ValueError(f"sampling_steps must be at most {most}, {where}, got {count}")
    scheduler.set_timesteps(count)
    gap = scheduler.config.num_train_timesteps // count
    steps = []
    for t in scheduler.timesteps.tolist():
        alpha = float(scheduler.alphas_cumprod[t])
        after = scheduler.alphas_cumprod[t - gap] if t >= gap else scheduler.final_alpha_cumprod
        variance = (1 - float(after)) / (1 - alpha) * (1 - alpha / float(after))
        steps.append(ChainStep(t, alpha, float(after), eta * max(variance, 0.0) ** 0.5))
    return steps


@dataclass
class Chain:
    """Draws latents with one denoiser, step by step."""

    model: StableDiffusion  # for its schedule and prediction type
    steps: list[ChainStep]  # from `chain_steps`
    guidance: float  # classifier-free guidance scale; 1 is off
    conditioning: Mapping[str, Tensor]  # of B prompts, by name
    unconditional: Mapping[str, Tensor]  # of the empty prompt, first dimension 1

    @cached_property
    def guided(self) -> dict[str, Tensor]:
        """The conditioning of a pass of 2 B samples, the empty prompt's first."""
        return {k: torch.cat([self.unconditional[k].expand_as(v), v]) for k, v in self.conditioning.items()}

    def mean(self, denoiser: nn.Module, latents: Tensor, step: ChainStep) -> Tensor:
        """Mean of x_{t-1} given x_t, (B, C, h, w); carries the denoiser's gradient.

        mean = sqrt(abar_s) * x_0 + sqrt(1 - abar_s - std^2) * noise, both predicted at t
        """
        guided = self.guidance != 1
        inputs = torch.cat([latents, latents]) if guided else latents
        timesteps = torch.full((len(inputs),), step.timestep, device=latents.device)
        output = self.model.predict(denoiser, inputs, timesteps, self.guided if guided else self.conditioning)
        if guided:
            without, with_prompt = output.chunk(2)
            output = without + self.guidance * (with_prompt - without)
        signal, spread = step.alpha**0.5, (1 - step.alpha) ** 0.5
        if self.model.scheduler.config.prediction_type == "epsilon":
            noise, clean = output, (latents - spread * output) / signal
        else:
            noise, clean = signal * output + spread * latents, signal * latents - spread * output
        if (config := self.model.scheduler.config).clip_sample:  # as DDIM does, beside the noise as predicted
            clean = clean.clamp(-config.clip_sample_range, config.clip_sample_range)
        return step.alpha_next**0.5 * clean + max(1 - step.alpha_next - step.std**2, 0.0) ** 0.5 * noise

    def draw(self, denoiser: nn.Module, noise: Tensor, gradient_steps: int = 0) -> Iterator[Tensor]:
        """x_T, then x after every step: N + 1 latents.

        Args:
            denoiser: the policy.
            noise: (B, N + 1, C, h, w) standard normal: the start and each step's own.
            gradient_steps: how many of the last steps keep the gradient; those before run without.
        """
        latents = noise[:, 0]
        yield latents
        for index, step in enumerate(self.steps):
            keeps = index >= len(self.steps) - gradient_steps
            with torch.set_grad_enabled(keeps):
                latents = self.mean(denoiser, latents, step) + step.std * noise[:, index + 1]
            yield latents


def log_ratio(latents: Tensor, policy_mean: Tensor, reference_mean: Tensor, std: float) -> Tensor:
    """log pi_theta(x_{t-1} | x_t, c) - log pi_ref(x_{t-1} | x_t, c), mean over latent dimensions (paper 3.5, eq. 9).

        mean((x - reference_mean)^2 - (x - policy_mean)^2) / (2 std^2)

    The mean, not the sum, as in the released code of D3PO.

    Args:
        latents: (B, C, h, w), the x_{t-1} that was drawn; the means have the same shape, the result (B,).
        std: of the step, above 0.

    >>> zeros, ones = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    >>> log_ratio(zeros, policy_mean=zeros, reference_mean=ones, std=1.0)
    tensor([0.5000])
    """
    gap = (latents - reference_mean).square() - (latents - policy_mean).square()
    return gap.flatten(1).mean(1) / (2 * std**2)
