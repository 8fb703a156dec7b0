"""How a command ends: by a mistake, an error of its own, a warning, an interruption."""

import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import psutil
import pytest

from dkto.common.ends import INTERRUPTED, guarded
from dkto.common.names import check_name
from dkto.common.progress import progress


def failing(error):
    raise error


@pytest.mark.parametrize(
    ("call", "code", "said"),
    [
        (lambda: check_name("scorer", "x", ["y"], KeyError), 2, "^dkto: unknown scorer 'x'; known: y\n$"),
        (lambda: {}["metadata"], 1, r"^dkto: internal error, KeyError: 'metadata'; please report it with \S+\.txt\n$"),
        (lambda: len(3), 1, "^dkto: internal error, TypeError: .*; please report it with"),
        (lambda: failing(RecursionError("too deep")), 1, "^dkto: internal error, RecursionError: too deep; please"),
        (lambda: failing(MemoryError()), 2, r"^dkto: not enough memory \(none left\): choose a smaller batch"),
        (lambda: Path("/no/such").read_text(), 2, "^dkto: /no/such: No such file or directory\n$"),
        (
            lambda: failing(OSError(28, "No space left on device", "out/m.json")),
            2,
            "^dkto: out/m.json: No space .*roo",
        ),
        (lambda: failing(KeyboardInterrupt()), 130, f"^dkto: {INTERRUPTED}\n$"),
    ],
)
def test_every_error_is_one_line(call, code, said, capsys):
    assert guarded(call, "dkto", own_process=False) == code
    text = capsys.readouterr().err
    assert re.match(said, text) and text.count("\n") == 1
    if code == 1:
        assert "Traceback" in Path(text.split("with ")[1].strip()).read_text()


def test_neither_an_error_nor_a_warning_is_glued_to_a_bar_or_shows_code(capsys):
    def work():
        for _ in progress(range(3), desc="encoding"):
            sys.stderr.write(warnings.formatwarning("2 images were skipped", UserWarning, "cli.py", 7))
            raise ValueError("no likes")

    assert guarded(work, "dkto", own_process=False) == 2
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert "dkto: 2 images were skipped" in lines and lines[-1] == "dkto: no likes"


SCRIPT = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from dkto.common.ends import guarded
from dkto.common.processes import worker_pool

def nap():
    os.write(1, b"started\\n")  # an interpreter that is interrupted while it starts says so in its own words
    time.sleep(60)

def work():
    with worker_pool(2) as pool:
        subprocess.Popen(["sh", "-c", "trap '' INT TERM; exec sleep 60"])
        waiting = [pool.submit(nap) for _ in range(2)]
        waiting[0].result()

if __name__ == "__main__":
    sys.exit(guarded(work, "dkto"))
"""


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_one_line_and_leaves_no_process(number, tmp_path):
    """Of a process group with workers and a child that does not want to end, as a terminal interrupts it."""
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert [process.stdout.readline() for _ in range(2)] == ["started\n"] * 2
    family = psutil.Process(process.pid).children(recursive=True)
    for each in (*family, psutil.Process(process.pid)):
        each.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (128 + number, f"dkto: {INTERRUPTED}\n")
    _, left = psutil.wait_procs(family, timeout=3)
    assert len(family) >= 3 and not left
