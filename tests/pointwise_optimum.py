"""The population optimum of Diffusion-KTO, noisy point by noisy point: what a network of any size would learn.

Given (x_t, t) the noise is Gaussian under each class, so the population objective falls apart into one problem
of two unknowns, the predicted noise, for each (x_t, t). Sampled with that prediction, it predicts trained networks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dkto.objective.losses import effective_weight
from dkto.objective.utilities import get_utility
from toy.exact import class_posterior, normal_quadrature
from toy.network import one_thread, stream
from toy.objectives import Method
from toy.sampling import NoisePred, ancestral
from toy.schedule import Schedule
from toy.world import DESIRABLE, to_paper_units

NODES = 48  # at beta 10 within 0.006 of 120 nodes in every sampled point; 24 nodes are 0.02 off
LONGEST_STEP = (
    0.1  # of Newton, in units of noise: the optimum wanted is the one that training reaches from the reference
)
SMALLEST_CURVATURE = 1e-3
ARRIVED = 1e-7  # Newton step below which a point has arrived


@dataclass(frozen=True)
class PointwiseOptimum:
    """Noise prediction of the population optimum of a "kto" method, from the exact pretrained denoiser.

    Attributes:
        method: beta, utility, weights and desirable_fraction are looked at; labels are taken as right.
        schedule: noise levels.
        reference_point: z, given: an implicit reward.
        iterations: of Newton's method, at the most.
    """

    method: Method
    schedule: Schedule
    reference_point: float = 0.0
    iterations: int = 100

    def __post_init__(self) -> None:
        if self.method.objective != "kto":
            raise ValueError(f"method must have the objective 'kto', got {self.method.objective!r}")

    def __call__(self, noisy: Tensor, timestep: int) -> Tensor:
        """The optimal noise prediction at (N, 2) points, float64.

        Newton's method from the reference's prediction along the eigenvectors of the curvature, uphill also where the
        objective is convex; the curvature by differences of the exact gradient.
        """
        posterior = self._posterior(noisy, timestep)
        best = posterior.reference.clone()
        moving = torch.arange(len(noisy))  # points that have not arrived yet
        for _ in range(self.iterations):
            step = self._newton_step(best[moving], posterior.of(moving))
            best[moving] += step
            moving = moving[step.norm(dim=-1) > ARRIVED]
            if not len(moving):
                break
        return best

    def _newton_step(self, noise_pred: Tensor, posterior: "_Posterior") -> Tensor:
        width = 1e-5
        shifts = noise_pred.new_tensor([[0, 0], [width, 0], [0, width]])[:, None]
        gradient, *others = self._gradient(noise_pred + shifts, posterior)
        curvature = torch.stack([(other - gradient) / width for other in others], dim=-1)
        values, vectors = torch.linalg.eigh((curvature + curvature.mT) / 2)
        # where the objective is not concave the way leads uphill, as training goes, and not to the nearest flat place
        convex = (values > 0).any(-1, keepdim=True)
        scale = torch.where(convex, values.abs().amax(-1, keepdim=True), values.abs())
        along = (vectors.mT @ gradient[..., None])[..., 0] / scale.clamp(min=SMALLEST_CURVATURE)
        step = (vectors @ along[..., None])[..., 0]
        length = step.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return step * (LONGEST_STEP / length).clamp(max=1)

    def sample(self, count: int = 800, seed: int = 0) -> Tensor:
        """Points (N, 2) in paper units, drawn by ancestral sampling with this prediction; see `draw_alike`."""
        return draw_alike(self, self.schedule, count, seed)

    def _posterior(self, noisy: Tensor, timestep: int) -> "_Posterior":
        abar = self.schedule.alphas_cumprod[timestep]
        chance, mean = class_posterior(noisy, abar, self.method.desirable_fraction)
        variance = abar * DESIRABLE.model_units().std ** 2
        std = float((variance / (variance + 1 - abar)).sqrt())
        return _Posterior((1 - abar).sqrt() * noisy, chance, mean, std)

    def _gradient(self, noise_pred: Tensor, posterior: "_Posterior") -> Tensor:
        """Uphill direction of the expected utility by the prediction, (..., N, 2): weighted denoising.

        E[ beta * effective_weight * (eps - noise_pred) ],   eps = mean + std * (nodes along the shift)
        """
        nodes, node_weights = normal_quadrature(NODES)
        shift = noise_pred - posterior.reference  # (..., N, 2)
        length = shift.norm(dim=-1, keepdim=True)
        direction = shift / length.clamp(min=1e-12)
        level = (posterior.reference.square() - noise_pred.square()).sum(-1) / 2  # (..., N)
        centre = level[..., None] + (posterior.mean * shift[..., None, :]).sum(-1)  # (..., N, classes)
        gap = centre[..., None] + posterior.std * length[..., None] * nodes  # (..., N, classes, nodes)
        liked = torch.tensor([True, False])[:, None].expand(gap.shape)
        pull = self.method.beta * effective_weight(
            self.method.beta * gap,
            liked,
            torch.full(gap.shape[:-1], self.reference_point, dtype=gap.dtype),
            get_utility(self.method.utility),
            desirable_weight=self.method.desirable_weight,
            undesirable_weight=self.method.undesirable_weight,
        )
        pull = pull * node_weights * posterior.chance[..., None]
        each = pull.sum(-1)  # (..., N, classes)
        across = (pull * nodes).sum((-1, -2))  # (..., N)
        towards = (each[..., None] * (posterior.mean - noise_pred[..., None, :])).sum(-2)
        return towards + posterior.std * across[..., None] * direction


def draw_alike(noise_pred: NoisePred, schedule: Schedule, count: int = 800, seed: int = 0) -> Tensor:
    """Ancestral samples whose noise depends on `count` and `seed` alone, so that two predictions meet the same luck.

    Every second point has the first one's noise with the other sign, which leaves means little to chance as well.

    Args:
        noise_pred: takes noisy points (N, 2) float64 and a timestep, gives the predicted noise.
        schedule: noise levels.
        count: N, even.
        seed: of the noise.

    Returns:
        (N, 2) in paper units.

    Raises:
        ValueError: if `count` is odd.
    """
    if count < 2 or count % 2:
        raise ValueError(f"count must be even and at least 2, got {count}")
    generator = stream(seed, "pointwise noise")

    def noise(_: int) -> Tensor:
        half = torch.randn(count // 2, 2, generator=generator, dtype=torch.float64)
        return torch.cat([half, -half])

    with one_thread():
        return to_paper_units(ancestral(noise_pred, schedule, noise(0), noise))


@dataclass(frozen=True)
class _Posterior:
    """Given a noisy point: the reference's prediction (N, 2), chance of each class (N, 2), mean of the noise under each
    class (N, 2 classes, 2), and its std."""

    reference: Tensor
    chance: Tensor
    mean: Tensor
    std: float

    def of(self, points: Tensor) -> "_Posterior":
        return _Posterior(self.reference[points], self.chance[points], self.mean[points], self.std)
