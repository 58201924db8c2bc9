"""Outputs of a study that are missing because their job failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from coppice.records.failure import SILENT, Failure
from coppice.records.layout import ResultsLayout
from coppice.study.schema import Study
from coppice.study.tree import Node


class Stage(NamedTuple):
    """output: what a job of the stage writes, by the parts of its name; parts: how many of them follow the node's."""

    output: Callable[[ResultsLayout, tuple[str, ...]], Path]
    parts: int


def _checkpoint(layout: ResultsLayout, name: tuple[str, ...]) -> Path:
    return layout.manifest("/".join(name))


STAGES = {
    "root": Stage(_checkpoint, 0),
    "tokenize": Stage(lambda layout, name: layout.tokens("/".join(name[:-1]), name[-1]), 1),
    "calibrate": Stage(lambda layout, name: layout.statistics("/".join(name[:-2]), *name[-2:]), 2),
    "compress": Stage(_checkpoint, 0),
    "recover": Stage(_checkpoint, 0),
    "evaluate": Stage(lambda layout, name: layout.metrics("/".join(name[:-1]), name[-1]), 1),
}


class FailedJob(NamedTuple):
    """A job that left a log and not its output. node: of a token set, the model."""

    node: str
    stage: str
    log: Path


def failures(layout: ResultsLayout, study: Study, tree: Mapping[str, Node]) -> list[Failure]:
    """The outputs of the study that are missing although a job of theirs left a log.

    The error is the sentence of the log's last line `error: ...`, or `SILENT` where the log ends otherwise.
    """
    rows = [_failure(layout, *job) for job in failed_jobs(layout) if job.node in tree]
    for law in study.laws:
        log = layout.log("fit", law)
        if log.exists() and not layout.fit(law).exists():
            rows.append(_failure(layout, None, "fit", log))
    return rows


def _failure(layout: ResultsLayout, node: str | None, stage: str, log: Path) -> Failure:
    place = log.relative_to(layout.root).as_posix()
    return {"node": node, "stage": stage, "error": final_error(log), "log": place}


def failed_jobs(layout: ResultsLayout) -> Iterator[FailedJob]:
    """Every job that left a log and not its output."""
    for name, stage in STAGES.items():
        logs = layout.logs / name
        for log in sorted(logs.rglob("*.log")):
            parts = log.relative_to(logs).with_suffix("").parts
            if len(parts) > stage.parts and not stage.output(layout, parts).exists():
                yield FailedJob("/".join(parts[: len(parts) - stage.parts]), name, log)


def final_error(log: Path) -> str:
    """The sentence that a log ends with after `error: `, or `SILENT`."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 65536))
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    last = lines[-1].strip() if lines else ""
    return last.removeprefix("error: ") if last.startswith("error: ") else SILENT
