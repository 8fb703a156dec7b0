"""Where the seconds go: CPU time of the demo and of a small replay by stage, beside the floor of their arithmetic.

Notebooks run in this process on one thread, without kernels, so that a second counts once. A stage counts what it does
itself: weights that a drawing loads are its own, an import is `import` wherever it happens. `training processes` are
whole processes, from their imports to the weights that they write. The floor of drawing and of
training is the UNet's multiplications and additions (a training step: two passes forwards and a backward one of twice
the work) at the speed of a large matrix product.
"""

import builtins
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import wraps
from unittest import mock

import pytest
import torch
from in_process import in_this_process
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

import dkto.data.encode
import dkto.evaluation.generate
import dkto.evaluation.scoring
import dkto.training.launch
import dkto.training.loop
from dkto.paper.demo import run_demo
from dkto.paper.replay import run_paper
from dkto.training.memory import build_denoiser

from .measures import interval

SIDE, STARTS, PROCESSES = 1024, 5, "training processes"
STAGES = {  # what is timed: the stage, and where its work is done
    "drawing": (dkto.evaluation.generate, "_draw_chunk"),
    "judging": (dkto.evaluation.scoring, "_score_chunk"),
    "training": (dkto.training.loop, "gradients_of"),
    "around a training": (dkto.training.loop, "open_run"),
    PROCESSES: (dkto.training.launch, "start_training"),
    "encoding": (dkto.data.encode._Job, "run"),
    "figures": (Figure, "savefig"),
    "import": (builtins, "__import__"),
}


class Clock:
    """CPU seconds by stage; a stage inside another counts for itself alone."""

    def __init__(self):
        self.seconds, self.passes = Counter(), Counter()
        self.stage, self.since = "notebook and tables", time.process_time()

    def turn(self, stage):
        now = time.process_time()
        self.seconds[self.stage] += now - self.since
        before, self.stage, self.since = self.stage, stage, now
        return before

    def timed(self, stage, function):
        @wraps(function)
        def work(*given, **options):
            before = self.turn("import" if self.stage == "import" else stage)
            try:
                found = function(*given, **options)
            finally:
                self.turn(before)
            self.passes[stage] += passes_of(stage, given)
            return found

        return work


def passes_of(stage, given):
    """Passes of the UNet for one sample: two for each step of each image, four for each sample of a training step."""
    if stage == "drawing":
        task, guided = given[0], given[0].system.guidance != 1
        return sum(map(len, task.batches)) * task.system.steps * (1 + guided)
    if stage in ("training", PROCESSES):
        config, steps = (given[0].config, 1) if stage == "training" else (given[0], given[0].max_train_steps)
        return 4 * steps * config.batch_size * hasattr(config, "prepared_dir")  # an online method also draws
    return 0


@contextmanager
def watched():
    clock, before = Clock(), os.times()
    with ExitStack() as stack:
        for stage, (place, name) in STAGES.items():
            stack.enter_context(mock.patch.object(place, name, clock.timed(stage, getattr(place, name))))
        yield clock
        clock.turn("")
    after = os.times()
    clock.seconds[PROCESSES] += after.children_user + after.children_system
    clock.seconds[PROCESSES] -= before.children_user + before.children_system


def floor_of_a_pass():
    """CPU seconds of the UNet's arithmetic for one sample at the speed of a large matrix product."""
    unet, matrix = build_denoiser("small-world"), torch.randn(SIDE, SIDE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(torch.randn(1, 4, 16, 16, device="meta"), 5, torch.randn(1, 16, 96, device="meta"))
    began = time.process_time()
    for _ in range(16):
        matrix @ matrix
    return counter.get_total_flops() * (time.process_time() - began) / 16 / (2 * SIDE**3)


def demo(folder):
    run_demo(folder, train={"processes": 0}, judge={"processes": 0})


def replay(folder):
    run_paper(folder, "quick", processes=0)


@pytest.mark.parametrize("job", [demo, replay])
def test_seconds_by_stage(job, tmp_path, record_ratio):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    floors = [floor_of_a_pass()]
    with watched() as clock, in_this_process():
        job(tmp_path)
    floors.append(floor_of_a_pass())
    torch.set_num_threads(threads)
    for stage, seconds in clock.seconds.most_common():
        record_ratio(f"ledger/{job.__name__}/{stage}, seconds", seconds)
        if passes := clock.passes[stage]:
            record_ratio(f"ledger/{job.__name__}/{stage}, over its floor", seconds / (passes * sum(floors) / 2))


@pytest.mark.parametrize(
    ("what", "command"),
    [
        ("Python alone", ["-c", "pass"]),
        ("import dkto", ["-c", "import dkto"]),
        ("dkto --help", ["-m", "dkto.cli", "--help"]),
        ("import of the trainer", ["-c", "import dkto.training.loop"]),
    ],
)
def test_start_up(what, command, record_ratio):
    seconds = []
    for _ in range(STARTS):
        before = os.times()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    record_ratio(f"start_up/{what}, seconds", **interval(seconds))
