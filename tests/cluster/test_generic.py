"""The profile for any other scheduler, with its own scripts: jobs in the background of this machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.cluster.daemons import reads, wait_until
from tests.cluster.study import ROOT, results, snakemake_command


def test_jobs_are_handed_in_asked_after_and_done(begun_folder: Path) -> None:
    words = ["--workflow-profile", "profiles/cluster-generic", "--seconds-between-status-checks", "1"]
    target = "results/demo/models/medium/magnitude-50/manifest.json"
    command = snakemake_command(begun_folder, *words, environment=dict(os.environ), targets=[target])
    done = subprocess.run(**command, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("Submitted job") == 1
    assert (results(begun_folder) / "models/medium/magnitude-50/manifest.json").is_file()
    [job] = (begun_folder / ".snakemake/background").iterdir()
    assert (job / "exit").read_text() == "0\n"


def test_a_job_is_running_then_failed_and_a_cancelled_one_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    (tmp_path / "fails.sh").write_text("exit 3\n")
    (tmp_path / "waits.sh").write_text("sleep 300 &\necho $! > begun && mv begun asleep\nwait\n")

    def script(name: str, *words: str) -> str:
        command = [f"profiles/cluster-generic/{name}", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    failing, waiting = (script("submit", "1", "1000", "10", "0", file) for file in ("fails.sh", "waits.sh"))
    wait_until((tmp_path / "asleep").exists, 60, "the job begins")
    assert script("status", waiting) == "running"
    script("cancel", waiting)
    asleep = int((tmp_path / "asleep").read_text())
    # What ended and was not asked after has no command any more.
    wait_until(lambda: reads(asleep, "cmdline") == "", 60, "what the job started ends")
    for job in (failing, waiting):
        while script("status", job) == "running":
            pass
        assert script("status", job) == "failed"
