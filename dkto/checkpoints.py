"""The files of one run: records, checkpoints that are whole or absent, and the final weights."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dkto.config import TrainConfig
from dkto.models import DiffusionModel, PolicyAndReference, read_weights, write_weights
from dkto.records import git_commit, hardware, versions, write_json


class CheckpointStore:
    """The files of one run: records, checkpoints that are whole or absent, and the final weights."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        self.records_path = self.folder / "metrics.jsonl"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("checkpoint-*") if p.is_dir() and not p.name.endswith(".part"))

    def is_finished(self) -> bool:
        """Whether this very configuration was trained to its end here."""
        path = self.folder / "run.json"
        if not path.exists():
            return False
        about = json.loads(path.read_text())
        return bool(about.get("finished")) and about["fingerprint"] == self.config.fingerprint()

    def describe(self, num_processes: int, **more) -> None:
        """Write run.json."""
        about = {"config": self.config.to_dict(), "fingerprint": self.config.fingerprint()}
        about |= {"git_commit": git_commit(), "versions": versions(), "hardware": hardware()}
        write_json(self.folder / "run.json", {**about, "num_processes": num_processes, **more})

    def append(self, record: dict) -> None:
        """Add one record; each line is flushed, so that a viewer sees it at once."""
        with self.records_path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def save(self, pair: PolicyAndReference, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write `checkpoint-STEP/`: weights in diffusers' layout, optimiser moments, step number."""
        target = self.folder / f"checkpoint-{step:08d}"
        part = target.with_name(target.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write_weights(pair, part)
        save_file(_moments(pair, optimizer), part / "optimizer.safetensors")
        about = {"global_step": step, "fingerprint": self.config.fingerprint(), "config": self.config.to_dict()}
        write_json(part / "state.json", about)
        part.replace(target)
        for old in self.checkpoints()[: -self.config.keep_checkpoints]:
            shutil.rmtree(old)

    def restore(self, pair: PolicyAndReference, optimizer: torch.optim.Optimizer) -> int:
        """Load the last complete checkpoint; returns its step, 0 if there is none."""
        found = self.checkpoints()
        if not found:
            return 0
        state = json.loads((found[-1] / "state.json").read_text())
        if state["fingerprint"] != self.config.fingerprint():
            difference = self.config.difference(state["config"])
            raise ValueError(f"{found[-1]} belongs to another configuration ({difference}): choose another output_dir")
        read_weights(pair, found[-1])
        _restore_moments(pair, optimizer, load_file(found[-1] / "optimizer.safetensors"))
        return state["global_step"]

    def finish(self, pair: PolicyAndReference, model: DiffusionModel, seconds: float) -> None:
        """Write the tuned weights for plain diffusers and remove the checkpoints."""
        if pair.reference is not None:
            model.write_pipeline(pair.policy, self.folder / "model")
        else:
            write_weights(pair, self.folder / "lora")
        self.describe(num_processes=1, seconds=round(seconds, 2), finished=True)
        for old in self.checkpoints():
            shutil.rmtree(old)


def _moments(pair: PolicyAndReference, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state
    return {
        f"{name}/{key}": value.contiguous().clone()
        for name, parameter in pair.trainable().items()
        for key, value in state[parameter].items()
    }


def _restore_moments(pair: PolicyAndReference, optimizer: torch.optim.Optimizer, stored: dict[str, Tensor]) -> None:
    for name, parameter in pair.trainable().items():
        moments = {key: stored[f"{name}/{key}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": stored[f"{name}/step"], **moments}
