"""A sweep on a real Slurm, with job accounting and without: one run fails, one is killed, the next call does both."""

import contextlib
import os
import re
import subprocess
import threading
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest
from slurm_site import install, slurm_site

from dkto.runs.record import read_record
from dkto.runs.runner import run_sweep
from dkto.runs.sweeps import read_sweep

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]
NOTEBOOK = Path(__file__).parents[1] / "files" / "tiny_train.ipynb"


@pytest.fixture(scope="module")
def programs():
    if reason := install():
        pytest.skip(reason)


@pytest.fixture(params=["with accounting", "without accounting"])
def site(request, programs, tmp_path, monkeypatch):
    with slurm_site(accounting=request.param == "with accounting") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield tmp_path


def kill_the_run(seed, killed, record):
    """SIGKILL to the process of one run as soon as it has begun its record."""
    while not killed.is_set():
        time.sleep(0.2)
        if not record.exists():
            continue
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "dkto.cli" in words and f"seed={seed}" in words:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                    killed.set()


def last_end():
    """When the last job ended, as Slurm knows it."""
    jobs = subprocess.run(["scontrol", "-o", "show", "jobs"], capture_output=True, check=True, text=True).stdout
    return max(datetime.fromisoformat(end).timestamp() for end in re.findall(r"EndTime=(\S+)", jobs))


@pytest.mark.timeout(1500)
def test_a_sweep_of_six_runs(site, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    mended, out = site / "mended", site / "out"
    (site / "six.yaml").write_text(f"""
notebook: {NOTEBOOK}
parameters: {{failing_seed: 1, slow_seed: 2, mended: {mended}}}
grid: {{seed: [0, 1, 2, 3, 4, 5]}}
resources: {{cpus: 1, hours: 0.2, memory_gb: 0.6}}
""")
    plan = read_sweep(site / "six.yaml", out)
    killed = threading.Event()
    killer = threading.Thread(target=kill_the_run, args=(2, killed, out / "runs" / "seed=2" / "run.json"), daemon=True)
    killer.start()
    try:
        with pytest.raises(RuntimeError, match="2 of 6 runs are not done; the same call does just these") as refused:
            run_sweep(plan, profile="slurm")
    finally:
        killed.set()
    assert time.time() - last_end() < 30, "the jobs had ended"
    records = {run.name: out / run.name / "run.json" for run in plan.runs}
    assert "runs/seed=1 failed: " in str(refused.value) and "runs/seed=2 killed: " in str(refused.value)
    began = {name: read_record(path)["began"] for name, path in records.items()}
    mended.touch()
    states = run_sweep(plan, profile="slurm")
    assert time.time() - last_end() < 30
    assert {state.word for state in states.values()} == {"done"}
    again = {name for name, path in records.items() if read_record(path)["began"] != began[name]}
    assert again == {"runs/seed=1", "runs/seed=2"}
