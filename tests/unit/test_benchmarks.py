"""The benchmark that others run on a GPU runs here on tiny models, without the packages that it does not ask for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
ABSENT = ("lm_eval", "mlflow", "snakemake", "datasets", "matplotlib", "peft", "compressed_tensors")

# A module that is None in sys.modules is one that cannot be imported.
RUN = """
import runpy, sys
sys.modules.update(dict.fromkeys({absent!r}))
sys.argv = {argv!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def run(absent: tuple[str, ...], *argv: str) -> subprocess.CompletedProcess[str]:
    code = RUN.format(absent=absent, argv=["gpu_check.py", *argv], script=str(SCRIPT))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_gpu_check_runs_every_stage_and_finds_the_cpu_alike_itself():
    done = run(ABSENT, "--device", "cpu", "--small")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    verdicts = {row[0]: row[-1] for row in rows if row[-1] in ("agrees", "DIFFERS")}
    assert len(verdicts) == 11 and set(verdicts.values()) == {"agrees"}
    speeds = {row[0] for row in rows}
    assert {"forward", "calibrate moments", "compress gptq", "recover full, one step"} <= speeds


def test_gpu_check_names_the_packages_that_are_missing():
    done = run(("pydantic", "pyarrow"), "--device", "cpu", "--small")
    assert done.returncode == 1
    assert done.stderr == "pydantic, pyarrow cannot be imported here; run `pip install pydantic pyarrow`.\n"
