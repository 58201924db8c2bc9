"""SparseGPT: pruning in one sweep over the inputs, while the remaining weights compensate for the error.

Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (arXiv 2301.00774),
algorithm 1. Score W_ij^2 / U_jj^2 of the current weights, U^T U = H^-1 (see `solvers.sweep`), compared within each
block of inputs of all outputs, or within each group of an N:M pattern.

With bits, the same sweep rounds what stays (section 3.5, "joint sparsification and quantization"): grids are fitted to
the weights before any is pruned, and a pruned weight takes the code of zero.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from coppice.methods.declaration import LayerMethod, Source
from coppice.methods.incompatible import PRUNE
from coppice.methods.solvers.grid import (
    OptionalGridOptions,
    fit_groups,
    grid_record,
    group_of_inputs,
    group_width,
    make_grid,
)
from coppice.methods.solvers.mask import (
    SparsityOptions,
    comparison_group,
    keep_largest,
    masked_replacement,
    nothing_to_prune,
    pruning_record,
)
from coppice.methods.solvers.sweep import Quantizer, Selection, cholesky_factor, sweep
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.replacements import Masked, Quantized, Unchanged

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Source(
    "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    "arXiv 2301.00774",
    "algorithm 1",
    claim="LLaMA-2-7B on WikiText-2 (windows of 4096; dense 5.12): perplexity 6.51 at 50 %, 8.12 at 4:8 and "
    "10.17 at 2:4, as the authors of Wanda report.",
)


class Options(SparsityOptions, OptionalGridOptions):
    block: int = Field(default=128, ge=1, description="Inputs whose weights a sparsity compares with each other.")
    damping: float = Field(default=0.01, ge=0, le=1, description="Share of mean(diag H) added to H's diagonal.")

    @model_validator(mode="after")
    def _refit_without_bits(self) -> Options:
        if self.refit and self.bits is not None:
            raise ValueError("'refit' moves the kept weights off the grid of 'bits': give one of them")
        return self


def traits(parent: frozenset[str], options: Options) -> frozenset[str]:
    """Masked, and quantized if the options have bits."""
    return parent | ({"masked"} if options.bits is None else {"masked", "quantized"})


def compress(linear: Linear, statistics: LinearStatistics, options: Options) -> Masked | Quantized | Unchanged:
    """Sweeps the weight, choosing the mask of each block when the sweep reaches it.

    Raises UserError when M of N:M does not divide the width, when the group size does not and `indivisible` is "error",
    or when the statistics are unfit (see `solvers.damping`).
    """
    if options.sparsity == 0 and options.bits is None:
        return nothing_to_prune()
    weight = linear.weight
    inputs = weight.shape[1]

    def choose(scores: Tensor, kept: Tensor) -> Tensor:
        return keep_largest(scores, *comparison_group(options, scores.numel(), inputs), kept)

    selection = Selection(options.block if options.kept_of is None else options.kept_of[1], choose)
    factor = cholesky_factor(statistics.second_moment, options.damping)
    if options.bits is None:
        swept = sweep(weight, factor, options.block, kept=linear.mask, selection=selection)
        replacement = masked_replacement(weight, swept.weight, swept.mask, statistics, options)
        return replace(replacement, record={**replacement.record, **factor.record})
    width = group_width(options, inputs)
    grid = make_grid(linear, options)
    groups = group_of_inputs(inputs, width, weight.device)
    parameters = fit_groups(grid, weight.masked_fill(factor.dead, 0), width)
    quantizer = Quantizer(grid, width, groups, parameters)
    swept = sweep(weight, factor, options.block, kept=linear.mask, selection=selection, quantizer=quantizer)
    return Quantized(
        *swept.on_grid,
        groups,
        options.bits,
        width,
        options.symmetric,
        record=pruning_record(options, swept.mask) | grid_record(options, width) | factor.record,
    )


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    needs=frozenset({"moments"}),
    adds_traits=frozenset({"masked", "quantized"}),
    incompatible_with=PRUNE,
    traits=traits,
    compress=compress,
)
