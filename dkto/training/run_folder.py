"""The files of one run: records, checkpoints that are whole or absent, and the final weights.

The folder of a run:

    training.json, metrics.jsonl                  configuration and machine; one line per step
    checkpoint-00000500/                          whole or absent; the last `keep_checkpoints` of them
    checkpoint-*/unet/ or pytorch_lora_weights.safetensors            as diffusers loads them
    checkpoint-*/state.json, engine.json, optimizer.safetensors, ...  to go on from
    latest -> checkpoint-00000500                 at the end -> model or lora
    model/ or lora/                               at the end: for plain diffusers, with a card
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from dkto.common.files import keep_records, publish, read_json, write_json
from dkto.common.machine import git_commit, hardware, versions
from dkto.models import write_weights
from dkto.models.system import TRAINING_RECORD
from dkto.training.card import write_card
from dkto.training.config import RunConfig

if TYPE_CHECKING:
    from dkto.training.step import Run

FORMER_RECORD = "run.json"  # of version 0.1


class RunFolder:
    """Writes and reads the folder of one run; it starts nothing and changes no configuration."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config.resolved()
        self.path = Path(config.output_dir)
        self.records_path = self.path / "metrics.jsonl"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p for p in self.path.glob("checkpoint-*") if p.is_dir() and not p.name.endswith(".part"))

    def is_finished(self) -> bool:
        """Whether this very configuration was trained to its end here; ValueError for another or other feedback."""
        path = self.path / TRAINING_RECORD
        if not path.exists():
            former = self.path / FORMER_RECORD
            if former.exists() and "fingerprint" in read_json(former, "record of a run"):
                raise ValueError(
                    f"{former} is a training of dkto 0.1, which this version cannot go on with: choose "
                    "another output_dir"
                )
            return False
        about = read_json(path, "record of a training", ["fingerprint", "config"])
        self._check_same(self.path, about)
        return bool(about.get("finished"))

    def begin(self, num_processes: int, last_step: int) -> None:
        """Write training.json, and drop the records after `last_step`, which will be written again."""
        keep_records(self.records_path, last_step)
        self._describe(num_processes)

    def append(self, record: dict) -> None:
        """Add one record; each line is flushed, so that a viewer sees it at once."""
        with self.records_path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def save(self, run: "Run") -> None:
        """Write `checkpoint-STEP/`; every rank makes the call.

        Raises:
            RuntimeError: if it cannot be written, for instance on a full disk; the former checkpoint is whole.
        """
        engine, target = run.engine, self.path / f"checkpoint-{run.progress.global_step:08d}"
        part = target.with_name(target.name + ".part")
        weights, moments = engine.full_weights(), engine.moments()
        if engine.accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
            try:
                part.mkdir(parents=True)
                write_weights(engine.pair, part, weights)
                engine.write_state(part, moments)
                write_json(part / "state.json", asdict(run.progress) | self._identity())
            except (OSError, SafetensorError) as error:
                shutil.rmtree(part, ignore_errors=True)
                kept = self.checkpoints()
                rest = f"{kept[-1].name} before it is whole" if kept else "there was none before it"
                raise RuntimeError(
                    f"{target.name} could not be written ({error}); {rest}: make room and call again"
                ) from error
        engine.save_whole_state(part)
        if engine.accelerator.is_main_process:
            publish(part, target)
            self._point_latest(target)
            for old in self.checkpoints()[: -self.config.keep_checkpoints]:
                shutil.rmtree(old)

    def last_checkpoint(self) -> tuple[Path, dict] | None:
        """The last complete checkpoint and its state, or None; ValueError for another configuration or feedback."""
        found = self.checkpoints()
        if not found:
            return None
        state = read_json(found[-1] / "state.json", "state of a checkpoint", ["fingerprint", "config"])
        self._check_same(found[-1], state)
        return found[-1], state

    def finish(self, run: "Run") -> None:
        """Write the tuned weights for plain diffusers with their card and remove the checkpoints; every rank calls."""
        engine = run.engine
        with engine.averaged():
            weights = engine.full_weights()
            if not engine.accelerator.is_main_process:
                return
            target = self.path / ("lora" if self.config.lora_rank else "model")
            part = target.with_name(target.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            if self.config.lora_rank:
                write_weights(engine.pair, part, weights)
            else:
                run.model.write_pipeline(engine.pair.policy, part, weights)
        write_card(part, self.path, self.config, run.model, run.progress)
        shutil.rmtree(target, ignore_errors=True)
        publish(part, target)
        self._point_latest(target)
        seconds, skipped = run.progress.seconds, run.progress.skipped_steps
        done = {"seconds": round(seconds, 2), "hours": round(seconds / 3600, 4), "skipped_steps": skipped}
        self._describe(engine.rank[1], **done, finished=True)
        for old in self.path.glob("checkpoint-*"):  # the half of one that a kill left as well
            shutil.rmtree(old)

    def _describe(self, num_processes: int, **more: object) -> None:
        about = {"git_commit": git_commit(), "versions": versions(), "hardware": hardware()}
        write_json(self.path / TRAINING_RECORD, {**self._identity(), **about, "num_processes": num_processes, **more})

    def _identity(self) -> dict[str, object]:
        """What a run is of: its configuration and its feedback."""
        config = self.config
        return {"config": config.to_dict(), "fingerprint": config.fingerprint(), "feedback": self._feedback()}

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
        """Hash of the prepared feedback; None if the training draws its own images or the folder is gone."""
        path = Path(getattr(self.config, "prepared_dir", "")) / "prepared.json"
        return read_json(path, "record of prepared feedback").get("feedback") if path.is_file() else None

    def _point_latest(self, target: Path) -> None:
        part = self.path / "latest.part"
        part.unlink(missing_ok=True)
        part.symlink_to(target.name)
        part.replace(self.path / "latest")
