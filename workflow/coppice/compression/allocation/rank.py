"""A share of the parameters to keep in factors: counted in parameters, k (m + n) at rank k.

The last level of a linear is to stay dense.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import replace
from fractions import Fraction

from coppice.compression.allocation import knapsack, sensitivity, svd_llm_v2, water_filling
from coppice.compression.allocation.entries import Entry, comparable_losses, relative_error, shape_of
from coppice.compression.allocation.spreading import ROUNDING, highest_levels, proportional, same_kinds
from coppice.methods.solvers import demand
from coppice.methods.solvers.selection import share_of
from coppice.methods.solvers.truncation import RankOptions, align_rank, break_even, chosen_rank
from coppice.models.contracts import Linear, LinearStatistics
from coppice.records.base import Json


class RankTarget:
    """See `entries.Target`."""

    def __init__(self, options: RankOptions) -> None:
        assert options.keep is not None  # validated: an uneven allocation spreads `keep`
        self.rule, self.requested, self.options = options.allocation, options.keep, options

    def capacity(self, size: int) -> int:
        return share_of(self.requested, size)

    def uniform(self, shape: tuple[int, int]) -> int:
        rank = chosen_rank(self.options, *shape)
        return math.prod(shape) if rank >= break_even(*shape) else rank * sum(shape)

    def value(self, cost: float, size: int) -> float:
        return cost / size

    def entry(self, name: str, linear: Linear, statistics: LinearStatistics) -> Entry:
        shape = shape_of(linear)
        size, dense = math.prod(shape), break_even(*shape)
        tails = demand.truncation_losses(linear.weight, statistics.second_moment)
        levels = self.ranks(shape)
        # Dense: rounded up, so that rounding down to a multiple of align leaves it at break-even.
        levels.append(max(-(-dense // self.options.align) * self.options.align, 1))
        costs = [*(rank * sum(shape) for rank in levels[:-1]), size]
        losses = comparable_losses([*(tails[rank] for rank in levels[:-1]), 0.0], tails[0], self.rule)
        entry = Entry(name, shape, costs[0], costs[-1], 0.0, levels, costs, losses)
        if self.rule.by == "knapsack":
            candidates = self.candidates(costs, size)
            return replace(entry, least=costs[candidates[0]], candidates=candidates)
        rank = chosen_rank(self.options, *shape)
        error = relative_error(0.0 if rank >= dense else tails[rank], tails[0])
        return replace(entry, measure=svd_llm_v2.loss(error, shape[0]) if self.rule.by == "svd-llm-v2" else error)

    def ranks(self, shape: tuple[int, int]) -> list[int]:
        """The ranks from the floor to below break-even that `align` leaves as they are."""
        dense, align = break_even(*shape), self.options.align
        least = max(math.ceil(round(self.rule.floor * chosen_rank(self.options, *shape), 6)), 1)
        if dense > 1:
            # Where the uniform target reaches break-even, the floor still lets a linear stay below it.
            least = min(least, align_rank(dense - 1, align))
        return [rank for rank in range(least, dense) if align_rank(rank, align) == rank]

    def candidates(self, costs: list[int], size: int) -> list[int]:
        """The levels that the knapsack chooses from: for each share to keep the largest that it pays for."""
        requested = Fraction(str(self.requested))
        floor = Fraction(str(self.rule.floor)) * requested
        if self.rule.levels is None:
            shares = [min(share, Fraction(1)) for share in knapsack.levels_around(requested, floor)]
        else:
            shares = knapsack.levels_above(floor, [Fraction(str(level)) for level in self.rule.levels], self.rule)
        return sorted({max(bisect_right(costs, share * size) - 1, 0) for share in shares})

    def spread(self, entries: list[Entry], capacity: int) -> list[int]:
        levels = water_filling.fill(entries, self.first_levels(entries, capacity), capacity)
        return [entry.costs[level] for entry, level in zip(entries, levels, strict=True)]

    def first_levels(self, entries: list[Entry], capacity: int) -> list[int]:
        """The levels that the rule chooses, before what is left of the capacity is given out."""
        costs = [entry.costs for entry in entries]
        if self.rule.by == "knapsack":
            return knapsack.best_levels(entries, capacity)
        if self.rule.by == "water-filling":
            return [0] * len(entries)
        if self.rule.by == "sensitivity":
            return highest_levels(costs, sensitivity.costs(entries, capacity, proportional))
        real = svd_llm_v2.costs(entries, capacity)
        levels = highest_levels(costs, real)
        # What rounding down leaves of a kind's share stays within the kind.
        for members in same_kinds(entries):
            share = int(sum(real[index] for index in members) + ROUNDING)
            levels = water_filling.fill(entries, levels, share, members)
        return levels

    def update(self, entry: Entry, cost: int) -> Json:
        return {"keep": None, "rank": entry.levels[entry.costs.index(cost)]}
