"""Outputs of a study that are missing because their job failed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from coppice.results.schemas import SILENT, Row
from coppice.study.schema import Study
from coppice.study.tree import Node

# What a stage writes for the log logs/<stage>/<path>.log: <folder>/<path>/<file>; and how many parts of <path> follow
# the node's name.
OUTPUTS = {
    "root": ("models", "manifest.json", 0),
    "tokenize": ("tokens", "manifest.json", 1),
    "calibrate": ("statistics", "manifest.json", 2),
    "compress": ("models", "manifest.json", 0),
    "recover": ("models", "manifest.json", 0),
    "evaluate": ("evaluations", "metrics.json", 1),
}


def failures(results: Path, study: Study, tree: Mapping[str, Node]) -> list[Row]:
    """The outputs of the study that are missing although a job of theirs left a log: node, stage, error, log.

    The error is the sentence of the log's last line `error: ...`, or `SILENT` where the log ends otherwise.
    """
    rows = [
        {"node": node, "stage": stage, "error": last_words(log), "log": _relative(log, results)}
        for node, stage, log in without_output(results)
        if node in tree
    ]
    for law in study.laws:
        log = results / "logs" / "fit" / f"{law}.log"
        if log.exists() and not (results / "laws" / law / "fit.json").exists():
            rows.append({"node": None, "stage": "fit", "error": last_words(log), "log": _relative(log, results)})
    return rows


def without_output(results: Path) -> Iterator[tuple[str, str, Path]]:
    """(node, stage, log) of every job that left a log and not its output; of a token set, the model is the node."""
    for stage, (folder, file, parts) in OUTPUTS.items():
        logs = results / "logs" / stage
        for log in sorted(logs.rglob("*.log")):
            path = log.relative_to(logs).with_suffix("")
            if not (results / folder / path / file).exists():
                yield "/".join(path.parts[: len(path.parts) - parts]), stage, log


def last_words(log: Path) -> str:
    """The sentence that a log ends with after `error: `, or `SILENT`."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 65536))
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    last = lines[-1].strip() if lines else ""
    return last.removeprefix("error: ") if last.startswith("error: ") else SILENT


def _relative(path: Path, results: Path) -> str:
    return path.relative_to(results).as_posix()
