"""The rank of low-rank corrections of what was compressed: counted in parameters; the loss is that of the residual."""

from __future__ import annotations

import math
from typing import Protocol

from coppice.compression.allocation import water_filling
from coppice.compression.allocation.entries import Entry, comparable_losses, shape_of
from coppice.methods.options import Allocation
from coppice.methods.solvers import demand
from coppice.methods.solvers.loss import output_power
from coppice.methods.solvers.moments import second_moment
from coppice.models.contracts import Linear, LinearStatistics
from coppice.records.base import Json


class CorrectionOptions(Protocol):
    """Options with a rank of corrections."""

    @property
    def allocation(self) -> Allocation: ...

    @property
    def rank(self) -> int: ...


class CorrectionTarget:
    """See `entries.Target`."""

    def __init__(self, options: CorrectionOptions) -> None:
        self.rule, self.rank = options.allocation, options.rank
        self.shapes: list[tuple[int, int]] = []

    @property
    def requested(self) -> float:
        return self.capacity(0) / sum(map(math.prod, self.shapes))

    def capacity(self, size: int) -> int:
        return sum(map(self.uniform, self.shapes))

    def uniform(self, shape: tuple[int, int]) -> int:
        return min(self.rank, *shape) * sum(shape)

    def value(self, cost: float, size: int) -> float:
        return cost / size

    def entry(self, name: str, linear: Linear, statistics: LinearStatistics) -> Entry:
        assert linear.reference is not None  # A method that corrects is given what it corrects.
        shape = shape_of(linear)
        self.shapes.append(shape)
        tails = demand.truncation_losses(linear.reference - linear.weight, statistics.second_moment)
        least = max(math.ceil(round(self.rule.floor * min(self.rank, *shape), 6)), 1)
        levels = range(least, min(shape) + 1)
        costs = [rank * sum(shape) for rank in levels]
        power = output_power(linear.reference, second_moment(statistics.second_moment))
        losses = comparable_losses([tails[rank] for rank in levels], power, self.rule)
        return Entry(name, shape, costs[0], costs[-1], 0.0, levels, costs, losses)

    def spread(self, entries: list[Entry], capacity: int) -> list[int]:
        levels = water_filling.fill(entries, [0] * len(entries), capacity)
        return [entry.costs[level] for entry, level in zip(entries, levels, strict=True)]

    def update(self, entry: Entry, cost: int) -> Json:
        return {"rank": cost // sum(entry.shape)}
