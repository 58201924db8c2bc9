"""The demo cut small runs to its end on a real Slurm, also when a job is cancelled and the node is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cluster.daemons import Slurm, wait_until
from tests.cluster.study import assert_same_results, make_study, results, snakemake_command

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
    *("--workflow-profile", "profiles/slurm", "--latency-wait", "5"),
    *("--slurm-arrays-init-seconds-before-status-checks", "1", "--seconds-between-status-checks", "1"),
    *("--default-resources", "slurm_partition=main", "mem_mb=2000", "runtime=10"),
    *("--set-threads", "calibrate=1", "compress=1", "recover=1", "evaluate=1", "cost=2"),
]
# Four nodes of two models whose jobs ask for the same.
PRUNED = [
    f"results/demo/models/{model}/width-{rate}/manifest.json" for model in ("small", "medium") for rate in (25, 50)
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

    def start(self, *words: str, targets: Sequence[str] = ("all",)) -> None:
        command = snakemake_command(self.folder, *OVERRIDES, *words, environment=self.environment, targets=targets)
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


def asked(printed: str, rule: str) -> dict[str, list[dict[str, int]]]:
    """What the jobs of a rule asked for, by Snakemake's number of the job, attempt by attempt."""
    attempts = defaultdict(list)
    for job, resources in re.findall(
        rf"^rule {rule}:\n(?:    .*\n)*?    jobid: (\d+)\n(?:    .*\n)*?    resources: (.*)$", printed, re.MULTILINE
    ):
        attempts[job].append({name: int(amount) for name, amount in re.findall(r"(\w+)=(\d+)\b", resources)})
    return attempts


def arrays(printed: str, rule: str) -> list[int]:
    """How many tasks each array of a rule had."""
    return [int(count) for count in re.findall(rf"^Handed in (\d+) jobs of {rule} as tasks of", printed, re.MULTILINE)]


def test_a_cancelled_job_and_a_lost_node_end_in_the_results_of_an_undisturbed_run(
    slurm: Slurm, local_folder: Path, tmp_path: Path
) -> None:
    study = Study(slurm, make_study(tmp_path / "study"))
    study.hold("compress")
    study.hold("recover")
    study.start()

    # Two jobs run at once, on a device each.
    study.wait_for("compress", 2)
    cancelled = slurm.running()[0]
    slurm.ask("scancel", cancelled)
    study.release("compress")

    study.wait_for("recover", 1)
    slurm.lose_node()
    wait_until(lambda: slurm.node_state().startswith("down"), 300, "Slurm misses its node")
    lost = len(study.jobs("recover"))
    study.release("recover")
    slurm.start_node()
    study.finish()

    assert_same_results(study.folder, local_folder)
    assert (results(study.folder) / "report" / "index.html").is_file()
    assert study.shared_devices() == []
    used = {device for stage in ("calibrate", "compress", "recover", "evaluate") for device in study.jobs(stage)}
    assert used == {"0", "1"}
    printed = study.log.read_text()
    assert f"SLURM-job '{cancelled}' failed, SLURM status is: 'CANCELLED'" in printed
    assert len(re.findall("^Error in rule", printed, re.MULTILINE)) == 1
    # The second attempt asks for twice as much.
    attempts = asked(printed, "compress")
    [(first, second)] = [each for each in attempts.values() if len(each) > 1]
    assert second["mem_mb"] == 2 * first["mem_mb"]
    assert (first["runtime"], second["runtime"]) == (480, 960)
    assert first["gpu"] == second["gpu"] == 1
    # What the node lost Slurm itself began again.
    recovered = asked(printed, "recover")
    assert all(len(each) == 1 for each in recovered.values())
    assert len(study.jobs("recover")) == len(recovered) + lost
    # Jobs that were ready together were handed in as arrays, and light stages ran beside Snakemake.
    assert arrays(printed, "calibrate") and arrays(printed, "compress")
    assert all(f"localrule {stage}:" in printed for stage in ("study", "root", "tokenize", "tables", "report"))


@pytest.mark.parametrize("told_by", ["sacct", "squeue"])
def test_arrays_hold_what_is_chosen_of_what_is_ready(slurm: Slurm, begun_folder: Path, told_by: str) -> None:
    study = Study(slurm, begun_folder)
    study.start("--jobs", "3", "--slurm-arrays-status-command", told_by, targets=PRUNED)
    study.finish()
    assert all((study.folder / node).is_file() for node in PRUNED)
    assert arrays(study.log.read_text(), "compress") == [3]
    assert len(study.jobs("compress")) == 4


def test_a_job_that_gives_way_to_an_urgent_one_is_begun_again_by_slurm(slurm: Slurm, begun_folder: Path) -> None:
    study = Study(slurm, begun_folder)
    study.hold("compress")
    study.start(targets=PRUNED[:1])
    study.wait_for("compress", 1)
    slurm.ask("sbatch", "--wait", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=true")
    study.wait_for("compress", 2)
    study.release("compress")
    study.finish()
    assert "Error in rule" not in study.log.read_text()
    assert len(study.jobs("compress")) == 2


@pytest.mark.parametrize("told_by", ["sacct", "squeue"])
def test_a_job_that_slurm_cancels_for_an_urgent_one_is_handed_in_again(
    slurm: Slurm, begun_folder: Path, told_by: str
) -> None:
    study = Study(slurm, begun_folder)
    study.hold("compress")
    words = ["--set-resources", "compress:slurm_partition=cancelled", "--slurm-arrays-status-command", told_by]
    study.start(*words, targets=PRUNED[:1])
    study.wait_for("compress", 1)
    slurm.ask("sbatch", "--wait", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=true")
    study.wait_for("compress", 2)
    study.release("compress")
    study.finish()
    assert study.log.read_text().count("failed, SLURM status is: 'CANCELLED'") == 1


def test_ctrl_c_ends_the_jobs_of_an_array(slurm: Slurm, begun_folder: Path) -> None:
    study = Study(slurm, begun_folder)
    study.hold("compress")
    study.start(targets=PRUNED)
    study.wait_for("compress", 2)
    study.process.send_signal(signal.SIGINT)
    assert study.process.wait(timeout=120) != 0
    # Also those that wait in the queue.
    wait_until(lambda: slurm.ask("squeue", "--noheader") == "", 60, "the queue is empty")


def test_a_job_that_took_too_much_memory_is_done_again_with_more(slurm: Slurm, begun_folder: Path) -> None:
    study = Study(slurm, begun_folder)
    # Snakemake and PyTorch together take more than 300 MB.
    study.start("--set-resources", "compress:mem_mb=attempt*300", targets=PRUNED[:1])
    study.finish()
    [attempts] = asked(study.log.read_text(), "compress").values()
    assert [attempt["mem_mb"] for attempt in attempts] in ([300, 600], [300, 600, 900])
    logs = "".join(log.read_text() for log in (study.folder / "results" / "slurm-logs").rglob("*.log"))
    assert "exceeded memory limit" in logs


def test_a_job_whose_time_is_over_is_done_again_with_more(slurm: Slurm, begun_folder: Path) -> None:
    study = Study(slurm, begun_folder)
    study.hold("compress")
    study.start("--set-resources", "compress:runtime=attempt", targets=PRUNED[:1])
    study.wait_for("compress", 2)
    study.release("compress")
    study.finish()
    printed = study.log.read_text()
    assert "SLURM status is: 'TIMEOUT'" in printed
    [attempts] = asked(printed, "compress").values()
    assert [attempt["runtime"] for attempt in attempts] == [1, 2]


def test_an_unknown_partition_is_named(slurm: Slurm, begun_folder: Path) -> None:
    study = Study(slurm, begun_folder)
    words = [*(word.replace("=main", "=fast") for word in OVERRIDES), "--retries", "0"]
    command = snakemake_command(study.folder, *words, environment=study.environment, targets=PRUNED[:2])
    done = subprocess.run(**command, check=False)
    assert done.returncode != 0
    refusal = "The error message was 'sbatch: error: invalid partition specified: fast"
    assert f"SLURM sbatch failed for an array. {refusal}" in done.stdout
