"""Mathematics that rules and targets share: costs between limits that sum to a total, as real numbers, as whole numbers
and as levels."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy

from coppice.compression.allocation.entries import Entry

# Costs are whole numbers, the solutions of equations nearly so.
ROUNDING = 1e-6

Array = numpy.ndarray


class Limits(NamedTuple):
    """[linears] each: their sizes m n, and the least and the most that each can cost."""

    sizes: Array
    least: Array
    most: Array


def limits_of(entries: Sequence[Entry]) -> Limits:
    """The limits of the linears' costs."""
    fields = ("size", "least", "most")
    return Limits(*(numpy.array([getattr(entry, field) for entry in entries], dtype=float) for field in fields))


def same_kinds(entries: Sequence[Entry]) -> list[list[int]]:
    """The indices of the linears of each kind."""
    groups: dict[str, list[int]] = {}
    for index, entry in enumerate(entries):
        groups.setdefault(entry.kind, []).append(index)
    return list(groups.values())


def spread_groups(
    entries: Sequence[Entry],
    groups: Sequence[Sequence[int]],
    capacity: int,
    spread: Callable[[Array, Limits, float], Array],
) -> Array:
    """The cost of each linear as a real number, between its least and most; their sum is the capacity.

    groups: indices of the linears that are compared with each other. Each group has the mean of all, where its floors
    allow it. spread(measures, limits, total) -> the costs of a group, which sum to the total.
    """
    limits = limits_of(entries)
    measures = numpy.array([entry.measure for entry in entries])
    mean = capacity / limits.sizes.sum()
    group_limits = Limits(*(numpy.array([part[list(members)].sum() for members in groups]) for part in limits))
    totals = shift_shares([mean] * len(groups), *group_limits, capacity)
    costs = numpy.empty(len(entries))
    for indices, total in zip(groups, totals, strict=True):
        members = list(indices)
        costs[members] = spread(measures[members], Limits(*(part[members] for part in limits)), total)
    return costs


def proportional(worth: Array, sizes: Array, least: Array, most: Array, total: float) -> Array:
    """Costs t worth_i n_i, cut to [least_i, most_i], with the t for which they sum to `total`.

    What is worth nothing gets the least until all others have the most.
    """
    largest = worth.max()
    worth = numpy.maximum(worth, 1e-12 * largest) if largest > 0 else numpy.ones_like(worth)
    highest = (most / (worth * sizes)).max()
    return _solve(lambda t: numpy.clip(t * worth * sizes, least, most), 0.0, highest, total)


def shift_shares(shares: Sequence[float] | Array, sizes: Array, least: Array, most: Array, total: float) -> Array:
    """Costs (share_i + t) n_i, cut to [least_i, most_i], with the t for which they sum to `total`."""
    shares = numpy.asarray(shares, dtype=float)
    lowest, highest = (least / sizes - shares).min(), (most / sizes - shares).max()
    return _solve(lambda t: numpy.clip((shares + t) * sizes, least, most), lowest, highest, total)


def _solve(costs: Callable[[float], Array], low: float, high: float, total: float) -> Array:
    """costs(t) for the t in [low, high] at which their sum, which rises with t, is `total`; by bisection."""
    while low < (middle := (low + high) / 2) < high:
        if costs(middle).sum() < total:
            low = middle
        else:
            high = middle
    return costs(high)


def round_to_total(costs: Array, total: int) -> list[int]:
    """Whole costs that sum to `total`: rounded down, and one more for the largest remainders."""
    rounded = numpy.floor(costs + ROUNDING).astype(int)
    missing = total - int(rounded.sum())
    rounded[numpy.argsort(rounded - costs, kind="stable")[:missing]] += 1
    return rounded.tolist()


def highest_levels(costs: Sequence[Sequence[int]], limits: Sequence[float] | Array) -> list[int]:
    """The most expensive level of each linear that costs no more than its limit."""
    return [bisect_right(row, limit + ROUNDING) - 1 for row, limit in zip(costs, limits, strict=True)]


def raise_levels(
    levels: Sequence[int],
    costs: Sequence[Sequence[int]],
    worth: Callable[[int, int], float],
    capacity: int,
    members: Iterable[int] | None = None,
) -> list[int]:
    """The levels raised, one step at a time, while any step of the members (all when None) fits.

    worth(i, level): of the step of linear i up from that level; the step worth the most goes first, of equal ones that
    of the earlier linear. capacity: for the members together.
    """
    raised = list(levels)
    members = range(len(raised)) if members is None else list(members)
    left = capacity - sum(costs[index][raised[index]] for index in members)
    steps = [(-worth(index, raised[index]), index) for index in members if raised[index] + 1 < len(costs[index])]
    heapq.heapify(steps)
    while steps:
        _, index = heapq.heappop(steps)
        level = raised[index]
        price = costs[index][level + 1] - costs[index][level]
        # What does not fit now never will: nothing is given back.
        if price <= left:
            left -= price
            raised[index] += 1
            if level + 2 < len(costs[index]):
                heapq.heappush(steps, (-worth(index, level + 1), index))
    return raised
