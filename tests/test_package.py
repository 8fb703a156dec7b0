"""What the package promises as a whole: light to import, every exported name there, imports that point one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dkto

PACKAGE = Path(dkto.__file__).parent
# each room, from the bottom up; a module may import its own room and those before it
ROOMS = (
    ("expression", "utilities", "records", "progress", "quiet", "votes", "processes", "follow", "yaml12", "kernels"),
    ("losses", "metrics", "sources", "run_record"),
    ("feedback", "config", "online_config", "search_config", "plotting"),
    ("pairs",),
    ("models", "published", "chain"),
    ("prepared", "prepare", "notebooks"),
    ("batches", "engine", "card"),
    ("checkpoints", "rewards", "memory"),
    ("trainer", "generate", "launch", "sweeps", "runs"),
    ("calibrate",),
    ("embedded", "scorers"),
    ("scoring", "prompts", "online"),
    ("evaluate", "monitors", "study", "study_answers", "page"),
    ("systems", "paper_tables"),
    ("search", "report", "batch_engine", "paper_seeds"),
    ("paper_page",),
    ("reference",),
    ("site",),
    ("demo", "paper", "widgets"),
    ("training_commands",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}


def test_importing_dkto_imports_neither_diffusers_nor_transformers():
    code = "import sys, dkto; print([m for m in ('diffusers', 'transformers', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_objective_needs_torch_alone():
    code = "import sys, dkto.losses; print([m for m in ('diffusers', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["dkto.generate", "dkto.engine"])
def test_what_imports_diffusers_first_is_quiet(module):
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("name", dkto.__all__)
def test_every_exported_name_is_there_and_is_no_module(name):
    """Also after the module of a similar name was imported: `from dkto import x` must not give a module."""
    value = getattr(dkto, name)
    assert not isinstance(value, type(sys)), f"{name} is a module"
    assert name in dir(dkto)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="module 'dkto' has no attribute 'kto'"):
        dkto.kto  # noqa: B018


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] == "__init__":
        return
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dkto."):
            imported.add(node.module.split(".")[1])
    upward = {room for room in imported - {parts[0]} if LEVEL[room] > LEVEL[parts[0]]}
    assert not upward, f"{'/'.join(parts)} imports {upward} from above"


def test_modules_can_be_read_in_one_sitting():
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 420}
    assert not long
