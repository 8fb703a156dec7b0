"""What every run of a notebook leaves beside its metrics: `run.json`, from which it can be judged and made again."""

import ast
import functools
import hashlib
import json
import resource
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psutil

from dkto.common.files import read_json, write_json
from dkto.common.machine import git_commit, hardware, largest_resident_mb, peak_memory_mb, versions

RECORD_NAME = "run.json"
ROOT = Path(__file__).parents[2]
FIRST_LOOK, LONGEST_WAIT = 0.5, 5.0  # seconds; a look costs some hundredths of a second of a busy machine


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
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_imports(source: str) -> str:
    """The lines of a cell that belong to no import statement; all of it where it is not Python.

    >>> _without_imports("import os\\nfrom a import (\\n    b,\\n)\\n\\nprint(os)")
    'print(os)'
    """
    try:
        statements = ast.parse(source).body
    except SyntaxError:
        return source.strip()
    imports = [each for each in statements if isinstance(each, ast.Import | ast.ImportFrom)]
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
    for source in _code_cells(notebook):
        try:
            todo |= _files_of(_imports(ast.parse(source)))
        except SyntaxError:  # a line for the shell, or with a magic
            continue
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
            node.body = [line for line in body if not _is_text(line)]
    return _digest(ast.dump(tree)), _imports(tree)


def _is_text(statement: ast.stmt) -> bool:
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
    named = {name: Path(value) for name, value in parameters.items() if name.endswith("_file") and value}
    return {name: _digest(path.read_text(encoding="utf-8")) for name, path in named.items() if path.is_file()}


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
    if path.exists() and "notebook" not in read_json(path, "record of a run"):
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
        error = str(caught) or type(caught).__name__
        raise
    finally:
        record |= {"status": "finished" if error is None else "failed", "error": error}
        record |= {"seconds": round(time.monotonic() - began, 2), "peak_memory_mb": round(memory.megabytes, 1)}
        write_json(path, record)
