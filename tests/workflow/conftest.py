"""The real Snakefile, run in a folder of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OFFLINE

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("Snakefile", "rules", "workflow", "profiles", "config", "envs", "resources")


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the workflow and its package, whose source files a test may change."""
    folder = tmp_path_factory.mktemp("repository")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copyfile(ROOT / part, folder / part)
    return folder


@pytest.fixture(scope="session")
def snakemake_command(repository: Path) -> Callable[..., dict[str, Any]]:
    """Arguments of `subprocess` that run Snakemake in a folder, on two cores and without a network."""

    def arguments(directory: Path, *words: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(repository / "Snakefile"), "--cores", "2"]
        return {
            "args": [*command, "--directory", str(directory), *words],
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
            "env": {**os.environ, **OFFLINE, **(environment or {})},
        }

    return arguments


@pytest.fixture(scope="session")
def snakemake(snakemake_command: Callable[..., dict[str, Any]]) -> Callable[..., subprocess.CompletedProcess]:
    """Runs Snakemake in a folder to its end; `stdout` holds all that it printed."""

    def run(directory: Path, *words: str, **options: Any) -> subprocess.CompletedProcess:
        return subprocess.run(**snakemake_command(directory, *words, **options), check=False)

    return run
