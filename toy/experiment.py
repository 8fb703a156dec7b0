"""An experiment: methods x seeds, trained as stacked ensembles, one process a core, sampled and measured (paper 7)."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dkto.common.processes import worker_pool
from dkto.common.settings import checked_number
from toy.measures import Estimate, bounds_of, has_diverged, held_out_rewards, measure_points, over_seeds
from toy.network import Architecture, Ensemble
from toy.objectives import Method
from toy.sampling import sample_ensemble
from toy.schedule import Schedule, linear_schedule
from toy.training import SMALL, Recipe, Record, pretrain, run, tune
from toy.world import to_paper_units

BASE = "base"


@dataclass(frozen=True)
class Experiment:
    """Trained and measured methods; "base", the pretrained model, is the first of them."""

    methods: Mapping[str, Method]  # K, without the base
    seeds: Sequence[int]  # S
    recipe: Recipe
    points: Tensor  # (1 + K, S, N, 2) samples in paper units, base first
    measures: Mapping[str, Tensor]  # (1 + K, S) each, see `measure_points`; "pair_accuracy" etc. are NaN for the base
    policy: Ensemble  # K x S members, method after method
    reference: Ensemble  # S members
    records: Sequence[Record]  # of the tuning
    seconds: Mapping[str, float]  # wall time of training and sampling ("ensemble"), and of measuring ("measures")

    @property
    def names(self) -> list[str]:
        """Rows of `points` and `measures`."""
        return [BASE, *self.methods]

    @property
    def schedule(self) -> Schedule:
        """The noise levels it was trained with."""
        return linear_schedule(self.recipe.num_train_timesteps)

    @property
    def diverged(self) -> Tensor:
        """(1 + K, S) bool."""
        return has_diverged(self.measures)

    def estimate(self, measure: str, method: str) -> Estimate:
        """A measure of a method over seeds; a KeyError for an unknown measure, a ValueError for an unknown method."""
        row = self.names.index(method)
        return over_seeds(self.measures[measure][row], self.diverged[row], bounds_of(measure))

    def difference(self, measure: str, method: str, other: str) -> Estimate:
        """A measure of a method minus that of another one on the same seeds, over the seeds in which both stayed."""
        rows = [self.names.index(name) for name in (method, other)]
        values = self.measures[measure]
        return over_seeds(values[rows[0]] - values[rows[1]], self.diverged[rows[0]] | self.diverged[rows[1]])

    def text(self, measure: str, method: str) -> str:
        """An estimate as text; "-" for what a method does not have, as the base has no implicit reward."""
        row = self.names.index(method)
        if bool(self.measures[measure][row][~self.diverged[row]].isnan().all()) and not self.diverged[row].all():
            return "-"
        return str(self.estimate(measure, method))

    def table(self, measures: Sequence[str] = ("kl", "undesirable_share", "off_manifold_share")) -> pd.DataFrame:
        """Estimates as text, a row a method, with the number of diverged seeds in a column of its own."""
        rows = [[self.text(measure, name) for measure in measures] for name in self.names]
        lost = [f"{int(row.sum())} of {len(self.seeds)}" for row in self.diverged]
        return pd.DataFrame(rows, self.names, [*measures]).assign(diverged=lost)

    def metrics(self, measures: Sequence[str]) -> dict[str, float]:
        """Flat names for `metrics.json`: "kl/sft", "kl/sft/low", "kl/sft/high" and so on, "diverged/sft".

        A number that does not exist (no reward, all seeds diverged, one seed has no interval) has no key.
        """
        found = {}
        for name, row in zip(self.names, self.diverged, strict=True):
            for measure in measures:
                estimate = self.estimate(measure, name)
                values = {"": estimate.mean, "/low": estimate.low, "/high": estimate.high}
                found |= {f"{measure}/{name}{end}": value for end, value in values.items() if np.isfinite(value)}
            found[f"diverged/{name}"] = int(row.sum())
        return found

    def model(self, method: str, seed: int | None = None) -> Ensemble:
        """Trained members of a method, of all seeds or of one."""
        source = self.reference if method == BASE else self.policy
        first = 0 if method == BASE else list(self.methods).index(method) * len(self.seeds)
        members = range(first, first + len(self.seeds))
        return source.select(list(members) if seed is None else [members[list(self.seeds).index(seed)]])


def run_experiment(
    methods: Mapping[str, Method],
    seeds: Sequence[int],
    recipe: Recipe = SMALL,
    processes: int = 2,
    record_every: int = 100,
) -> Experiment:
    """Pretrain, tune, sample and measure all methods of all seeds.

    Args:
        methods: by name; "base" is always there and must not be among them.
        seeds: distinct.
        recipe: sizes and rates.
        processes: single-thread processes that share the seeds; 1 works in the calling process. The numbers depend on
            it only by rounding.
        record_every: steps between records of the tuning.

    Raises:
        ValueError: if there is no method or seed, a seed comes twice, or "base" is among the methods.
    """
    if not methods or BASE in methods:
        raise ValueError(f"methods must be named, and none {BASE!r}, got: {', '.join(methods) or 'none'}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be distinct and not empty, got {list(seeds)}")
    processes = checked_number("processes", processes, least=1)
    start = time.perf_counter()
    shares = [list(part) for part in np.array_split(np.asarray(seeds), min(processes, len(seeds)))]
    jobs = [(dict(methods), [int(seed) for seed in share], recipe, record_every) for share in shares]
    if len(jobs) == 1:
        parts = [_work(*jobs[0])]
    else:
        with worker_pool(len(jobs)) as pool:
            parts = list(pool.map(_work, *zip(*jobs, strict=True)))
    measuring = max(part.pop("seconds") for part in parts)
    seconds = {"ensemble": time.perf_counter() - start - measuring, "measures": measuring}
    found, architecture = _joined(parts), Architecture(recipe.num_train_timesteps, recipe.width)
    policy, reference = (Ensemble(architecture, found[name].flatten(0, 1)) for name in ("policy", "reference"))
    records = [Record(step, *values) for step, values in found["records"].items()]
    return Experiment(
        dict(methods), list(seeds), recipe, found["points"], found["measures"], policy, reference, records, seconds
    )


def seconds_one_by_one(methods: Mapping[str, Method], seeds: int, recipe: Recipe = SMALL) -> float:
    """Wall time that `seeds` seeds would take one model at a time, extrapolated from one full seed.

    The same code with ensembles of one: pretraining, then tuning and sampling of each method by itself, in this
    process on one thread, which is faster for models this small than two. Measuring is left out, as in
    `Experiment.seconds["ensemble"]`.
    """
    _one_by_one(methods, recipe.replace(pretrain_steps=2, max_train_steps=2, num_samples=100))
    start = time.perf_counter()
    _one_by_one(methods, recipe)
    return seeds * (time.perf_counter() - start)


def _one_by_one(methods: Mapping[str, Method], recipe: Recipe) -> None:
    schedule, seeds = linear_schedule(recipe.num_train_timesteps), [0]
    reference = Ensemble.initial(Architecture(recipe.num_train_timesteps, recipe.width), seeds)
    run(pretrain(reference, schedule, seeds, recipe))
    sample_ensemble(reference, schedule, seeds, recipe.num_samples)
    for method in methods.values():
        policy = reference.copy()
        run(tune(policy, reference, schedule, [method], seeds, recipe))
        sample_ensemble(policy, schedule, seeds, recipe.num_samples, [method.label])


def _work(methods: dict[str, Method], seeds: list[int], recipe: Recipe, record_every: int) -> dict:
    """One process's share of the seeds; everything comes back as arrays, which travel between processes safely."""
    schedule = linear_schedule(recipe.num_train_timesteps)
    labels = [method.label for method in methods.values()]
    reference = Ensemble.initial(Architecture(recipe.num_train_timesteps, recipe.width), seeds)
    run(pretrain(reference, schedule, seeds, recipe, recipe.pretrain_steps))
    policy = reference.copy(len(methods))
    records = run(tune(policy, reference, schedule, list(methods.values()), seeds, recipe, record_every))
    base = sample_ensemble(reference, schedule, seeds, recipe.num_samples)
    tuned = sample_ensemble(policy, schedule, seeds, recipe.num_samples, labels)
    points = to_paper_units(torch.cat([base, tuned]))
    start = time.perf_counter()
    measures = measure_points(points)
    shape, nothing = (len(methods), len(seeds)), torch.full((1, len(seeds)), torch.nan)
    for name, values in held_out_rewards(policy, reference, schedule, labels).accuracies().items():
        kind, draw, once = name.partition("/")
        measures[f"{kind}_accuracy{draw}{once}"] = torch.cat([nothing, values.float().view(shape)])
    return {
        "points": points.numpy(),
        "measures": {name: values.double().numpy() for name, values in measures.items()},
        "policy": policy.parameters.unflatten(0, shape).numpy(),
        "reference": reference.parameters[None].numpy(),
        "records": {record.global_step: [part.numpy() for part in record[1:]] for record in records},
        "seconds": time.perf_counter() - start,
    }


def _joined(parts: Sequence) -> dict | list | Tensor:
    """What several processes found, side by side: dictionaries and lists entry by entry, arrays along their seeds."""
    if isinstance(parts[0], dict):
        return {key: _joined([part[key] for part in parts]) for key in parts[0]}
    if isinstance(parts[0], list):
        return [_joined(entries) for entries in zip(*parts, strict=True)]
    return torch.from_numpy(np.concatenate(parts, 1))
