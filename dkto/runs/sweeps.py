"""A sweep: a small YAML file that names notebooks and the parameters that vary, checked whole before anything starts.

    notebook: notebooks/20_toy.ipynb          # or stages: [...], see below
    parameters: {max_train_steps: 200}        # shared by all runs
    grid: {beta: [1, 10], seed: [0, 1, 2]}    # every combination
    list: [{utility: linear}, {utility: kahneman_tversky, learning_rate: 1e-7}]   # times every entry
    resources: {cpus: 1, gpus: 0, hours: 0.2, memory_gb: 4}                       # of one run

A stage is a notebook that other stages can read; runs that agree in everything that reaches a stage share it:

    stages:
      - {name: train, notebook: notebooks/30_train_with_likes.ipynb, parameters: {...}, resources: {...}}
      - {name: judge, notebook: notebooks/40_win_rates.ipynb, parameters: {runs_dir: {stage: train}}}
    grid: {train.beta: [50, 100], judge.seed: [1, 2]}   # 2 trainings, 4 judgements

A name without a stage, `seed`, goes to every stage that declares it. A run lies in STAGE/WHAT VARIES, or in STAGE alone
where nothing does.
"""

import hashlib
import itertools
import json
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from dkto.common.names import not_known, printable, shown
from dkto.runs.notebooks import Parameter, coerce, declared_parameters
from dkto.runs.yaml12 import read_yaml

CHECKOUT = Path(__file__).parents[2]
SHIPPED = CHECKOUT / "papermill_runs" / "sweeps"
OUTPUTS = Path("papermill_runs/outputs")
SWEEP_KEYS = ("notebook", "stages", "parameters", "grid", "list", "resources")
STAGE_KEYS = ("name", "notebook", "parameters", "resources")
ONLY_STAGE = "runs"  # name of the stage of a sweep that has one notebook
MOST_RUNS = 100_000  # of one sweep
LARGEST_FILE = 250_000  # bytes of a sweep's file
MOST = {"cpus": 10_000, "gpus": 10_000, "hours": 10_000, "memory_gb": 1_000_000}  # that one run may ask for
LONGEST_NAME = 100  # characters of a run's name; file systems allow 255 bytes


@dataclass(frozen=True)
class Resources:
    """What one run may take; a cluster stops it when `hours` are over."""

    cpus: int = 1
    gpus: int = 0
    hours: float = 1.0
    memory_gb: float = 4.0

    def __post_init__(self) -> None:
        for name, least in (("cpus", 1), ("gpus", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= MOST[name]:
                raise ValueError(f"{name} must be a whole number from {least} to {MOST[name]}, got {shown(value)}")
        for name in ("hours", "memory_gb"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value <= MOST[name]:
                raise ValueError(f"{name} must be a number above 0, at most {MOST[name]}, got {shown(value)}")


@dataclass(frozen=True)
class Stage:
    """One notebook of a sweep: its parameters, what all its runs get, and which ones are folders of another stage."""

    name: str
    notebook: Path
    declared: dict[str, Parameter]
    parameters: dict[str, object]
    inputs: dict[str, str]  # parameter -> name of an earlier stage
    resources: Resources


@dataclass(frozen=True)
class PlannedRun:
    """One run of one notebook."""

    name: str  # stage/varying parameters, or the stage alone; also its folder below the sweep's
    notebook: str
    given: dict[str, object]  # the values that the sweep names
    parameters: dict[str, object]  # every parameter with its value, but output_dir and inputs
    inputs: dict[str, str]  # parameter -> name of the run whose folder it gets
    resources: Resources

    @property
    def stage(self) -> str:
        """The stage it belongs to."""
        return self.name.split("/")[0]


@dataclass(frozen=True)
class Plan:
    """What a sweep comes to: its runs, each after those it reads."""

    name: str
    folder: Path
    runs: tuple[PlannedRun, ...]

    def only(self, names: Sequence[str]) -> "Plan":
        """The plan of these runs and of those that they read; all if none is named, ValueError for an unknown name."""
        known = {run.name: run for run in self.runs}
        for name in names:
            if name not in known:
                raise ValueError(not_known(f"sweep {self.name} has no run {shown(name)}", name, known, "its runs"))
        wanted, todo = set(), list(names or known)
        while todo:
            name = todo.pop()
            todo += () if name in wanted else known[name].inputs.values()
            wanted.add(name)
        return replace(self, runs=tuple(run for run in self.runs if run.name in wanted))

    def executed(self, run: PlannedRun) -> Path:
        """Where the executed notebook of a run goes."""
        return self.folder / run.name / "notebook.ipynb"

    def told(self, run: PlannedRun) -> dict[str, object]:
        """Every parameter that the notebook gets, folders included."""
        paths = {key: str(self.folder / name) for key, name in run.inputs.items()}
        return run.given | paths | {"output_dir": str(self.folder / run.name)}

    def command(self, run: PlannedRun) -> list[str]:
        """The `dkto run` that makes this run by hand, as arguments."""
        pairs = [f"{key}={_as_text(value)}" for key, value in self.told(run).items()]
        return ["dkto", "run", run.notebook, str(self.executed(run)), "--parameters", *pairs]

    def shell_command(self, run: PlannedRun) -> str:
        """The same for a shell, signs that a terminal would obey spelled out."""
        return " ".join(map(_quoted, self.command(run)))


def _quoted(text: str) -> str:
    """A text as one word of a shell; bash reads `$'\\x1b'` as the sign itself.

    >>> print(_quoted("a b"), _quoted("it's\\x1b[2J"))
    'a b' $'it\\'s\\x1b[2J'
    """
    if text.isprintable():
        return shlex.quote(text)
    return f"$'{printable(text.replace(chr(92), chr(92) * 2), len(text) * 2).replace(chr(39), chr(92) + chr(39))}'"


def read_sweep(
    path: str | Path, output_dir: str | Path | None = None, changes: Mapping[str, object] | None = None
) -> Plan:
    """Read a sweep and check all of it: notebooks, names and types of parameters, resources, names of runs.

    Args:
        path: the YAML file; its notebooks are taken relative to the working directory, or else to the checkout.
        output_dir: where the runs land, `papermill_runs/outputs/NAME OF THE FILE` if left out.
        changes: values that take the place of the file's, by name (`seed`, `train.seed`).

    Raises:
        FileNotFoundError: if the file or a notebook does not exist.
        ValueError, TypeError: one sentence on the first thing that is wrong; it names the file, the key, what was
            expected and what came, and the nearest known name for one that is unknown.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"sweep {path} does not exist")
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise ValueError(f"sweep {path} must have at most {LARGEST_FILE:,} bytes, got {size:,}")
    try:
        content = read_yaml(path.read_text(encoding="utf-8-sig"))
        _check_keys(content, SWEEP_KEYS, "the sweep")
        stages = _read_stages(content)
        changed = _addresses(changes or {}, stages, "changes")
        for stage, key in changed:
            stages[stage].parameters.pop(key, None)
        varying = [{key: changed.get(key, value) for key, value in c.items()} for c in _combinations(content, stages)]
        shared = _addresses(_mapping(content, "parameters"), stages, "parameters")
        shared |= {key: value for key, value in changed.items() if key not in varying[0]}
        _refuse_twice(stages, shared, varying)
        folder = Path(output_dir) if output_dir is not None else OUTPUTS / path.stem
        return Plan(path.stem, folder, tuple(_plan_runs(stages, shared, varying)))
    except (ValueError, TypeError, FileNotFoundError) as error:
        kind = next(kind for kind in (FileNotFoundError, TypeError, ValueError) if isinstance(error, kind))
        raise kind(f"{path}: {error}") from error


def _check_keys(value: object, known: Sequence[str], what: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a mapping with some of {', '.join(known)}, got {shown(value)}")
    for key in value:
        if key not in known:
            raise ValueError(not_known(f"{what} has no key {shown(key)}", key, known))


def _mapping(content: dict, key: str) -> dict:
    value = content.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be a mapping of names to values, got {shown(value)}")
    return value


def _read_stages(content: dict) -> dict[str, Stage]:
    if ("notebook" in content) == ("stages" in content):
        raise ValueError("the sweep must have either notebook or stages")
    if "notebook" in content:
        only = {"name": ONLY_STAGE, "notebook": content["notebook"], "resources": content.get("resources", {})}
        return {ONLY_STAGE: _read_stage(only, {})}
    if "resources" in content:
        raise ValueError("resources belong in each stage when there are stages")
    if not isinstance(content["stages"], list) or not content["stages"]:
        raise ValueError(f"stages must be a list of at least one stage, got {shown(content['stages'])}")
    stages = {}
    for number, entry in enumerate(content["stages"], 1):
        _check_keys(entry, STAGE_KEYS, f"stage {number}")
        name = entry.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
            raise ValueError(f"name of stage {number} must be small letters, digits, _ and -, got {shown(name)}")
        if name in stages:
            raise ValueError(f"two stages are called {shown(name)}")
        stages[name] = _read_stage(entry, stages)
    return stages


def _read_stage(entry: dict, earlier: dict[str, Stage]) -> Stage:
    name, notebook = entry["name"], entry.get("notebook")
    if not isinstance(notebook, str) or "\0" in notebook:
        raise ValueError(f"notebook of stage {name} must be a path, got {shown(notebook)}")
    if not os.path.isfile(notebook) and os.path.isfile(CHECKOUT / notebook):  # false too for what can be no name
        notebook = os.path.relpath(CHECKOUT / notebook)
    declared = declared_parameters(notebook)
    if "output_dir" not in declared:
        raise ValueError(f"notebook {notebook} must declare the parameter output_dir: its run's folder goes there")
    parameters, inputs = {}, {}
    for key, value in _mapping(entry, "parameters").items():
        _check_parameter(key, declared, Path(notebook).name)
        if isinstance(value, dict):
            inputs[key] = _read_input(key, value, declared[key], earlier)
        else:
            parameters[key] = coerce(declared[key], value, Path(notebook).name)
    _check_keys(_mapping(entry, "resources"), [field.name for field in fields(Resources)], f"resources of stage {name}")
    resources = Resources(**_mapping(entry, "resources"))
    return Stage(name, Path(notebook), declared, parameters, inputs, resources)


def _check_parameter(name: str, declared: Mapping[str, Parameter], notebook: str) -> None:
    if name not in declared:
        raise ValueError(not_known(f"{notebook} has no parameter {shown(name)}", name, declared))
    if name == "output_dir":
        raise ValueError("output_dir is chosen by the sweep: each run has a folder of its own")


def _read_input(key: str, value: dict, parameter: Parameter, earlier: dict[str, Stage]) -> str:
    if set(value) != {"stage"}:
        raise ValueError(f"{key} must be a value or {{stage: NAME}}, got {shown(value)}")
    stage = value["stage"]
    if not isinstance(stage, str) or stage not in earlier:
        raise ValueError(not_known(f"{key}: {shown(stage)} is no earlier stage", stage, earlier, "earlier"))
    if parameter.type_name != "str":
        raise TypeError(f"{key} must be str to get the folder of stage {stage}, got {parameter.type_name}")
    return stage


Address = tuple[str, str]  # stage, parameter
Values = dict[Address, tuple[str, object]]  # the name as the sweep's file has it, and the value


def _addresses(values: Mapping[str, object], stages: dict[str, Stage], where: str) -> Values:
    """Each value under every (stage, parameter) that its name reaches, read by the type declared there."""
    found = {}
    for name, value in values.items():
        for stage, key in _resolve(str(name), stages):
            notebook = stages[stage].notebook.name
            _check_parameter(key, stages[stage].declared, notebook)
            if (stage, key) in found:
                former, name = (printable(each, 80) for each in (found[stage, key][0], name))
                raise ValueError(f"{where}: {key} of stage {stage} is given twice, as {former} and {name}")
            found[stage, key] = (str(name), coerce(stages[stage].declared[key], value, f"{where}, {notebook}"))
    return found


def _resolve(name: str, stages: dict[str, Stage]) -> list[Address]:
    stage, dot, key = name.rpartition(".")
    if dot:
        if stage not in stages:
            raise ValueError(not_known(f"{shown(name)} names no stage", stage, stages, "stages"))
        return [(stage, key)]
    reached = [(stage.name, name) for stage in stages.values() if name in stage.declared]
    if not reached:
        known = sorted({parameter for stage in stages.values() for parameter in stage.declared})
        notebooks = " and ".join(sorted({stage.notebook.name for stage in stages.values()}))
        raise ValueError(not_known(f"no parameter {shown(name)} in {notebooks}", name, known))
    return reached


def _combinations(content: dict, stages: dict[str, Stage]) -> list[Values]:
    """What varies, one mapping a combination: every entry of the list times every point of the grid."""
    grid, entries = _mapping(content, "grid"), content.get("list", [{}])
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            name = printable(name, 80)
            raise ValueError(f"grid: {name} must be a list of at least one value, got {shown(values)}")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"list must be a list of mappings of names to values, got {shown(entries)}")
    if (count := math.prod(map(len, [entries, stages, *grid.values()]))) > MOST_RUNS:
        raise ValueError(f"a sweep may have {MOST_RUNS:,} runs, grid and list make {count:,}: leave values out")
    axes = [[_addresses({name: value}, stages, "grid") for value in values] for name, values in grid.items()]
    listed = [_addresses(entry, stages, f"list, entry {number}") for number, entry in enumerate(entries, 1)]
    found = {}
    for parts in itertools.product(listed, *axes):
        combination = {}
        for part in parts:
            for stage, key in part.keys() & combination.keys():
                raise ValueError(f"{key} of stage {stage} is given twice, in grid and list")
            combination |= part
        same = json.dumps(sorted([*key, value] for key, (_, value) in combination.items()))
        if same in found:
            raise ValueError(f"two runs are the same: {_name_of(combination)}")
        found[same] = combination
    return list(found.values())


def _refuse_twice(stages: dict[str, Stage], shared: Values, combinations: list[Values]) -> None:
    """A value that another one would silently replace is a mistake."""
    varying = {address for combination in combinations for address in combination}
    for name, stage in stages.items():
        for key in stage.declared:
            places = [f"stage {name}"] * (key in stage.parameters or key in stage.inputs)
            places += ["parameters"] * ((name, key) in shared) + ["grid or list"] * ((name, key) in varying)
            if len(places) > 1:
                raise ValueError(f"{key} is given twice, in {' and in '.join(places)}")


def _plan_runs(stages: dict[str, Stage], shared: Values, combinations: list[Values]) -> list[PlannedRun]:
    above = {}  # stage -> itself and all stages that reach it
    for stage in stages.values():
        above[stage.name] = {stage.name}.union(*(above[name] for name in stage.inputs.values()))
    runs, names = {}, set()
    for combination in combinations:
        called = {}
        for stage in stages.values():
            reaching = {address: value for address, value in combination.items() if address[0] in above[stage.name]}
            identity = stage.name, json.dumps([[*key, value] for key, (_, value) in reaching.items()])
            if identity not in runs:
                name = f"{stage.name}/{_name_of(reaching)}" if reaching else stage.name
                name = f"{name}-{_short_hash(identity[1])}" if name in names else name
                names.add(name)
                inputs = {key: called[upstream] for key, upstream in stage.inputs.items()}
                runs[identity] = _plan_run(stage, name, shared | combination, inputs)
            called[stage.name] = runs[identity].name
    return sorted(runs.values(), key=lambda run: list(stages).index(run.stage))


def _plan_run(stage: Stage, name: str, values: Values, inputs: dict[str, str]) -> PlannedRun:
    given = stage.parameters | {key: value for (owner, key), (_, value) in values.items() if owner == stage.name}
    every = {key: parameter.default for key, parameter in stage.declared.items()} | given
    parameters = {key: value for key, value in every.items() if key not in {"output_dir", *inputs}}
    return PlannedRun(name, str(stage.notebook), given, parameters, inputs, stage.resources)


def _name_of(varying: Values) -> str:
    """A folder name from the parameters that vary: `beta=50,seed=1`."""
    name = ",".join(f"{title}={_plain(value)}" for title, value in dict(varying.values()).items()) or "run"
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 9]}-{_short_hash(name)}"


def _plain(value: object) -> str:
    """A value as part of a file name: numbers short, everything unusual a dash."""
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", _as_text(value)).strip("-.") or "empty"


def _as_text(value: object) -> str:
    """A value as `dkto run --parameters` reads it."""
    return value if isinstance(value, str) else json.dumps(value)


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def plan_to_dict(plan: Plan) -> dict[str, dict]:
    """The plan's runs as plain values, for `papermill_runs/Snakefile`."""
    return {
        run.name: {
            "stage": run.stage,
            "notebook": run.notebook,
            "told": [f"{key}={_as_text(value)}" for key, value in sorted(run.parameters.items())],
            "inputs": run.inputs,
            "resources": asdict(run.resources),
        }
        for run in plan.runs
    }
