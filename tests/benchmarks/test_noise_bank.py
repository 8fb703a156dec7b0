"""How many draws of noise an image needs: KTO in 2-D on a fixed set of images, against new noises in every step.

The measure is the exact KL of the fitted Gaussian to the desirable one. One pretrained model a seed, the same images
and the same order of them for every size of the bank.
"""

from functools import cache

import numpy as np
import pytest
import torch

import toy.training
from toy.measures import measure_points
from toy.network import Architecture, Ensemble, stream
from toy.objectives import Draws, get_method
from toy.sampling import sample_ensemble
from toy.schedule import linear_schedule
from toy.training import SMALL, draw_steps, pretrain, run, tune
from toy.world import to_paper_units

from .measures import interval

SEEDS = range(20)
OF_THE_IMAGE = ("points", "partners", "coin", "flip")


@cache
def reference():
    schedule = linear_schedule(SMALL.num_train_timesteps)
    found = Ensemble.initial(Architecture(SMALL.num_train_timesteps, SMALL.width), SEEDS)
    run(pretrain(found, schedule, SEEDS, SMALL, SMALL.pretrain_steps))
    return found, schedule


def from_a_bank(images, draws):
    """A stand-in for `draw_steps`: fixed images; `draws` noises of each, or new ones in every step for None."""

    def steps(seeds, purpose, batch_size, num_train_timesteps, dtype):
        given = (seeds, "bank", images, num_train_timesteps, dtype)
        fixed = next(draw_steps(*given))._asdict()
        kept = [
            next(drawn)._asdict() for drawn in [draw_steps(seeds, "bank-noise", *given[2:])] for _ in range(draws or 0)
        ]
        fresh = draw_steps(seeds, purpose, batch_size, num_train_timesteps, dtype)
        rngs = [stream(seed, "bank-order") for seed in seeds]
        own, here = torch.arange(len(seeds))[:, None], torch.arange(batch_size)
        while True:
            rows = torch.stack([torch.randint(images, (batch_size,), generator=rng) for rng in rngs])
            batch = next(fresh)._asdict() | {name: fixed[name][own, rows] for name in OF_THE_IMAGE}
            numbers = torch.stack([torch.randint(draws or 1, (batch_size,), generator=rng) for rng in rngs])
            for name in ("noise", "timesteps") if draws else ():
                batch[name] = torch.stack([each[name][own, rows] for each in kept])[numbers, own, here]
            yield Draws(**batch)

    return steps


def kl(images, draws, monkeypatch):
    """KL of each seed's tuned model, (20,)."""
    before, schedule = reference()
    policy = before.copy()
    monkeypatch.setattr(toy.training, "draw_steps", from_a_bank(images, draws))
    run(tune(policy, before, schedule, [get_method("kahneman_tversky")], SEEDS, SMALL))
    points = sample_ensemble(policy, schedule, SEEDS, SMALL.num_samples)
    return measure_points(to_paper_units(points))["kl"].flatten().double().numpy()


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("images", [40, 400])
def test_how_many_draws_suffice(images, monkeypatch, record_ratio):
    fresh = kl(images, None, monkeypatch)
    for draws in (1, 2, 4, 8, 16, 32):
        values = kl(images, draws, monkeypatch)
        record_ratio(f"kl_of_bank_minus_fresh/{images}_images/{draws}_draws", **interval(list(values - fresh)))
    record_ratio(f"kl_of_fresh/{images}_images", float(np.mean(fresh)), n=len(fresh))
