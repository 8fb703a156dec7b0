"""The files of one run: records, checkpoints that are whole or absent, and the final weights.

The folder of a run:

    run.json, metrics.jsonl                       configuration and machine; one line per step
    checkpoint-00000500/                          whole or absent; the last `keep_checkpoints` of them
    checkpoint-*/unet/ or pytorch_lora_weights.safetensors            as diffusers loads them
    checkpoint-*/optimizer.safetensors, ema.safetensors, state.json   to go on from
    latest -> checkpoint-00000500                 at the end -> model or lora
    model/ or lora/                               at the end: for plain diffusers, with a card
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dkto.common.files import read_json, write_json
from dkto.common.machine import git_commit, hardware, versions
from dkto.models import DiffusionModel, read_weights, write_weights
from dkto.training.card import write_card
from dkto.training.config import TrainConfig
from dkto.training.engine import Engine, make_ema

ENGINE_STATE = "engine"  # what DeepSpeed writes for itself


class CheckpointStore:
    """Writes and reads the folder of one run.

    Attributes:
        state: what a checkpoint remembers beside weights: `global_step`, `skipped_steps`, `bad_steps` (in a
            row) and `seconds` of training.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config.resolved()
        self.folder = Path(config.output_dir)
        self.records_path = self.folder / "metrics.jsonl"
        self.state: dict = {"global_step": 0, "skipped_steps": 0, "bad_steps": 0, "seconds": 0.0}

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("checkpoint-*") if p.is_dir() and not p.name.endswith(".part"))

    def is_finished(self) -> bool:
        """Whether this very configuration was trained to its end here.

        Raises:
            ValueError: if another one was, or on other feedback; the sentence names what differs.
        """
        path = self.folder / "run.json"
        if not path.exists():
            return False
        about = read_json(path, "record of a training")
        if "fingerprint" in about:
            self._check_same(self.folder, about)
        return bool(about.get("finished"))

    def describe(self, num_processes: int, **more) -> None:
        """Write run.json."""
        about = {
            "config": self.config.to_dict(),
            "fingerprint": self.config.fingerprint(),
            "feedback": self._feedback(),
        }
        about |= {"git_commit": git_commit(), "versions": versions(), "hardware": hardware()}
        write_json(self.folder / "run.json", {**about, "num_processes": num_processes, **more})

    def append(self, record: dict) -> None:
        """Add one record; each line is flushed, so that a viewer sees it at once."""
        with self.records_path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def save(self, engine: Engine) -> None:
        """Write `checkpoint-STEP/`; every rank makes the call.

        Raises:
            RuntimeError: if it cannot be written, for instance on a full disk; the former checkpoint is whole.
        """
        target = self.folder / f"checkpoint-{self.state['global_step']:08d}"
        part = target.with_name(target.name + ".part")
        weights = engine.full_weights()
        moments = _moments(engine) if engine.accelerator.is_main_process or engine.sharded else {}
        if engine.accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
            try:
                part.mkdir(parents=True)
                write_weights(engine.pair, part, weights)
                self._write_state(engine, part, moments)
            except (OSError, SafetensorError) as error:
                shutil.rmtree(part, ignore_errors=True)
                kept = self.checkpoints()
                rest = f"{kept[-1].name} before it is whole" if kept else "there was none before it"
                raise RuntimeError(
                    f"{target.name} could not be written ({error}); {rest}: make room and call again"
                ) from error
        if engine.deepspeed:
            engine.accelerator.wait_for_everyone()
            engine.accelerator.save_state(part / ENGINE_STATE)
        engine.accelerator.wait_for_everyone()
        if engine.accelerator.is_main_process:
            part.replace(target)
            self._point_latest(target)
            for old in self.checkpoints()[: -self.config.keep_checkpoints]:
                shutil.rmtree(old)

    def restore(self, engine: Engine) -> None:
        """Load the last complete checkpoint, if there is one, into an engine that has not started, and start it.

        Raises:
            ValueError: if it belongs to another configuration or other feedback; the sentence names what differs.
        """
        found = self.checkpoints()
        if not found:
            engine.start()
            return
        state = read_json(found[-1] / "state.json", "state of a checkpoint")
        self._check_same(found[-1], state)
        self.state = {name: state[name] for name in self.state}
        read_weights(engine.pair, found[-1])
        if engine.scaler is not None:
            engine.scaler.load_state_dict(state["scaler"])
        engine.start()
        if engine.deepspeed:
            engine.accelerator.load_state(found[-1] / ENGINE_STATE)
        else:
            _restore_moments(engine, load_file(found[-1] / "optimizer.safetensors"))
        if self.config.ema_decay:
            stored = load_file(found[-1] / "ema.safetensors")
            engine.ema = make_ema(self.config, engine.parameters)
            engine.ema.shadow_params = [stored[n].to(p.device) for n, p in engine.pair.trainable().items()]
            engine.ema.optimization_step = state["ema_step"]

    def _check_same(self, place: Path, stored: dict) -> None:
        if stored["fingerprint"] != self.config.fingerprint():
            difference = self.config.difference(stored["config"]) or "its prompts or the fields of a configuration"
            raise ValueError(f"{place} belongs to another configuration ({difference}): choose another output_dir")
        before, now = stored.get("feedback"), self._feedback()
        if None not in (before, now) and before != now:
            raise ValueError(
                f"{place} was trained on other feedback ({before} stored, {now} in {self.config.prepared_dir}): choose "
                "another output_dir"
            )

    def _feedback(self) -> str | None:
        """Hash of the prepared feedback; None if the training draws its own pictures or the folder is gone."""
        path = Path(getattr(self.config, "prepared_dir", "")) / "prepared.json"
        return read_json(path, "record of prepared feedback").get("feedback") if path.is_file() else None

    def finish(self, engine: Engine, model: DiffusionModel) -> None:
        """Write the tuned weights for plain diffusers with their card and remove the checkpoints; every rank calls."""
        with engine.averaged():
            weights = engine.full_weights()
            if not engine.accelerator.is_main_process:
                return
            target = self.folder / ("lora" if self.config.lora_rank else "model")
            part = target.with_name(target.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            if self.config.lora_rank:
                write_weights(engine.pair, part, weights)
            else:
                model.write_pipeline(engine.pair.policy, part, weights)
        write_card(part, self.folder, self.config, model, self.state)
        shutil.rmtree(target, ignore_errors=True)
        part.replace(target)
        self._point_latest(target)
        done = {"seconds": round(self.state["seconds"], 2), "hours": round(self.state["seconds"] / 3600, 4)}
        skipped = self.state["skipped_steps"]
        self.describe(engine.accelerator.num_processes, **done, skipped_steps=skipped, finished=True)
        for old in self.folder.glob("checkpoint-*"):  # the half of one that a kill left as well
            shutil.rmtree(old)

    def _write_state(self, engine: Engine, part: Path, moments: dict[str, Tensor]) -> None:
        save_file(moments, part / "optimizer.safetensors")
        about = {**self.state, "fingerprint": self.config.fingerprint(), "config": self.config.to_dict()}
        about["feedback"] = self._feedback()
        if engine.ema is not None:
            names = engine.pair.trainable()
            shadows = {n: s.contiguous() for n, s in zip(names, engine.ema.shadow_params, strict=True)}
            save_file(shadows, part / "ema.safetensors")
            about["ema_step"] = engine.ema.optimization_step
        if engine.scaler is not None:
            about["scaler"] = engine.scaler.state_dict()
        write_json(part / "state.json", about)

    def _point_latest(self, target: Path) -> None:
        part = self.folder / "latest.part"
        part.unlink(missing_ok=True)
        part.symlink_to(target.name)
        part.replace(self.folder / "latest")


def _moments(engine: Engine) -> dict[str, Tensor]:
    """The optimiser's state by parameter, whole on every rank."""
    if engine.deepspeed:
        return {}
    if engine.sharded:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(engine.policy, engine.optimizer, options=options)["state"]
    else:
        state = {name: engine.optimizer.state[parameter] for name, parameter in engine.pair.trainable().items()}
    return {
        f"{name}/{key}": torch.as_tensor(value).contiguous().clone()
        for name, values in state.items()
        for key, value in values.items()
    }


def _restore_moments(engine: Engine, stored: dict[str, Tensor]) -> None:
    state: dict[str, dict[str, Tensor]] = {}
    for path, value in stored.items():
        name, _, key = path.rpartition("/")
        state.setdefault(name, {})[key] = value
    if engine.sharded:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        groups = engine.optimizer.state_dict()["param_groups"]
        whole = {"state": state, "param_groups": groups}
        set_optimizer_state_dict(engine.policy, engine.optimizer, whole, options=options)
        return
    fused = engine.optimizer.defaults.get("fused")  # such a kernel counts its steps beside the weights, others on a CPU
    for name, parameter in engine.pair.trainable().items():
        moments = {k: v.to(parameter.device) if fused or v.ndim else v for k, v in state.get(name, {}).items()}
        if moments:
            engine.optimizer.state[parameter] = moments
