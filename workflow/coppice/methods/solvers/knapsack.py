"""One level for each item, with the least summed loss that a capacity allows: the multiple-choice knapsack.

Dynamic programming over the spare capacity, its standard exact solution: with items i, levels j, integer costs c_ij
and losses l_ij, f_i(c) = min over j of f_{i-1}(c - c_ij) + l_ij is the least loss of the first i items at a cost of at
most c.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from coppice.lazy import LazyModule

numpy: Any = LazyModule("numpy")

# Most columns of the table: items x columns bytes, and items x levels x columns steps.
_COLUMNS = 2**17


def knapsack(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], capacity: int, columns: int = _COLUMNS
) -> list[int]:
    """For each item the index of its level. Of equal losses the cheaper level is taken, then the earlier one.

    capacity: at least the sum of each item's least cost. Exact when the spare capacity is at most `columns` times the
    greatest common divisor of the differences between an item's costs; beyond that these are rounded up to
    ceil(spare capacity / columns), so that the capacity still holds.
    """
    least = [min(row) for row in costs]
    steps = [[cost - low for cost in row] for row, low in zip(costs, least, strict=True)]
    spare = min(capacity - sum(least), sum(max(row) for row in steps))
    divisor = math.gcd(*(step for row in steps for step in row)) or 1
    unit = max(divisor, -(-spare // columns))
    steps = [[-(-step // unit) for step in row] for row in steps]
    spare //= unit

    best = numpy.zeros(spare + 1)
    choices = numpy.zeros((len(costs), spare + 1), numpy.min_scalar_type(max(map(len, costs))))
    for choice, row, losses_of in zip(choices, steps, losses, strict=True):
        before, best = best, numpy.full(spare + 1, numpy.inf)
        for level in sorted(range(len(row)), key=lambda level: row[level]):
            if row[level] > spare:
                break
            losses_here = before[: spare + 1 - row[level]] + losses_of[level]
            lower = losses_here < best[row[level] :]
            best[row[level] :][lower] = losses_here[lower]
            choice[row[level] :][lower] = level

    chosen = []
    for choice, row in zip(choices[::-1], steps[::-1], strict=True):
        chosen.append(int(choice[spare]))
        spare -= row[chosen[-1]]
    return chosen[::-1]
