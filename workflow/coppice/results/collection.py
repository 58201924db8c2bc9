"""Every node's records as typed Parquet: nodes, metrics, items, curves, costs, comparisons, signals, failures.

Each column carries its unit and its meaning in the schema's metadata; `docs/formats.md` prints them. Rows are sorted
and nothing of the time of writing is stored, so that the same results give the same bytes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial as partial_of
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from coppice import storage
from coppice.errors import UserError
from coppice.files import atomic_write
from coppice.records.failure import Failure
from coppice.records.layout import ResultsLayout
from coppice.records.node_name import NodeName
from coppice.results.comparisons import compare, signals
from coppice.results.failures import failures
from coppice.results.measurements import evaluation_rows, item_rows, manifest_costs, roofline_rows
from coppice.results.nodes import add_relations, checkpoint_row, curve_rows
from coppice.results.reading import build_table
from coppice.results.schemas import SCHEMAS, Row
from coppice.study.loading import load_study
from coppice.study.schema import Study
from coppice.study.schema.evaluations import protocols
from coppice.study.tree import evaluations, nodes

T = TypeVar("T")


def write_tables(study: Study, results: Path, output: Path, partial: bool = False) -> dict[str, pa.Table]:
    """Writes one Parquet file per table, each whole or not at all, and returns the tables.

    `partial`: results that are missing are left out, damaged ones become failures, and the files are dated 1970, so
    that whoever compares dates takes them for outdated. Otherwise raises UserError, naming the file, at the first such
    result.
    """
    rows = collect(study, Path(results), partial)
    tables = {name: build_table(rows[name], schema) for name, schema in SCHEMAS.items()}
    for name, table in tables.items():
        with atomic_write(Path(output) / f"{name}.parquet") as temporary:
            pq.write_table(table, temporary, compression="zstd")
            if partial:
                os.utime(temporary, (0, 0))
    return tables


def partial_rows(study: Study, results: Path) -> dict[str, list[Row]]:
    """The rows of the partial tables, but for items and what follows from them; nothing is written."""
    rows = collect(study, Path(results), partial=True, itemized=False)
    names = ("nodes", "metrics", "curves", "costs", "failures")
    return {name: build_table(rows[name], SCHEMAS[name]).to_pylist() for name in names}


class _Reader:
    """Reads results. partial: those that are missing are left out, and damaged ones become failures."""

    def __init__(self, layout: ResultsLayout, partial: bool) -> None:
        self.layout, self.partial = layout, partial
        self.failures: list[Failure] = []

    def read(self, node: str, path: Path, reader: Callable[[Path], T], manifest: str = "manifest.json") -> Iterator[T]:
        """What the reader makes of a file; nothing where the file is left out. manifest: the record that names it."""
        try:
            if not self.partial or storage.ensure_local(path, manifest).exists():
                yield reader(storage.ensure_local(path, manifest))
        except UserError as error:
            if not self.partial:
                raise
            self.refuse(node, path, str(error))

    def refuse(self, node: str, path: Path, error: str) -> None:
        log = path.relative_to(self.layout.root).as_posix()
        self.failures.append({"node": node, "stage": "tables", "error": error, "log": log})

    def refused_ancestor(self, node: str) -> str | None:
        """The node on the path to this one that was refused."""
        names = (failure["node"] for failure in self.failures)
        return next((name for name in names if name is not None and NodeName(node).is_below(name)), None)


def collect(study: Study, results: Path, partial: bool = False, itemized: bool = True) -> dict[str, list[Any]]:
    """Every table's rows, unsorted; items as Arrow tables, none where not `itemized`.

    Results of nodes that are not in the study are left out, as are those of nodes below one that cannot be read or
    belongs to another study.
    """
    tree, layout = nodes(study), ResultsLayout(results)
    reader = _Reader(layout, partial)
    checkpoints: dict[str, Row] = {}
    for name, node in tree.items():
        path = layout.manifest(name)
        if refused := reader.refused_ancestor(name):
            if path.exists():
                reader.refuse(name, path, f"It was made from {refused}, which the tables leave out.")
            continue
        for row in reader.read(name, path, partial_of(checkpoint_row, study, node, layout)):
            checkpoints[name] = row
    curves: list[Row] = []
    for name in [name for name, row in checkpoints.items() if row["family"] == "recover"]:
        for rows in reader.read(name, layout.curve(name), partial_of(curve_rows, name)):
            curves += rows
    add_relations(checkpoints, curves)
    metrics: list[Row] = []
    costs = [row for checkpoint in checkpoints.values() for row in manifest_costs(checkpoint)]
    if study.roofline:
        for name in checkpoints:
            path = layout.checkpoint(name) / "config.json"
            for rows in reader.read(name, path, partial_of(roofline_rows, study, study.roofline, name)):
                costs += rows
    items: list[pa.Table] = []
    for name, evaluation in [(node, evaluation) for node in checkpoints for evaluation in evaluations(study, node)]:
        rows_of = partial_of(evaluation_rows, study, name, evaluation, layout)
        for measurements in reader.read(name, layout.metrics(name, evaluation), rows_of):
            metrics += measurements.metrics
            costs += measurements.costs
            if itemized and study.evaluations[evaluation].kind == "quality":
                path = layout.items(name, evaluation)
                items += reader.read(name, path, partial_of(item_rows, name, evaluation), "metrics.json")
    protocols_of = {name: protocols(evaluation) for name, evaluation in study.evaluations.items()}
    return {
        "nodes": list(checkpoints.values()),
        "metrics": metrics,
        "items": items,
        "curves": curves,
        "costs": costs,
        "comparisons": compare(checkpoints.values(), items, protocols_of),
        "signals": signals(metrics, curves),
        # Where nothing is missing, a log that ends in an error is an earlier run's.
        "failures": reader.failures + failures(layout, study, tree) if partial else [],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--study", required=True, type=Path, help="the study's YAML file")
    parser.add_argument("--results", required=True, type=Path, help="folder of the study's results")
    parser.add_argument("--output", required=True, type=Path, help="folder of the tables")
    parser.add_argument(
        "--partial",
        action="store_true",
        help="write the rows that exist; the tables are dated 1970, so that they are recomputed",
    )


def run(arguments: argparse.Namespace) -> None:
    write_tables(load_study(arguments.study), arguments.results, arguments.output, arguments.partial)
