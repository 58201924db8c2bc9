"""uniform: every linear gets the target as it is requested."""

from __future__ import annotations

from collections.abc import Iterable

from coppice.compression.allocation.entries import Entry, Target, shape_of
from coppice.models.contracts import Linear, LinearStatistics


def entries(linears: Iterable[tuple[str, Linear, LinearStatistics | None]]) -> list[Entry]:
    """The linears by name and shape; nothing of them is measured."""
    return [Entry(name, shape_of(linear), 0, 0) for name, linear, _ in linears]


def costs(entries: list[Entry], target: Target) -> list[int]:
    """The cost of each linear."""
    return [target.uniform(entry.shape) for entry in entries]
