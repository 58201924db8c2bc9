"""Spreads a budget over the linears: one number for the whole model becomes one for each linear.

A budget is counted in a whole-number cost: weights kept for a sparsity, parameters for a share to keep (k (m + n) at
rank k, m n where the linear stays dense) and for the rank of a correction, bits for bits. A rule gives each linear i of
n_i weights a cost c_i between its floor and the most that it can use; sum c_i is the asked budget, less what no linear
can use: nothing for a sparsity, less than a rank or a bit for every weight of the smallest linear that could take one.
It is never more.

- sensitivity, with e_i = |dW X| / |W X| at the uniform budget: c_i / n_i in proportion to e_i; for bits, whose error
  halves with each, log2 e_i more than a constant;
- owl (Yin et al., OWL, arXiv 2310.05175) and mosaic (arXiv 2504.06323): c_i / n_i rises with the share D of outliers
  among |W_ij| sqrt(H_jj), of a block or of each projection over the blocks: from the mean, D scaled to [0, 2 spread]
  less its own mean;
- svd-llm-v2 (arXiv 2503.12340): among linears of one kind, what is removed is in proportion to 1 / ln L.
  The paper's L = |W X - W_k X| depends on how many tokens were seen and on the scale of the inputs. Here W X is scaled
  to a mean square of 1 over `TOKENS` tokens, the size of the paper's calibration, so that neither matters; L below e
  counts as e;
- water-filling: ranks in order of sigma_{k+1}^2 / (m + n) over all linears, from the floor up;
- knapsack: the least summed loss over a few levels (see `methods.solvers.knapsack`).

Losses are those of `methods.solvers.demand`.
"""

from __future__ import annotations

import heapq
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby
from typing import Any, Protocol

import numpy

from coppice.errors import UserError, error_context
from coppice.methods.contracts import Linear, LinearStatistics
from coppice.methods.options import Allocation, BudgetOptions
from coppice.methods.solvers import demand
from coppice.methods.solvers.budget import share_of
from coppice.methods.solvers.knapsack import knapsack
from coppice.methods.solvers.loss import output_power
from coppice.methods.solvers.moments import second_moment
from coppice.methods.solvers.truncation import aligned, break_even, chosen_rank

# 256 windows of 2048 tokens.
TOKENS = 256 * 2048
# Of the levels that a knapsack chooses from, so many lie below the asked one and as many above.
_STEPS = 8
# Costs are whole numbers, the solutions of equations nearly so.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Entry:
    """What the rules know of a linear.

    shape: [m, n]; least, most: the costs that it can have; measure: what the rule compares. levels: budgets in order of
    cost, their costs and losses, where a linear has one of several; candidates: the indices of those that the knapsack
    chooses from.
    """

    name: str
    shape: tuple[int, int]
    least: int
    most: int
    measure: float = 0.0
    levels: Sequence[Any] = ()
    costs: Sequence[int] = ()
    losses: Sequence[float] = ()
    candidates: Sequence[int] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def kind(self) -> str:
        """`mlp.up_proj`: what linears of different blocks have in common."""
        return _place(self.name)[1]


class Budget(Protocol):
    """One of the four budgets. asked: as the option has it; for a rank, the share of the weights that it adds."""

    asked: float

    def capacity(self, size: int) -> int:
        """The cost that `size` weights may have together."""

    def uniform(self, shape: tuple[int, int]) -> int:
        """The cost of a linear under the uniform budget."""

    def value(self, cost: float, size: int) -> float:
        """The budget that a cost of `size` weights is."""

    def entry(self, name: str, linear: Linear, statistics: LinearStatistics) -> Entry: ...

    def spread(self, entries: list[Entry], capacity: int) -> list[int]:
        """The cost of each linear."""

    def update(self, entry: Entry, cost: int) -> dict[str, Any]:
        """The options that give a linear this cost."""


def allocate(
    linears: Iterable[tuple[str, Linear, LinearStatistics | None]], options: BudgetOptions
) -> tuple[dict[str, BudgetOptions], dict[str, Any]]:
    """The options of each linear, with a budget of its own, and the record of what was asked and achieved.

    linears: by full name in the model's order, read once; those of a block must come together. Statistics may be None
    under the uniform rule. options: with the budget that `BUDGET` names given. Raises UserError when the floor or the
    levels leave no way to meet the budget, or when a linear cannot be measured, which the sentence names.
    """
    rule = options.allocation
    budget = BUDGETS[options.BUDGET](options)
    plain = options.model_copy(update={"allocation": Allocation()})
    if rule.by == "uniform":
        entries = [Entry(name, tuple(linear.weight.shape), 0, 0) for name, linear, _ in linears]
    else:
        entries = list(survey(linears, budget, rule))
    if not entries:
        raise UserError("There is no linear to spread a budget over: let the option 'target_modules' name some.")
    if rule.by == "uniform":
        costs = [budget.uniform(entry.shape) for entry in entries]
        options_of = {entry.name: plain for entry in entries}
    else:
        capacity = budget.capacity(sum(entry.size for entry in entries))
        require_room(entries, budget, capacity, options)
        costs = budget.spread(entries, capacity)
        options_of = {
            entry.name: plain.model_copy(update=budget.update(entry, cost))
            for entry, cost in zip(entries, costs, strict=True)
        }
    record = {
        "by": rule.by,
        "asked": budget.asked,
        "achieved": budget.value(sum(costs), sum(entry.size for entry in entries)),
        "linears": {entry.name: budget.value(cost, entry.size) for entry, cost in zip(entries, costs, strict=True)},
    }
    if rule.by in ("sensitivity", "owl", "mosaic", "svd-llm-v2"):
        record["measures"] = {entry.name: entry.measure for entry in entries}
    if rule.by == "svd-llm-v2":
        record["loss_tokens"] = TOKENS
    return options_of, record


def require_room(entries: list[Entry], budget: Budget, capacity: int, options: BudgetOptions) -> None:
    """Raises UserError when even the least costs are more than the capacity."""
    least = sum(entry.least for entry in entries)
    if least > capacity:
        size = sum(entry.size for entry in entries)
        raise UserError(
            f"The least that allocation {options.allocation.by!r} can give the linears comes to {options.BUDGET} "
            f"{budget.value(least, size):.4g}, and {budget.asked:g} is asked: change 'floor' or 'levels' of the "
            f"allocation, or {options.BUDGET!r}."
        )


def survey(
    linears: Iterable[tuple[str, Linear, LinearStatistics]], budget: Budget, rule: Allocation
) -> Iterator[Entry]:
    """What the rule needs to know of each linear; of their weights only a block's scores are held at once."""

    def together(each: tuple[str, Linear, LinearStatistics]) -> str:
        return _place(each[0])[0] if rule.by == "owl" else each[0]

    for _, members in groupby(linears, together):
        entries, scores = [], []
        for name, linear, statistics in members:
            with error_context(name):
                entries.append(budget.entry(name, linear, statistics))
                if rule.by in ("owl", "mosaic"):
                    scores.append(demand.outlier_scores(linear.weight, statistics.second_moment))
        if scores:
            share = demand.outlier_share(scores, rule.outlier_factor)
            entries = [replace(entry, measure=share) for entry in entries]
        yield from entries


def _place(name: str) -> tuple[str, str]:
    """(block, kind) of a linear: ("0", "mlp.up_proj") of `model.layers.0.mlp.up_proj`; (name, name) outside blocks."""
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (found[1], found[2]) if found else (name, name)


class SparsityBudget:
    """Counted in weights kept."""

    def __init__(self, options: BudgetOptions) -> None:
        self.rule, self.asked = options.allocation, options.sparsity
        self.share = 1 - Fraction(str(self.asked))

    def capacity(self, size: int) -> int:
        return size - share_of(self.asked, size)

    def uniform(self, shape: tuple[int, int]) -> int:
        return self.capacity(math.prod(shape))

    def value(self, cost: float, size: int) -> float:
        return (size - cost) / size

    def entry(self, name: str, linear: Linear, statistics: LinearStatistics) -> Entry:
        weight, shape = linear.weight, tuple(linear.weight.shape)
        size = math.prod(shape)
        # A sparsity is less than 1.
        least = max(int(Fraction(str(self.rule.floor)) * self.share * size), 1)
        entry = Entry(name, shape, least, size)
        if self.rule.by == "sensitivity":
            lost, power = demand.masking_losses(weight, statistics.second_moment, [self.asked, 1.0])
            return replace(entry, measure=_error(lost, power))
        if self.rule.by == "knapsack":
            shares = self.levels()
            sparsities = [float(1 - share) for share in shares]
            *losses, power = demand.masking_losses(weight, statistics.second_moment, [*sparsities, 1.0])
            least = max(int(shares[0] * size), 1)
            return replace(entry, least=least, levels=shares, losses=_counted(losses, power, self.rule))
        return entry

    def levels(self) -> list[Fraction]:
        """The shares of weights to keep that a knapsack chooses from, in increasing order."""
        floor = Fraction(str(self.rule.floor)) * self.share
        if self.rule.levels is None:
            return sorted({min(share, Fraction(1)) for share in _around(self.share, floor)} - {Fraction(0)})
        return _above_floor(sorted(1 - Fraction(str(level)) for level in self.rule.levels), floor, self.rule)

    def spread(self, entries: list[Entry], capacity: int) -> list[int]:
        if self.rule.by == "knapsack":
            shares = self.best_levels(entries)
            wanted = shifted(shares, *_arrays(entries), capacity)
        else:
            wanted = wanted_costs(entries, self.rule, capacity, proportional)
        return whole(wanted, capacity)

    def best_levels(self, entries: list[Entry]) -> list[float]:
        """The knapsack's shares. Costs are in parts of a weight, in which every share of every linear is whole."""
        shares = entries[0].levels
        parts = math.lcm(self.share.denominator, *(share.denominator for share in shares))
        costs = [[int(share * parts) * entry.size for share in shares] for entry in entries]
        capacity = int(self.share * parts) * sum(entry.size for entry in entries)
        chosen = knapsack(costs, [entry.losses for entry in entries], capacity)
        return [float(shares[level]) for level in chosen]

    def update(self, entry: Entry, cost: int) -> dict[str, Any]:
        return {"sparsity": self.value(cost, entry.size)}


class RankBudget:
    """Counted in parameters. The last level of a linear is to stay dense."""

    def __init__(self, options: BudgetOptions) -> None:
        self.rule, self.asked, self.options = options.allocation, options.keep, options

    def capacity(self, size: int) -> int:
        return share_of(self.asked, size)

    def uniform(self, shape: tuple[int, int]) -> int:
        rank = chosen_rank(self.options, *shape)
        return math.prod(shape) if rank >= break_even(*shape) else rank * sum(shape)

    def value(self, cost: float, size: int) -> float:
        return cost / size

    def entry(self, name: str, linear: Linear, statistics: LinearStatistics) -> Entry:
        shape = tuple(linear.weight.shape)
        size, dense = math.prod(shape), break_even(*shape)
        tails = demand.truncation_losses(linear.weight, statistics.second_moment)
        levels = self.ranks(shape)
        # Dense: rounded up, so that rounding down to a multiple of align leaves it at break-even.
        levels.append(max(-(-dense // self.options.align) * self.options.align, 1))
        costs = [*(rank * sum(shape) for rank in levels[:-1]), size]
        losses = _counted([*(tails[rank] for rank in levels[:-1]), 0.0], tails[0], self.rule)
        entry = Entry(name, shape, costs[0], costs[-1], 0.0, levels, costs, losses)
        if self.rule.by == "knapsack":
            candidates = self.candidates(costs, size)
            return replace(entry, least=costs[candidates[0]], candidates=candidates)
        rank = chosen_rank(self.options, *shape)
        error = _error(0.0 if rank >= dense else tails[rank], tails[0])
        if self.rule.by == "svd-llm-v2":
            return replace(entry, measure=error * math.sqrt(TOKENS * shape[0]))
        return replace(entry, measure=error)

    def ranks(self, shape: tuple[int, int]) -> list[int]:
        """The ranks from the floor to below break-even that `align` leaves as they are."""
        dense, align = break_even(*shape), self.options.align
        least = max(math.ceil(round(self.rule.floor * chosen_rank(self.options, *shape), 6)), 1)
        if dense > 1:
            # Where the uniform budget reaches break-even, the floor still lets a linear stay below it.
            least = min(least, aligned(dense - 1, align))
        return [rank for rank in range(least, dense) if aligned(rank, align) == rank]

    def candidates(self, costs: list[int], size: int) -> list[int]:
        """The levels that the knapsack chooses from: for each share to keep the largest that it pays for."""
        asked = Fraction(str(self.asked))
        floor = Fraction(str(self.rule.floor)) * asked
        if self.rule.levels is None:
            shares = [min(share, Fraction(1)) for share in _around(asked, floor)]
        else:
            shares = _above_floor([Fraction(str(level)) for level in self.rule.levels], floor, self.rule)
        return sorted({max(bisect_right(costs, share * size) - 1, 0) for share in shares})

    def spread(self, entries: list[Entry], capacity: int) -> list[int]:
        costs = [entry.costs for entry in entries]

        def worth(index: int, level: int) -> float:
            losses = entries[index].losses
            return (losses[level] - losses[level + 1]) / (costs[index][level + 1] - costs[index][level])

        if self.rule.by == "knapsack":
            chosen = self.best_levels(entries, capacity)
        elif self.rule.by == "water-filling":
            chosen = [0] * len(entries)
        else:
            wanted = wanted_costs(entries, self.rule, capacity, proportional)
            chosen = below(costs, wanted)
            if self.rule.by == "svd-llm-v2":
                for members in _groups(entries, self.rule):
                    room = int(sum(wanted[index] for index in members) + _ROUNDING)
                    chosen = spend(chosen, costs, worth, room, members)
        chosen = spend(chosen, costs, worth, capacity)
        return [row[level] for row, level in zip(costs, chosen, strict=True)]

    def update(self, entry: Entry, cost: int) -> dict[str, Any]:
        return {"keep": None, "rank": entry.levels[entry.costs.index(cost)]}

    @staticmethod
    def best_levels(entries: list[Entry], capacity: int) -> list[int]:
        """The knapsack's levels."""
        costs = [[entry.costs[level] for level in entry.candidates] for entry in entries]
        losses = [[entry.losses[level] for level in entry.candidates] for entry in entries]
        chosen = knapsack(costs, losses, capacity)
        return [entry.candidates[choice] for entry, choice in zip(entries, chosen, strict=True)]


class CorrectionBudget:
    """Ranks of low-rank paths beside what was compressed, counted in parameters; the loss is that of the residual."""

    def __init__(self, options: BudgetOptions) -> None:
        self.rule, self.rank = options.allocation, options.rank
        self.shapes: list[tuple[int, int]] = []

    @property
    def asked(self) -> float:
        return self.capacity(0) / sum(map(math.prod, self.shapes))

    def capacity(self, size: int) -> int:
        return sum(map(self.uniform, self.shapes))

    def uniform(self, shape: tuple[int, int]) -> int:
        return min(self.rank, *shape) * sum(shape)

    def value(self, cost: float, size: int) -> float:
        return cost / size

    def entry(self, name: str, linear: Linear, statistics: LinearStatistics) -> Entry:
        shape = tuple(linear.weight.shape)
        self.shapes.append(shape)
        tails = demand.truncation_losses(linear.reference - linear.weight, statistics.second_moment)
        least = max(math.ceil(round(self.rule.floor * min(self.rank, *shape), 6)), 1)
        levels = range(least, min(shape) + 1)
        costs = [rank * sum(shape) for rank in levels]
        power = output_power(linear.reference, second_moment(statistics.second_moment))
        losses = _counted([tails[rank] for rank in levels], power, self.rule)
        return Entry(name, shape, costs[0], costs[-1], 0.0, levels, costs, losses)

    def spread(self, entries: list[Entry], capacity: int) -> list[int]:
        costs = [entry.costs for entry in entries]

        def worth(index: int, level: int) -> float:
            losses = entries[index].losses
            return (losses[level] - losses[level + 1]) / (costs[index][level + 1] - costs[index][level])

        chosen = spend([0] * len(entries), costs, worth, capacity)
        return [row[level] for row, level in zip(costs, chosen, strict=True)]

    def update(self, entry: Entry, cost: int) -> dict[str, Any]:
        return {"rank": cost // sum(entry.shape)}


class BitsBudget:
    """Counted in bits of codes."""

    def __init__(self, options: BudgetOptions) -> None:
        self.rule, self.asked, self.options = options.allocation, options.bits, options

    def capacity(self, size: int) -> int:
        return self.asked * size

    def uniform(self, shape: tuple[int, int]) -> int:
        return self.capacity(math.prod(shape))

    def value(self, cost: float, size: int) -> float:
        return cost / size

    def entry(self, name: str, linear: Linear, statistics: LinearStatistics) -> Entry:
        shape, moment = tuple(linear.weight.shape), statistics.second_moment
        size = math.prod(shape)
        candidates = sorted(int(level) for level in self.rule.levels or range(2, 9))
        levels = _above_floor(candidates, self.rule.floor * self.asked, self.rule)
        costs = [bits * size for bits in levels]
        entry = Entry(name, shape, costs[0], costs[-1], 0.0, levels, costs)
        power = output_power(linear.weight, second_moment(moment))
        if self.rule.by == "knapsack":
            losses = demand.rounding_losses(linear, moment, self.options, levels)
            return replace(entry, losses=_counted(losses, power, self.rule))
        (lost,) = demand.rounding_losses(linear, moment, self.options, [self.asked])
        return replace(entry, measure=_error(lost, power))

    def spread(self, entries: list[Entry], capacity: int) -> list[int]:
        costs = [entry.costs for entry in entries]
        if self.rule.by == "knapsack":
            chosen = knapsack(costs, [entry.losses for entry in entries], capacity)
        else:
            wanted = wanted_costs(entries, self.rule, capacity, logarithmic)

            def lacking(index: int, level: int) -> float:
                return (wanted[index] - costs[index][level]) / entries[index].size

            chosen = spend(below(costs, wanted), costs, lacking, capacity)
        return [row[level] for row, level in zip(costs, chosen, strict=True)]

    def update(self, entry: Entry, cost: int) -> dict[str, Any]:
        return {"bits": entry.levels[entry.costs.index(cost)]}


BUDGETS: dict[str, Callable[[BudgetOptions], Budget]] = {
    "sparsity": SparsityBudget,
    "keep": RankBudget,
    "bits": BitsBudget,
    "rank": CorrectionBudget,
}


def _error(lost: float, power: float) -> float:
    """|dW X| / |W X|; 0 for a linear whose outputs are zero."""
    return math.sqrt(lost / power) if power > 0 else 0.0


def _counted(losses: Sequence[float], power: float, rule: Allocation) -> list[float]:
    """The losses as the rule sums them: as they are, or relative to the power of the outputs."""
    return [loss / power for loss in losses] if rule.relative and power > 0 else list(losses)


def _around(asked: Fraction, floor: Fraction) -> list[Fraction]:
    """Levels evenly from the floor to as far above the asked one."""
    return [floor + (asked - floor) * step / _STEPS for step in range(2 * _STEPS + 1)]


def _above_floor(levels: list[Any], floor: Fraction | float, rule: Allocation) -> list[Any]:
    """The levels that are not below the floor. Raises UserError when there is none."""
    kept = [level for level in levels if level >= floor - _ROUNDING]
    if not kept:
        raise UserError(
            f"No level of the allocation reaches its floor of {rule.floor:g} of the uniform budget: lower 'floor', or "
            "give larger levels."
        )
    return kept


def _arrays(entries: list[Entry]) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Sizes, least and most costs."""
    return tuple(
        numpy.array([getattr(entry, field) for entry in entries], dtype=float) for field in ("size", "least", "most")
    )


def _groups(entries: list[Entry], rule: Allocation) -> list[list[int]]:
    """The indices of the linears that the rule compares with each other: of one kind, or all."""
    groups: dict[str, list[int]] = {}
    for index, entry in enumerate(entries):
        groups.setdefault(entry.kind if rule.by in ("mosaic", "svd-llm-v2") else "", []).append(index)
    return list(groups.values())


def wanted_costs(
    entries: list[Entry], rule: Allocation, capacity: int, by_error: Callable[..., numpy.ndarray]
) -> numpy.ndarray:
    """The cost of each linear as a real number, between its least and most; their sum is the capacity.

    Each group of linears that are compared with each other has the mean of all, where its floors allow it.
    by_error: what turns the errors of `sensitivity` into costs.
    """
    sizes, least, most = _arrays(entries)
    measures = numpy.array([entry.measure for entry in entries])
    mean = capacity / sizes.sum()
    groups = _groups(entries, rule)
    limits = [[part[members].sum() for members in groups] for part in (sizes, least, most)]
    totals = shifted([mean] * len(groups), *map(numpy.array, limits), capacity)
    wanted = numpy.empty(len(entries))
    for members, total in zip(groups, totals, strict=True):
        part = (sizes[members], least[members], most[members])
        if rule.by == "sensitivity":
            wanted[members] = by_error(measures[members], *part, total)
        elif rule.by == "svd-llm-v2":
            wanted[members] = svd_llm_v2(measures[members], *part, total)
        else:
            wanted[members] = shifted(by_outliers(measures[members], sizes[members], rule.spread, mean), *part, total)
    return wanted


def by_outliers(outliers: numpy.ndarray, sizes: numpy.ndarray, spread: float, mean: float) -> numpy.ndarray:
    """Shares whose mean over the weights is `mean`: D scaled to [0, 2 spread], centred. Equal D give equal shares."""
    lowest, span = outliers.min(), numpy.ptp(outliers)
    scaled = 2 * spread * (outliers - lowest) / (span if span > 0 else 1)
    return scaled - (scaled * sizes).sum() / sizes.sum() + mean


def svd_llm_v2(
    losses: numpy.ndarray, sizes: numpy.ndarray, least: numpy.ndarray, most: numpy.ndarray, total: float
) -> numpy.ndarray:
    """Costs that sum to `total`, where the share removed of a linear is in proportion to 1 / ln max(L, e)."""
    removable = 1 / numpy.log(numpy.maximum(losses, math.e))
    return sizes - proportional(removable, sizes, sizes - most, sizes - least, sizes.sum() - total)


def proportional(
    worth: numpy.ndarray, sizes: numpy.ndarray, least: numpy.ndarray, most: numpy.ndarray, total: float
) -> numpy.ndarray:
    """Costs t worth_i n_i, cut to [least_i, most_i], with the t for which they sum to `total`.

    What is worth nothing gets the least until all others have the most.
    """
    largest = worth.max()
    worth = numpy.maximum(worth, 1e-12 * largest) if largest > 0 else numpy.ones_like(worth)
    highest = (most / (worth * sizes)).max()
    return _solve(lambda t: numpy.clip(t * worth * sizes, least, most), 0.0, highest, total)


def shifted(
    shares: Sequence[float], sizes: numpy.ndarray, least: numpy.ndarray, most: numpy.ndarray, total: float
) -> numpy.ndarray:
    """Costs (share_i + t) n_i, cut to [least_i, most_i], with the t for which they sum to `total`."""
    shares = numpy.asarray(shares, dtype=float)
    lowest, highest = (least / sizes - shares).min(), (most / sizes - shares).max()
    return _solve(lambda t: numpy.clip((shares + t) * sizes, least, most), lowest, highest, total)


def logarithmic(
    errors: numpy.ndarray, sizes: numpy.ndarray, least: numpy.ndarray, most: numpy.ndarray, total: float
) -> numpy.ndarray:
    """Costs (log2 e_i + t) n_i, cut to [least_i, most_i]: a bit more for each doubling of the error."""
    largest = errors.max()
    errors = numpy.maximum(errors, 1e-12 * largest) if largest > 0 else numpy.ones_like(errors)
    return shifted(numpy.log2(errors), sizes, least, most, total)


def _solve(costs: Callable[[float], numpy.ndarray], low: float, high: float, total: float) -> numpy.ndarray:
    """costs(t) for the t in [low, high] at which their sum, which rises with t, is `total`; by bisection."""
    while low < (middle := (low + high) / 2) < high:
        if costs(middle).sum() < total:
            low = middle
        else:
            high = middle
    return costs(high)


def whole(wanted: numpy.ndarray, total: int) -> list[int]:
    """Whole costs that sum to `total`: rounded down, and one more for the largest remainders."""
    costs = numpy.floor(wanted + _ROUNDING).astype(int)
    missing = total - int(costs.sum())
    costs[numpy.argsort(costs - wanted, kind="stable")[:missing]] += 1
    return costs.tolist()


def below(costs: Sequence[Sequence[int]], wanted: Sequence[float]) -> list[int]:
    """The most expensive level of each linear that costs no more than wanted."""
    return [bisect_right(row, cost + _ROUNDING) - 1 for row, cost in zip(costs, wanted, strict=True)]


def spend(
    chosen: Sequence[int],
    costs: Sequence[Sequence[int]],
    worth: Callable[[int, int], float],
    capacity: int,
    members: Iterable[int] | None = None,
) -> list[int]:
    """The chosen levels raised, one step at a time, while any step of the members (all when None) fits.

    worth(i, level): of the step of linear i up from that level; the step worth the most goes first, of equal ones that
    of the earlier linear. capacity: for the members together.
    """
    chosen = list(chosen)
    members = range(len(chosen)) if members is None else list(members)
    left = capacity - sum(costs[index][chosen[index]] for index in members)
    steps = [(-worth(index, chosen[index]), index) for index in members if chosen[index] + 1 < len(costs[index])]
    heapq.heapify(steps)
    while steps:
        _, index = heapq.heappop(steps)
        level = chosen[index]
        price = costs[index][level + 1] - costs[index][level]
        # What does not fit now never will: nothing is given back.
        if price <= left:
            left -= price
            chosen[index] += 1
            if level + 2 < len(costs[index]):
                heapq.heappush(steps, (-worth(index, level + 1), index))
    return chosen
