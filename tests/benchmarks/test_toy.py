"""How long the headline of the laboratory takes: all methods x 20 seeds as ensembles, against one model at a time.

TOY_SEEDS and TOY_STEPS in the environment make a smaller trial run, which keeps no bound.
"""

import os

from toy.experiment import run_experiment, seconds_one_by_one
from toy.objectives import METHODS
from toy.training import SMALL

SEEDS = int(os.environ.get("TOY_SEEDS", "20"))
RECIPE = SMALL.replace(max_train_steps=int(os.environ.get("TOY_STEPS", SMALL.max_train_steps)))
FULL_SIZE = SEEDS == 20 and RECIPE == SMALL


def test_headline_as_an_ensemble_and_one_by_one(benchmark, record_ratio):
    """9 methods x 20 seeds x 3500 samples: seconds, and how much faster than one model at a time."""
    experiment = benchmark.pedantic(run_experiment, (METHODS, range(SEEDS), RECIPE), rounds=1)
    assert not experiment.diverged.any()
    seconds, alone = experiment.seconds["ensemble"], seconds_one_by_one(METHODS, SEEDS, RECIPE)
    record_ratio("toy_headline_seconds", seconds, n=1)
    record_ratio("toy_one_by_one_over_ensemble", alone / seconds, at_least=4 if FULL_SIZE else None, n=1)
