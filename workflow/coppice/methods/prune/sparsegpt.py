"""SparseGPT: pruning while the weights that stay make up for what goes.

Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (arXiv 2301.00774),
algorithm 1. Score W_ij^2 / U_jj^2 of the current weights, U^T U = H^-1 (see `solvers.sweep`), compared within each
block of inputs of all outputs, or within each group of an N:M pattern.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from coppice.methods.base import Linear, LinearStatistics, Masked, Source, Unchanged
from coppice.methods.solvers.mask import (
    SparsityOptions,
    comparison_group,
    keep_largest,
    nothing_to_prune,
    pruning_record,
)
from coppice.methods.solvers.sweep import Selection, inverse_factor, sweep

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Source(
    "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", "arXiv 2301.00774", "algorithm 1"
)
NEEDS = frozenset({"moments"})
MAKES = frozenset({"masked"})
REFUSES = {
    "quantized": "because packed integers cannot be masked; prune before quantizing",
    "compensated": "because the compensation was fitted to the weights as they are; prune before compensating",
}


class Options(SparsityOptions):
    block: int = Field(default=128, ge=1, description="Inputs whose weights a sparsity compares with each other.")
    damping: float = Field(default=0.01, ge=0, le=1, description="Share of mean(diag H) added to H's diagonal.")


def compress(linear: Linear, statistics: LinearStatistics, options: Options) -> Masked | Unchanged:
    """Sweeps the weight, choosing the mask of each block when the sweep reaches it.

    Raises UserError when M of N:M does not divide the width, or when the statistics are unfit (see `solvers.sweep`).
    """
    if options.sparsity == 0:
        return nothing_to_prune()
    width = linear.weight.shape[1]

    def choose(scores: Tensor, kept: Tensor) -> Tensor:
        return keep_largest(scores, *comparison_group(options, scores.numel(), width), kept)

    selection = Selection(options.block if options.pattern is None else options.kept_of[1], choose)
    factor = inverse_factor(statistics.second_moment, options.damping)
    swept = sweep(linear.weight, factor, options.block, kept=linear.mask, selection=selection)
    return Masked(swept.weight, swept.mask, record=pruning_record(options, swept.mask) | factor.record)
