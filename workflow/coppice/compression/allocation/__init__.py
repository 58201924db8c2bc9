"""Allocates a sparsity, rank, bit or correction target across linears: one number for the whole model becomes one for
each linear.

A target is counted in a whole-number cost (one file each: `sparsity`, `rank`, `correction`, `bits`). For a sparsity
these are the weights kept. For a share to keep they are parameters (k (m + n) at rank k, m n where the linear stays
dense), and so for the rank of a correction. For bits they are bits. A rule (one file each: `uniform`, `sensitivity`,
`outliers`, `svd_llm_v2`, `water_filling`, `knapsack`) gives each linear i of n_i weights a cost c_i between its floor
and the most that it can use. sum c_i is the requested target, less what no linear can use: nothing for a sparsity, less
than a rank or a bit for every weight of the smallest linear that could take one. It is never more.

What a linear loses at each cost is measured by `methods.solvers.demand`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

from coppice.compression.allocation import outliers, svd_llm_v2, uniform
from coppice.compression.allocation.bits import BitsTarget
from coppice.compression.allocation.correction import CorrectionTarget
from coppice.compression.allocation.entries import Entry, Target
from coppice.compression.allocation.rank import RankTarget
from coppice.compression.allocation.sparsity import SparsityTarget
from coppice.errors import UserError, error_context
from coppice.methods.options import Allocation, TargetOptions
from coppice.models.contracts import Linear, LinearStatistics
from coppice.records.base import Json

# By the option that holds the target.
TARGETS: dict[str, Callable[[Any], Target]] = {
    "sparsity": SparsityTarget,
    "keep": RankTarget,
    "bits": BitsTarget,
    "rank": CorrectionTarget,
}
# The rules that compare a measure of each linear, which is on record.
MEASURING = ("sensitivity", "owl", "mosaic", "svd-llm-v2")


def allocate(
    linears: Iterable[tuple[str, Linear, Any]], options: TargetOptions
) -> tuple[dict[str, TargetOptions], Json]:
    """The options of each linear, with a target of its own, and the record of what was requested and achieved.

    linears: (full name, linear, LinearStatistics) in the model's order, read once; those of a block must come together.
    Statistics may be None under the uniform rule. options: with the target that `TARGET` names given. Raises UserError
    when the floor or the levels leave no way to meet the target, or when a linear cannot be measured, which the
    sentence names.
    """
    rule = options.allocation
    target = TARGETS[options.TARGET](options)
    plain = options.model_copy(update={"allocation": Allocation()})
    entries = uniform.entries(linears) if rule.by == "uniform" else list(survey(linears, target, rule))
    if not entries:
        raise UserError("No linear is left to allocate a target to: let the option 'target_modules' name some.")
    size = sum(entry.size for entry in entries)
    if rule.by == "uniform":
        costs = uniform.costs(entries, target)
        options_of = {entry.name: plain for entry in entries}
    else:
        capacity = target.capacity(size)
        require_capacity(entries, target, capacity, options)
        costs = target.spread(entries, capacity)
        options_of = {
            entry.name: plain.model_copy(update=target.update(entry, cost))
            for entry, cost in zip(entries, costs, strict=True)
        }
    record: Json = {
        "by": rule.by,
        "asked": target.requested,
        "achieved": target.value(sum(costs), size),
        "linears": {entry.name: target.value(cost, entry.size) for entry, cost in zip(entries, costs, strict=True)},
    }
    if rule.by in MEASURING:
        record["measures"] = {entry.name: entry.measure for entry in entries}
    if rule.by == "svd-llm-v2":
        record["loss_tokens"] = svd_llm_v2.TOKENS
    return options_of, record


def survey(
    linears: Iterable[tuple[str, Linear, LinearStatistics]], target: Target, rule: Allocation
) -> Iterator[Entry]:
    """What the rule needs to know of each linear; of their weights only a block's scores are held at once."""

    def group(member: tuple[str, Linear, LinearStatistics]) -> str:
        return outliers.group(rule, member[0])

    for _, members in groupby(linears, group):
        entries, scores = [], []
        for name, linear, statistics in members:
            with error_context(name):
                entries.append(target.entry(name, linear, statistics))
                if rule.by in outliers.RULES:
                    scores.append(outliers.scores(linear, statistics))
        if scores:
            share = outliers.share(scores, rule)
            entries = [replace(entry, measure=share) for entry in entries]
        yield from entries


def require_capacity(entries: list[Entry], target: Target, capacity: int, options: TargetOptions) -> None:
    """Raises UserError when even the least costs are more than the capacity."""
    least = sum(entry.least for entry in entries)
    if least > capacity:
        size = sum(entry.size for entry in entries)
        raise UserError(
            f"The least that allocation {options.allocation.by!r} can give the linears comes to {options.TARGET} "
            f"{target.value(least, size):.4g}, and {target.requested:g} is requested: change 'floor' or 'levels' of "
            f"the allocation, or {options.TARGET!r}."
        )
