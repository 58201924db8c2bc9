"""A study followed while it runs: nodes appear as they are computed, with the losses of recoveries under way.

Nothing but files is read: manifests and metrics as they come, and for a recovery the lines of its job's log; those that
were printed before an interruption are in the state from which it resumes.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from coppice.files import fingerprint
from coppice.records.failure import SILENT
from coppice.records.layout import ResultsLayout
from coppice.records.node_name import NodeName
from coppice.results.collection import partial_rows
from coppice.results.schemas import Row
from coppice.study.schema import Study
from coppice.study.tree import evaluations, nodes
from coppice.tracking import notes
from coppice.tracking.mirror import Mirror, name_parameters, node_mirrors, node_tags
from coppice.tracking.quantities import Metrics

_LINE = re.compile(r"^([\d,]+) of [\d,]+ tokens: (.*)$")
_LOSS = re.compile(r"(train|held-out) loss (\S+?)(?:,|$)")
_SPLITS = {"train": "train_loss", "held-out": "validation_loss"}
DIGITS = 4  # that a log's losses are printed with
STATE = "state.safetensors"


def live_mirrors(study: Study, results: Path) -> list[Mirror]:
    """The runs of a study under way: of nodes that are whole as `study_mirrors` has them, and of those under way."""
    tables = partial_rows(study, results)
    silent = {row["node"] for row in tables["failures"] if row["error"] == SILENT}
    reported = [row for row in tables["failures"] if row["error"] != SILENT]
    failed = {row["node"] for row in reported}
    complete = {row["node"] for row in tables["nodes"]}
    waiting = {node for node in complete if node not in failed and not is_measured(study, results, node)}
    uploaded = frozenset(complete) if study.tracking.weights == "all" else frozenset()
    mirrors = node_mirrors(study, results, {**tables, "failures": reported}, uploaded)
    whole = [mirror for mirror in mirrors if mirror.name not in waiting]
    unmeasured = {mirror.name: mirror for mirror in mirrors if mirror.name in waiting}
    live = [
        _live_mirror(study, results, node, unmeasured.get(node))
        for node in nodes(study)
        if node in waiting or node in silent - complete - failed
    ]
    return whole + live


def is_measured(study: Study, results: Path, node: str) -> bool:
    """Whether all evaluations of a node are complete."""
    layout = ResultsLayout(results)
    return all(layout.metrics(node, name).exists() for name in evaluations(study, node))


class Ending:
    """The end of a study that is followed.

    It is over when all of it is complete, or when its workflow, with failures, has tracked what it achieved; and no
    Snakemake holds the working directory, in which the results lie as results/<study>.
    """

    def __init__(self, results: Path) -> None:
        self.results, self.tracked = results, ResultsLayout(results).tracking
        self.before = self._tracking_time()

    def is_over(self, study: Study) -> bool:
        locks = self.results.parent.parent / ".snakemake" / "locks"
        return not any(locks.glob("*")) and (self._tracking_time() > self.before or self._complete(study))

    def _tracking_time(self) -> int:
        return self.tracked.stat().st_mtime_ns if self.tracked.exists() else 0

    def _complete(self, study: Study) -> bool:
        """Whether all nodes are computed and measured, the laws fitted and the page written."""
        layout = ResultsLayout(self.results)
        manifests = [layout.manifest(node) for node in nodes(study)]
        outputs = [*manifests, *map(layout.fit, study.laws), layout.page]
        return all(map(Path.exists, outputs)) and all(is_measured(study, self.results, node) for node in nodes(study))


def _live_mirror(study: Study, results: Path, node: str, complete: Mirror | None) -> Mirror:
    """The run of a node under way. complete: its run where it only waits to be measured.

    Its parameters follow from the name, and its points have no time of their own, so that several watchers log the
    same.
    """
    return Mirror(
        name=node,
        status="RUNNING",
        fingerprint=fingerprint({"live": node}),
        parameters=name_parameters(node),
        metrics=complete.metrics if complete else live_curve(results, node),
        tags=complete.tags if complete else node_tags(study, node),
        note=notes.live_note(study, node, NodeName(node).parent),
        start=int(time.time() * 1000),
        end=0,
        live=True,
    )


def live_curve(results: Path, node: str) -> Metrics:
    """Losses so far of a recovery under way, with tokens as the step."""
    layout = ResultsLayout(results)
    state, log = layout.state(node) / STATE, layout.log("recover", node)
    rows = _state_rows(state) if state.exists() else []
    points = {(name, row["tokens"]): row[name] for row in rows for name in _SPLITS.values() if row[name] is not None}
    points |= _parse_log(log.read_text(encoding="utf-8", errors="replace")) if log.exists() else {}
    return [(name, round(loss, DIGITS), tokens) for (name, tokens), loss in sorted(points.items())]


def _state_rows(path: Path) -> list[Row]:
    """The curve in the state of an interrupted run: JSON in the header of a safetensors file."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header["__metadata__"]["progress"])["rows"]


def _parse_log(text: str) -> dict[tuple[str, int], float]:
    """(name of the loss, tokens) -> loss, from the lines of a recovery's log."""
    losses = {}
    for line in text.splitlines():
        if row := _LINE.match(line):
            for what, loss in _LOSS.findall(row[2]):
                losses[_SPLITS[what], int(row[1].replace(",", ""))] = float(loss)
    return losses
