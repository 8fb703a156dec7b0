"""What every run of a notebook leaves beside its metrics: `run.json`, from which it can be judged and made again."""

import ast
import functools
import hashlib
import json
import math
import os
import resource
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psutil

from dkto.common.files import Fields, check_fields, file_sha256, read_json, write_json
from dkto.common.json_text import parse_json
from dkto.common.machine import git_commit, hardware, largest_resident_mb, peak_memory_mb, versions
from dkto.common.names import PATH_SHOWN, printable, shown

RECORD_NAME = "run.json"
ROOT = Path(__file__).parents[2]
FIRST_LOOK, LONGEST_WAIT = 0.5, 5.0  # seconds; a look costs some hundredths of a second of a busy machine


STATES = ("running", "finished", "failed")


def read_notebook(path: str | Path) -> dict:
    """A notebook as json has it, checked, each cell with a text and metadata; what an execution put in is left out.

    An executed copy is so its notebook again: the parameters that a former run got are those of that run alone.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no notebook of format 4; the sentence names the file, and the cell.
    """
    path = Path(path)
    if not os.path.isfile(path):  # false too for what can be no name
        raise FileNotFoundError(f"notebook {printable(path, PATH_SHOWN)} does not exist")
    try:
        notebook = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"notebook {path} is no notebook: {error}") from error
    if not (isinstance(notebook, dict) and isinstance(notebook.get("cells"), list)):
        raise ValueError(f"notebook {path} is no notebook: it holds no list of cells")
    notebook = {"nbformat": 4, "nbformat_minor": 5} | notebook
    if notebook["nbformat"] != 4:
        got = shown(notebook["nbformat"])
        raise ValueError(f"notebook {path} must be of format 4, got {got}: open and save it with Jupyter")
    if not isinstance(notebook.setdefault("metadata", {}), dict):
        raise ValueError(
            f"notebook {path} is no notebook: metadata must be an object, got {shown(notebook['metadata'])}"
        )
    for number, cell in enumerate(notebook["cells"], 1):
        _check_cell(cell, f"notebook {path}, cell {number}")
    notebook["cells"] = [cell for cell in notebook["cells"] if INJECTED not in tags_of(cell)]
    notebook["metadata"].pop("papermill", None)
    return notebook


def _check_cell(cell: object, where: str) -> None:
    if not isinstance(cell, dict):
        raise ValueError(f"{where}: expected an object, got {shown(cell)}")
    cell.setdefault("metadata", {})
    cell["source"] = "".join(cell["source"]) if _is_texts(cell.get("source")) else cell.get("source")
    check_fields(cell, CELL, where)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def is_unicode(text: str) -> bool:
    """Whether a text can be written: half a sign that takes two (a lone surrogate) cannot."""
    return not any("\ud800" <= sign <= "\udfff" for sign in text) if not text.isascii() else True


def tags_of(cell: Mapping) -> list[str]:
    """The tags of a cell."""
    return cell["metadata"].get("tags", [])


INJECTED = "injected-parameters"  # papermill's tag of the cell that a run's parameters are in
CELL: Fields = {
    "cell_type": (("code", "markdown", "raw").__contains__, "code, markdown or raw"),
    "source": (lambda value: isinstance(value, str) and is_unicode(value), "text or a list of lines"),
    "metadata": (
        lambda value: isinstance(value, dict) and _is_texts(value.get("tags", [])),
        "an object, its tags texts",
    ),
}


class PeakMemory:
    """The most memory that this process's children held together, looked at often at first, every 5 seconds later.

    The sum of the resident sets of all processes below this one: pages that two of them share count twice. Between
    two looks the system still notes the most that one process held, once it has ended.
    """

    def __init__(self) -> None:
        self.megabytes = 0.0
        self._before = largest_resident_mb(resource.RUSAGE_CHILDREN)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        ended = largest_resident_mb(resource.RUSAGE_CHILDREN)
        # otherwise it is that of an earlier run, or this program's own, which a child shares until it becomes another
        if ended > max(self._before, peak_memory_mb()):
            self.megabytes = max(self.megabytes, ended)

    def _watch(self) -> None:
        me, pause = psutil.Process(), FIRST_LOOK
        while not self._over.wait(pause):
            pause = min(1.2 * pause, LONGEST_WAIT)
            total = 0
            for process in me.children(recursive=True):
                try:
                    total += process.memory_info().rss
                except psutil.Error:  # it has just ended
                    continue
            self.megabytes = max(self.megabytes, total / 2**20)


def source_hash(notebook: str | Path) -> str:
    """Hash of what a notebook computes: its code cells without their imports.

    Prose, outputs, metadata and the place that a name is imported from change no result.
    """
    return _digest(json.dumps([*filter(None, map(_without_imports, _code_cells(notebook)))]))


def _code_cells(notebook: str | Path) -> list[str]:
    return [cell["source"] for cell in read_notebook(notebook)["cells"] if cell["cell_type"] == "code"]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parsed(source: str) -> ast.Module | None:
    """A text as Python; None where it is not, as a line for the shell, or nested too deep."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _without_imports(source: str) -> str:
    """The lines of a cell that belong to no import statement; all of it where it is not Python.

    >>> _without_imports("import os\\nfrom a import (\\n    b,\\n)\\n\\nprint(os)")
    'print(os)'
    """
    if (tree := parsed(source)) is None:
        return source.strip()
    imports = [each for each in tree.body if isinstance(each, ast.Import | ast.ImportFrom)]
    left_out = {number for each in imports for number in range(each.lineno, each.end_lineno + 1)}
    lines = enumerate(source.splitlines(), 1)
    return "\n".join(line.rstrip() for number, line in lines if number not in left_out).strip()


def rooms_of(notebook: str | Path) -> dict[str, str]:
    """The rooms that a notebook imports, each with a hash of the code that it reaches there.

    Imports are followed from module to module and through the lazy doors of the rooms. Comments, docstrings and modules
    that nothing imports do not count. `ast` writes the code, so that another Python may give another hash.

    Returns:
        Hash by room: a sub-package of dkto, a module beside them, or toy.
    """
    todo, modules = set(), {}
    for tree in map(parsed, _code_cells(notebook)):
        todo |= _files_of(_imports(tree)) if tree else set()
    while todo:
        path = todo.pop()
        modules[path], imports = _module(path.read_text(encoding="utf-8"))
        todo |= _files_of(imports) - modules.keys()
    rooms: dict[str, list[str]] = {}
    for path in sorted(modules):
        parts = path.relative_to(ROOT).with_suffix("").parts
        rooms.setdefault("toy" if parts[0] == "toy" else ".".join(parts[:2]), []).append(modules[path])
    return {room: _digest("".join(hashes)) for room, hashes in rooms.items()}


@functools.cache
def _module(source: str) -> tuple[str, frozenset[str]]:
    """Hash of a module's code, and what it imports from dkto and toy."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [line for line in body if not _is_docstring(line)]
    return _digest(ast.dump(tree)), _imports(tree)


def _is_docstring(statement: ast.stmt) -> bool:
    constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return constant and isinstance(statement.value.value, str)


def _imports(tree: ast.AST) -> frozenset[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(name for name in names if name.split(".")[0] in ("dkto", "toy"))


def _files_of(names: Iterable[str]) -> set[Path]:
    return {path for name in names if (path := _file_of(name))}


def _file_of(name: str) -> Path | None:
    """The module of this name, or the one that defines it: a package's lazy door is followed."""
    place = ROOT.joinpath(*name.split("."))
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return path
    package, _, member = name.rpartition(".")
    if not package:
        return None
    door = ROOT.joinpath(*package.split("."), "__init__.py")
    behind = _door(door.read_text(encoding="utf-8")).get(member) if door.is_file() else None
    return _file_of(f"{package}.{behind}.{member}" if behind else package)


@functools.cache
def _door(source: str) -> dict[str, str]:
    """Which sub-module a package offers each name from, see `lazy_loader.attach`."""
    tree = ast.parse(source)
    words = [word for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords]
    doors = [ast.literal_eval(word.value) for word in words if word.arg == "submod_attrs"]
    return {name: module for door in doors for module, names in door.items() for name in names}


def files_of(parameters: Mapping[str, object]) -> dict[str, str]:
    """Hash of the content of each file that a parameter `..._file` names."""
    named = {name: value for name, value in parameters.items() if name.endswith("_file")}
    paths = {name: Path(value) for name, value in named.items() if value and isinstance(value, str)}
    return {name: file_sha256(path)[:16] for name, path in paths.items() if os.path.isfile(path)}


def is_number(value: object) -> bool:
    """Whether a value is a finite number; yes and no are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_plain(value: object, depth: int = 3) -> bool:
    """Whether a value is one that a notebook takes: a number, a text, yes or no, or a list of these."""
    if isinstance(value, list):
        return depth > 0 and all(_is_plain(each, depth - 1) for each in value)
    return value is None or isinstance(value, bool) or _is_text(value) or is_number(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and is_unicode(value)


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(map(is_unicode, value)) and all(map(_is_plain, value.values()))


TEXT, NUMBER = (_is_text, "text"), (is_number, "a finite number")
OR_NULL = (lambda value: value is None or _is_text(value), "text or null")
TABLE = (_is_table, "an object of numbers, texts and lists")
RECORD: Fields = {
    "status": (STATES.__contains__, f"one of {', '.join(STATES)}"),
    "notebook": TEXT,
    "source_hash": TEXT,
    "parameters": TABLE,
}
MAY_HOLD: Fields = {
    "error": OR_NULL,
    "seconds": NUMBER,
    "peak_memory_mb": NUMBER,
    "began": TEXT,
    "git_commit": OR_NULL,
    **dict.fromkeys(("rooms", "files", "versions", "hardware"), TABLE),
}
ENDED: Fields = {"failed": {"error": TEXT}, "finished": {"seconds": NUMBER}, "running": {}}
METRICS: Fields = {
    "metrics": (lambda held: _is_table(held) and all(map(is_number, held.values())), "an object of numbers")
}


def read_record(path: Path) -> dict:
    """The `run.json` of a run of a notebook, checked.

    Raises:
        FileNotFoundError, ValueError: as `dkto.common.files.read_json`, or if a field is not what it should be.
    """
    record = read_json(path, "record of a run")
    check_record(record, path)
    return record


def check_record(record: dict, path: Path) -> None:
    """Refuse what a `run.json` held, if a field is not what it should be."""
    where = f"{path} is no record of a run"
    check_fields(record, RECORD, where)
    check_fields(record, {name: field for name, field in MAY_HOLD.items() if name in record}, where)
    check_fields(record, ENDED[record["status"]], where)


def is_of_notebook(record: dict) -> bool:
    """Whether what a `run.json` held is of a run of a notebook; trainings of version 0.1 left files of that name."""
    return "notebook" in record or "fingerprint" not in record


def read_metrics(path: Path) -> dict[str, float]:
    """The metrics of a run's `metrics.json`, finite numbers by name; errors as those of `read_record`."""
    found = read_json(path, "table of metrics")
    check_fields(found, METRICS, f"{path} is no table of metrics")
    return found["metrics"]


@contextmanager
def recorded(folder: Path, notebook: Path, executed: Path, parameters: Mapping[str, object]) -> Iterator[PeakMemory]:
    """Write `run.json` when a run starts and again when it ends, well or not.

    A record that still says "running" when nothing holds the folder belongs to a run that was killed.

    Args:
        folder: the run's output folder.
        notebook, executed: its source, and where the executed copy goes.
        parameters: all of them, defaults included.

    Raises:
        ValueError: if the folder holds the record of something else, a training, which would be lost.
    """
    path = folder / RECORD_NAME
    if path.exists() and not is_of_notebook(read_json(path, "record of a run")):
        raise ValueError(f"{folder} holds the {RECORD_NAME} of a training: choose another output_dir")
    began = time.monotonic()
    record = {"schema_version": 1, "status": "running", "notebook": str(notebook), "source_hash": source_hash(notebook)}
    record |= {"rooms": rooms_of(notebook), "files": files_of(parameters), "executed": str(executed)}
    record |= {"parameters": dict(parameters), "seed": parameters.get("seed"), "git_commit": git_commit()}
    record |= {"versions": versions(), "hardware": hardware()}
    record["began"] = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(path, record)
    error = None
    try:
        with PeakMemory() as memory:
            yield memory
    except BaseException as caught:
        error = "interrupted" if isinstance(caught, KeyboardInterrupt) else str(caught) or type(caught).__name__
        raise
    finally:
        record |= {"status": "finished" if error is None else "failed", "error": error}
        record |= {"seconds": round(time.monotonic() - began, 2), "peak_memory_mb": round(memory.megabytes, 1)}
        write_json(path, record)
