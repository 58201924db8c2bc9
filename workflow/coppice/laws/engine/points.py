"""Points: a dict of columns [n], one row an observation, among them `run` (str), the unit that the bootstrap draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

Points = dict[str, np.ndarray]
Columns = dict[str, type[str] | type[float]]  # name -> type of a column


def points_from(table: pd.DataFrame, columns: Columns) -> Points:
    """The rows of a table as points: its `columns`, each converted to its type."""
    return {name: table[name].to_numpy(dtype=kind) for name, kind in columns.items()}


def count(points: Points) -> int:
    """Number of points."""
    return len(points["run"])


def select(points: Points, rows: np.ndarray | slice | list[int]) -> Points:
    """The points at `rows`, a mask or indices."""
    return {name: column[rows] for name, column in points.items()}


def run_rows(points: Points, run: str, by: str = "tokens") -> np.ndarray:
    """Indices of the points of a run, in ascending order of the column `by`."""
    rows = np.flatnonzero(points["run"] == run)
    return rows[np.argsort(points[by][rows], kind="stable")]


def levels(values: np.ndarray, gap: float = 0.05) -> np.ndarray:
    """Level of each of the positive `values` [n], ascending from 0: those within a relative `gap` of its first.

    Ratios that were requested to be equal differ a little once whole units were removed. A level does not grow from
    neighbour to neighbour, so that a fine scale of values is many levels and not one.
    """
    distinct, inverse = np.unique(values, return_inverse=True)
    level, first = np.zeros(len(distinct), int), distinct[0]
    for place, value in enumerate(distinct[1:], 1):
        opens = value > first * (1 + gap)
        level[place] = level[place - 1] + opens
        first = value if opens else first
    return level[inverse]


def is_single(values: np.ndarray) -> bool:
    """Whether all of the positive `values` [n] share one level."""
    return bool(levels(values).max() == 0)


def powers_of_a_thousand(points: Points, names: tuple[str, ...]) -> dict[str, float]:
    """Units: for each named column the largest power of a thousand, from 1 to 1e15, that its largest value reaches."""
    powers = 1000.0 ** np.arange(6)
    return {name: float(powers[powers <= max(points[name].max(), 1)][-1]) for name in names}
