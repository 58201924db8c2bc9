"""What a layer method makes is where its linear is, and nothing on the way is elsewhere (see `emulated`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import emulated
import pytest

GRID = {"bits": 4, "group_size": 8}
CASES: dict[str, dict[str, Any]] = {
    "magnitude": {"sparsity": 0.5},
    "wanda": {"pattern": "2:4", "refit": True},
    "sparsegpt": {"sparsity": 0.5, "refit": True},
    "sparsegpt with bits": {"sparsity": 0.5, **GRID},
    "awp": {"sparsity": 0.5, "iterations": 4, "step": "spectral"},
    "awp with bits": {"sparsity": 0.5, "iterations": 4, **GRID},
    "net-trim": {"sparsity": 0.4},
    "obr": {"sparsity": 0.5},
    "obr with bits": {"pattern": "2:4", "form": "gptq", **GRID},
    "svd": {"rank": 3},
    "svd-llm": {"rank": 3},
    "svd-llm by cholesky": {"rank": 3, "whitening": "cholesky"},
    "asvd": {"rank": 3},
    "dobi-svd": {"rank": 3, "learn": False},
    "curing": {"rank": 3, "link": "data"},
    "compactifai": {"bond": 2, "scaling": "absmean"},
    "rtn": GRID,
    "gptq": GRID,
    "gptq by size": {"act_order": True, **GRID},
    "awq": {"duo_scaling": True, **GRID},
    "coordinate-descent": {"sweeps": 1, **GRID},
    "flattenquant": {"bits": "auto", "solver": "gptq"},
    "k-bit": {"bits": 4, "type": "quantile"},
    "learned-rounding": {"steps": 10, **GRID},
    "learned-rounding of floats": {"steps": 10, "bits": 4, "format": "float"},
    "eora": {"rank": 2},
}


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    command = [sys.executable, str(Path(emulated.__file__)), json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_stays_on_the_device_of_its_linear(failures: dict[str, str], case: str) -> None:
    assert failures.get(case) is None
