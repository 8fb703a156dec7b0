"""Several processes: two gloo ranks under torchrun train as one, also by the files that ship for GPUs."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from dkto.common.files import read_records
from dkto.training.launch import config_arguments, run_trainings, training_command
from dkto.training.loop import train

PROFILES = Path(__file__).parents[2] / "papermill_runs" / "profiles" / "accelerate"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

PARITY = """
import itertools, sys
import torch
import torch.distributed as dist
from dkto.training.batches import Batch
from dkto.training.config import TrainConfig
from dkto.training.step import columns
from dkto.objective.accuracy import measures
from dkto.objective.methods import METHODS, OFFLINE, Errors, method_loss
from dkto.objective.utilities import UTILITIES

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()

def total(values):
    values = values.clone()
    dist.all_reduce(values)
    return values

def share(values, where):
    return values[where].clone()

checked = 0
cases = [("kto", u, e) for u, e in itertools.product(UTILITIES, ("batch", "unrelated", "per_class", "running", "zero"))]
for name, utility, estimator in cases + [(o, "kahneman_tversky", "batch") for o in OFFLINE if o != "kto"]:
    for beta, liked_only_here in ((0.5, False), (20.0, True)):
        config = TrainConfig("p", "o", objective=name, utility=utility, estimator=estimator, beta=beta, batch_size=8)
        generator = torch.Generator().manual_seed(checked)
        policy, reference, other_p, other_r = torch.rand(4, 8, generator=generator, dtype=torch.float64)
        liked = torch.tensor([True] * 4 + [False] * 4 if liked_only_here else [True, False] * 4)
        pairs = METHODS[name].draws in ("pairs", "groups")
        if pairs:
            liked = torch.tensor([True, False] * 4)
        if name == "sft":  # its sampler draws liked samples only
            liked = torch.ones(8, dtype=torch.bool)

        def run(where, total):
            leaf = share(policy, where).requires_grad_()
            batch = Batch(None, None, None, {}, share(liked, where))
            unrelated = Errors(share(other_p, where), share(other_r, where)) if estimator == "unrelated" else None
            errors = Errors(leaf, share(reference, where), unrelated, share(other_p, where), leaf.detach()[::2] / 2)
            settings = METHODS[name].loss_settings(config) | {"anchor": 0.5, "sft_weight": 0.5}
            felt = method_loss(name, errors, batch.is_desirable, reduce=total, **settings)
            felt.loss.backward()
            return felt.loss.detach(), leaf.grad, columns(felt, errors, batch, beta)

        whole_loss, whole_grad, whole_table = run(slice(0, 8), lambda x: x)
        mine = slice(rank * 4, rank * 4 + 4)
        loss, grad, table = run(mine, total)
        assert abs(float(total(loss) / ranks - whole_loss)) < 1e-6 * max(1, abs(float(whole_loss))), (name, utility)
        # DDP averages the gradients of the ranks
        assert torch.allclose(grad / ranks, whole_grad[mine], rtol=1e-6, atol=1e-12), (name, utility, estimator)
        rows = torch.stack(list(table.values())).T.contiguous()
        parts = [torch.empty_like(rows) for _ in range(ranks)]
        dist.all_gather(parts, rows)
        gathered = dict(zip(table, torch.cat(parts).T))
        one, two = (measures(**found, pairs=pairs) for found in (gathered, whole_table))
        assert one.keys() == two.keys()
        assert all(abs(one[k] - two[k]) <= 1e-6 * max(1, abs(two[k])) for k in one), (name, utility, estimator)
        checked += 1
if rank == 0:
    print("checked", checked)
dist.destroy_process_group()
"""


def run(command, **options):
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_loss_gradient_and_measures_are_those_of_the_global_batch(tmp_path):
    """Every objective, utility and estimator: 1 rank x 8 equals 2 ranks x 4 to 1e-6, a class missing on a rank too."""
    script = tmp_path / "parity.py"
    script.write_text(PARITY)
    assert int(run([*TORCHRUN, str(script)]).split()[-1]) >= 40


def test_two_processes_train_as_one(config):
    """The whole trainer, the estimator that mixes samples of both ranks: the records agree to rounding in float32."""
    config = replace(config, beta=20.0, estimator="unrelated", prompt_dropout=0.2, gradient_accumulation=1)
    expected = list(train(config))
    double = replace(config, output_dir=config.output_dir.with_name("double"))
    run_trainings([double], ranks=2)
    records = read_records(double.output_dir / "metrics.jsonl")
    assert [r["global_step"] for r in records] == [r["global_step"] for r in expected]
    assert records[0]["loss"] == pytest.approx(expected[0]["loss"], abs=1e-6)
    for one, two in zip(expected, records, strict=True):
        for name in ("loss", "reference_point", "policy_error", "mean_abs_reward"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=2e-4), (one["global_step"], name)


def test_a_batch_that_the_processes_cannot_share_is_refused(config, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"batch_size 3 is not a multiple of 2 processes"):
        next(train(replace(config, batch_size=3)))


SHARDING = """
# accelerate shards on accelerators alone, and hears here that gloo is one; `stop` ends the run after that step
import itertools, os, sys
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from dkto.cli import main
from dkto.training import engine, loop

def sharding(**options):
    accelerator = Accelerator(**options)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # by the variables of the launcher's file
    PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator

engine.Accelerator = sharding
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed.comm.torch
    deepspeed.comm.torch.build_shm_op = lambda: None  # its compiler works for minutes; gloo does without
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_CPU)
    engine.Accelerator = lambda cpu, **options: Accelerator(**options)
stop, *arguments = sys.argv[1:]
train, steps = loop.train, itertools.count(1)
loop.train = lambda config, _: train(config, lambda: next(steps) == int(stop))
sys.exit(main(arguments))
"""


def launch(name, config, *options, script=None):
    """A training by `accelerate launch` with a shipped file, whose number of processes is made one for this machine."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(PROFILES / name), *options]
    return [*command, *(script or ["-m", "dkto.cli"]), "train", *config_arguments(config), "--threads", "1"]


def check_equal(config, expected):
    """The records are those of one process, to rounding in float32."""
    records = read_records(config.output_dir / "metrics.jsonl")
    assert [r["global_step"] for r in records] == [r["global_step"] for r in expected]
    for one, two in zip(expected, records, strict=True):
        for name in ("loss", "policy_error", "mean_abs_reward", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=2e-4), (one["global_step"], name)


@pytest.fixture
def alone(config):
    """A short training, what one process records of it, and the same training for another folder."""
    config = replace(config, beta=20.0, max_train_steps=5)
    expected = list(train(config))
    return expected, replace(config, output_dir=config.output_dir.with_name("launched"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_gpu.yaml", "eight_gpus.yaml"])
def test_one_machine_trains_by_the_shipped_file(name, alone):
    expected, config = alone
    processes = ["--num_processes", "2", "--main_process_port", "0"] if name == "eight_gpus.yaml" else []
    run(launch(name, config, *processes))
    check_equal(config, expected)
    record = json.loads((config.output_dir / "training.json").read_text())
    assert record["num_processes"] == len(processes) // 2 or 1


@pytest.mark.slow
def test_two_machines_train_by_the_shipped_file(alone):
    """Both are this one, with a process each."""
    expected, config = alone
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ["--num_processes", "2", "--main_process_port", port, "--machine_rank"]
    commands = [launch("two_by_eight_gpus.yaml", config, *options, rank) for rank in "01"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    other = subprocess.Popen(commands[1], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        run(commands[0])
        assert other.wait(60) == 0
    finally:
        other.kill()
        other.wait()
    check_equal(config, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lora_rank"),
    [("fsdp_eight_gpus.yaml", 0), ("fsdp_eight_gpus.yaml", 4), ("deepspeed_zero2_eight_gpus.yaml", 0)],
)
def test_what_lies_in_pieces_trains_stops_and_goes_on_as_one(name, lora_rank, config, tmp_path, monkeypatch):
    """By the shipped file: losses, the checkpoint that the second call starts from, and the written weights."""
    if "deepspeed" in name and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = replace(config, beta=20.0, max_train_steps=5, lora_rank=lora_rank)
    expected = list(train(config))
    sharded = replace(config, output_dir=config.output_dir.with_name("sharded"))
    (tmp_path / "sharding.py").write_text(SHARDING)
    options = ["--num_processes", "2", "--main_process_port", "0"]
    for stop in ("4", "0"):
        run(launch(name, sharded, *options, script=[str(tmp_path / "sharding.py"), stop]))
        assert len(read_records(sharded.output_dir / "metrics.jsonl")) == int(stop) or 5
    check_equal(sharded, expected)
    (one, two) = (load_weights(each.output_dir) for each in (config, sharded))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-3)


def load_weights(folder):
    (path,) = [*folder.glob("model/unet/*.safetensors"), *folder.glob("lora/*.safetensors")]
    return load_file(path)


def test_every_file_is_read_whole_and_named_on_its_page():
    """accelerate knows every key, and precision is left to the training."""
    page = (PROFILES / "README.md").read_text()
    for path in PROFILES.glob("*.yaml"):
        found, text = load_config_from_file(str(path)), yaml.safe_load(path.read_text())
        assert found.mixed_precision == "no" and found.num_processes == text["num_processes"]
        plugin = found.fsdp_config if "fsdp" in path.stem else found.deepspeed_config
        assert bool(plugin) == path.stem.startswith(("fsdp", "deepspeed")) and f"`{path.name}`" in page


def test_the_five_configurations_are_there():
    named = {yaml.safe_load(path.read_text())["distributed_type"] for path in PROFILES.glob("*.yaml")}
    assert named == {"NO", "MULTI_GPU", "FSDP", "DEEPSPEED"} and len(list(PROFILES.glob("*.yaml"))) == 5


def test_the_command_names_its_launcher(config):
    plain = training_command(config, threads=1, ranks=1, accelerate_config="")
    assert plain[1:4] == ["-m", "dkto.cli", "train"]
    path = PROFILES / "eight_gpus.yaml"
    launched = training_command(config, threads=1, ranks=1, accelerate_config=path)
    assert launched[1:5] == ["-m", "accelerate.commands.launch", "--config_file", str(path)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ranks": 0, "accelerate_config": ""}, "ranks must be 1 or above, got 0"),
        (
            {"ranks": 2, "accelerate_config": PROFILES / "one_gpu.yaml"},
            "ranks must be 1 with accelerate_config",
        ),
        ({"ranks": 1, "accelerate_config": "nothing.yaml"}, "accelerate_config 'nothing.yaml' does not exist"),
    ],
)
def test_launches_that_cannot_be_are_refused(config, options, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        training_command(config, threads=1, **options)
