"""pyproject.toml, environment.yml and constraints.txt tell one story, and none of them names an index."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
THE_EIGHT = {"jupyterlab", "torch", "diffusers", "accelerate", "matplotlib", "seaborn", "papermill", "ipywidgets"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
PIP_SECTION = next(entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict))


def by_name(lines):
    """Requirements by their canonical name."""
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return by_name(line for line in lines if line and not line.startswith("#"))


def test_environment_yml_has_the_ranges_of_pyproject():
    ranges = by_name(PROJECT["dependencies"])
    named = by_name(line for line in PIP_SECTION if not line.startswith("-e"))
    assert set(named) == THE_EIGHT
    assert {name: str(named[name].specifier) for name in named} == {name: str(ranges[name].specifier) for name in named}
    assert PIP_SECTION[-1] == "-e .[dev,batch]"


def test_conda_gives_only_python_and_pip():
    assert CONDA["name"] == "dkto"
    assert CONDA["channels"] == ["conda-forge"]
    assert [entry for entry in CONDA["dependencies"] if isinstance(entry, str)] == [
        f"python{PROJECT['requires-python']}",
        "pip",
    ]


def test_every_dependency_is_pinned_exactly_within_its_range():
    pinned = pins()
    for name, wanted in by_name(sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])).items():
        assert name in pinned, f"{name} is in pyproject.toml but not in constraints.txt"
        version = str(pinned[name].specifier).removeprefix("==")
        assert wanted.specifier.contains(version), f"{name}: {version} is outside {wanted.specifier}"


def test_constraints_are_exact_and_name_no_build_or_place():
    for name, pin in pins().items():
        assert re.fullmatch(r"==[^*+,]+", str(pin.specifier)), f"{name} must read name==version, got {pin}"
        assert pin.url is None
    assert "torch" in pins()


@pytest.mark.parametrize("name", ["pyproject.toml", "environment.yml", "constraints.txt", "Makefile"])
def test_no_file_names_a_package_index(name):
    text = (ROOT / name).read_text()
    assert not re.search(r"https?://|file://|index-url|find-links|trusted-host", text)


def test_every_extra_is_known():
    assert set(PROJECT["optional-dependencies"]) == {"batch", "dev", "web"}
    assert "snakemake" in by_name(PROJECT["optional-dependencies"]["batch"])
