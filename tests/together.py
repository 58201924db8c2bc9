"""Recoveries in one group of two processes, one after the other: their arguments are in the JSON file that is named.

The processes are forked from this one, which imported what they need.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import coppice.recovery.trainer  # noqa: F401 - for the processes that are forked
from coppice.recovery import distributed
from coppice.recovery.stage import Recovery, recover


def run(jobs: list[dict[str, Any]]) -> None:
    """Each job's fields as those of `Recovery`, paths as text."""
    for job in jobs:
        paths = {key: Path(job[key]) for key in ("parent", "dense", "tokens", "validation", "state", "output")}
        recover(Recovery(**{**job, **paths, "budgets": tuple(job["budgets"])}))


def run_together(jobs: list[dict[str, Any]]) -> None:
    distributed.join("cpu")
    run(jobs)
    distributed.leave()


def launch(jobs: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=2,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            start_method="fork",
            max_restarts=0,
        )
        elastic_launch(config, run_together)(jobs)


def environment() -> dict[str, str]:
    """Of a process that imports the package and the helpers of tests."""
    tests = Path(__file__).resolve().parent
    return {**os.environ, "PYTHONPATH": f"{tests.parent / 'workflow'}{os.pathsep}{tests}", "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    launch(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
