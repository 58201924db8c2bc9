"""Bits of codes: counted in bits."""

from __future__ import annotations

import math
from dataclasses import replace

from coppice.compression.allocation import knapsack, sensitivity
from coppice.compression.allocation.entries import Entry, comparable_losses, relative_error, shape_of
from coppice.compression.allocation.spreading import highest_levels, raise_levels
from coppice.methods.solvers import demand
from coppice.methods.solvers.grid import GridOptions
from coppice.methods.solvers.loss import output_power
from coppice.methods.solvers.moments import second_moment
from coppice.models.contracts import Linear, LinearStatistics
from coppice.records.base import Json


class BitsTarget:
    """See `entries.Target`."""

    def __init__(self, options: GridOptions) -> None:
        self.rule, self.requested, self.options = options.allocation, options.bits, options

    def capacity(self, size: int) -> int:
        return self.requested * size

    def uniform(self, shape: tuple[int, int]) -> int:
        return self.capacity(math.prod(shape))

    def value(self, cost: float, size: int) -> float:
        return cost / size

    def entry(self, name: str, linear: Linear, statistics: LinearStatistics) -> Entry:
        shape, moment = shape_of(linear), statistics.second_moment
        size = math.prod(shape)
        candidates = sorted(int(level) for level in self.rule.levels or range(2, 9))
        levels = knapsack.levels_above(self.rule.floor * self.requested, candidates, self.rule)
        costs = [bits * size for bits in levels]
        entry = Entry(name, shape, costs[0], costs[-1], 0.0, levels, costs)
        power = output_power(linear.weight, second_moment(moment))
        if self.rule.by == "knapsack":
            losses = demand.rounding_losses(linear, moment, self.options, levels)
            return replace(entry, losses=comparable_losses(losses, power, self.rule))
        (lost,) = demand.rounding_losses(linear, moment, self.options, [self.requested])
        return replace(entry, measure=relative_error(lost, power))

    def spread(self, entries: list[Entry], capacity: int) -> list[int]:
        if self.rule.by == "knapsack":
            levels = knapsack.best_levels(entries, capacity)
        else:
            levels = self.by_sensitivity(entries, capacity)
        return [entry.costs[level] for entry, level in zip(entries, levels, strict=True)]

    def by_sensitivity(self, entries: list[Entry], capacity: int) -> list[int]:
        """Bits by the error at the uniform target; what rounding down leaves goes where most is missing."""
        costs = [entry.costs for entry in entries]
        real = sensitivity.costs(entries, capacity, sensitivity.logarithmic)

        def missing(index: int, level: int) -> float:
            return (real[index] - costs[index][level]) / entries[index].size

        return raise_levels(highest_levels(costs, real), costs, missing, capacity)

    def update(self, entry: Entry, cost: int) -> Json:
        return {"bits": entry.levels[entry.costs.index(cost)]}
