"""The cluster profiles, as far as they can be tried without a cluster: a stand-in for Slurm, a plan for Kubernetes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dkto.runs.runner import _write_plan, run_sweep
from dkto.runs.sweeps import read_sweep
from dkto.runs.yaml12 import read_yaml

ROOT = Path(__file__).parents[2]
PROFILES = ROOT / "papermill_runs" / "profiles"
DATA = Path(__file__).parents[1] / "files"
SWEEP = f"""
stages:
  - name: train
    notebook: {DATA / "tiny_train.ipynb"}
    resources: {{cpus: 3, gpus: 2, hours: 1.5, memory_gb: 20}}
  - name: judge
    notebook: {DATA / "tiny_judge.ipynb"}
    parameters: {{runs_dir: {{stage: train}}}}
    resources: {{cpus: 1, gpus: 0, hours: 0.25, memory_gb: 2}}
"""
# Each records or answers as much as Snakemake's Slurm plugin asks; sbatch really runs what it is given.
STAND_INS = {
    "sbatch": """
import json, os, subprocess, sys
place = os.environ["SLURM_STAND_IN"]
number = len(os.listdir(place)) + 1
with open(f"{place}/{number}.json", "w") as file:
    json.dump(sys.argv[1:], file)
(wrapped,) = [a.removeprefix("--wrap=") for a in sys.argv if a.startswith("--wrap=")]
code = f"({wrapped}) > {place}/../{number}.log 2>&1; echo $? > {place}/../{number}.end"
subprocess.Popen(["bash", "-c", code], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                 env=os.environ | {"SLURM_JOB_ID": str(number)})
print(number)
""",
    "sacct": """
import os
place = os.environ["SLURM_STAND_IN"]
for name in os.listdir(place):
    number = name.removesuffix(".json")
    end = f"{place}/../{number}.end"
    code = open(end).read().strip() if os.path.exists(end) else ""
    state = {"": "RUNNING", "0": "COMPLETED"}.get(code, "FAILED")
    print(f"{number}|{state}")
""",
    "srun": """
import os, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words = words[2:] if words[0] in ("-n", "-c") else words[1:]
os.execvp(words[0], words)
""",
    "squeue": "",
    "sinfo": "print('gpu')",
    "scontrol": "print('MinJobAge = 300 sec')",
    "sacctmgr": "print('research')",
    "scancel": "",
}  # fmt: skip


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "two.yaml").write_text(SWEEP)
    return read_sweep(tmp_path / "two.yaml", tmp_path / "out")


@pytest.mark.parametrize("name", ["local", "slurm", "kubernetes"])
def test_no_profile_repeats_finished_work_or_hides_a_failure(name):
    settings = read_yaml((PROFILES / name / "config.yaml").read_text())
    assert settings["executor"] == name and settings["keep-going"] is True and settings["rerun-incomplete"] is True
    assert settings["rerun-triggers"] == ["mtime", "params", "input"]
    assert "keep-incomplete" not in settings


@pytest.mark.parametrize("name", ["slurm", "kubernetes"])
def test_what_no_cluster_has_run_is_marked_so(name):
    assert "NOT RUN ON A CLUSTER" in (PROFILES / name / "config.yaml").read_text()
    assert re.search(rf"{name}.*not run on a cluster", (ROOT / "papermill_runs" / "README.md").read_text(), re.I)


def test_kubernetes_profile_parses_and_the_plan_shows_each_jobs_resources(plan):
    plan.folder.mkdir()
    _write_plan(plan, local=False)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "papermill_runs" / "Snakefile")]
    command += ["--profile", str(PROFILES / "kubernetes"), "--dry-run", "--directory", str(plan.folder)]
    command += ["--configfile", str(plan.folder / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    train, judge = (text.split(f"rule {stage}:")[1].split("Shell command")[0] for stage in ("train", "judge"))
    assert "threads: 3" in train
    for resource in ("gpu=2", "runtime=90", "mem_mb=20000"):
        assert resource in train
    for resource in ("gpu=0", "runtime=15", "mem_mb=2000"):
        assert resource in judge
    assert "cd /dkto && " in text and " exec python -m dkto.cli run " in text, "the image's folder and interpreter"


@pytest.mark.slow
def test_slurm_is_told_what_each_run_may_take(plan, tmp_path, monkeypatch):
    """A stand-in for sbatch takes the arguments down and runs the job; the sweep goes to its end through it."""
    tools, place = tmp_path / "tools", tmp_path / "calls"
    tools.mkdir()
    place.mkdir()
    for name, code in STAND_INS.items():
        (tools / name).write_text(f"#!{sys.executable}\n{code}")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_STAND_IN", str(place))
    profile = tmp_path / "slurm"
    profile.mkdir()
    quick = "slurm-init-seconds-before-status-checks: 1\nseconds-between-status-checks: 1\n"
    settings = (PROFILES / "slurm" / "config.yaml").read_text().replace("latency-wait: 60", "latency-wait: 5")
    (profile / "config.yaml").write_text(settings + quick)
    states = run_sweep(plan, profile=str(profile))
    assert {state.word for state in states.values()} == {"done"}
    calls = [json.loads((place / f"{number}.json").read_text()) for number in (1, 2)]
    train, judge = (" ".join(word for word in call if not word.startswith("--wrap")) for call in calls)
    for arguments in (train, judge):
        assert "-A research" in arguments and "-p gpu" in arguments and "--export=ALL" in arguments
    assert re.search(r"-t 90\b", train) and "--mem 20000" in train
    assert re.search(r"--gpus?=2\b|--gpus-per-node=2\b|--gres=gpu:2\b", train)
    assert re.search(r"--cpus-per-(task|gpu)=3\b", train)
    assert re.search(r"-t 15\b", judge) and "--mem 2000" in judge and "gpu" not in judge.replace("-p gpu", "")
    assert len(list(place.iterdir())) == 2
