"""What an image costs: the small world's drawing over torch's UNet and over the floor of its arithmetic.

CPU seconds on one thread, in alternating pairs of one run. The floor is the UNet's multiplications and additions at the
speed of a large matrix product measured between the pairs; a convolution may lie below it.
"""

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dkto.models import System, draw, noise_generator
from dkto.world.scenes import prompts_for

from .measures import interval

IMAGES, PAIRS, SIDE = 25, 12, 1024


@pytest.fixture(scope="module")
def measured():
    """CPU seconds of each pair: drawn by the graph, drawn by torch, the floor."""
    system, before = System(), torch.get_num_threads()
    torch.set_num_threads(1)
    pipelines = {name: system.load(compiled=name == "graph") for name in ("graph", "torch")}
    prompts = prompts_for("test", IMAGES, 0)

    def drawing(name):
        noise = [noise_generator(0, p, 0) for p in range(IMAGES)]
        return lambda: draw(pipelines[name], prompts, noise, system)

    def seconds(work):
        began = time.process_time()
        work()
        return time.process_time() - began

    with FlopCounterMode(display=False) as counter:
        drawing("torch")()
    operations = counter.get_total_flops()
    matrix, rows = torch.randn(SIDE, SIDE), []
    for _ in range(PAIRS + 1):
        product = seconds(lambda: [matrix @ matrix for _ in range(8)]) / 8
        rows.append((seconds(drawing("graph")), seconds(drawing("torch")), operations * product / (2 * SIDE**3)))
    torch.set_num_threads(before)
    return rows[1:]  # the first warms up


def test_drawing_over_torch(measured, record_ratio):
    record_ratio("drawing_over_torch", **interval([graph / plain for graph, plain, _ in measured]), at_most=0.9)


def test_drawing_over_the_floor_of_its_arithmetic(measured, record_ratio):
    record_ratio("drawing_over_arithmetic", **interval([graph / floor for graph, _, floor in measured]))
