"""Truncated singular value decomposition of the weight alone.

Eckart and Young, The approximation of one matrix by another of lower rank (doi 10.1007/BF02288367).
W = U Sigma V^T; first = Sigma_k^(1/2) V_k^T [k, n], second = U_k Sigma_k^(1/2) [m, k].
"""

from __future__ import annotations

from coppice.methods.base import Factors, Linear, LinearStatistics, Source, Unchanged
from coppice.methods.solvers.truncation import RankOptions, break_even, chosen_rank, factors, stays_dense, truncate

SOURCE = Source(
    "The approximation of one matrix by another of lower rank", "doi 10.1007/BF02288367", "W_k = U_k Sigma_k V_k^T"
)
NEEDS = frozenset()
MAKES = frozenset({"factorized"})
REFUSES = {
    "quantized": "because packed integers have no factors; decompose before quantizing",
    "factorized": "because a linear that is factors already would be factorized twice; choose a smaller keep instead",
    "masked": "because factors fill the pruned places again; decompose before pruning",
    "compensated": "because the compensation was fitted to the weights as they are; decompose before compensating",
}


class Options(RankOptions):
    pass


def compress(linear: Linear, statistics: LinearStatistics | None, options: Options) -> Factors | Unchanged:
    """The best rank-k factors in the Frobenius norm; a linear whose rank reaches break-even stays dense.

    Raises UserError when the weight holds values that are not finite.
    """
    shape = linear.weight.shape
    rank = chosen_rank(options, *shape)
    if rank >= break_even(*shape):
        return stays_dense(rank, *shape)
    return factors(truncate(linear.weight, rank, scaling=None), rank)
