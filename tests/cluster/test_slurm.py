"""A study runs to its end on a real Slurm, also when jobs are cancelled and the node is lost."""

from __future__ import annotations

import os
import re
import subprocess
from math import ceil
from pathlib import Path

from coppice.files import read_json
from coppice.needs import memory_bytes
from tests.cluster.daemons import Slurm, wait_until
from tests.cluster.study import assert_same_tables, make_study, results, snakemake_command

# A module that Python imports at its start. Each `coppice` writes down which devices it was given, and holds a lock on
# each as long as it lives; one that finds a device locked, or is given none, says so.
SITECUSTOMIZE = """
import fcntl
import os
import sys
import time
from pathlib import Path

STAGES = {"calibrate", "compress", "recover", "evaluate"}
words = sys.orig_argv
if "GPU_RECORD" in os.environ and words[1:3] == ["-m", "coppice"] and words[3] in STAGES:
    record = Path(os.environ["GPU_RECORD"])
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
    held = []
    for device in devices.split(","):
        lock = open(record / f"device-{device}", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            (record / f"shared-{device}-{os.getpid()}").touch()
        held.append(lock)
    written = record / f"writing-{os.getpid()}"
    written.write_text(devices)
    written.rename(record / f"job-{words[3]}-{os.getpid()}")
    # A job that waits stays as long as the file is there.
    while (record / f"hold-{words[3]}").exists():
        time.sleep(0.1)
    sys.held = held
"""
OVERRIDES = [
    *("--workflow-profile", "profiles/slurm", "--slurm-status-command", "squeue", "--latency-wait", "5"),
    *("--slurm-init-seconds-before-status-checks", "1", "--seconds-between-status-checks", "1"),
    *("--default-resources", "slurm_partition=main", "mem_mb=2000", "runtime=10"),
    *("--set-threads", "compress=1", "recover=1", "evaluate=1"),
]


class Study:
    """A study that runs on Slurm, and what its jobs wrote down."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.folder = folder
        self.record = folder / "record"
        self.record.mkdir()
        (folder / "module").mkdir()
        (folder / "module" / "sitecustomize.py").write_text(SITECUSTOMIZE)
        search = os.pathsep.join(filter(None, [str(folder / "module"), os.environ.get("PYTHONPATH")]))
        self.environment = {**slurm.environment, "GPU_RECORD": str(self.record), "PYTHONPATH": search}

    def start(self) -> None:
        command = snakemake_command(self.folder, *OVERRIDES, environment=self.environment)
        self.log = self.folder / "run.log"
        with self.log.open("w") as printed:
            self.process = subprocess.Popen(**{**command, "stdout": printed})

    def hold(self, stage: str) -> None:
        """Jobs of a stage wait at their start until `release`."""
        (self.record / f"hold-{stage}").touch()

    def release(self, stage: str) -> None:
        (self.record / f"hold-{stage}").unlink()

    def jobs(self, stage: str) -> list[str]:
        """The devices of each job of a stage."""
        return [file.read_text() for file in self.record.glob(f"job-{stage}-*")]

    def wait_for(self, stage: str, count: int) -> None:
        """Until so many jobs of a stage were begun."""

        def begun() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return len(self.jobs(stage)) >= count

        wait_until(begun, 600, f"{count} jobs of {stage} begin")

    def finish(self) -> None:
        assert self.process.wait(timeout=1200) == 0, self.log.read_text()

    def shared_devices(self) -> list[str]:
        return [file.name for file in self.record.glob("shared-*")]


def asked(printed: str, rule: str, resource: str) -> list[int]:
    """What the jobs of a rule asked for, in the order in which Snakemake chose them."""
    found = re.findall(rf"^rule {rule}:\n(?:    .*\n)*?    resources: .*\b{resource}=(\d+)", printed, re.MULTILINE)
    return [int(amount) for amount in found]


def test_a_cancelled_job_and_a_lost_node_end_in_the_tables_of_an_undisturbed_run(
    slurm: Slurm, local_folder: Path, tmp_path: Path
) -> None:
    study = Study(slurm, make_study(tmp_path / "study"))
    study.hold("compress")
    study.hold("recover")
    study.start()

    # Two jobs run at once, on a device each.
    study.wait_for("compress", 2)
    assert sorted(study.jobs("compress")) == ["0", "1"]
    cancelled = slurm.running()[0]
    slurm.ask("scancel", cancelled)
    study.release("compress")

    study.wait_for("recover", 1)
    slurm.lose_node()
    wait_until(lambda: slurm.node_state().startswith("down"), 300, "Slurm misses its node")
    study.release("recover")
    slurm.start_node()
    study.finish()

    assert_same_tables(study.folder, local_folder)
    assert study.shared_devices() == []
    printed = study.log.read_text()
    assert f"SLURM-job '{cancelled}' failed, SLURM status is: 'CANCELLED'" in printed
    # The second attempt asks for more.
    root = read_json(results(study.folder) / "models/tiny/manifest.json")
    needed = ceil(memory_bytes("compress", root) / 1e6)
    assert asked(printed, "compress", "mem_mb") == [needed, needed, 2 * needed]
    assert asked(printed, "compress", "runtime") == [480, 480, 960]
    # Two, the second attempt, and what the node lost of it.
    assert len(study.jobs("compress")) in (3, 4)
    # Slurm itself began the recovery again.
    assert asked(printed, "recover", "gpu") == [1]
    assert len(study.jobs("recover")) == 2
    assert {*study.jobs("recover"), *study.jobs("evaluate")} <= {"0", "1"}
    # Light stages ran beside Snakemake.
    assert all(f"localrule {stage}:" in printed for stage in ("study", "root", "tokenize", "tables"))


def test_an_unknown_partition_is_named(slurm: Slurm, begun_folder: Path) -> None:
    study = Study(slurm, begun_folder)
    words = [word.replace("=main", "=fast") for word in OVERRIDES]
    target = "results/clustered/models/tiny/rtn-4/manifest.json"
    command = snakemake_command(study.folder, *words, "--retries", "0", environment=study.environment, target=target)
    done = subprocess.run(**command, check=False)
    assert done.returncode != 0
    assert "SLURM sbatch failed. The error message was 'sbatch: error: invalid partition specified: fast" in done.stdout
