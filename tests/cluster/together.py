"""Recoveries in one group of processes, one after the other: their arguments are in the JSON file that is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from coppice import distributed
from coppice.train import recover


def run(jobs: list[dict[str, Any]]) -> None:
    """Each job's arguments as those of `recover`, paths as text."""
    for job in jobs:
        paths = {key: Path(job[key]) for key in ("parent", "dense", "tokens", "validation", "state", "output")}
        recover(**{**job, **paths, "budgets": tuple(job["budgets"])})


if __name__ == "__main__":
    distributed.join("cpu")
    run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
