"""Which jobs become one array of Slurm, what its tasks run, and what Slurm is told; tests/cluster has a real one."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.settings import SharedFSUsage
from studies import small_study, tiny_folder

import snakemake_executor_plugin_slurm_arrays as plugin

ROOT = Path(__file__).resolve().parents[2]


class Job(SimpleNamespace):
    __hash__ = object.__hash__


def job(name: str, *, group: bool = False, threads: int = 4, **resources: int) -> Job:
    return Job(name=name, threads=threads, resources={"mem_mb": 2000, **resources}, is_group=lambda: group)


def grouped(jobs: list[Job], rules: set[str], size: int = 100) -> list[list[int]]:
    """Places of the jobs in each group."""
    executor = SimpleNamespace(array_jobs=rules, max_array_size=size)
    places = {id(each): place for place, each in enumerate(jobs)}
    return [[places[id(each)] for each in together] for together in plugin.Executor.arrays(executor, jobs)]


def test_jobs_of_a_rule_that_ask_for_the_same_are_together() -> None:
    jobs = [job("compress"), job("compress", mem_mb=4000), job("evaluate"), job("compress"), job("compress", threads=8)]
    assert grouped(jobs, {"compress", "evaluate"}) == [[0, 3], [1], [2], [4]]
    assert grouped(jobs, {"all"}) == [[0, 3], [1], [2], [4]]
    assert grouped(jobs, {"recover"}) == [[0], [1], [2], [3], [4]]


def test_groups_of_snakemake_stay_alone_and_arrays_no_larger_than_slurm_allows() -> None:
    assert grouped([job("compress", group=True) for _ in range(2)], {"compress"}) == [[0], [1]]
    assert grouped([job("compress") for _ in range(5)], {"compress"}, size=2) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("task", [0, 1, 2])
def test_a_task_runs_the_command_of_its_job_and_ends_with_its_status(task: int) -> None:
    script = plugin.array_script(["echo 'a;; b' && false", 'cd / && echo "$PWD"', "exit 3"])
    done = subprocess.run(["sh"], input=script, env={"SLURM_ARRAY_TASK_ID": str(task)}, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == [("a;; b\n", 1), ("/\n", 0), ("", 3)][task]


@pytest.mark.parametrize("requeue", [False, True])
def test_states_are_told_by_task_and_in_one_word(requeue: bool, tmp_path: Path) -> None:
    answer = "7_0|COMPLETED\\n7_1|CANCELLED by 1000\\n8|RUNNING\\n9|NODE_FAIL\\n"
    command = program(tmp_path, "sacct", f"[ $1 = --format=JobID,State ] && printf '{answer}'")
    executor = object.__new__(plugin.Executor)
    executor.workflow = SimpleNamespace(executor_settings=SimpleNamespace(requeue=requeue))

    def states(columns: str) -> dict[str, str]:
        return asyncio.run(executor.query_states(f"{command} --format={columns}", logging.getLogger()))[0]

    lost = "REQUEUED" if requeue else "NODE_FAIL"
    assert states("JobIdRaw,State") == {"7_0": "COMPLETED", "7_1": "CANCELLED", "8": "RUNNING", "9": lost}
    assert states("User") == {}


@pytest.mark.parametrize("told_by", ["sacct", "squeue"])
def test_a_preempted_job_is_cancelled_unless_the_controller_puts_it_back_into_the_queue(
    told_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = "1|COMPLETING\\n2|PENDING\\n3_1|PREEMPTED\\n5|RUNNING\\n"
    program(tmp_path, "squeue", f"[ $5 = run ] && printf '{held}'")
    program(tmp_path, "sacct", r"printf '1|PREEMPTED\n2|PREEMPTED\n3_1|PREEMPTED\n4|PREEMPTED\n5|RUNNING\n'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    executor = object.__new__(plugin.Executor)
    executor.workflow = SimpleNamespace(executor_settings=SimpleNamespace(requeue=True))
    executor.run_uuid, executor._submitted_job_clusters = "run", set()
    command = {"sacct": "sacct", "squeue": plugin.query_job_status_squeue("run")}[told_by]

    def states() -> dict[str, str]:
        return asyncio.run(executor.query_states(command, logging.getLogger()))[0]

    queued = {"1": "COMPLETING", "2": "PENDING", "3_1": "CANCELLED", "5": "RUNNING"}
    # One that `squeue` no longer knows ended long ago.
    assert states() == (queued | {"4": "CANCELLED"} if told_by == "sacct" else queued)
    if told_by == "sacct":
        program(tmp_path, "squeue", "exit 1")
        assert set(states().values()) == {"PREEMPTED", "RUNNING"}


def test_jobs_whose_states_slurm_does_not_tell_are_asked_after_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = started(tmp_path, monkeypatch, squeue="exit 1")
    job = SubmittedJobInfo(asking("evaluate"), external_jobid="7", aux={})

    async def still_active() -> list[SubmittedJobInfo]:
        return [kept async for kept in executor.check_active_jobs([job])]

    assert asyncio.run(still_active()) == [job]
    executor.shutdown()


def test_whoever_stops_a_run_leaves_no_job_in_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "said"
    slow = f"sleep 0.1; echo sbatch $3 >> {said}; echo 7"
    executor = started(tmp_path, monkeypatch, sbatch=slow, scancel=f'echo scancel "$@" >> {said}')
    executor.run_jobs([asking("evaluate") for _ in range(8)])
    # As while the states are asked for.
    executor.active_jobs.clear()
    executor.cancel()
    *handed_in, cancelled = said.read_text().splitlines()
    assert set(handed_in) <= {f"sbatch {executor.run_uuid}"}
    assert cancelled == f"scancel --name={executor.run_uuid}"


@pytest.fixture(scope="module")
def recovery(tmp_path_factory: pytest.TempPathFactory, without_messages: Path) -> dict[str, int]:
    """What a recovery on four GPUs asks for, as Snakemake plans it with the profile for Slurm."""
    folder = tmp_path_factory.mktemp("study")
    study = small_study()
    study["steps"]["full-5k"] |= {"gpus": 4, "batch_size": 4, "micro_batch_size": 1}
    tiny_folder(folder)
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    node = "results/small/models/tiny/wanda-50/full-5k/manifest.json"
    command = [sys.executable, "-m", "snakemake", node, "--snakefile", without_messages, "--dry-run"]
    command += ["--configfile", "study.yaml", "--workflow-profile", ROOT / "profiles/slurm"]
    planned = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout
    [resources] = re.findall(r"^rule recover:\n(?:    .*\n)*?    resources: (.*)$", planned, re.MULTILINE)
    return {name: int(amount) for name, amount in re.findall(r"(\w+)=(\d+)\b", resources)}


@pytest.mark.parametrize("count", [1, 2])
def test_the_gpus_of_a_recovery_are_asked_for_on_one_node(
    recovery: dict[str, int], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a job runs is started on one node; with its GPUs on several it would never begin."""
    said = tmp_path / "said"
    executor = started(tmp_path, monkeypatch, sbatch=f'echo "$@" >> {said}; echo 7')
    executor.run_jobs([asking("recover", **recovery) for _ in range(count)])
    executor.shutdown()
    words = said.read_text().split()
    assert {"--gpus=4", "--nodes=1"} <= set(words)
    assert ("--array=0-1" in words) == (count == 2)


def program(folder: Path, name: str, body: str) -> Path:
    """A program of this name that a shell runs."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


class Resources(dict):
    __getattr__ = dict.get


def asking(name: str, **resources: int) -> Job:
    """A job that can be handed in."""
    asked = Resources({"mem_mb": 1000, "runtime": 5, "slurm_partition": "main"} | resources)
    return Job(
        name=name, rule=SimpleNamespace(name=name), jobid=1, threads=4, wildcards=None, resources=asked,
        is_group=lambda: False, register=lambda **_: None,
    )  # fmt: skip


def started(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> plugin.Executor:
    """The executor of a run that has begun, and Slurm's programs; those not given fail."""
    for name in ("sbatch", "scancel", "sacct", "squeue", "scontrol"):
        program(folder, name, programs.get(name, "exit 1"))
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.chdir(folder)
    (folder / ".snakemake").mkdir()
    monkeypatch.setattr(plugin.Executor, "run_job_pre", lambda self, job: None)
    monkeypatch.setattr(plugin.Executor, "format_job_exec", lambda self, job: "true")
    monkeypatch.setattr(plugin.slurm, "query_job_status", None)  # which the executor sets
    settings = plugin.ExecutorSettings(
        array_jobs="recover", logdir=folder / "logs", requeue=True, status_command="squeue",
        keep_successful_logs=True, init_seconds_before_status_checks=1,
    )  # fmt: skip
    remote = SimpleNamespace(
        max_status_checks_per_second=10, jobname="{jobid}", jobscript=None, immediate_submit=False,
        seconds_between_status_checks=1,
    )  # fmt: skip
    workflow = SimpleNamespace(
        dag=None, main_snakefile="Snakefile", workdir_init=folder, executor_settings=settings,
        remote_execution_settings=remote, storage_settings=SimpleNamespace(shared_fs_usage=SharedFSUsage.all()),
        executor_plugin=SimpleNamespace(common_settings=plugin.common_settings),
        scheduler=SimpleNamespace(submit_callback=lambda job: None),
    )  # fmt: skip
    return plugin.Executor(workflow, logging.getLogger())
