"""Which jobs become one array of Slurm, and what its tasks run; a real Slurm runs them in tests/cluster."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import snakemake_executor_plugin_slurm_arrays as plugin


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
    command = tmp_path / "sacct"
    answer = "7_0|COMPLETED\\n7_1|CANCELLED by 1000\\n8|RUNNING\\n9|NODE_FAIL\\n"
    command.write_text(f"#!/bin/sh\n[ $1 = --format=JobID,State ] && printf '{answer}'\n")
    command.chmod(0o755)
    executor = object.__new__(plugin.Executor)
    executor.workflow = SimpleNamespace(executor_settings=SimpleNamespace(requeue=requeue))

    def states(columns: str) -> dict[str, str] | None:
        return asyncio.run(executor.query_states(f"{command} --format={columns}", SimpleNamespace(debug=print)))[0]

    lost = "REQUEUED" if requeue else "NODE_FAIL"
    assert states("JobIdRaw,State") == {"7_0": "COMPLETED", "7_1": "CANCELLED", "8": "RUNNING", "9": lost}
    assert states("User") is None
