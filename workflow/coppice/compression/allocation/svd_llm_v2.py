"""svd-llm-v2 (arXiv 2503.12340): less is removed where truncation loses more, among linears of one kind.

What is removed of a linear is in proportion to 1 / ln L. The paper's L = |W X - W_k X| depends on how many tokens were
seen and on the scale of the inputs. Here W X is scaled to a mean square of 1 over `TOKENS` tokens, the size of the
paper's calibration, so that neither matters. L below e counts as e.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy

from coppice.compression.allocation.entries import Entry
from coppice.compression.allocation.spreading import Array, Limits, proportional, same_kinds, spread_groups

# 256 windows of 2048 tokens.
TOKENS = 256 * 2048


def loss(error: float, rows: int) -> float:
    """L of a linear with so many outputs, from its relative error |dW X| / |W X|."""
    return error * math.sqrt(TOKENS * rows)


def costs(entries: Sequence[Entry], capacity: int) -> Array:
    """The cost of each linear as a real number."""
    return spread_groups(entries, same_kinds(entries), capacity, group_costs)


def group_costs(losses: Array, limits: Limits, total: float) -> Array:
    """Costs that sum to `total`, where the share removed of a linear is in proportion to 1 / ln max(L, e)."""
    removable = 1 / numpy.log(numpy.maximum(losses, math.e))
    sizes, least, most = limits
    return sizes - proportional(removable, sizes, sizes - most, sizes - least, sizes.sum() - total)
