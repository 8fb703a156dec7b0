"""What the package promises as a whole: light to import, every exported name there, imports that point one way."""

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import dkto

PACKAGE = Path(dkto.__file__).parent
# from the bottom up: a file may import its own room and those of the lines before
ROOMS = (
    ("common",),
    ("objective", "world"),
    ("models", "runs"),
    ("data",),
    ("evaluation",),
    ("training", "plotting"),
    ("paper", "widgets"),
    ("web",),
    ("workshop",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
TOY = {"common", "objective", "plotting", "runs", "widgets"}  # what the 2-D laboratory takes of dkto


LIGHT = """
import sys
found = lambda *names: [name for name in names if name in sys.modules]
heavy = ("diffusers", "transformers", "accelerate", "peft")
import dkto
print("dkto", found("torch", *heavy))
import dkto.objective.losses, dkto.objective.methods, dkto.evaluation.metrics
print("objective", found(*heavy))
import toy.experiment
print("toy", found(*heavy))
import dkto.training, dkto.training.step, dkto.training.batches, dkto.training.launch, dkto.evaluation.scoring
print("step", found(*heavy))
import dkto.training.loop
print("loop", found("peft", "diffusers.pipelines.pipeline_utils", "transformers.modeling_utils", "matplotlib"))
"""


@pytest.mark.process
def test_dkto_the_objective_the_toy_and_the_step_import_little():
    """`import dkto` loads not even torch; objective, metrics, 2-D laboratory and step need no image model, and the
    training itself no pipeline."""
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["dkto []", "objective []", "toy []", "step []", "loop []"]


@pytest.mark.process
@pytest.mark.parametrize(
    "module",
    # both go through `dkto.common.quiet`; a second process of ten seconds of imports is for the whole suite
    ["dkto.training.engine", pytest.param("dkto.evaluation.generate", marks=pytest.mark.slow)],
)
def test_what_imports_diffusers_first_is_quiet(module):
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.process
def test_a_notebook_is_opened_without_the_grammar_of_web_addresses():
    """jsonschema builds 38 parsers where it finds `rfc3987_syntax`: 2 s of every run. It stays importable."""
    code = """
import sys
from dkto.common.quick_nbformat import nbformat
print("lark" in sys.modules)
nbformat.validate(nbformat.v4.new_notebook(), relax_add_props=False)
import jsonschema, rfc3987_syntax
print(rfc3987_syntax.is_valid_syntax("iri", "https://example.org/a"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("name", dkto.__all__)
def test_every_exported_name_is_there_and_is_no_module(name):
    """Also after the module of a similar name was imported: `from dkto import x` must not give a module."""
    value = getattr(dkto, name)
    assert not isinstance(value, type(sys)), f"{name} is a module"
    assert name in dir(dkto)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="dkto attribute kto"):
        dkto.kto  # noqa: B018


def rooms_imported(path):
    """The rooms of dkto that a file names in its import statements, at the top and inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dkto":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("dkto.")}
    return found & LEVEL.keys()


@pytest.mark.parametrize("room", LEVEL)
def test_imports_point_one_way(room):
    files = sorted((PACKAGE / room).rglob("*.py")) if (PACKAGE / room).is_dir() else [PACKAGE / f"{room}.py"]
    assert files
    for path in files:
        up = {other for other in rooms_imported(path) - {room} if LEVEL[other] >= LEVEL[room]}
        assert not up, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(up))}, which is not below {room}"


def test_rooms_are_all_there_is_and_few():
    there = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"} - {"__pycache__"}
    assert there == {*LEVEL, "__init__"}
    assert len([path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]) <= 14
    assert len(list(PACKAGE.glob("*.py"))) <= 4


def test_the_laboratory_takes_only_what_it_may():
    taken = set().union(*(rooms_imported(path) for path in (PACKAGE.parent / "toy").glob("*.py")))
    assert taken <= TOY


def test_no_module_defines_a_name_twice():
    """The later one would take the place of the first, also where that is called."""
    twice = []
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "toy").rglob("*.py")]:
        names = [node.name for node in ast.parse(path.read_text()).body if hasattr(node, "name")]
        twice += [f"{path.name}: {name}" for name in set(names) if names.count(name) > 1]
    assert not twice


def test_an_order_does_not_depend_on_the_processor():
    """What ties keeps its order: numpy and pandas sort otherwise as the processor's instructions have it."""
    unstable = []
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "toy").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("argsort", "sort_values", "topk"):
                given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
                if given.get("kind") != "stable" and given.get("stable") is not True:
                    unstable.append(f"{path}:{node.lineno}")
    assert unstable == []


def test_modules_can_be_read_in_one_sitting():
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 480}
    assert not long


def imports_of(notebook):
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            for node in ast.walk(ast.parse("".join(cell["source"]))):
                if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("dkto", "toy"):
                    yield from ((node.module, alias.name) for alias in node.names)


def test_lessons_import_only_what_a_room_offers():
    notebooks = sorted((PACKAGE.parent / "notebooks").rglob("*.ipynb"))
    taken = {
        pair for notebook in notebooks if ".ipynb_checkpoints" not in notebook.parts for pair in imports_of(notebook)
    }
    assert len(notebooks) >= 50 and len(taken) > 100
    doors = {room for room, _ in taken}
    assert all(door in ("dkto", "toy") or door.removeprefix("dkto.") in LEVEL for door in doors), "a module, not a room"
    offered = {door: getattr(import_module(door), "__all__", None) for door in doors}
    missing = {(door, name) for door, name in taken if offered[door] is not None and name not in offered[door]}
    assert not missing, f"not offered: {sorted(missing)}"


@pytest.mark.parametrize("room", [room for room in LEVEL if room not in ("cli", "plotting")])
def test_a_room_says_what_it_is_for_and_offers_what_is_there(room):
    """Every name of its door can be had and is no module, also after the module of a similar name was imported."""
    module = import_module(f"dkto.{room}")
    assert 0 < len(module.__doc__.strip().splitlines()) <= 6
    for name in getattr(module, "__all__", ()):
        assert not isinstance(getattr(module, name), type(sys)), f"{name} is a module"
