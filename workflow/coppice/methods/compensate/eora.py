"""EoRA: a low-rank correction of a compressed linear, fitted to its error in the eigenspace of its inputs.

Liu et al., EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation (arXiv
2410.21271), equations 2 to 4. dW = W - W^; H = Q Lambda Q^T; dW Q Lambda^(1/2) = U Sigma V^T;
second first = U_r Sigma_r V_r^T Lambda^(-1/2) Q^T = U_r U_r^T dW (see `solvers.truncation`);
y = W^ x + second first x, first [r, n], second [m, r].
"""

from __future__ import annotations

from pydantic import Field

from coppice.methods.declaration import LayerMethod, Source
from coppice.methods.incompatible import COMPENSATE
from coppice.methods.options import TargetOptions
from coppice.methods.solvers.truncation import truncate_outputs
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.replacements import LowRankCorrection

SOURCE = Source(
    "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
    "arXiv 2410.21271",
    "equations 2 to 4",
    claim="LLaMA-3-8B on WikiText-2 (dense 6.13), rank 128: perplexity 11.07 instead of 12.32 with 2:4 by "
    "SparseGPT, 6.80 instead of 7.00 with GPTQ at 4 bits, 10.06 instead of 15.64 at 3.",
)


class Options(TargetOptions):
    TARGET = "rank"
    RULES = frozenset({"uniform", "water-filling"})

    rank: int = Field(ge=1, description="Rank of the correction, at most that of the linear.")


def compress(linear: Linear, statistics: LinearStatistics, options: Options) -> LowRankCorrection:
    """The rank-r correction with the least E|(dW - second first) x|^2, dW = linear.reference - linear.weight.

    Raises UserError when a weight holds values that are not finite, or when the statistics are unfit (see
    `solvers.truncation`).
    """
    assert linear.reference is not None  # as every compensate method is given one
    residual = linear.reference - linear.weight
    truncation = truncate_outputs(residual, options.rank, statistics.second_moment)
    record = {
        "rank_asked": options.rank,
        "rank": len(truncation.first),
        "truncation_error": truncation.error,
    }
    return LowRankCorrection(truncation.first, truncation.second, record=record)


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    needs=frozenset({"moments"}),
    adds_traits=frozenset({"compensated"}),
    incompatible_with=COMPENSATE,
    compress=compress,
)
