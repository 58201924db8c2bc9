"""SVD-LLM: singular value decomposition, truncated where the inputs feel it least.

Wang et al., SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression (arXiv
2403.07378), theorem 3.2, with the square root by eigenvectors of SVD-LLM V2 (arXiv 2503.12340), theorem 3.1.
W S = U Sigma V^T with S S^T = H; W_k = U_k Sigma_k V_k^T S^-1 = U_k U_k^T W (see `solvers.truncation`).
"""

from __future__ import annotations

from coppice.methods.base import Factors, Linear, LinearStatistics, Source, Unchanged
from coppice.methods.solvers.truncation import (
    RankOptions,
    break_even,
    chosen_rank,
    factors,
    square_root,
    stays_dense,
    truncate,
)

SOURCE = Source(
    "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
    "arXiv 2403.07378",
    "theorem 3.2: W_k = U_k Sigma_k V_k^T S^-1, S S^T = E[x x^T]",
)
NEEDS = frozenset({"moments"})
MAKES = frozenset({"factorized"})
REFUSES = {
    "quantized": "because packed integers have no factors; decompose before quantizing",
    "factorized": "because a linear that is factors already would be factorized twice; choose a smaller keep instead",
    "masked": "because factors fill the pruned places again; decompose before pruning",
    "compensated": "because the compensation was fitted to the weights as they are; decompose before compensating",
}


class Options(RankOptions):
    pass


def compress(linear: Linear, statistics: LinearStatistics, options: Options) -> Factors | Unchanged:
    """The rank-k factors with the least E|(W - W_k) x|^2; a linear whose rank reaches break-even stays dense.

    Raises UserError when the weight holds values that are not finite, or when the statistics are unfit (see
    `solvers.truncation`).
    """
    shape = linear.weight.shape
    rank = chosen_rank(options, *shape)
    if rank >= break_even(*shape):
        return stays_dense(rank, *shape)
    return factors(truncate(linear.weight, rank, square_root(statistics.second_moment)), rank)
