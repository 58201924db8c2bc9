"""Tables read back from Parquet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from coppice.errors import UserError
from coppice.results.schemas import SCHEMAS


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one beats, in order of the first coordinate; less is better in both."""
    best, found = math.inf, []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if points[index][1] < best:
            best = points[index][1]
            found.append(index)
    return found


def read_table(directory: Path, name: str) -> pa.Table:
    """A table written earlier. Raises UserError when it is missing, broken, or lacks a column."""
    return read_parquet(Path(directory) / f"{name}.parquet", SCHEMAS[name].names)


def read_parquet(path: Path, columns: list[str]) -> pa.Table:
    try:
        table = pq.ParquetFile(path).read()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a whole Parquet file; remove it and run again.") from error
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}; remove it and run again.")
    return table.select(columns)


def sorted_table(rows: list[Any], schema: pa.Schema) -> pa.Table:
    if rows and isinstance(rows[0], pa.Table):
        table = pa.concat_tables(rows)
    else:
        table = pa.Table.from_pylist(rows, schema=schema)
    keys = schema.metadata[b"key"].decode().split()
    return table.sort_by([(key, "ascending") for key in keys]).combine_chunks()
