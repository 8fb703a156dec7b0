"""A command that ends with the process that started it, with real processes that are really killed."""

import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from dkto.common.processes import following

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the request is Linux's")

PARENT = "import subprocess, sys, time\nfrom dkto.common.processes import following\n"
PARENT += "child = subprocess.Popen(following([sys.executable, '-c', 'import time; time.sleep(60)']))\n"
PARENT += "print(child.pid, flush=True)\ntime.sleep(60)\n"


def test_the_child_of_a_killed_process_ends():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running()


def test_the_command_is_run_as_given_with_its_code_and_its_descriptors(tmp_path):
    code = "import os, sys; os.write(int(sys.argv[1]), b'held'); sys.exit(7)"
    with (tmp_path / "out").open("w") as file:
        command = following([sys.executable, "-c", code, str(file.fileno())], signal.SIGKILL)
        assert subprocess.run(command, pass_fds=[file.fileno()], check=False).returncode == 7
    assert (tmp_path / "out").read_text() == "held"


def test_whoever_started_it_and_is_gone_is_not_followed():
    command = following([sys.executable, "-c", "print('ran')"])
    command[command.index(str(os.getpid()))] = "1"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == "" and "process 1, which started this, has ended" in done.stderr


def test_many_threads_that_load_libraries_do_not_hang_it():
    """A notebook's kernel has threads; what runs between fork and exec must not wait for their locks."""
    stop = threading.Event()

    def load():
        import ctypes

        while not stop.is_set():
            ctypes.CDLL(None)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            assert subprocess.run(following([sys.executable, "-I", "-S", "-c", ""]), timeout=60).returncode == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
