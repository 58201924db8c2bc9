"""Services that tests start for themselves, on this machine alone."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import mlflow_server


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The address of a PostgreSQL of its own, reached through a socket in its folder alone."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    programs = found[-1].parent
    folder = Path(tempfile.mkdtemp(prefix="coppice-postgresql-"))
    # PostgreSQL refuses to run as root.
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if user:
        shutil.chown(folder, pwd.getpwnam("postgres").pw_uid)
    control = [*user, str(programs / "pg_ctl"), "-D", str(folder / "data"), "-w", "-s"]
    try:
        made = [str(programs / "initdb"), "-D", str(folder / "data"), "-A", "trust", "-U", "coppice", "-E", "UTF8"]
        subprocess.run([*user, *made, "--no-sync"], check=True, capture_output=True, cwd=folder)
        settings = f"-F -k {folder} -c listen_addresses=''"
        subprocess.run([*control, "-l", str(folder / "log"), "-o", settings, "start"], check=True, cwd=folder)
        yield f"postgresql://coppice@/postgres?host={folder}"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], cwd=folder)
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def server(postgresql: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `mlflow server` with PostgreSQL behind it, as a team runs it."""
    folder = tmp_path_factory.mktemp("server")
    with mlflow_server(folder, postgresql, "--artifacts-destination", str(folder / "artifacts")) as address:
        yield address
