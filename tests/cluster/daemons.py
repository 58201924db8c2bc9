"""A real Slurm of one node with two GPUs that are none, and its accounting, started and stopped by process ids."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAMS = (
    "munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd", "mariadb-install-db",
    "sbatch", "squeue", "sacct", "scancel",
)  # fmt: skip
SEARCHED = f"{os.environ['PATH']}:/usr/sbin:/sbin"

SLURM = """
ClusterName=coppice
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=2
SlurmdTimeout=20
SchedulerParameters=sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting_port}
AccountingStoragePass={folder}/munge.socket
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
PlugStackConfig=/dev/null
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=12000 Gres=gpu:2
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
PartitionName=cancelled Nodes={host} PreemptMode=CANCEL MaxTime=INFINITE State=UP
PartitionName=urgent Nodes={host} PriorityTier=10 MaxTime=INFINITE State=UP
"""

ACCOUNTING = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={accounting_port}
SlurmUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm
"""


class Slurm:
    """The daemons of a cluster of one node, in a folder of their own; `environment` is what reaches them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{folder / 'bin'}{os.pathsep}{SEARCHED}",
        }
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        host = socket.gethostname().partition(".")[0]
        names = ("controller_port", "node_port", "accounting_port", "database_port")
        facts = {**dict(zip(names, free_ports(len(names)), strict=True)), "folder": self.folder, "host": host}
        (self.folder / "slurm.conf").write_text(SLURM.format(**facts))
        (self.folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File=/dev/null,/dev/zero\n")
        # Snakemake's plugin takes SLURM_CONF away from the `srun` of its jobs, and /etc is not ours to write to.
        command = self.folder / "bin" / "srun"
        command.parent.mkdir()
        program = shutil.which("srun", path=SEARCHED)
        command.write_text(f'#!/bin/sh\nSLURM_CONF={self.environment["SLURM_CONF"]} exec {program} "$@"\n')
        command.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {name: self.folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
        self.run_daemon(
            *("munged", "--foreground", "--force", f"--socket={files['socket']}", f"--key-file={key}"),
            *(f"--pid-file={files['pid']}", f"--log-file={files['log']}", f"--seed-file={files['seed']}"),
        )
        wait_until(files["socket"].exists, 10, "munged opens its socket")
        self.start_accounting(facts)
        self.run_daemon("slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        self.start_node()
        wait_until(lambda: self.node_state() == "idle", 60, "the node is idle")

    def start_accounting(self, facts: dict[str, Any]) -> None:
        """MariaDB with an empty database, and the daemon that writes into it what becomes of jobs."""
        data, password = self.folder / "database", secrets.token_hex(16)
        # It runs as root: its own root is nobody but the system's, through the socket.
        rights = ["--auth-root-authentication-method=socket", "--auth-root-socket-user=root"]
        make = ["mariadb-install-db", "--user=root", f"--datadir={data}", "--skip-test-db", *rights]
        subprocess.run(make, env=self.environment, check=True, stdout=subprocess.DEVNULL)
        first = self.folder / "first.sql"
        first.touch(0o600)
        first.write_text(
            f"CREATE DATABASE slurm;\nGRANT ALL ON slurm.* TO 'slurm'@'127.0.0.1' IDENTIFIED BY '{password}';\n"
        )
        self.run_daemon(
            *("mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", f"--init-file={first}"),
            *("--bind-address=127.0.0.1", f"--port={facts['database_port']}", "--skip-name-resolve"),
            *(f"--socket={self.folder / 'database.socket'}", f"--pid-file={self.folder / 'database.pid'}"),
        )
        wait_until(lambda: answers(facts["database_port"]), 60, "the database answers")
        settings = self.folder / "slurmdbd.conf"
        settings.touch(0o600)
        settings.write_text(ACCOUNTING.format(**facts, password=password))
        self.run_daemon("slurmdbd", "-D")
        wait_until(lambda: answers(facts["accounting_port"]), 60, "the accounting answers")
        self.ask("sacctmgr", "--immediate", "add", "cluster", "coppice")

    def run_daemon(self, program: str, *words: str) -> None:
        path = shutil.which(program, path=SEARCHED)
        log = (self.folder / f"{program}.out").open("ab")
        self.daemons[program] = subprocess.Popen(
            [path, *words], env=self.environment, stdout=log, stderr=log, start_new_session=True
        )

    def start_node(self) -> None:
        self.run_daemon("slurmd", "-D", "-f", self.environment["SLURM_CONF"])

    def lose_node(self) -> None:
        """The node's daemon and all that it runs end at once, as when the power fails."""
        daemon = self.daemons.pop("slurmd")
        started = [pid for step in self.step_daemons() for pid in (step, *descendants(step))]
        daemon.kill()
        daemon.wait()
        for pid in started:
            kill(pid)

    def node_state(self) -> str:
        return self.ask("sinfo", "--noheader", "--format=%t")

    def step_daemons(self) -> list[int]:
        """The processes that hold this cluster's jobs; they outlive slurmd."""
        return [pid for pid in processes() if reads(pid, "comm").strip() == "slurmstepd" and self.owns(pid)]

    def owns(self, pid: int) -> bool:
        return f"SLURM_CONF={self.environment['SLURM_CONF']}" in reads(pid, "environ").split("\0")

    def ask(self, *words: str) -> str:
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False).stdout.strip()

    def running(self) -> list[str]:
        """Numbers of the running jobs."""
        return self.ask("squeue", "--noheader", "--states=RUNNING", "--format=%i").split()

    def stop(self) -> None:
        self.ask("scancel", "--state=RUNNING", "--state=PENDING", "--user=root")
        if "slurmd" in self.daemons:
            self.lose_node()
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def reads(pid: int, file: str) -> str:
    """A file of a process; empty when the process is gone."""
    try:
        return (Path("/proc") / str(pid) / file).read_text(errors="replace")
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    children = [other for other in processes() if reads(other, "stat").rpartition(")")[2].split()[1:2] == [str(pid)]]
    return [found for child in children for found in (child, *descendants(child))]


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def answers(port: int) -> bool:
    """Whether somebody listens at a port of this machine."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def wait_until(condition: Callable[[], Any], seconds: float, awaited: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{awaited}: not within {seconds} seconds"
        time.sleep(0.2)
