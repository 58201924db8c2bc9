"""A sparsity: counted in weights kept."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Protocol

from coppice.compression.allocation import knapsack, outliers, sensitivity
from coppice.compression.allocation.entries import Entry, comparable_losses, relative_error, shape_of
from coppice.compression.allocation.spreading import limits_of, proportional, round_to_total, shift_shares
from coppice.methods.options import Allocation
from coppice.methods.solvers import demand
from coppice.methods.solvers.knapsack import knapsack as solve
from coppice.methods.solvers.selection import share_of
from coppice.models.contracts import Linear, LinearStatistics
from coppice.records.base import Json


class SparsityOptions(Protocol):
    """Options with a sparsity that is given where it is allocated unevenly."""

    @property
    def allocation(self) -> Allocation: ...

    @property
    def sparsity(self) -> float | None: ...


class SparsityTarget:
    """See `entries.Target`."""

    def __init__(self, options: SparsityOptions) -> None:
        assert options.sparsity is not None
        self.rule, self.requested = options.allocation, options.sparsity
        self.share = 1 - Fraction(str(self.requested))

    def capacity(self, size: int) -> int:
        return size - share_of(self.requested, size)

    def uniform(self, shape: tuple[int, int]) -> int:
        return self.capacity(math.prod(shape))

    def value(self, cost: float, size: int) -> float:
        return (size - cost) / size

    def entry(self, name: str, linear: Linear, statistics: LinearStatistics) -> Entry:
        weight, shape = linear.weight, shape_of(linear)
        size = math.prod(shape)
        # A sparsity is less than 1.
        least = max(int(Fraction(str(self.rule.floor)) * self.share * size), 1)
        entry = Entry(name, shape, least, size)
        if self.rule.by == "sensitivity":
            lost, power = demand.masking_losses(weight, statistics.second_moment, [self.requested, 1.0])
            return replace(entry, measure=relative_error(lost, power))
        if self.rule.by == "knapsack":
            shares = self.levels()
            sparsities = [float(1 - share) for share in shares]
            *losses, power = demand.masking_losses(weight, statistics.second_moment, [*sparsities, 1.0])
            least = max(int(shares[0] * size), 1)
            return replace(entry, least=least, levels=shares, losses=comparable_losses(losses, power, self.rule))
        return entry

    def levels(self) -> list[Fraction]:
        """The shares of weights to keep that a knapsack chooses from, in increasing order."""
        floor = Fraction(str(self.rule.floor)) * self.share
        if self.rule.levels is None:
            shares = knapsack.levels_around(self.share, floor)
            return sorted({min(share, Fraction(1)) for share in shares} - {Fraction(0)})
        return knapsack.levels_above(floor, sorted(1 - Fraction(str(level)) for level in self.rule.levels), self.rule)

    def spread(self, entries: list[Entry], capacity: int) -> list[int]:
        if self.rule.by == "knapsack":
            costs = shift_shares(self.best_shares(entries), *limits_of(entries), capacity)
        elif self.rule.by == "sensitivity":
            costs = sensitivity.costs(entries, capacity, proportional)
        else:
            costs = outliers.costs(entries, self.rule, capacity)
        return round_to_total(costs, capacity)

    def best_shares(self, entries: list[Entry]) -> list[float]:
        """The knapsack's shares. Costs are in parts of a weight, in which every share of every linear is whole."""
        shares = entries[0].levels
        parts = math.lcm(self.share.denominator, *(share.denominator for share in shares))
        costs = [[int(share * parts) * entry.size for share in shares] for entry in entries]
        capacity = int(self.share * parts) * sum(entry.size for entry in entries)
        chosen = solve(costs, [entry.losses for entry in entries], capacity)
        return [float(shares[level]) for level in chosen]

    def update(self, entry: Entry, cost: int) -> Json:
        return {"sparsity": self.value(cost, entry.size)}
