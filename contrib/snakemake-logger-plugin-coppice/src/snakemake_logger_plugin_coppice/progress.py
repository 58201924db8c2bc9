"""How far a run has come, by the events that Snakemake tells of it, and how long it will go on.

Coppice is imported where it is used: Snakemake loads this before the Snakefile, which says which Coppice it is.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

TARGETS = ("all", "total", "checkpoints", "evaluations", "laws")  # what of Snakemake's counts is no job of a stage
NAMES = 3  # running jobs of a stage that are named


class Running:
    """A job under way. weight: what its time is in proportion to, tokens of a recovery, 1 for others."""

    def __init__(self, stage: str, name: str, weight: float, started: float) -> None:
        self.stage, self.name, self.weight, self.started = stage, name, weight, started


class Progress:
    """Counts and times of a run; times are seconds since the epoch, as log records have them.

    totals: jobs by stage; finished: (seconds, weight) of each job that is done, by stage; running, failed: by job id.
    """

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}
        self.finished: dict[str, list[tuple[float, float]]] = {}
        self.running: dict[int, Running] = {}
        self.failed: dict[int, str] = {}
        self.began = 0.0

    def plan(self, counts: dict[str, int], now: float) -> None:
        """Takes Snakemake's numbers of jobs by rule."""
        self.totals = {stage: count for stage, count in counts.items() if stage not in TARGETS}
        self.began = now

    def start(self, job: int, stage: str, name: str, weight: float, now: float) -> None:
        """A job begins, perhaps again."""
        if stage in self.totals:
            self.failed.pop(job, None)
            self.running[job] = Running(stage, name, weight, now)

    def finish(self, job: int, now: float) -> None:
        if ended := self.running.pop(job, None):
            self.finished.setdefault(ended.stage, []).append((now - ended.started, ended.weight))

    def fail(self, job: int) -> None:
        if ended := self.running.pop(job, None):
            self.failed[job] = ended.stage

    def done(self, stage: str | None = None) -> int:
        """Jobs that ended well, of a stage or of all."""
        return sum(len(jobs) for name, jobs in self.finished.items() if stage in (None, name))

    def total(self) -> int:
        return sum(self.totals.values())

    def remaining(self, now: float) -> tuple[float, list[str]]:
        """(seconds until the end, stages that nothing is known of yet), as if jobs went on side by side as they did.

        A job takes what those of its stage took so far, in proportion to their weights.
        """
        left, untimed = 0.0, []
        for stage, total in self.totals.items():
            running = [job for job in self.running.values() if job.stage == stage]
            waiting = total - self.done(stage) - len(running) - sum(name == stage for name in self.failed.values())
            times = self.finished.get(stage)
            if not times:
                untimed += [stage] if waiting or running else []
                continue
            rate = sum(seconds for seconds, _ in times) / sum(weight for _, weight in times)
            usual = median([weight for _, weight in times] + [job.weight for job in running])
            left += waiting * rate * usual
            left += sum(max(0.0, rate * job.weight - (now - job.started)) for job in running)
        busy = sum(seconds for times in self.finished.values() for seconds, _ in times)
        busy += sum(now - job.started for job in self.running.values())
        at_once = max(1.0, busy / max(now - self.began, 1e-9))
        return left / at_once, untimed

    def heading(self, now: float) -> str:
        """All in one sentence."""
        from coppice.formatting import duration

        failed = f", {len(self.failed)} failed" if self.failed else ""
        text = f"{self.done()} of {self.total()} jobs done{failed}, {duration(now - self.began)} so far"
        left, untimed = self.remaining(now)
        besides = f", not counting {', '.join(untimed)}" if untimed else ""
        return f"{text}, about {duration(left)} left{besides}" if left else text

    def line(self, now: float) -> str:
        """The heading, and the stages under way."""
        under_way = dict.fromkeys(job.stage for job in self.running.values())
        stages = ", ".join(f"{stage} {self.done(stage)}/{self.totals[stage]}" for stage in under_way)
        return self.heading(now) + (f" ({stages})" if stages else "")

    def lines(self, now: float, width: int) -> list[str]:
        """A heading, wrapped to a width, and a line a stage: how many are done, which run, for how long."""
        from coppice.formatting import duration, shorten

        wide = max(map(len, self.totals))
        digits = max(len(str(total)) for total in self.totals.values())
        usual = {stage: self.usual(stage) for stage in self.totals}
        column = max(map(len, usual.values()))
        lines = textwrap.wrap(self.heading(now), width, subsequent_indent="  ")
        for stage, total in self.totals.items():
            failed = sum(name == stage for name in self.failed.values())
            running = [job for job in self.running.values() if job.stage == stage]
            names = [f"{shorten(job.name, 40)} ({duration(now - job.started)})" for job in running[:NAMES]]
            names += [f"{len(running) - NAMES} more"] if len(running) > NAMES else []
            names += [f"{failed} failed"] if failed else []
            done = f"{self.done(stage):>{digits}}/{total:<{digits}}"
            lines.append(f"  {stage:<{wide}}  {done}  {usual[stage]:>{column}}  {', '.join(names)}".rstrip())
        return lines

    def usual(self, stage: str) -> str:
        """What a job of a stage took on average."""
        from coppice.formatting import duration

        times = self.finished.get(stage)
        return f"{duration(fmean(seconds for seconds, _ in times))} each" if times else ""


def job_name(logs: Sequence[str], outputs: Sequence[str]) -> str:
    """What a job is about, by its log's path: `medium/rtn-3` of results/demo/logs/compress/medium/rtn-3.log."""
    if logs and "/logs/" in logs[0]:
        return logs[0].rpartition("/logs/")[2].partition("/")[2].removesuffix(".log")
    return outputs[0] if outputs else ""


def job_weight(command: str | None) -> float:
    """The tokens that a recovery's command asks for; 1 for another's."""
    asked = re.search(r'"tokens": (\d+)', command or "")
    return float(asked[1]) if asked else 1.0


def interrupted(logs: Sequence[str]) -> bool:
    """Whether a job ended by Ctrl-C, by the last line of its log."""
    from coppice.results.failures import final_error

    return any(Path(log).is_file() and final_error(Path(log)).startswith("Interrupted;") for log in logs)


def failure_sentence(rule: str, name: str, logs: Sequence[str]) -> str:
    """Why a job failed, by the last line of its log, and where the log is."""
    # Imported where something failed: it takes as long as Snakemake itself.
    from coppice.results.failures import final_error

    logs = [log for log in logs if Path(log).is_file()]
    if not logs:
        return f"FAILED {rule} {name}: it left no log."
    return f"FAILED {rule} {name}: {final_error(Path(logs[0]))} (log: {logs[0]})"
