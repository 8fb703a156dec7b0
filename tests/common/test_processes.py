"""Locks and parental death, with real processes."""

import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from dkto.common.ends import PARENT_VARIABLE
from dkto.common.processes import graphics_cards, has_writer, sole_writer

HOLD = "import sys, time\nfrom pathlib import Path\nfrom dkto.common.processes import sole_writer\n"
HOLD += "with sole_writer(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"


def start(code, *arguments, **more):
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, **more
    )
    process.line = process.stdout.readline().strip()
    return process


def end(process):
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_folder_has_one_writer_until_its_process_ends_however_it_ends(tmp_path):
    folder = tmp_path / "run"
    assert not has_writer(folder)
    process = start(HOLD, folder)
    assert process.line == "held" and has_writer(folder)
    with (
        pytest.raises(BlockingIOError, match=rf"run is being written by process {process.pid} on \S+: wait for it"),
        sole_writer(folder),
    ):
        pass
    end(process)
    assert not has_writer(folder)
    with sole_writer(folder):
        assert has_writer(folder)
    assert not has_writer(folder)


def test_patience_waits_for_a_writer_that_is_about_to_end(tmp_path):
    process, released = start(HOLD, tmp_path), threading.Event()

    def release():
        released.set()
        process.kill()

    threading.Timer(0.5, release).start()
    with sole_writer(tmp_path, patience=120):
        assert released.is_set(), "the folder was ours while its writer lived"
    end(process)


CARDS = "import sys, time\nfrom pathlib import Path\nfrom dkto.common.processes import graphics_cards\n"
CARDS += "with graphics_cards(int(sys.argv[2]), ['0', '1', 'GPU-ab'], Path(sys.argv[1])) as mine:\n"
CARDS += "    print(','.join(mine), flush=True)\n    time.sleep(float(sys.argv[3]))\n"


def test_two_runs_never_hold_one_card_and_a_killed_one_gives_it_back(tmp_path):
    first, second = start(CARDS, tmp_path, 1, 60), start(CARDS, tmp_path, 1, 60)
    assert [first.line, second.line] == ["0", "1"]
    end(first)
    third = start(CARDS, tmp_path, 2, 0)
    assert third.line == "0,GPU-ab"
    for process in (second, third):
        end(process)


def test_runs_that_want_several_cards_wait_in_turn_and_never_for_each_other(tmp_path):
    first = start(CARDS, tmp_path, 2, 1)
    others = [
        subprocess.Popen([sys.executable, "-c", CARDS, str(tmp_path), "2", "0.2"], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert all(len(process.communicate(timeout=60)[0].strip().split(",")) == 2 for process in others)
    end(first)


def test_more_cards_than_there_are_is_refused(tmp_path):
    sentence = "gpus must be between 0 and 1, the number of cards here, got 2"
    with pytest.raises(ValueError, match=sentence), graphics_cards(2, ["0"], tmp_path):
        pass
    with graphics_cards(0, [], tmp_path) as mine:
        assert mine == []


CHILD = """
import os, subprocess, sys, time
code = "import os, sys; from dkto.common.ends import guarded; import time\\n"
code += "guarded(lambda: (print(os.getpid(), flush=True), time.sleep(60)), 'run')"
environment = os.environ | {"DKTO_PARENT": str(os.getpid())}
launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
child = subprocess.Popen([sys.executable, "-c", launcher, code], env=environment)
time.sleep(60)
"""


def test_a_command_ends_with_whom_it_follows_also_below_a_launcher():
    engine = start(CHILD)
    child = psutil.Process(int(engine.line))
    launcher = child.parent()
    engine.send_signal(signal.SIGKILL)
    _, left = psutil.wait_procs([child], timeout=10)
    assert not left or child.status() == psutil.STATUS_ZOMBIE
    psutil.wait_procs([launcher], timeout=10)
    end(engine)


def test_a_run_whose_engine_has_ended_already_does_not_start():
    code = "from dkto.common.ends import guarded; guarded(lambda: print('started'), 'run')"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    environment = os.environ | {PARENT_VARIABLE: str(gone.pid)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert "which started this, has ended" in done.stderr


POOL = """
import os, time
from dkto.common.processes import worker_pool
if __name__ == "__main__":
    with worker_pool(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the request is Linux's")
def test_the_worker_of_a_pool_ends_with_a_killed_process(tmp_path):
    (tmp_path / "pool.py").write_text(POOL)
    process = subprocess.Popen([sys.executable, str(tmp_path / "pool.py")], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(process.stdout.readline()))
    assert worker.is_running()
    end(process)
    psutil.wait_procs([worker], timeout=20)
    assert not worker.is_running()
