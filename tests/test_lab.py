"""`make lab` as a user meets it: an address with a token, and nothing that listens to other machines."""

import os
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent


def recipe():
    (line,) = re.findall(r"^lab:.*\n\t(.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    assert line.startswith("$(BIN)/jupyter lab ")
    return shlex.split(line.removeprefix("$(BIN)/jupyter lab "))


def test_make_lab_prints_an_address_with_a_token_and_listens_on_this_machine_only(tmp_path):
    root = ["--allow-root"] if os.name == "posix" and os.geteuid() == 0 else []
    command = [sys.executable, "-m", "jupyterlab", *recipe(), "--port=0", *root]
    environment = os.environ | {"JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTER_RUNTIME_DIR": str(tmp_path)}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        found, deadline = None, time.monotonic() + 90
        while found is None and time.monotonic() < deadline and server.poll() is None:
            found = re.search(r"(http://127\.0\.0\.1:\d+)/lab\?token=(\w{32,})", (tmp_path / "log").read_text())
            time.sleep(0.2)
        assert found, (tmp_path / "log").read_text()[-1000:]
        address, token = found.groups()
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{address}/api/contents", timeout=30)
        with urllib.request.urlopen(f"{address}/api/contents?token={token}", timeout=30) as answer:
            assert b"61_teach_by_likes.ipynb" in answer.read()
        family = [server.pid, *(child.pid for child in psutil.Process(server.pid).children(recursive=True))]
        listening = [c for pid in family for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"]
        assert listening and {connection.laddr.ip for connection in listening} == {"127.0.0.1"}
    finally:
        server.terminate()
        server.wait(30)
