"""The demo cut small, as the tests of clusters run it, and what came of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from tests.demo import cut_demo

ROOT = Path(__file__).resolve().parents[2]
TIMES = {"nodes": ["wall_seconds", "peak_memory_bytes"], "curves": ["seconds"]}


def make_study(folder: Path) -> Path:
    """A folder with the study, its profiles and its models."""
    folder.mkdir()
    (folder / "study.yaml").write_text(yaml.safe_dump(cut_demo(), sort_keys=False))
    (folder / "profiles").symlink_to(ROOT / "profiles")
    return folder


def begun_study(finished: Path, folder: Path) -> Path:
    """A copy of a finished study in which no more is done than what runs beside Snakemake: roots and tokens."""
    shutil.copytree(finished, folder, symlinks=True)
    made = results(folder)
    for part in [made / "evaluations", made / "tables", *made.glob("models/*/*/")]:
        shutil.rmtree(part)
    return folder


def results(folder: Path) -> Path:
    return folder / "results" / "demo"


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Every table without what is a time, or was measured by a clock."""
    frames = {path.stem: pd.read_parquet(path) for path in (results(folder) / "tables").glob("*.parquet")}
    frames["costs"] = frames["costs"][frames["costs"].simulated]
    return {name: frame.drop(columns=TIMES.get(name, [])) for name, frame in frames.items()}


def assert_same_results(folder: Path, other: Path) -> None:
    """Two runs ended with the same tables and the same law."""
    found, wanted = tables(folder), tables(other)
    assert found.keys() == wanted.keys() != set()
    for name in wanted:
        pd.testing.assert_frame_equal(found[name], wanted[name], check_exact=True)
    assert found["failures"].empty
    laws = [(results(run) / "laws" / "p2" / "fit.json").read_text() for run in (folder, other)]
    assert laws[0] == laws[1]


def snakemake_command(
    folder: Path, *words: str, environment: Mapping[str, str], targets: Sequence[str] = ("all",)
) -> dict[str, Any]:
    """Arguments of `subprocess` for a run of the folder's study up to its targets."""
    command = [sys.executable, "-m", "snakemake", *targets, "--snakefile", str(ROOT / "Snakefile")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {
        "args": [*command, "--configfile", "study.yaml", *words],
        "cwd": folder,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "env": {**environment, **offline},
    }
