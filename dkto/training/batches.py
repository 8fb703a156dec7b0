"""The global batch of a step: which rows, which noise, which timesteps, whatever the number of processes.

Every random number is drawn from a counter-based generator at the address (seed, step, stream, index in
the global batch). A rank draws only its own share, a resumed run repeats what an uninterrupted one does,
and 1 process or 16 see the same samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dkto.data.sampler import BiasedSampler
from dkto.objective.methods import METHODS
from dkto.training.config import TrainConfig

if TYPE_CHECKING:  # diffusers takes ten seconds to import, and a batch needs none of it
    from dkto.data.encoded import PreparedFeedback
    from dkto.models import DiffusionModel

# streams of random numbers; the biased sampler draws from stream 0
PAIRS, TIMESTEPS, NOISE, POSTERIOR, DROPOUT, FLIPS, NUMBERS = 1, 2, 3, 4, 5, 6, 7
OF_THE_BANK = 16  # added to a stream whose address is a row and a draw's number, not a step and an index


@dataclass(frozen=True)
class Batch:
    """What one rank works on at once; B is its share of a global micro-batch.

    For a method on pairs the rows alternate: chosen, rejected, chosen, rejected, ...
    """

    noisy_latents: Tensor  # (B, C, h, w)
    target: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,)
    conditioning: dict[str, Tensor]  # each (B, ...)
    is_desirable: Tensor  # (B,) bool
    unrelated: dict[str, Tensor] | None = None  # the conditioning of another sample, for that estimator
    sample_weight: Tensor | None = None  # (B,), for a method that reads it, of data that have it
    expected: Tensor | None = None  # (B, C, h, w) the reference's prediction, if a bank holds it

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        from accelerate.utils import send_to_device

        return Batch(**send_to_device(vars(self), device))


class Draws(NamedTuple):
    """The random part of a batch."""

    timesteps: Tensor  # (B,)
    noise: Tensor  # (B, C, h, w)
    posterior: Tensor  # (B, C, h, w), of the latents
    dropped: np.ndarray  # (B,) bool, prompts that give way to the empty one
    flipped: np.ndarray | None  # (B,) bool, images that are mirrored; None if none may be


def stream(seed: int, step: int, which: int, index: int = 0) -> np.random.Generator:
    """The generator at one address; streams at different addresses never meet."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, index, which, step]))


class GlobalBatches:
    """Draws any rank's share of any step's global batch.

    Rows as the method's entry in `dkto.objective.methods` says: "biased" by gamma (paper 4.3), uniformly among the
    "liked" or among "all", as uniform "pairs" (chosen, rejected), or as "groups" of a uniformly drawn prompt.

    Args:
        config: seed, batch size, objective, gamma, estimator, prompt dropout.
        data: the prepared feedback.
        model: noises latents and says what is to be predicted.

    Attributes:
        leaves_weights: whether the data have weights that the method does not read.
        bank: the reference's predictions by row and number of a draw (`dkto.training.noise_bank`), once they are there.

    Raises:
        ValueError: if a class, pairs, groups or mirrored images are needed that the data lack.
    """

    def __init__(self, config: TrainConfig, data: "PreparedFeedback", model: "DiffusionModel") -> None:
        self.config, self.data, self.model = config, data, model
        self.bank: Callable[[np.ndarray, np.ndarray], Tensor] | None = None
        if config.random_flip and not data.has_flips:
            raise ValueError(f"random_flip needs mirrored images, but {data.folder} has none: prepare it with flip")
        self._method = METHODS[config.objective]
        self._weighs = data.weights is not None and "sample_weight" in self._method.reads
        self.leaves_weights = data.weights is not None and not self._weighs
        if self._method.draws == "pairs":
            if not len(data.pairs):
                raise ValueError(
                    f"objective {config.objective!r} needs pairs, but no liked and disliked image of {data.folder} "
                    "share a pair_id"
                )
            self._sampler = None
            return
        if self._method.draws == "groups":
            self._sampler, self._groups = None, self._prompts_with_both()
            return
        gamma = {"biased": config.desirable_fraction, "liked": 1.0}.get(self._method.draws, data.is_desirable.mean())
        self._sampler = BiasedSampler(data.is_desirable, float(gamma), config.seed)

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of the global batch of one step, (batch_size,) int64."""
        size, together = self.config.batch_size, self._method.rows_at_once(self.config)
        if self._sampler is not None:
            return self._sampler.rows(step, size // together).repeat(together)
        chance = stream(self.config.seed, step, PAIRS)
        if self._method.draws == "groups":
            chosen = chance.integers(len(self._groups), size=size // together)
            sides = (chance.choice(side, together // 2) for group in chosen for side in self._groups[group])
            return np.stack(list(sides)).reshape(-1, 2, together // 2).swapaxes(1, 2).reshape(-1)
        return self.data.pairs[chance.integers(len(self.data.pairs), size=size // 2)].reshape(-1)

    def _prompts_with_both(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rows of the liked and of the disliked images of each prompt that has both."""
        order = np.argsort(self.data.prompt_ids, kind="stable")
        cuts = np.flatnonzero(np.diff(self.data.prompt_ids[order])) + 1
        liked = self.data.is_desirable
        both = [(rows[liked[rows]], rows[~liked[rows]]) for rows in np.split(order, cuts)]
        both = [sides for sides in both if all(map(len, sides))]
        if not both:
            raise ValueError(
                f"objective {self.config.objective!r} needs prompts with a liked and a disliked image, but "
                f"{self.data.folder} has none"
            )
        return both

    def draw(self, step: int, micro: int = 0, rank: int = 0, ranks: int = 1) -> Batch:
        """One rank's share of one of the `gradient_accumulation` micro-batches of a step, which counts from 0."""
        whole = self.config.batch_size // self.config.gradient_accumulation  # of the global micro-batch
        group = np.arange(micro * whole, (micro + 1) * whole)
        index = group[rank * whole // ranks : (rank + 1) * whole // ranks]
        return self._draw(self.rows(step), step, index, others=np.roll(group, 1)[index - group[0]])

    def draw_rows(self, rows: np.ndarray, step: int) -> Batch:
        """These very rows with the noise of a step: for measuring, where every row counts once."""
        index = np.arange(len(rows))
        return self._draw(rows, step, index, others=np.roll(index, 1))

    def _draw(self, rows: np.ndarray, step: int, index: np.ndarray, others: np.ndarray) -> Batch:
        """The samples `index` of a global batch of `rows`; `others` lend their prompts as unrelated ones."""
        if self.config.noise_bank:
            numbers = stream(self.config.seed, step, NUMBERS).integers(self.config.noise_bank, size=len(rows))[index]
            batch = self.draw_numbers(rows[index], numbers)
            return replace(batch, expected=self.bank(rows[index], numbers)) if self.bank else batch
        size = len(rows)
        # the sides of a pair (Diffusion-DPO) and the images of a group share timestep, noise, prompt and mirroring
        shared = np.arange(size)
        if self._method.draws in ("pairs", "groups"):
            shared //= self._method.rows_at_once(self.config)
        at, shape = partial(stream, self.config.seed, step), self._latent_shape
        timesteps = self.model.draw_timesteps(at(TIMESTEPS), size, self.config.timestep_sampling)
        dropped = (at(DROPOUT).random(size) < self.config.prompt_dropout)[shared]
        flipped = (at(FLIPS).random(size) < 0.5)[shared[index]] if self.config.random_flip else None
        noise, posterior = (
            _normal([at(which, int(i)) for i in places], shape)
            for which, places in ((NOISE, shared[index]), (POSTERIOR, index))
        )
        drawn = Draws(timesteps[torch.from_numpy(shared[index])], noise, posterior, dropped[index], flipped)
        batch = self._noised(rows[index], drawn)
        if not self.config.borrows_prompts:
            return batch
        return replace(batch, unrelated=self.data.conditioning(rows[others], dropped[others]))

    def draw_numbers(self, rows: np.ndarray, numbers: np.ndarray) -> Batch:
        """Rows with the draws of these numbers, below `noise_bank`: row and number fix all that is random."""
        config, shape = self.config, self._latent_shape
        places = [(int(number), int(row)) for row, number in zip(rows, numbers, strict=True)]

        def at(which: int) -> list[np.random.Generator]:
            return [stream(config.seed, number, OF_THE_BANK + which, row) for number, row in places]

        timesteps = [self.model.draw_timesteps(rng, 1, config.timestep_sampling) for rng in at(TIMESTEPS)]
        dropped = np.array([rng.random() < config.prompt_dropout for rng in at(DROPOUT)])
        flipped = np.array([rng.random() < 0.5 for rng in at(FLIPS)]) if config.random_flip else None
        noise, posterior = (_normal(at(which), shape) for which in (NOISE, POSTERIOR))
        return self._noised(rows, Draws(torch.cat(timesteps), noise, posterior, dropped, flipped))

    def _noised(self, rows: np.ndarray, drawn: Draws) -> Batch:
        mean, std = self.data.latents(rows, drawn.flipped)
        latents, style = mean + std * drawn.posterior, self.config.csft_style
        return Batch(
            noisy_latents=self.model.add_noise(latents, drawn.noise, drawn.timesteps),
            target=self.model.target(latents, drawn.noise, drawn.timesteps),
            timesteps=drawn.timesteps,
            conditioning=self.data.conditioning(
                rows, drawn.dropped, csft=style if "csft_style" in self._method.settings else None
            ),
            is_desirable=torch.from_numpy(self.data.is_desirable[rows]),
            sample_weight=torch.from_numpy(self.data.weights[rows]) if self._weighs else None,
        )

    @cached_property
    def _latent_shape(self) -> tuple[int, ...]:
        return tuple(self.data.latents(np.array([0]))[0].shape[1:])


def _normal(rngs: Sequence[np.random.Generator], shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.stack([rng.standard_normal(shape, np.float32) for rng in rngs]))
