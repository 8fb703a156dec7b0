"""Run parameterised notebooks with papermill, refusing what papermill only warns of, and hand results over.

A notebook declares its parameters in one cell tagged `parameters`, one annotated literal a line, and
ends by writing `metrics.json` with `write_metrics`.
"""

import ast
import io
import json
import logging
import math
import os
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dkto.common.files import force_to_disk, stays_inside, write_atomically, write_json
from dkto.common.json_text import parse_json
from dkto.common.machine import versions
from dkto.common.names import not_known, printable, shown
from dkto.common.processes import sole_writer
from dkto.runs.record import (
    ROOT,
    PeakMemory,
    is_number,
    is_unicode,
    parsed,
    read_metrics,
    read_notebook,
    recorded,
    tags_of,
)

if TYPE_CHECKING:
    import pandas as pd

PARAMETER_TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list}
YES, NO = ("true", "yes", "on"), ("false", "no", "off")
PATIENCE = 5.0  # seconds in which a kernel whose runner was killed ends too


@dataclass(frozen=True)
class Parameter:
    """One declared parameter: its name, type name, default value and the comment that gives its meaning and unit."""

    name: str
    type_name: str
    default: object
    comment: str


def parameters_cell(notebook: Mapping, name: str) -> Mapping:
    """The one cell tagged `parameters` of a notebook; ValueError without just one."""
    cells = [cell for cell in notebook["cells"] if "parameters" in tags_of(cell)]
    if len(cells) != 1:
        raise ValueError(f"notebook {name} must have one cell tagged 'parameters', found {len(cells)}")
    return cells[0]


def declared_parameters(path: str | Path) -> dict[str, Parameter]:
    """The parameters that a notebook takes, by name, in the order of its `parameters` cell.

    Raises:
        FileNotFoundError: if there is no such notebook.
        ValueError: if the cell is missing, is repeated, or holds anything but annotated literals of plain types.
    """
    path = Path(path)
    source = parameters_cell(read_notebook(path), path.name)["source"]
    if (tree := parsed(source)) is None:
        raise ValueError(f"notebook {path.name}: {_not_python(source)}")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)  # a # inside a string is no comment
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    found = {}
    for statement in tree.body:
        line = ast.get_source_segment(source, statement)
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value):
            raise ValueError(f"notebook {path.name}: parameters must read 'name: type = literal', got {shown(line)}")
        name, type_name = statement.target.id, ast.unparse(statement.annotation)
        if name in found:
            raise ValueError(f"notebook {path.name}: parameter {name} is declared twice")
        if type_name not in PARAMETER_TYPES:
            known = ", ".join(PARAMETER_TYPES)
            raise ValueError(
                f"notebook {path.name}: type of {name} must be one of {known}, got {printable(type_name, 80)}"
            )
        try:
            default = ast.literal_eval(statement.value)
        except (ValueError, TypeError, RecursionError, MemoryError) as error:
            value = printable(ast.get_source_segment(source, statement.value), 80)
            raise ValueError(f"notebook {path.name}: default of {name} must be a literal, got {value}") from error
        if type(default) is not PARAMETER_TYPES[type_name]:
            raise ValueError(f"notebook {path.name}: default of {name} must be {type_name}, got {shown(default)}")
        _refuse_unsound(name, default, f"notebook {path.name}")
        found[name] = Parameter(name, type_name, default, comments.get(statement.end_lineno, ""))
    return found


def _not_python(source: str) -> str:
    try:
        ast.parse(source)
    except SyntaxError as error:
        return f"line {error.lineno or 1} of its parameters is not Python"
    except (ValueError, RecursionError, MemoryError):
        return "its parameters are nested too deep, or hold a sign that is not Python"
    raise AssertionError


def _refuse_unsound(name: str, value: object, where: str) -> None:
    """A value that JSON, a command line or a file cannot hold is refused."""
    todo = [value]
    for each in todo:  # grows while it is read
        if isinstance(each, list | tuple):
            todo += each
        elif isinstance(each, float) and not math.isfinite(each):
            raise ValueError(f"{where}: parameter {name} must be finite, got {each}")
        elif isinstance(each, str) and ("\0" in each or not is_unicode(each)):
            raise ValueError(f"{where}: parameter {name} must be text without NUL and half signs, got {shown(each)}")
        elif not isinstance(each, int | float | str | None):
            raise ValueError(f"{where}: parameter {name} may hold numbers, texts and lists, got {shown(each)}")


def coerce(parameter: Parameter, value: object, where: str) -> object:
    """Read a value by the declared type: text from a shell or YAML becomes a number, never the other way.

    Raises:
        TypeError: if it cannot be read so.
        ValueError: if it is not finite, or a text that no command line can hold.

    >>> coerce(Parameter("rate", "float", 1e-4, ""), "1e-7", "train.ipynb")
    1e-07
    """
    kind = PARAMETER_TYPES[parameter.type_name]
    found = _read_as(kind, value)
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise TypeError(f"{where}: parameter {parameter.name} must be {parameter.type_name}, got {shown(value)}")
    _refuse_unsound(parameter.name, found, where)
    return found


def _read_as(kind: type, value: object) -> object:
    """A value, which a text may spell, as one of this kind; as it stands where it is none."""
    try:
        if isinstance(value, str) and kind in (int, float):
            return kind(value)
        if isinstance(value, str) and kind is bool and value.lower() in (*YES, *NO):
            return value.lower() in YES
        if isinstance(value, str) and kind is list:
            return parse_json(value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
    except (ValueError, OverflowError):
        pass
    return value


def check_parameters(path: str | Path, given: Mapping[str, object]) -> dict[str, object]:
    """The given parameters read by their declared types.

    Raises:
        ValueError: for a name the notebook does not declare; the sentence names the nearest one.
        TypeError: for a value of another type.
    """
    declared, name = declared_parameters(path), Path(path).name
    for key in given:
        if key not in declared:
            raise ValueError(not_known(f"{name} has no parameter {shown(key)}", key, declared))
    return {key: coerce(declared[key], value, name) for key, value in given.items()}


def run_notebook(
    path: str | Path, output: str | Path, parameters: Mapping[str, object] | None = None, *, progress: bool = True
) -> dict[str, float]:
    """Execute a notebook with papermill and return the metrics it wrote.

    Args:
        path: the notebook.
        output: where the executed copy goes; it is kept when a cell fails.
        parameters: values by name. `output_dir` is taken relative to the working directory.
        progress: show papermill's bar.

    Returns:
        The metrics of the `metrics.json` in the notebook's `output_dir`; `run.json` is there too (`dkto.runs.record`).

    Raises:
        FileNotFoundError, ValueError, TypeError: before anything runs, see `check_parameters`.
        ValueError: if `output` is the notebook itself, or another that was not executed.
        BlockingIOError: if another process writes into `output_dir`.
        RuntimeError: if a cell fails or the kernel dies; the sentence names the notebook, the cell and the error.
    """
    path, output = Path(path), Path(output)
    checked = check_parameters(path, parameters or {})
    every = {name: declared.default for name, declared in declared_parameters(path).items()} | checked
    if "output_dir" not in every:
        raise ValueError(f"notebook {path.name} must declare the parameter output_dir; declared: {', '.join(every)}")
    if not isinstance(every["output_dir"], str) or not every["output_dir"].strip():
        raise ValueError(f"output_dir must name the folder of the run, got {shown(every['output_dir'])}")
    _check_output(path, output)
    folder, source = Path(every["output_dir"]), _to_execute(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_dir {folder} is a file: choose another folder")
    with sole_writer(folder, patience=PATIENCE), recorded(folder, path, output, every) as memory:
        result = folder / "metrics.json"
        result.unlink(missing_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, lambda part: part.write_text(source, encoding="utf-8"))
        _execute(path.name, output, checked, progress, memory)
        force_to_disk(output)  # which papermill wrote, before the record says that the run is finished
        if not result.is_file():
            raise RuntimeError(f"{path.name} ran to its end but wrote no metrics.json into {folder}")
        return read_metrics(result)


def _check_output(path: Path, output: Path) -> None:
    """The executed copy takes the place of another executed copy alone, never of a notebook."""
    if not output.exists():
        return
    if output.is_dir():
        raise IsADirectoryError(f"output {output} is a folder: name a file in it")
    if output.is_symlink() and not stays_inside(output, output.parent):
        raise ValueError(f"output {output} is a link that leaves its folder: choose another file")
    if output.samefile(path):
        raise ValueError(f"output {output} is the notebook itself, which would be lost: choose another file")
    try:
        found = json.loads(output.read_text(encoding="utf-8"))
        lost = "cells" in found and "papermill" not in found["metadata"]
    except (ValueError, TypeError, KeyError, RecursionError):  # one that a crash cut
        return
    if lost:
        raise ValueError(f"output {output} is a notebook that was not executed, which would be lost: choose another")


def _to_execute(path: Path) -> str:
    """The text of a notebook as papermill takes it: without outputs, and without what a former execution put in."""
    from dkto.common.quick_nbformat import nbformat  # isort: skip, before papermill
    import papermill

    notebook = read_notebook(path)
    about = {"default_parameters": {}, "parameters": {}, "environment_variables": {}, "version": papermill.__version__}
    notebook["metadata"]["papermill"] = about
    for cell in notebook["cells"]:
        cell["metadata"].pop("papermill", None)
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    try:
        found = nbformat.validator.normalize(nbformat.from_dict(notebook))[1]
        nbformat.validate(found)
        text = nbformat.writes(found)
        text.encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, nbformat.ValidationError) as error:
        raise ValueError(
            f"notebook {path} is no notebook: {printable(str(error).partition(chr(10))[0], 200)}"
        ) from error
    return text


def _execute(name: str, output: Path, parameters: Mapping[str, object], progress: bool, memory: PeakMemory) -> None:
    """Execute the notebook that lies in `output` there."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    from dkto.runs.kernels import AskingKernelManager

    logger = logging.getLogger("papermill")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its notices stay off the terminal
    python = {"kernel_name": "python3", "language": "python", "kernel_manager_class": AskingKernelManager}
    encrypted = Config({"KernelManager": {"transport_encryption": "auto"}})
    path = str(output).replace("{", "{{").replace("}", "}}")  # papermill fills in parameters
    try:
        papermill.execute_notebook(
            path, path, parameters, progress_bar=progress, cwd=os.getcwd(), config=encrypted, **python
        )
    except PapermillExecutionError as error:
        raise RuntimeError(
            f"{name}, cell {error.exec_count}: {error.ename}: {error.evalue} (executed copy: {output})"
        ) from error
    except DeadKernelError as error:
        raise RuntimeError(
            f"{name}: its kernel died, most often for lack of memory (it held {memory.megabytes:.0f} MB "
            f"at its peak); use smaller parameters (executed copy: {output})"
        ) from error
    finally:
        logger.setLevel(level)


def write_metrics(
    output_dir: str | Path, metrics: Mapping[str, float], parameters: Mapping[str, object], seed: int
) -> Path:
    """Write `metrics.json` (metrics, parameters, seed, versions) whole or not at all into the folder of the run.

    Args:
        metrics: flat names such as "win_rate/kto_vs_base/world_redness" to numbers.
        parameters, seed: of the notebook.

    Raises:
        ValueError: if a metric is not a finite number; the sentence names it.
    """
    values = {}
    for name, value in metrics.items():
        number = value.item() if hasattr(value, "item") else value
        if not is_number(number):
            raise ValueError(f"metric {shown(name)} must be a finite number, got {shown(value)}")
        values[name] = number
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"schema_version": 1, "metrics": values, "parameters": dict(parameters)}
    write_json(folder / "metrics.json", {**about, "seed": seed, "versions": versions()})
    return folder / "metrics.json"


def project_path(path: str | Path) -> Path:
    """A path as it is, or below the project or its notebooks where it exists only there.

    JupyterLab starts a kernel in the folder of its notebook, `dkto run` where it was called.
    """
    places = (Path(path), ROOT / path, ROOT / "notebooks" / path)
    return next((place for place in places if place.exists()), places[0])


def environment_table() -> "pd.DataFrame":
    """Versions and devices that a notebook runs on, for its first cell."""
    import pandas as pd
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return pd.DataFrame({"": versions() | {"torch": torch.__version__, "device": device}}).T
