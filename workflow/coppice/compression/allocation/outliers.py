"""owl (Yin et al., OWL, arXiv 2310.05175) and mosaic (arXiv 2504.06323): more for linears with more outliers.

c_i / n_i rises with the share D of outliers among |W_ij| sqrt(H_jj), of a block (owl) or of each projection over the
blocks (mosaic): from the mean, D scaled to [0, 2 spread] less its own mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy

from coppice.compression.allocation.entries import Entry, block_and_kind
from coppice.compression.allocation.spreading import Array, Limits, same_kinds, shift_shares, spread_groups
from coppice.methods.options import Allocation
from coppice.methods.solvers import demand
from coppice.models.contracts import Linear, LinearStatistics

if TYPE_CHECKING:
    from torch import Tensor

RULES = ("owl", "mosaic")


def group(rule: Allocation, name: str) -> str:
    """What the linears have in common whose outliers are counted together: a block, or one linear alone."""
    return block_and_kind(name)[0] if rule.by == "owl" else name


def scores(linear: Linear, statistics: LinearStatistics) -> Tensor:
    """|W_ij| sqrt(H_jj), [m, n]."""
    return demand.outlier_scores(linear.weight, statistics.second_moment)


def share(scores: Sequence[Tensor], rule: Allocation) -> float:
    """D of the linears with these scores."""
    return demand.outlier_share(scores, rule.outlier_factor)


def costs(entries: Sequence[Entry], rule: Allocation, capacity: int) -> Array:
    """The cost of each linear as a real number."""
    groups = same_kinds(entries) if rule.by == "mosaic" else [list(range(len(entries)))]
    mean = capacity / sum(entry.size for entry in entries)

    def spread(outliers: Array, limits: Limits, total: float) -> Array:
        return shift_shares(by_outliers(outliers, limits.sizes, rule.spread, mean), *limits, total)

    return spread_groups(entries, groups, capacity, spread)


def by_outliers(outliers: Array, sizes: Array, spread: float, mean: float) -> Array:
    """Shares whose mean over the weights is `mean`: D scaled to [0, 2 spread], centred. Equal D give equal shares."""
    lowest, span = outliers.min(), numpy.ptp(outliers)
    offsets = 2 * spread * (outliers - lowest) / (span if span > 0 else 1)
    return offsets - (offsets * sizes).sum() / sizes.sum() + mean
