"""Services and folders that the tests of clusters share."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.daemons import PROGRAMS, SEARCHED, Slurm
from tests.cluster.study import begun_study, make_study, snakemake_command


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    missing = [name for name in PROGRAMS if not shutil.which(name, path=SEARCHED)]
    if missing:
        packages = "slurmctld slurmd slurmdbd slurm-client mariadb-server"
        pytest.skip(f"needs a Slurm to start: {', '.join(missing)} is missing (Debian: {packages})")
    if os.geteuid() != 0:
        pytest.skip("starts the daemons of Slurm, which must be done as root")
    # Sockets have short paths, so this is not pytest's folder.
    folder = Path(tempfile.mkdtemp(prefix="coppice-slurm-"))
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def local_folder(forks: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study as this machine makes it without a cluster."""
    folder = make_study(tmp_path_factory.mktemp("local") / "study")
    done = subprocess.run(**snakemake_command(folder, "--cores", "2", environment=os.environ | forks), check=False)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture
def begun_folder(local_folder: Path, tmp_path: Path) -> Path:
    """The study with its root and its tokens, and nothing that a cluster makes."""
    return begun_study(local_folder, tmp_path / "study")
