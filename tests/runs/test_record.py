"""`run.json`: what every run leaves, also when it fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import dkto.runs.record as record_module
from dkto.common.files import write_json
from dkto.common.machine import git_commit
from dkto.runs.record import files_of, recorded, rooms_of, source_hash

DATA = Path(__file__).parents[1] / "files"


def test_a_run_of_a_notebook_leaves_a_record_from_which_it_can_be_made_again(tmp_path):
    told = ["beta=2", "seed=3", f"output_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "dkto.cli", "run", str(DATA / "tiny_train.ipynb")]
    command += [str(tmp_path / "run" / "notebook.ipynb"), "--parameters", *told]
    subprocess.run(command, check=True, capture_output=True)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["error"], record["seed"]) == ("finished", None, 3)
    assert record["parameters"]["beta"] == 2.0 and record["parameters"]["slow_seed"] == -1, "defaults too"
    assert record["git_commit"] == git_commit() and record["versions"]["torch"]
    assert record["source_hash"] == source_hash(DATA / "tiny_train.ipynb")
    assert record["hardware"]["cores"] >= 1 and record["hardware"]["memory_gb"] > 0
    assert record["seconds"] > 0.2 and 10 < record["peak_memory_mb"] < 4000
    assert Path(record["executed"]).is_file() and record["began"].endswith("+00:00")


def test_a_failed_run_says_why_and_one_under_way_says_so(tmp_path):
    notebook = DATA / "tiny_train.ipynb"
    with pytest.raises(ValueError, match="no likes"), recorded(tmp_path, notebook, tmp_path / "n.ipynb", {"seed": 1}):
        assert json.loads((tmp_path / "run.json").read_text())["status"] == "running"
        raise ValueError("no likes")
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["status"], record["error"]) == ("failed", "no likes")


def test_the_record_of_a_training_is_never_replaced(tmp_path):
    write_json(tmp_path / "run.json", {"fingerprint": "ab"})
    sentence = r"holds the run.json of a training: choose another output_dir"
    notebook = DATA / "tiny_train.ipynb"
    with pytest.raises(ValueError, match=sentence), recorded(tmp_path, notebook, tmp_path / "n.ipynb", {}):
        pass
    assert json.loads((tmp_path / "run.json").read_text()) == {"fingerprint": "ab"}


def test_peak_memory_is_that_of_all_processes_below_together():
    code = """
import subprocess, sys, time
from dkto.runs.record import PeakMemory
block = "block = bytearray(100_000_000); import time; time.sleep(60)"
with PeakMemory() as memory:
    processes = [subprocess.Popen([sys.executable, "-c", block]) for _ in range(2)]
    deadline = time.monotonic() + 30
    while memory.megabytes < 195 and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in processes:
        process.kill()
        process.wait()
print(memory.megabytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 195 < float(done.stdout) < 400


def test_a_process_that_ends_between_two_looks_is_not_missed():
    code = """
import subprocess, sys
from dkto.runs.record import PeakMemory
block = "b = bytearray({}); b[::4096] = b'1' * len(b[::4096])"
with PeakMemory() as first:
    subprocess.run([sys.executable, "-c", block.format(200_000_000)])
with PeakMemory() as second:
    subprocess.run([sys.executable, "-c", block.format(1_000_000)])
print(first.megabytes, second.megabytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = map(float, done.stdout.split())
    assert 190 < first < 300 and second < 100, "the second run is not charged with the first one's"


def test_the_source_of_a_notebook_is_its_code_without_imports_prose_and_outputs(tmp_path):
    notebook = json.loads((DATA / "tiny_train.ipynb").read_text())
    before = source_hash(DATA / "tiny_train.ipynb")
    notebook["cells"][1]["outputs"], notebook["cells"][1]["source"] = [], "".join(notebook["cells"][1]["source"])
    notebook["metadata"]["papermill"] = {"duration": 1}
    (tmp_path / "same.ipynb").write_text(json.dumps(notebook))
    assert source_hash(tmp_path / "same.ipynb") == before
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code[0]["source"] = "import json\nfrom os import (\n    path,\n)\n" + "".join(code[0]["source"])
    notebook["cells"].insert(0, {"cell_type": "markdown", "metadata": {}, "source": "Other words."})
    (tmp_path / "prose.ipynb").write_text(json.dumps(notebook))
    assert source_hash(tmp_path / "prose.ipynb") == before
    code[1]["source"] = "1"
    (tmp_path / "other.ipynb").write_text(json.dumps(notebook))
    assert source_hash(tmp_path / "other.ipynb") != before


DOOR = """import lazy_loader
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"one": ["f"], "two": ["g"]})
"""


def test_rooms_are_those_that_a_notebook_reaches_through_their_doors(tmp_path, monkeypatch):
    """Code that is not imported, comments and docstrings do not count; code behind two doors does."""
    modules = {
        "dkto/__init__.py": "",
        "dkto/a/__init__.py": DOOR,
        "dkto/a/one.py": '"""Words."""\nimport os\n\ndef f():\n    from dkto.b.deep import h\n    return h  # so\n',
        "dkto/a/two.py": "g = 1\n",
        "dkto/b/__init__.py": "",
        "dkto/b/deep.py": "from dkto.plot import x\nh = 1\n",
        "dkto/plot.py": "x = 1\n",
        "toy/__init__.py": "",
    }
    for name, text in modules.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    cells = ["%magic", "from dkto.a import f\nimport numpy"]
    cells = [{"cell_type": "code", "source": source} for source in cells]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr(record_module, "ROOT", tmp_path)

    def rooms(name="toy/__init__.py", old="", new=""):
        (tmp_path / name).write_text((tmp_path / name).read_text().replace(old, new))
        return rooms_of(tmp_path / "n.ipynb")

    before = rooms()
    assert list(before) == ["dkto.a", "dkto.b", "dkto.plot"]
    assert rooms("dkto/a/two.py", "1", "2") == before
    assert rooms("dkto/a/one.py", "Words.", "Other\nwords.") == before == rooms("dkto/a/one.py", "# so", "# but")
    after = rooms("dkto/b/deep.py", "h = 1", "h = 2")
    assert after["dkto.b"] != before["dkto.b"] and after | {"dkto.b": before["dkto.b"]} == before


def test_what_a_settings_file_holds_is_part_of_a_record(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text("{}")
    parameters = {"settings_file": str(path), "data_file": "", "seed": 0}
    before = files_of(parameters)
    assert list(before) == ["settings_file"]
    path.write_text("[]")
    assert files_of(parameters) != before


def test_code_that_is_edited_while_this_process_lives_is_seen(tmp_path, monkeypatch):
    from dkto.runs import record

    (tmp_path / "dkto").mkdir()
    module = tmp_path / "dkto" / "one.py"
    module.write_text("ONE = 1\n")
    notebook = tmp_path / "notebook.ipynb"
    notebook.write_text(json.dumps({"cells": [{"cell_type": "code", "source": "from dkto.one import ONE"}]}))
    monkeypatch.setattr(record, "ROOT", tmp_path)
    before = record.rooms_of(notebook)
    module.write_text('"""Only words."""\n\nONE = 1  # the same\n')
    assert record.rooms_of(notebook) == before
    module.write_text("ONE = 2\n")
    assert record.rooms_of(notebook) != before
