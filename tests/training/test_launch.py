"""Trainings end with the notebook that started them, however it ends."""

import signal
import subprocess
import sys
import time
from dataclasses import replace

import nbformat
import psutil
import pytest

from dkto.objective.utilities import define_utility
from dkto.training.launch import config_arguments
from dkto.training.loop import train
from dkto.training.run_folder import RunFolder


def living(folder):
    """Processes that name the run's folder on their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and str(folder) in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


def wait(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


NOTEBOOK = """
from dkto.training.config import TrainConfig
from dkto.training.launch import run_trainings

run_trainings([TrainConfig({arguments})], ranks=2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's request to end with the parent is Linux' own")
def test_a_killed_papermill_leaves_no_orphan(config, tmp_path):
    """SIGKILL to papermill while its kernel trains with two ranks under torchrun: nothing of it is left."""
    arguments = ", ".join(
        f"{name}={value!r}" for name, value in (config.to_dict() | {"max_train_steps": 100_000}).items()
    )
    cells = [nbformat.v4.new_code_cell(NOTEBOOK.format(arguments=arguments))]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(notebook, tmp_path / "in.ipynb")
    command = [sys.executable, "-m", "papermill", str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb")]
    papermill = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records = config.output_dir / "metrics.jsonl"
    try:
        assert wait(lambda: records.exists() and len(living(config.output_dir)) >= 3, 240), "torchrun and its two ranks"
        children = psutil.Process(papermill.pid).children(recursive=True)
        papermill.send_signal(signal.SIGKILL)
        papermill.wait()
        assert wait(lambda: not living(config.output_dir), 20), living(config.output_dir)
        assert wait(lambda: not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children), 60)
    finally:
        papermill.kill()
        for process in living(config.output_dir):
            process.kill()


def test_arguments_say_the_whole_configuration(config):
    import tyro

    assert tyro.cli(type(config), args=config_arguments(config)) == config


def test_a_utility_defined_as_text_is_one_configuration_here_and_there(config):
    define_utility("steep_here", "tanh(3 * x)")
    named, told = replace(config, utility="steep_here"), replace(config, utility="steep_here = tanh(3 * x)")
    assert config_arguments(named) == config_arguments(told)
    list(train(replace(told, max_train_steps=1)))
    assert RunFolder(replace(named, max_train_steps=1)).is_finished()
