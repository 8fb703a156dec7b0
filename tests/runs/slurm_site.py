"""A real Slurm of one node on this machine, in a folder of its own: munged, slurmctld, slurmd, and slurmdbd on MariaDB.

Needs root and Debian's packages, which `install` fetches where apt-get can; nothing of it outlives the `with` block.
"""

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from dkto.common.processes import following

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "slurmdbd", "mariadbd", "mariadb-install-db", "mariadb")
PACKAGES = ("slurm-wlm", "munge", "slurmdbd", "mariadb-server-core", "mariadb-client-core")


def install() -> str:
    """Put the programs in place; says why that is not possible, or nothing."""
    if os.geteuid() != 0:
        return "only root can start slurmd"
    if all(map(shutil.which, PROGRAMS)):
        return ""
    if shutil.which("apt-get") is None:
        return "apt-get is missing, and Slurm too"
    options = {"capture_output": True, "check": False, "text": True, "timeout": 600}
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update"], env=quiet, **options)
    command = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
    done = subprocess.run(command, env=quiet, **options)
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"apt-get could not install {', '.join(missing)}: {done.stderr.strip()[-200:]}" if missing else ""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def slurm_site(accounting: bool) -> Iterator[dict[str, str]]:
    """A site, with job accounting or without; yields the environment in which its commands find it."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        Path(name).chmod(0o755)  # munge's socket is for everybody
        yield from _site(Path(name), accounting)


def _site(folder: Path, accounting: bool) -> Iterator[dict[str, str]]:
    host, (control, node, book) = socket.gethostname(), free_ports(3)
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    # the engine takes SLURM_CONF from its jobs: elsewhere srun finds its file in /etc, which stays as it is here
    srun = f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n'
    auth = f"AuthType=auth/munge\nAuthInfo=socket={folder}/munge.socket\nLogFile={folder}"
    kept = f"accounting_storage/slurmdbd\nAccountingStorageHost=localhost\nAccountingStoragePort={book}"
    kept += f"\nAccountingStoragePass={folder}/munge.socket\nAccountingStorageEnforce=associations"
    (folder / "slurm.conf").write_text(f"""
ClusterName=dkto
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={control}
SlurmdPort={node}
{auth.replace("LogFile", "SlurmctldLogFile")}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
JobAcctGatherType=jobacct_gather/none
AccountingStorageType={kept if accounting else "accounting_storage/none"}
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
    (folder / "slurmdbd.conf").write_text(f"""
DbdHost=localhost
DbdPort={book}
SlurmUser=root
{auth}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
""")
    (folder / "slurmdbd.conf").chmod(0o600)
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    (folder / "bin" / "srun").write_text(srun)
    (folder / "bin" / "srun").chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    places = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munged = ["munged", "--foreground", *(f"--{name}={folder}/munge.{end}" for name, end in places.items())]
    started: list[subprocess.Popen] = []

    def start(name: str, command: list[str], ready: list[str]) -> None:
        whole = following([shutil.which(command[0]), *command[1:]], signal.SIGKILL)  # a killed test leaves none either
        with (folder / f"{name}.out").open("w") as log:
            options = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
            started.append(subprocess.Popen(whole, env=os.environ | environment, **options))
        for _ in range(300):
            if started[-1].poll() is not None:
                break
            if said(ready, environment) is not None:
                return
            time.sleep(0.2)
        raise RuntimeError(f"{name} did not start: {(folder / f'{name}.out').read_text()[-500:]}")

    try:
        start("munged", munged, ["munge", "-n", "-S", str(folder / "munge.socket")])
        if accounting:
            data, sock = folder / "data", folder / "mariadb.sock"
            user = f"--user={getpass.getuser()}"
            install_db = ["mariadb-install-db", "--no-defaults", user, f"--datadir={data}", "--skip-test-db"]
            subprocess.run(install_db, capture_output=True, check=True)
            mariadb = ["mariadbd", "--no-defaults", user, f"--datadir={data}", f"--socket={sock}", "--skip-networking"]
            client = ["mariadb", "--no-defaults", f"--socket={sock}", "-e"]
            start("mariadbd", [*mariadb, f"--pid-file={folder}/mariadb.pid"], [*client, "CREATE DATABASE slurm"])
            environment["MYSQL_UNIX_PORT"] = str(sock)
            start("slurmdbd", ["slurmdbd", "-D"], ["sacctmgr", "-n", "-i", "add", "cluster", "dkto"])
            for entity in (["account", "research"], ["user", "root", "account=research"]):
                subprocess.run(
                    ["sacctmgr", "-n", "-i", "add", *entity], env=os.environ | environment, check=True, text=True
                )
        start("slurmctld", ["slurmctld", "-D", "-f", environment["SLURM_CONF"]], ["scontrol", "ping"])
        start("slurmd", ["slurmd", "-D", "-f", environment["SLURM_CONF"]], ["srun", "-n1", "-t1", "true"])
        yield environment
    finally:
        everything = [child for process in started for child in _family(process.pid)]
        for process in reversed(started):
            process.terminate()
        _, left = psutil.wait_procs(everything, timeout=20)
        for each in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        for process in started:
            process.wait()


def _family(pid: int) -> list[psutil.Process]:
    """A process and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def said(command: list[str], environment: dict[str, str]) -> str | None:
    """What a command prints, or None if it fails."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        options = {"capture_output": True, "text": True, "check": False, "timeout": 10}
        done = subprocess.run(command, env=os.environ | environment, **options)
        return done.stdout if done.returncode == 0 else None
    return None
