"""FWSVD: singular value decomposition weighted by the Fisher information of each input.

Hsu et al., Language model compression with weighted low-rank factorization (arXiv 2207.00112).
F_ij = mean over batches of (dL / dW_ij)^2, the empirical Fisher information; d_j = sqrt(sum_i F_ij) [n];
W diag(d) = U Sigma V^T; W_k = U_k Sigma_k V_k^T diag(d)^-1 = U_k U_k^T W (see `solvers.truncation`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from coppice.errors import UserError
from coppice.lazy import torch
from coppice.methods.declaration import LayerMethod, Resources, Source
from coppice.methods.incompatible import DECOMPOSE
from coppice.methods.solvers.truncation import (
    RankOptions,
    break_even,
    chosen_rank,
    factors,
    stays_dense,
    truncate,
)
from coppice.models.contracts import Decoder, Linear, LinearStatistics
from coppice.models.replacements import LowRank, Unchanged

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Source(
    "Language model compression with weighted low-rank factorization",
    "arXiv 2207.00112",
    "d_j = sqrt(sum_i F_ij), W diag(d) = U Sigma V^T",
    "LLaMA-7B with 20 % of its parameters removed has a perplexity of 1727 on WikiText-2 (dense: 5.68), as the authors "
    "of SVD-LLM report.",
)


class Options(RankOptions):
    batch: int = Field(
        default=1, ge=1, description="Calibration windows whose mean loss one gradient, squared afterwards, is of."
    )


def plan(decoder: Decoder, options: Options) -> dict[str, Tensor]:
    """d [n] in float64 of each linear."""
    power: dict[str, Tensor] = {}
    batches = 0
    for gradients in decoder.gradients(options.batch):
        batches += 1
        for name, gradient in gradients.items():
            square = torch.linalg.vector_norm(gradient, dim=0, dtype=torch.float64).square()
            power[name] = power[name] + square if name in power else square
    return {name: (sum_of_squares / batches).sqrt() for name, sum_of_squares in power.items()}


def compress(linear: Linear, statistics: LinearStatistics | None, options: Options) -> LowRank | Unchanged:
    """The rank-k factors with the least sum_ij d_j^2 (W - W_k)_ij^2; from break-even on the linear stays dense.

    Inputs without importance (d_j = 0) do not influence U_k; their columns are projected on it like the others.
    Raises UserError when the weight or the importance holds values that are not finite, or when no input has any.
    """
    shape = linear.weight.shape
    rank = chosen_rank(options, *shape)
    if rank >= break_even(*shape):
        return stays_dense(rank, *shape)
    importance = linear.plan
    if not torch.isfinite(importance).all():
        raise UserError("The gradients of this layer's weights are not finite: calibrate in a wider dtype.")
    if not importance.any():
        raise UserError(
            "The gradients of this layer's weights are zero on every window, so nothing indicates which inputs matter: "
            "calibrate on text that reaches this layer."
        )
    record = {"inputs_without_importance": int((importance == 0).sum())}
    # Fisher information is tiny; its scale does not matter, and a narrow type could lose it.
    return factors(truncate(linear.weight, rank, importance / importance.max()), rank, record)


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    needs=frozenset({"windows"}),
    adds_traits=frozenset({"factorized"}),
    incompatible_with=DECOMPOSE,
    compress=compress,
    plan=plan,
    resources=Resources(reach="model"),
)
