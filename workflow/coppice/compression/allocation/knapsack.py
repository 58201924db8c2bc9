"""knapsack: the least summed loss over a few levels of each linear (see `methods.solvers.knapsack`).

The levels are those of the option, or else chosen around what is requested.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TypeVar

from coppice.compression.allocation.entries import Entry
from coppice.compression.allocation.spreading import ROUNDING
from coppice.errors import UserError
from coppice.methods.options import Allocation
from coppice.methods.solvers.knapsack import knapsack

# So many levels are below what is requested, and as many above.
_STEPS = 8

Level = TypeVar("Level", int, Fraction)


def levels_around(requested: Fraction, floor: Fraction) -> list[Fraction]:
    """Levels evenly from the floor to as far above what is requested."""
    return [floor + (requested - floor) * step / _STEPS for step in range(2 * _STEPS + 1)]


def levels_above(floor: Fraction | float, levels: Sequence[Level], rule: Allocation) -> list[Level]:
    """The levels that are not below the floor. Raises UserError where none is left."""
    above = [level for level in levels if level >= floor - ROUNDING]
    if not above:
        raise UserError(
            f"No level of the allocation reaches its floor of {rule.floor:g} of the uniform target: lower 'floor', or "
            "give larger levels."
        )
    return above


def best_levels(entries: Sequence[Entry], capacity: int) -> list[int]:
    """The index of each linear's level: of its `candidates`, or of all where it has none."""
    candidates = [entry.candidates or range(len(entry.costs)) for entry in entries]
    costs = [[entry.costs[level] for level in row] for entry, row in zip(entries, candidates, strict=True)]
    losses = [[entry.losses[level] for level in row] for entry, row in zip(entries, candidates, strict=True)]
    return [row[choice] for row, choice in zip(candidates, knapsack(costs, losses, capacity), strict=True)]
