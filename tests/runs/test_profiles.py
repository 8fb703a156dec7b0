"""The cluster profiles, as far as they can be tried without a cluster: stand-ins for Slurm and for Kubernetes' API.

A real Slurm runs a sweep in `test_slurm.py`.
"""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from dkto.runs.runner import _of_slurm, _write_plan, run_sweep
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


def test_what_no_cluster_has_run_is_marked_so():
    assert "NOT RUN ON A CLUSTER" in (PROFILES / "kubernetes" / "config.yaml").read_text()
    assert "kubernetes: not run on a cluster" in (ROOT / "papermill_runs" / "README.md").read_text()


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


def test_a_slurm_without_accounts_is_asked_by_squeue(monkeypatch):
    """There sacct knows nothing, and an account is refused; settings of one's own stay."""
    settings = read_yaml((PROFILES / "slurm" / "config.yaml").read_text())
    for kept, expected in (
        ("none", ["--slurm-status-command", "squeue", "--default-resources", "slurm_partition='gpu'"]),
        ("slurmdbd", []),
    ):
        said = f"AccountingStorageTRES   = cpu\nAccountingStorageType   = accounting_storage/{kept}\n"
        monkeypatch.setattr("dkto.runs.runner.said", lambda *command, said=said: said)
        assert _of_slurm(settings) == expected
        assert _of_slurm(settings | {"slurm-status-command": "sacct"}) == _of_slurm({"executor": "local"}) == []


class StandInForKubernetes(BaseHTTPRequestHandler):
    """As much of the API as the engine asks: it runs a job's command here, and says how that ended."""

    posted, running = [], {}

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/jobs"):
            self.posted.append(body)
            (container,) = body["spec"]["template"]["spec"]["containers"]
            command = [*container["command"], *container["args"]]
            self.running[body["metadata"]["name"]] = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        self.answer(body, 201)

    def do_GET(self):
        if self.path.endswith("/status"):
            code = self.running[self.path.split("/")[-2]].poll()
            state = {} if code is None else {"failed" if code else "succeeded": 1}
            self.answer({"kind": "Job", "status": state})
        else:
            self.answer({"kind": "PodList", "items": []})

    def do_DELETE(self):
        self.answer({"kind": "Status"})

    def answer(self, body, code=200):
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_kubernetes_gets_jobs_of_its_schema_with_what_each_run_may_take(plan, tmp_path, monkeypatch):
    """The jobs that are sent hold no field that the API's models lack, and the sweep goes to its end through them."""
    client = pytest.importorskip("kubernetes.client")
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandInForKubernetes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cluster = {"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
    context = {"name": "here", "context": {"cluster": "here", "user": "me"}}
    access = {"current-context": "here", "clusters": [cluster], "contexts": [context]}
    (tmp_path / "access.json").write_text(json.dumps(access | {"users": [{"name": "me", "user": {}}]}))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "access.json"))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # the image's python
    settings = (PROFILES / "kubernetes" / "config.yaml").read_text()
    here = f'config: ["python={sys.executable}", "working_directory={os.getcwd()}"]'
    (tmp_path / "kubernetes").mkdir()
    (tmp_path / "kubernetes" / "config.yaml").write_text(re.sub("(?m)^config: .*", here, settings))
    try:
        states = run_sweep(plan, profile=str(tmp_path / "kubernetes"))
    finally:
        server.shutdown()
        server.server_close()
    assert {state.word for state in states.values()} == {"done"}
    train, judge = StandInForKubernetes.posted
    api = client.ApiClient()
    for job in (train, judge):
        read = api.deserialize(SimpleNamespace(data=json.dumps(job)), "V1Job")
        assert api.sanitize_for_serialization(read) == job, "the API knows every field"
    for job, cpus, memory, gpus in ((train, 3, 20_000, 2), (judge, 1, 2_000, 0)):
        (container,) = job["spec"]["template"]["spec"]["containers"]
        takes = {"cpu": f"{1000 * cpus}m", "memory": f"{memory}M", "nvidia.com/gpu": str(gpus)}
        assert takes.items() <= container["resources"]["limits"].items(), "cards need a limit"
        assert (
            container["image"] in settings and {"name": "dkto-runs", "mountPath": "/runs"} in container["volumeMounts"]
        )


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
    quick = "seconds-between-status-checks: 1\n"
    settings = (PROFILES / "slurm" / "config.yaml").read_text().replace("latency-wait: 60", "latency-wait: 5")
    settings = settings.replace("status-checks: 10 ", "status-checks: 1 ")
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
