"""Jobs on one machine get GPUs of their own; the devices are names, no GPU is used."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from coppice.cli import claim_devices, processes
from coppice.errors import UserError
from coppice.recovery import devices

# Claims what it is told, says what it got and waits to be killed.
CLAIMS = """
import os, pathlib, sys, time
from coppice.recovery import devices
devices.LOCKS = pathlib.Path(sys.argv[1])
devices.claim(int(sys.argv[2]))
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
time.sleep(600)
"""


@pytest.fixture
def claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Starts processes that claim devices among those that are named; their claims end with the test."""
    for name in devices.ALLOCATIONS:
        monkeypatch.delenv(name, raising=False)
    started = []

    def start(among: str, count: int = 1, **variables: str) -> subprocess.Popen:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": among, **variables}
        words = [sys.executable, "-c", CLAIMS, str(tmp_path), str(count)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def got(process: subprocess.Popen) -> list[str]:
    return process.stdout.readline().strip().split(",")


def test_two_jobs_get_distinct_devices_and_a_third_waits_for_one_that_is_killed(claims) -> None:
    first, second = claims("GPU-a,GPU-b"), claims("GPU-a,GPU-b")
    devices_of = {process: got(process) for process in (first, second)}
    assert sorted(devices_of.values()) == [["GPU-a"], ["GPU-b"]]
    third = claims("GPU-a,GPU-b")
    assert third.stdout.readline() == "All 2 GPUs are taken; waiting for 1.\n"
    first.send_signal(signal.SIGKILL)
    assert got(third) == devices_of[first]


def test_a_job_gets_as_many_as_its_step_asks_for(claims) -> None:
    assert got(claims("0,1,2,3", 3)) == ["0", "1", "2"]
    waiting = claims("0,1,2,3", 2)
    assert waiting.stdout.readline() == "All 4 GPUs are taken; waiting for 2.\n"
    # It holds none while it waits for two.
    assert got(claims("0,1,2,3", 1)) == ["3"]


def test_allocations_of_a_scheduler_name_their_devices_themselves(claims) -> None:
    assert got(claims("0,1", SLURM_JOB_ID="7")) == got(claims("0,1", SLURM_JOB_ID="8")) == ["0"]
    assert got(claims("0,1", SLURM_JOB_ID="8")) == ["1"]


def test_a_job_that_sees_one_device_computes_on_it_and_others_see_that(claims, tmp_path: Path) -> None:
    assert got(claims("1")) == got(claims("1")) == ["1"]
    assert got(claims("0,1")) == ["0"]
    third = claims("0,1", XDG_RUNTIME_DIR=str(tmp_path), TMPDIR=str(tmp_path))
    assert third.stdout.readline() == "All 2 GPUs are taken; waiting for 1.\n"


@pytest.mark.parametrize(("among", "allocation"), [("", ""), ("-1", ""), ("0", "7")])
def test_nothing_is_claimed_where_there_is_no_device_or_a_scheduler_gave_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, among: str, allocation: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", among)
    monkeypatch.setenv("SLURM_JOB_ID", allocation)
    monkeypatch.setattr(devices, "LOCKS", tmp_path)
    devices.claim()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == among
    assert not any(tmp_path.iterdir())


def test_locks_in_a_folder_of_another_user_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a folder that all may write to, another one may have made it, with links in it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(devices, "LOCKS", tmp_path)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    (tmp_path / "coppice-12345").mkdir()
    with pytest.raises(
        UserError, match=f"{tmp_path}/coppice-12345 belongs to another user; its owner or an administrator"
    ):
        devices.claim()


def test_too_few_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match=r"requests 2 GPUs \(gpus\), but this job sees 1; set gpus"):
        devices.claim(2)


def test_what_the_workflow_tells_goes_before_what_the_step_says() -> None:
    step = {"options": {"gpus": 2}}
    asked = [argparse.Namespace(stage="recover", step=step, gpus=gpus) for gpus in (0, 4)]
    assert [processes(arguments) for arguments in asked] == [2, 4]
    assert processes(argparse.Namespace(stage="evaluate")) == 1


def test_one_named_device_is_too_few_for_a_step_on_several() -> None:
    arguments = argparse.Namespace(stage="recover", device="cuda:1", step={"options": {"gpus": 2}})
    with pytest.raises(UserError, match="--device cuda:1 is one, but the step requests 2 GPUs; pass auto or cuda"):
        claim_devices(arguments)
