"""The study of one small chain that the tests of clusters run, and what came of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[2]
TIMES = {"nodes": ["wall_seconds", "peak_memory_bytes"], "curves": ["seconds"]}


def make_study(folder: Path) -> Path:
    """A folder with a study of the smallest shipped model."""
    folder.mkdir()
    world = {"text": "biographies", "length": 64, "pack": False}
    training = {**world, "validation": "biographies", "validation_windows": 8, "batch_size": 8}
    study = {
        "study": "clustered",
        "models": {"tiny": {"shipped": "bio-tiny"}},
        "texts": {"biographies": {"builtin": "biographies", "people": 1200}},
        "budgets": [1024, 4096],
        "steps": {
            "magnitude-50": {"method": "magnitude", "sparsity": 0.5},
            "rtn-4": {"method": "rtn", "bits": 4, "group_size": 32},
            "full": {"method": "full", **training, "tokens": 4096, "learning_rate": 1e-3},
        },
        "recipes": [["magnitude-50", "full"], ["rtn-4"]],
        "evaluations": {
            "quality": {
                "kind": "quality",
                "perplexity": {"biographies": {**world, "windows": 16}},
                "nodes": ["tiny/rtn-4", "tiny/magnitude-50/full"],
            }
        },
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    (folder / "profiles").symlink_to(ROOT / "profiles")
    return folder


def begun_study(finished: Path, folder: Path) -> Path:
    """A copy of a finished study in which no more is done than what runs beside Snakemake: roots and tokens."""
    shutil.copytree(finished, folder, symlinks=True)
    for part in ("models/tiny/magnitude-50", "models/tiny/rtn-4", "evaluations", "tables", "state"):
        shutil.rmtree(results(folder) / part, ignore_errors=True)
    return folder


def results(folder: Path) -> Path:
    return folder / "results" / "clustered"


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Every table without what is a time."""
    frames = {path.stem: pd.read_parquet(path) for path in (results(folder) / "tables").glob("*.parquet")}
    return {name: frame.drop(columns=TIMES.get(name, [])) for name, frame in frames.items()}


def assert_same_tables(folder: Path, other: Path) -> None:
    found, wanted = tables(folder), tables(other)
    assert found.keys() == wanted.keys() != set()
    for name in wanted:
        pd.testing.assert_frame_equal(found[name], wanted[name], check_exact=True)
    assert found["failures"].empty


def snakemake_command(folder: Path, *words: str, environment: dict[str, str], target: str = "tables") -> dict[str, Any]:
    """Arguments of `subprocess` for a run of the folder's study up to a target."""
    command = [sys.executable, "-m", "snakemake", target, "--snakefile", str(ROOT / "Snakefile")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {
        "args": [*command, "--configfile", "study.yaml", *words],
        "cwd": folder,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "env": {**environment, **offline},
    }
