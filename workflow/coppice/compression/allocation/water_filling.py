"""water-filling: the largest singular values of all linears.

Ranks are raised from the floor in order of sigma_{k+1}^2 / (m + n) over all linears: of what a rank keeps for each
parameter that it costs. Whatever another rule of ranks leaves over is given out in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from coppice.compression.allocation.entries import Entry
from coppice.compression.allocation.spreading import raise_levels


def fill(
    entries: Sequence[Entry], levels: Sequence[int], capacity: int, members: Iterable[int] | None = None
) -> list[int]:
    """The levels of the members (all when None) raised while their costs together are within the capacity."""
    costs = [entry.costs for entry in entries]

    def worth(index: int, level: int) -> float:
        losses = entries[index].losses
        return (losses[level] - losses[level + 1]) / (costs[index][level + 1] - costs[index][level])

    return raise_levels(levels, costs, worth, capacity, members)
