"""Magnitude pruning: prune the weights of smallest magnitude.

Han et al., Learning both Weights and Connections for Efficient Neural Networks (arXiv 1506.02626), section 3.
Score |W_ij|, compared within the whole matrix, within each output's row, or within each group of an N:M pattern.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from coppice.methods.declaration import LayerMethod, Source
from coppice.methods.incompatible import PRUNE
from coppice.methods.solvers.mask import (
    SparsityOptions,
    comparison_group,
    keep_largest,
    masked_replacement,
    nothing_to_prune,
)
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.replacements import Masked, Unchanged

SOURCE = Source(
    "Learning both Weights and Connections for Efficient Neural Networks",
    "arXiv 1506.02626",
    "section 3: |W_ij|",
    claim="LLaMA-2-7B on WikiText-2 (windows of 4096; dense 5.12): perplexity 14.89 at 50 %, 16.48 at 4:8 and "
    "54.59 at 2:4, as the authors of Wanda report.",
)


class Options(SparsityOptions):
    scope: Literal["layer", "row"] = Field(
        default="layer", description="Which weights a sparsity compares: the whole matrix, or each output's row."
    )

    @model_validator(mode="after")
    def _scope_without_pattern(self) -> Options:
        # The default is let through: an effective study writes it out.
        if self.pattern is not None and self.scope != "layer":
            raise ValueError("'scope' requires 'sparsity': a pattern compares the inputs of each of its groups")
        return self


def compress(linear: Linear, statistics: LinearStatistics | None, options: Options) -> Masked | Unchanged:
    """Prunes the smallest |W_ij| of each comparison group.

    Raises UserError when M of N:M does not divide the width, or when a refit finds the statistics unfit (see
    `solvers.damping`).
    """
    if options.sparsity == 0:
        return nothing_to_prune()
    weight = linear.weight
    width = weight.shape[1]
    size, count = comparison_group(options, weight.numel() if options.scope == "layer" else width, width)
    mask = keep_largest(weight.abs(), size, count, linear.mask)
    return masked_replacement(weight, weight.masked_fill(~mask, 0), mask, statistics, options)


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    adds_traits=frozenset({"masked"}),
    incompatible_with=PRUNE,
    compress=compress,
)
