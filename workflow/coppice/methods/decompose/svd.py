"""Truncated singular value decomposition of the weight alone.

Eckart and Young, The approximation of one matrix by another of lower rank (doi 10.1007/BF02288367).
W = U Sigma V^T; first = Sigma_k^(1/2) V_k^T [k, n], second = U_k Sigma_k^(1/2) [m, k].
"""

from __future__ import annotations

from coppice.methods.declaration import LayerMethod, Source
from coppice.methods.incompatible import DECOMPOSE
from coppice.methods.solvers.truncation import (
    RankOptions,
    break_even,
    chosen_rank,
    factors,
    stays_dense,
    truncate,
)
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.replacements import LowRank, Unchanged

SOURCE = Source(
    "The approximation of one matrix by another of lower rank",
    "doi 10.1007/BF02288367",
    "W_k = U_k Sigma_k V_k^T",
    "A baseline: LLaMA-7B with 20 % of its parameters removed has a perplexity of 20061 on WikiText-2 (dense: 5.68), "
    "as the authors of SVD-LLM report.",
)


class Options(RankOptions):
    pass


def compress(linear: Linear, statistics: LinearStatistics | None, options: Options) -> LowRank | Unchanged:
    """The best rank-k factors in the Frobenius norm; a linear whose rank reaches break-even stays dense.

    Raises UserError when the weight holds values that are not finite.
    """
    shape = linear.weight.shape
    rank = chosen_rank(options, *shape)
    if rank >= break_even(*shape):
        return stays_dense(rank, *shape)
    return factors(truncate(linear.weight, rank, scaling=None), rank)


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    adds_traits=frozenset({"factorized"}),
    incompatible_with=DECOMPOSE,
    compress=compress,
)
