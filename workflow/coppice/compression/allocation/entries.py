"""What the rules know of a linear, and what a target is to them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from coppice.methods.options import Allocation
from coppice.models.contracts import Linear, LinearStatistics
from coppice.records.base import Json


@dataclass(frozen=True)
class Entry:
    """What the rules know of a linear.

    shape: [m, n]; least, most: the costs that it can have; measure: what the rule compares. levels: targets in order of
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
        return block_and_kind(self.name)[1]


class Target(Protocol):
    """One of the four targets. requested: as the option has it; for a rank, the share of the weights that it adds."""

    @property
    def requested(self) -> float: ...

    def capacity(self, size: int) -> int:
        """The cost that `size` weights may have together."""

    def uniform(self, shape: tuple[int, int]) -> int:
        """The cost of a linear under the uniform target."""

    def value(self, cost: float, size: int) -> float:
        """The target that a cost of `size` weights is."""

    def entry(self, name: str, linear: Linear, statistics: LinearStatistics) -> Entry:
        """What the rule needs to know of a linear."""

    def spread(self, entries: list[Entry], capacity: int) -> list[int]:
        """The cost of each linear."""

    def update(self, entry: Entry, cost: int) -> Json:
        """The options that give a linear this cost."""


def shape_of(linear: Linear) -> tuple[int, int]:
    """(m, n)."""
    rows, columns = linear.weight.shape
    return rows, columns


def block_and_kind(name: str) -> tuple[str, str]:
    """("0", "mlp.up_proj") of `model.layers.0.mlp.up_proj`; (name, name) outside blocks."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (match[1], match[2]) if match else (name, name)


def relative_error(lost: float, power: float) -> float:
    """|dW X| / |W X|; 0 for a linear whose outputs are zero."""
    return math.sqrt(lost / power) if power > 0 else 0.0


def comparable_losses(losses: Sequence[float], power: float, rule: Allocation) -> list[float]:
    """The losses as the rule sums them: as they are, or relative to the power of the outputs."""
    return [loss / power for loss in losses] if rule.relative and power > 0 else list(losses)
