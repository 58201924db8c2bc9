"""Wanda: pruning by weights and activations.

Sun et al., A Simple and Effective Pruning Approach for Large Language Models (arXiv 2306.11695), equation 1.
Score |W_ij| |X_j|_2, with |X_j|_2 = sqrt(H_jj) up to a constant, compared within each output's row or within each group
of an N:M pattern. The weights that stay are not changed, unless a refit is requested.
"""

from __future__ import annotations

from dataclasses import replace

from coppice.methods.declaration import LayerMethod, Source
from coppice.methods.incompatible import PRUNE
from coppice.methods.solvers.mask import (
    SparsityOptions,
    comparison_group,
    keep_largest,
    masked_replacement,
    nothing_to_prune,
)
from coppice.methods.solvers.moments import input_power
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.replacements import Masked, Unchanged

SOURCE = Source(
    "A Simple and Effective Pruning Approach for Large Language Models",
    "arXiv 2306.11695",
    "equation 1: |W_ij| |X_j|_2",
    claim="LLaMA-2-7B on WikiText-2 (windows of 4096; dense 5.12): perplexity 6.42 at 50 %, 7.97 at 4:8 and "
    "11.02 at 2:4.",
)


class Options(SparsityOptions):
    pass


def compress(linear: Linear, statistics: LinearStatistics, options: Options) -> Masked | Unchanged:
    """Prunes the smallest |W_ij| sqrt(H_jj) of each comparison group.

    Raises UserError when M of N:M does not divide the width, or when the statistics are unfit (see `solvers.moments`).
    """
    if options.sparsity == 0:
        return nothing_to_prune()
    weight = linear.weight
    width = weight.shape[1]
    power = input_power(statistics.second_moment)
    scores = weight.abs() * power.sqrt().to(weight.dtype)
    mask = keep_largest(scores, *comparison_group(options, width, width), linear.mask)
    replacement = masked_replacement(weight, weight.masked_fill(~mask, 0), mask, statistics, options)
    return replace(replacement, record={**replacement.record, "dead_inputs": int((power == 0).sum())})


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    needs=frozenset({"moments"}),
    adds_traits=frozenset({"masked"}),
    incompatible_with=PRUNE,
    compress=compress,
)
