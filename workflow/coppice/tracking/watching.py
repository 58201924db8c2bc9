"""A study followed while it runs: nodes appear as they are made, with the losses of recoveries under way.

Nothing but files is read: manifests and metrics as they come, and for a recovery the lines of its job's log; those that
were printed before an interruption stand in the state from which it goes on.
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
    made = {row["node"] for row in tables["nodes"]}
    waiting = {node for node in made if node not in failed and not is_measured(study, results, node)}
    uploaded = frozenset(made) if study.tracking.weights == "all" else frozenset()
    mirrors = node_mirrors(study, results, {**tables, "failures": reported}, uploaded)
    whole = [mirror for mirror in mirrors if mirror.name not in waiting]
    shown = {mirror.name: mirror for mirror in mirrors if mirror.name in waiting}
    live = [
        _live_mirror(study, results, node, shown.get(node))
        for node in nodes(study)
        if node in waiting or node in silent - made - failed
    ]
    return whole + live


def is_measured(study: Study, results: Path, node: str) -> bool:
    """Whether all evaluations of a node are there."""
    layout = ResultsLayout(results)
    return all(layout.metrics(node, name).exists() for name in evaluations(study, node))


class Ending:
    """When a study that is followed has come to its end.

    It has when all of it is there, or when its workflow, with failures, has tracked what it achieved; and no Snakemake
    holds the working directory, in which the results lie as results/<study>.
    """

    def __init__(self, results: Path) -> None:
        self.results, self.tracked = results, ResultsLayout(results).tracking
        self.before = self._tracked_at()

    def reached(self, study: Study) -> bool:
        locks = self.results.parent.parent / ".snakemake" / "locks"
        return not any(locks.glob("*")) and (self._tracked_at() > self.before or self._complete(study))

    def _tracked_at(self) -> int:
        return self.tracked.stat().st_mtime_ns if self.tracked.exists() else 0

    def _complete(self, study: Study) -> bool:
        """Whether all nodes are made and measured, the laws fitted and the page written."""
        layout = ResultsLayout(self.results)
        manifests = [layout.manifest(node) for node in nodes(study)]
        outputs = [*manifests, *map(layout.fit, study.laws), layout.page]
        return all(map(Path.exists, outputs)) and all(is_measured(study, self.results, node) for node in nodes(study))


def _live_mirror(study: Study, results: Path, node: str, made: Mirror | None) -> Mirror:
    """The run of a node under way. made: what is known of it when it waits to be measured.

    Its parameters are those that the name tells, and its points bear no time of their own: several that watch log the
    same.
    """
    return Mirror(
        name=node,
        status="RUNNING",
        fingerprint=fingerprint({"live": node}),
        parameters=name_parameters(node),
        metrics=made.metrics if made else live_curve(results, node),
        tags=made.tags if made else node_tags(study, node),
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
    points |= _printed(log.read_text(encoding="utf-8", errors="replace")) if log.exists() else {}
    return [(name, round(loss, DIGITS), tokens) for (name, tokens), loss in sorted(points.items())]


def _state_rows(path: Path) -> list[Row]:
    """The curve in the state of an interrupted run: JSON in the header of a safetensors file."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header["__metadata__"]["progress"])["rows"]


def _printed(text: str) -> dict[tuple[str, int], float]:
    """(name of the loss, tokens) -> loss, from the lines of a recovery's log."""
    found = {}
    for line in text.splitlines():
        if row := _LINE.match(line):
            for what, loss in _LOSS.findall(row[2]):
                found[_SPLITS[what], int(row[1].replace(",", ""))] = float(loss)
    return found
