"""Noise schedules that speak diffusers' language (`add_noise`, `step`, `alphas_cumprod`), in a page (paper 3.1)."""

import math
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dkto.common.settings import checked_number

SMALLEST_LAST = 1e-3  # below it the preference objectives ask for huge shifts of the noise prediction


@dataclass(frozen=True, eq=False)
class Schedule:
    """The noise levels of a diffusion: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.

    The same numbers as diffusers' `DDPMScheduler` with `variance_type="fixed_small"` and no clipping, and for
    `ddim_step` as its `DDIMScheduler` with `set_alpha_to_one=True`. Kept in float64, used in the sample's precision.

    Attributes:
        betas: (T,) float64 in (0, 1), noise variance of each step.
        alphas_cumprod: (T,) float64, abar_t, product of 1 - betas.

    Warns:
        UserWarning: if the last `alphas_cumprod` is below 1e-3.
    """

    betas: Tensor
    alphas_cumprod: Tensor = field(init=False)

    def __post_init__(self) -> None:
        betas = torch.as_tensor(self.betas, dtype=torch.float64)
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas must have shape (T,) with T >= 1, got {tuple(betas.shape)}")
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"betas must be in (0, 1), got {betas.min():g} to {betas.max():g}")
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "alphas_cumprod", torch.cumprod(1 - betas, 0))
        last = float(self.alphas_cumprod[-1])
        if last < SMALLEST_LAST:
            warnings.warn(
                f"the last alphas_cumprod is {last:.2g}, below {SMALLEST_LAST:g}: the optimum of Diffusion-DPO shifts "
                "the noise prediction by an amount that grows as 1/sqrt(alphas_cumprod), here "
                f"{last**-0.5:.0f} times, so preference objectives blow up; end the schedule earlier",
                stacklevel=3,
            )

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of diffusion steps."""
        return len(self.betas)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy samples (..., 2) from clean ones: sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.

        Args:
            original_samples: (..., 2) clean points.
            noise: (..., 2) draws of N(0, I).
            timesteps: (...) int64 in [0, T).
        """
        abar = self.alphas_cumprod.to(original_samples.device)
        signal = abar.sqrt().to(original_samples.dtype)[timesteps][..., None]
        spread = (1 - abar).sqrt().to(original_samples.dtype)[timesteps][..., None]
        return signal * original_samples + spread * noise

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, noise: Tensor) -> Tensor:
        """One ancestral step with the posterior's variance, from x_t to the previous sample x_{t-1} (DDPM).

            x_{t-1} = scale * (x_t - gain * eps_theta) + std * noise,   see `ancestral_coefficients`

        All are (..., 2): the predicted noise, x_t, and draws of N(0, I), which the last step, t = 0, leaves out.
        """
        scale, gain, std = self.ancestral_coefficients(timestep)
        mean = scale * (sample - gain * model_output)
        return mean if timestep == 0 else mean + std * noise

    def ddim_step(self, model_output: Tensor, timestep: int, sample: Tensor) -> Tensor:
        """One deterministic step (DDIM, eta = 0), from x_t to the previous sample; shapes as in `step`."""
        scale, gain = self.ddim_coefficients(timestep)
        return scale * (sample - gain * model_output)

    def ancestral_coefficients(self, timestep: int) -> tuple[float, float, float]:
        """Scale, gain and std of `step`: 1/sqrt(1 - beta), beta/sqrt(1 - abar), sqrt(beta (1 - abar')/(1 - abar))."""
        beta = float(self.betas[timestep])
        abar, before = self._levels(timestep)
        return (1 - beta) ** -0.5, beta / math.sqrt(1 - abar), math.sqrt(beta * (1 - before) / (1 - abar))

    def ddim_coefficients(self, timestep: int) -> tuple[float, float]:
        """Scale and gain of `ddim_step`: sqrt(abar'/abar), sqrt(1 - abar) - sqrt((1 - abar') abar/abar')."""
        abar, before = self._levels(timestep)
        return math.sqrt(before / abar), math.sqrt(1 - abar) - math.sqrt((1 - before) * abar / before)

    def _levels(self, timestep: int) -> tuple[float, float]:
        if not 0 <= timestep < len(self.betas):
            raise ValueError(f"timestep must be in [0, {len(self.betas)}), got {timestep}")
        return float(self.alphas_cumprod[timestep]), float(self.alphas_cumprod[timestep - 1]) if timestep else 1.0


def linear_schedule(num_train_timesteps: int = 50, last_beta: float | None = None) -> Schedule:
    """Noise variances that rise linearly by a factor of 100; by default as far as one pass of diffusion needs.

    The default `last_beta`, 10 / T, ends near alphas_cumprod = 0.005 whatever T from 20 on: small enough that
    sampling may start from pure noise, large enough that the preference objectives stay bounded. Warns as `Schedule`.

    >>> linear_schedule(50).alphas_cumprod[-1].round(decimals=4)
    tensor(0.0044, dtype=torch.float64)
    """
    num_train_timesteps = checked_number("num_train_timesteps", num_train_timesteps, least=1)
    last = 10 / num_train_timesteps if last_beta is None else last_beta
    return Schedule(torch.linspace(last / 100, last, num_train_timesteps, dtype=torch.float64))
