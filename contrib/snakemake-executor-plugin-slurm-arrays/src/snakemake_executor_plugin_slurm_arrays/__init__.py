"""`executor: slurm-arrays`: Snakemake's executor for Slurm, with arrays whose tasks are jobs of their own.

Jobs of a rule that ask for the same are one array as soon as Snakemake chose them, and each task runs the command that
it would run alone. States are understood as `sacct` and `squeue` tell them. All else, and every option, is that of
snakemake-executor-plugin-slurm; docs/clusters.md says what of its version 2.8.0 is mended. Snakemake finds this package
by its name.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import snakemake_executor_plugin_slurm as slurm
from snakemake_executor_plugin_slurm import ExecutorSettings as ExecutorSettings
from snakemake_executor_plugin_slurm import common_settings as common_settings
from snakemake_executor_plugin_slurm.job_status_query import query_job_status, query_job_status_squeue
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string
from snakemake_executor_plugin_slurm.validation import validate_or_get_slurm_job_id, validate_slurm_extra
from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.jobs import JobExecutorInterface

CLUSTERS = ("cluster", "clusters", "slurm_cluster")  # resources that name one


class Executor(slurm.Executor):
    def __post_init__(self, *words: bool) -> None:
        super().__post_init__(*words)
        slurm.query_job_status = self.query_states  # the plugin has no other place for it

    async def query_states(self, command: str, logger: Any) -> tuple[dict[str, str], float]:
        """The states of jobs, and the seconds that Slurm took to tell them; of an array by task, and in one word.

        By its raw number a task is unknown until it starts, and `sacct` calls a cancelled job `CANCELLED by 1000`.
        Empty when Slurm does not answer: the plugin keeps jobs that are not told, and at None it would forget all jobs.
        """
        states, seconds = await query_job_status(command.replace("JobIdRaw", "JobID"), logger)
        if states is None:
            return {}, 0.0
        if "PREEMPTED" in states.values():
            states |= await self.preempted([job for job, told in states.items() if told == "PREEMPTED"], logger)
        return {job: self.state(told) for job, told in states.items()}, seconds

    async def preempted(self, jobs: list[str], logger: Any) -> dict[str, str]:
        """The states of jobs that gave way to others; CANCELLED when Slurm does not put them back into the queue.

        `sacct` calls all of them PREEMPTED, also while one that goes back is still ending. The controller does not: it
        has that one as COMPLETING, then PENDING. How a job gives way depends on the cluster, its partition and its QOS.
        """
        clusters = " --clusters=all" if self._submitted_job_clusters else ""
        held, _ = await query_job_status(query_job_status_squeue(self.run_uuid) + clusters, logger)
        if held is None:  # asked again with the next states
            return {}
        return {job: held.get(job, "PREEMPTED").replace("PREEMPTED", "CANCELLED") for job in jobs}

    def state(self, told: str) -> str:
        """A state in one word. A job that goes back into the queue from a node that failed has not failed.

        The plugin would leave out that node for good, or, once the job waits, a node `None assigned`, which no job to
        come would get over. Slurm itself leaves out a node that is down.
        """
        word = told.partition(" ")[0]
        return "REQUEUED" if word == "NODE_FAIL" and self.workflow.executor_settings.requeue else word

    def cancel_jobs(self, active_jobs: list[SubmittedJobInfo]) -> None:
        """Hands in no more jobs, and cancels all of this run by its name.

        `active_jobs` lacks those that are just being handed in, and while states are asked for it lacks all.
        """
        self._job_submission_executor.shutdown(wait=True, cancel_futures=True)
        # The plugin puts numbers of jobs behind `scancel`; an option may stand there as well.
        super().cancel_jobs([SubmittedJobInfo(job=None, external_jobid=f"--name={self.run_uuid}")])

    def run_jobs(self, jobs: list[JobExecutorInterface]) -> None:
        """Hands in the jobs that Snakemake chose."""
        for together in self.arrays(jobs):
            if len(together) == 1:
                self._submit_job(together[0])
            else:
                self._submit_array_jobs(together)

    def arrays(self, jobs: Iterable[JobExecutorInterface]) -> list[list[JobExecutorInterface]]:
        """Jobs of a rule of `--slurm-arrays-array-jobs` that ask for the same together, each other one alone."""
        groups: dict[object, list[JobExecutorInterface]] = {}
        for job in jobs:
            chosen = not job.is_group() and not self.array_jobs.isdisjoint((job.name, "all"))
            groups.setdefault(request(job) if chosen else job, []).append(job)
        size = self.max_array_size
        return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]

    def run_array_jobs(self, jobs: list[JobExecutorInterface]) -> None:
        """Hands in jobs that ask for the same as one array; task i is job i."""
        try:
            identifier = self.hand_in(jobs)
        except Exception as error:  # of a thread, where nobody else would hear of it
            for job in jobs:
                self._report_job_error_threadsafe(SubmittedJobInfo(job), f"{error}\n")
            return
        self.logger.info(f"Handed in {len(jobs)} jobs of {jobs[0].name} as tasks of Slurm's array {identifier}.")
        for task, job in enumerate(jobs):
            log = self.log_folder(job) / f"{identifier}_{task}.log"
            submitted = SubmittedJobInfo(job, external_jobid=f"{identifier}_{task}", aux={"slurm_logfile": log})
            self._report_job_submission_threadsafe(submitted)

    def hand_in(self, jobs: list[JobExecutorInterface]) -> str:
        """The number of the array that Slurm made of jobs that ask for the same.

        Raises: WorkflowError in Slurm's words when it refuses them.
        """
        for job in jobs:
            validate_slurm_extra(job)
        first = jobs[0]
        self.log_folder(first).mkdir(parents=True, exist_ok=True)
        parameters = {
            "run_uuid": self.run_uuid,
            "slurm_logfile": self.log_folder(first) / "%A_%a.log",
            "comment_str": f"rule_{first.name}",
            "account": next(self.get_account_arg(first)),
            "partition": self.get_partition_arg(first),
            "workdir": self.workflow.workdir_init,
        }
        settings = self.workflow.executor_settings
        command = get_submit_command(first, parameters, settings=settings, failed_nodes=self._failed_nodes)
        command += f"{set_gres_string(first)} --array=0-{len(jobs) - 1}"
        script = array_script([self.format_job_exec(job) for job in jobs])
        # By a shell, as the plugin hands in single jobs: `slurm_extra` may be written for one.
        done = subprocess.run(command, shell=True, input=script, capture_output=True, text=True, check=False)
        if done.returncode:
            raise WorkflowError(
                "SLURM sbatch failed for an array. "
                f"The error message was '{done.stderr.strip()}'.\n    sbatch call:\n        {command}"
            )
        # Where several clusters may have been asked, jobs are cancelled on all of them.
        self._submitted_job_clusters |= {first.resources.get(name) for name in CLUSTERS} - {None}
        return validate_or_get_slurm_job_id(done.stdout.strip().split(";")[0], done.stdout)

    def log_folder(self, job: JobExecutorInterface) -> Path:
        return self.slurm_logdir / f"rule_{job.name}"


def request(job: JobExecutorInterface) -> tuple:
    """What jobs of one array have in common."""
    return job.name, job.threads, *sorted((name, str(amount)) for name, amount in job.resources.items())


def array_script(commands: list[str]) -> str:
    """A script of which task i runs the command i."""
    cases = [f"{task})\n{command}\n;;" for task, command in enumerate(commands)]
    return "\n".join(["#!/bin/sh", 'case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac", ""])
