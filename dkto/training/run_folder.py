"""The files of one run: records, checkpoints that are whole or absent, and the final weights.

The folder of a run:

    training.json, metrics.jsonl                  configuration and machine; one line per step
    checkpoint-00000500/                          whole or absent; the last `keep_checkpoints` of them
    checkpoint-*/unet/ or pytorch_lora_weights.safetensors            as diffusers loads them
    checkpoint-*/state.json, engine.json, optimizer.safetensors, ...  to go on from
    latest -> checkpoint-00000500                 at the end -> model or lora; a text file where there are no links
    model/ or lora/                               at the end: for plain diffusers, with a card
                                                  beside lora/ the last checkpoint stays: small, and it goes on longer
"""

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from dkto.common.files import (
    PART,
    Fields,
    check_fields,
    discard,
    force_to_disk,
    keep_records,
    publish,
    read_json,
    remove,
    write_json,
    writing,
)
from dkto.common.machine import git_commit, hardware, versions
from dkto.common.names import printable, shown
from dkto.models import write_weights
from dkto.models.system import TRAINING_RECORD, read_training
from dkto.training.card import write_card
from dkto.training.config import RunConfig

if TYPE_CHECKING:
    from dkto.training.step import Progress, Run


def _are_sums(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(v) is float and math.isfinite(v) for v in value)


_COUNT = (lambda value: type(value) is int and value >= 0, "a whole number")
STATE: Fields = dict.fromkeys(("global_step", "skipped_steps", "bad_steps"), _COUNT)
STATE |= {"seconds": (lambda value: type(value) in (int, float) and 0 <= value < math.inf, "a number")}
STATE |= {"past": (lambda value: value is None or _are_sums(value), "null, or a sum and a count of rewards")}
STATE |= {"config": (lambda value: isinstance(value, dict), "an object")}
"""What a checkpoint says beside weights: how far the run is, see `dkto.training.step.Progress`, and of what."""
FORMER_RECORD = "run.json"  # of version 0.1


class RunFolder:
    """Writes and reads the folder of one run; it starts nothing and changes no configuration."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config.resolved()
        self.path = Path(config.output_dir)
        self.records_path = self.path / "metrics.jsonl"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p for p in self.path.glob("checkpoint-*") if p.is_dir() and not p.name.endswith(PART))

    def is_finished(self) -> bool:
        """Whether this very configuration was trained to its end here; not if more steps are asked and can be done.

        Raises:
            ValueError: for another configuration, a length that cannot be reached from there, or other feedback.
        """
        path = self.path / TRAINING_RECORD
        if not path.exists():
            former = self.path / FORMER_RECORD
            if former.exists() and "fingerprint" in read_json(former, "record of a run"):
                raise ValueError(
                    f"{former} is a training of dkto 0.1, which this version cannot go on with: choose "
                    "another output_dir"
                )
            return False
        about = read_training(path, {})
        self._check_same(self.path, about)
        steps = about["config"].get("max_train_steps")
        if about.get("finished") and steps != (asked := self.config.max_train_steps):
            if self.checkpoints() and asked > steps:
                return False
            why = "and cannot be made shorter" if asked < steps else "of all weights, and keeps no checkpoint of them"
            raise ValueError(
                f"{self.path} was trained to its end of {steps} steps {why}: train {asked} steps in another output_dir"
            )
        return bool(about.get("finished"))

    def begin(self, num_processes: int, progress: "Progress") -> None:
        """Write training.json, and drop the records after the last step, which will be written again.

        A warning counts those before it that are not there.
        """
        for part in self.path.glob(f"*{PART}"):  # the folder is held: whoever wrote these is gone
            remove(part)
        last = progress.global_step
        steps = keep_records(self.records_path, last)
        if len(steps) < (expected := last - progress.skipped_steps):
            gaps = [(a + 1, b - 1) for a, b in pairwise([0, *steps, last + 1]) if b - a > 1]
            skipped = f" ({progress.skipped_steps} of them were skipped)" if progress.skipped_steps else ""
            absent = shown([f"{a}-{b}" if b > a else str(a) for a, b in gaps])
            text = f"{self.records_path} should hold {expected} records of the first {last} steps, got {len(steps)}"
            warnings.warn(f"{text}: steps {absent} have none{skipped}, the run goes on", stacklevel=2)
        self._describe(num_processes)

    def append(self, record: dict) -> None:
        """Add one record; each line is flushed, so that a viewer sees it at once."""
        with writing(self.records_path), self.records_path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def save(self, run: "Run") -> None:
        """Write `checkpoint-STEP/`; every rank makes the call.

        Raises:
            RuntimeError: if it cannot be written, for instance on a full disk; the former checkpoint is whole.
        """
        engine, target = run.engine, self.path / f"checkpoint-{run.progress.global_step:08d}"
        main, weights, moments = engine.accelerator.is_main_process, engine.full_weights(), engine.moments()
        with self._part_of(target, main) as part:
            if main:
                write_weights(engine.pair, part, weights)
                engine.write_state(part, moments)
                write_json(part / "state.json", asdict(run.progress) | self._identity())
            engine.save_whole_state(part)
            if main:
                self._publish(part, target)
        if main:
            found = self.checkpoints()
            place = found.index(target) + 1
            for old in [*found[: max(0, place - self.config.keep_checkpoints)], *found[place:]]:
                discard(old)  # a newer one is broken: the run went on from one before it

    @contextmanager
    def _part_of(self, target: Path, main: bool) -> Iterator[Path]:
        """The folder that becomes `target`; one that cannot be written is removed, with a sentence."""
        part = target.with_name(target.name + PART)
        try:
            if main:
                remove(part)
                part.mkdir(parents=True)
            yield part
        except (OSError, SafetensorError) as error:
            remove(part)
            kept = self.checkpoints()
            rest = f"{kept[-1].name} before it is whole" if kept else "there was none before it"
            raise RuntimeError(
                f"{target.name} could not be written ({error}); {rest}: make room and call again"
            ) from error

    def _publish(self, part: Path, target: Path) -> None:
        """Let a complete folder be `target`, and the records that lead to it be on disk before."""
        if self.records_path.exists():
            force_to_disk(self.records_path)
        if target.exists():
            discard(target)
        publish(part, target)
        self._point_latest(target)

    def last_checkpoint(self, check: Callable[[Path], None]) -> tuple[Path, dict] | None:
        """The newest checkpoint that is whole and its state, or None if there is none at all.

        Args:
            check: raises a ValueError or FileNotFoundError for one that cannot be gone on from.

        Raises:
            ValueError: if none is whole, for another configuration or feedback, or if more steps are done than asked.
        """
        broken = []
        for folder in reversed(self.checkpoints()):
            try:
                state = read_json(folder / "state.json", "state of a checkpoint", ["fingerprint"])
                check_fields(state, STATE, str(folder / "state.json"))
                if folder.name != f"checkpoint-{state['global_step']:08d}":
                    raise ValueError(f"{folder / 'state.json'} is of step {state['global_step']}, another checkpoint's")
            except (ValueError, FileNotFoundError) as error:
                broken.append(f"{folder.name} is broken ({printable(error, 250)})")
                continue
            self._check_same(folder, state)
            try:
                check(folder)
            except (ValueError, FileNotFoundError) as error:
                broken.append(f"{folder.name} is broken ({printable(error, 250)})")
                continue
            if state["global_step"] > self.config.max_train_steps:
                raise ValueError(
                    f"{self.path} has done {state['global_step']} steps, more than max_train_steps "
                    f"{self.config.max_train_steps}: ask for more, or choose another output_dir"
                )
            if broken:
                warnings.warn(f"{'; '.join(broken)}: going on from {folder.name}", stacklevel=2)
            return folder, state
        if broken:
            raise ValueError(
                f"no checkpoint in {self.path} is whole: {'; '.join(broken)}: remove them to train from the beginning, "
                "or choose another output_dir"
            )
        return None

    def finish(self, run: "Run") -> None:
        """Write the tuned weights for plain diffusers with their card and `clear` the checkpoints; every rank calls.

        No step depends on how many follow it: a run that is made longer ends with the weights of one long run.

        Raises:
            RuntimeError: if they cannot be written, for instance on a full disk.
        """
        engine = run.engine
        if self.config.lora_rank:
            self.save(run)
        target = self.path / ("lora" if self.config.lora_rank else "model")
        with engine.averaged():
            weights = engine.full_weights()
            if not engine.accelerator.is_main_process:
                return
            with self._part_of(target, main=True) as part:
                if self.config.lora_rank:
                    write_weights(engine.pair, part, weights)
                else:
                    run.model.write_pipeline(engine.pair.policy, part, weights)
                write_card(part, self.path, self.config, run.model, run.progress)
                self._publish(part, target)
        seconds, skipped = run.progress.seconds, run.progress.skipped_steps
        done = {"seconds": round(seconds, 2), "hours": round(seconds / 3600, 4), "skipped_steps": skipped}
        self._describe(engine.rank[1], **done, finished=True)
        self.clear()

    def clear(self) -> None:
        """Remove the checkpoints of a finished run, of adapters all but the last, and the half that a kill left."""
        kept = self.checkpoints()[-1:] if self.config.lora_rank else []
        for old in self.path.glob("checkpoint-*"):
            if old not in kept:
                remove(old)

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
                f"{place} was trained on other feedback ({printable(before, 80)} stored, {printable(now, 80)} in "
                f"{self.config.prepared_dir}): choose another output_dir"
            )

    def _feedback(self) -> str | None:
        """Hash of the prepared feedback; None if the training draws its own images or the folder is gone."""
        path = Path(getattr(self.config, "prepared_dir", "")) / "prepared.json"
        return read_json(path, "record of prepared feedback").get("feedback") if path.is_file() else None

    def _point_latest(self, target: Path) -> None:
        part = self.path / f"latest{PART}"
        remove(part)
        try:
            part.symlink_to(target.name)
        except OSError:  # a file system without links: a file that names it
            part.write_text(f"{target.name}\n")
        part.replace(self.path / "latest")
