"""What the engine of a sweep costs beyond papermill's own start-up, as a difference within one run.

The same tiny notebook is executed by plain papermill, one process after another, and by `dkto sweep` on one core, for
two numbers of runs: the slope over the number of runs is the cost of a run, the intercept that of the engine once.
BATCH_ROUNDS=1 in the environment makes a trial run.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from .measures import interval

TINY = Path(__file__).parent.parent / "files" / "tiny_train.ipynb"
FEW, MANY = 2, 8
ROUNDS = int(os.environ.get("BATCH_ROUNDS", "5"))


def plain_papermill(folder, seed):
    """Seconds of one `papermill` command, the way a user calls it without the engine."""
    command = [sys.executable, "-m", "papermill", str(TINY), str(folder / f"{seed}.ipynb"), "--no-progress-bar"]
    command += ["-k", "python3", "-p", "seed", str(seed), "-p", "output_dir", str(folder / f"plain-{seed}")]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def sweep(folder, count):
    """Seconds of one `dkto sweep` of that many runs, one at a time."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    seeds = ", ".join(map(str, range(count)))
    (folder / "tiny.yaml").write_text(f"notebook: {TINY}\ngrid: {{seed: [{seeds}]}}\nresources: {{memory_gb: 0.5}}\n")
    command = [
        sys.executable,
        "-m",
        "dkto.cli",
        "sweep",
        str(folder / "tiny.yaml"),
        "--output-dir",
        str(folder / "out"),
    ]
    began = time.perf_counter()
    subprocess.run([*command, "--cores", "1"], check=True, capture_output=True)
    return time.perf_counter() - began


def test_the_engine_adds_little_to_papermill(tmp_path, record_ratio):
    """Alternating, so that a slow moment of the machine meets both; medians over the rounds."""
    plain_papermill(tmp_path, 99)  # files into memory
    each, once, plain = [], [], []
    for _ in range(ROUNDS):
        plain.append(statistics.mean(plain_papermill(tmp_path, seed) for seed in range(FEW)))
        few, many = sweep(tmp_path / "sweep", FEW), sweep(tmp_path / "sweep", MANY)
        per_run = (many - few) / (MANY - FEW)
        each.append(per_run - plain[-1])
        once.append(few - FEW * per_run)
    record_ratio("sweep_seconds_once", **interval(once))
    record_ratio("sweep_seconds_per_run", **interval(each), papermill=statistics.median(plain))
