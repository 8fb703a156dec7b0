"""The denoising chain as something to train through: each step's mean and standard deviation, with gradient.

diffusers' pipelines draw without gradient and do not say how probable a step was. AlignProp needs the
first, D3PO the second. DDIM's step (Song et al. 2021, eq. 12) keeps what a latent is at each level,
x_t = signal x_0 + spread noise, whatever noise it adds. A flow has such levels too, (1 - s, s). So the same step is
Euler's where it adds none, and where it adds some the stochastic sampler of flows that preserves coefficients
(Wang & Yu, arXiv 2509.05952). Finely cut, it is the stochastic equation of Flow-GRPO (arXiv 2505.05470, eq. 9) with
noise level a = sqrt(2) eta, but it is finite at pure noise.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from dkto.models import DiffusionModel
from dkto.models.base import Level


@dataclass(frozen=True)
class ChainStep:
    """One step x_t -> x_{t-1} of a chain."""

    timestep: float  # t
    level: Level
    after: Level  # of x_{t-1}
    std: float  # standard deviation of the noise it adds, in latent units


def chain_steps(model: DiffusionModel, count: int, eta: float) -> list[ChainStep]:
    """The N = `count` steps of a chain on the model's schedule and spacing of timesteps, noisiest first.

        std = eta * spread_s / spread_t * sqrt(spread_t^2 - (signal_t / signal_s * spread_s)^2),  s the step after t

    An `eta` of 0 adds no noise, 1 as much as DDPM does; a ValueError for more steps than the schedule has.
    """
    if count > (most := model.num_train_timesteps):
        where = f"as finely as the schedule of {model.folder} is cut"
        raise ValueError(f"sampling_steps must be at most {most}, {where}, got {count}")
    steps = []
    for t, level, after in model.sampler_levels(count):
        variance = level.spread**2 - (level.signal / after.signal * after.spread) ** 2
        steps.append(ChainStep(t, level, after, eta * after.spread / level.spread * max(variance, 0.0) ** 0.5))
    return steps


@dataclass
class Chain:
    """Draws latents with one denoiser, step by step."""

    model: DiffusionModel  # for what its denoiser predicts
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

        mean = signal_s * x_0 + sqrt(spread_s^2 - std^2) * noise, both predicted at t
        """
        guided = self.guidance != 1
        inputs = torch.cat([latents, latents]) if guided else latents
        timesteps = torch.full((len(inputs),), step.timestep, device=latents.device)
        output = self.model.predict(denoiser, inputs, timesteps, self.guided if guided else self.conditioning)
        if guided:
            without, with_prompt = output.chunk(2)
            output = without + self.guidance * (with_prompt - without)
        clean, noise = self.model.clean_and_noise(output, latents, step.level)
        return step.after.signal * clean + max(step.after.spread**2 - step.std**2, 0.0) ** 0.5 * noise

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
