"""Tables read back from Parquet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from coppice.records.arrow import read_parquet
from coppice.records.renamed import COLUMNS
from coppice.results.schemas import SCHEMAS


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one beats, in order of the first coordinate; less is better in both."""
    best, front = math.inf, []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if points[index][1] < best:
            best = points[index][1]
            front.append(index)
    return front


def read_table(directory: Path, name: str) -> pa.Table:
    """A table written earlier, under the names of this version's columns.

    Raises UserError when it is missing, damaged, or lacks a column.
    """
    return read_parquet(Path(directory) / f"{name}.parquet", SCHEMAS[name].names, renamed=COLUMNS)


def build_table(rows: list[Any], schema: pa.Schema) -> pa.Table:
    """Rows, or tables of them, as one table in the order of the schema's key."""
    if rows and isinstance(rows[0], pa.Table):
        table = pa.concat_tables(rows)
    else:
        table = pa.Table.from_pylist(rows, schema=schema)
    keys = schema.metadata[b"key"].decode().split()
    return table.sort_by([(key, "ascending") for key in keys]).combine_chunks()
