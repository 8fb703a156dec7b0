import json

import pytest

from dkto.workshop import check_class as module
from dkto.workshop.check_class import check_class, lab, packages, python, room, weights


def test_a_machine_that_is_ready_says_so(capsys):
    assert check_class({"Python": python, "packages": packages, "room": room, "model": weights})
    lines = capsys.readouterr().out.splitlines()
    assert [line[:6] for line in lines[:4]] == ["ok    "] * 4 and lines[4] == "ready for the class"
    assert "drew an image" in lines[3]


@pytest.mark.process
def test_jupyterlab_starts_and_its_kernel_finds_the_default_paths():
    assert "finds what it reads" in lab()


@pytest.mark.slow
@pytest.mark.process
def test_a_lab_that_does_not_start_or_finds_nothing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "DEFAULTS", ("nowhere.json",))
    with pytest.raises(RuntimeError, match=r"expected nowhere.json from a lesson's kernel, got none"):
        lab()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match=r"expected JupyterLab to start within 45 s, its last line is"):
        lab()


def test_every_trouble_is_a_line_and_the_next_check_follows(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(module.sys, "version_info", (3, 10, 2))
    monkeypatch.setattr(module, "LEAST_DISK", 1e9)
    monkeypatch.setattr(module, "requires", lambda name: ["numpy>=2", "no-such-package>=1", "ruff; extra == 'dev'"])
    assert not check_class({"Python": python, "packages": packages, "room": room, "JSON": lambda: json.loads("{")})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "WRONG Python: expected Python 3.11 or newer, got 3.10.2: call make PYTHON=/path/to/python3.11 setup"
    )
    assert lines[1].startswith("WRONG packages: ") and "'no-such-package': call make setup" in lines[1]
    assert lines[2].startswith("WRONG room: expected 1e+09 GB of free disk, got ")
    assert lines[3].startswith("WRONG JSON: ") and lines[4].startswith("not ready: ")
