"""What the laboratory promises as a whole: what it imports, and modules that can be read in one sitting."""

import ast
from pathlib import Path

import pytest

import toy

PACKAGE = Path(toy.__file__).parent
ALLOWED = ("common.ends", "common.names", "common.processes", "common.settings")
ALLOWED += ("objective", "plotting", "runs", "widgets.base")
# each room, from the bottom up; a module may import its own room and those before it
ROOMS = (
    ("world", "schedule", "network"),
    ("objectives", "sampling"),
    ("training", "measures", "exact"),
    ("experiment",),
    ("verdicts", "plotting"),
    ("playground",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}
MODULES = sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imported_by(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_point_one_way(path):
    for name in imported_by(path):
        top, _, module = name.partition(".")
        assert top not in ("diffusers", "transformers", "accelerate", "peft")
        if top == "dkto":
            assert module.startswith(ALLOWED)
        if top == "toy":
            assert LEVEL[module] <= LEVEL[path.stem], f"{path.stem} imports {module} from above"


def test_modules_can_be_read_in_one_sitting():
    assert not {path.name: n for path in MODULES if (n := len(path.read_text().splitlines())) > 420}
