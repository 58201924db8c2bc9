"""An MLflow server of its own, on this machine alone: for tests, and for the pictures of docs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Telemetry is off, and so are the server's jobs for generative models, which take seconds to start.
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


@contextmanager
def mlflow_server(folder: Path, database: str, *words: str) -> Iterator[str]:
    """The address of a server of the database, which writes its log into the folder, until the block ends."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database, *words]
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env=os.environ | QUIET, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(address, process, folder / "server.log")
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    """Returns once the server at the address is well; raises RuntimeError with the end of its log where it ended.

    A machine with much to do starts one in minutes.
    """
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=1)
            return
        except OSError:
            time.sleep(0.25)
    raise RuntimeError(f"The tracking server did not start:\n{log.read_text()[-2000:]}")
