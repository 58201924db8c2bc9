"""SVD-LLM: truncation-aware (whitened) singular value decomposition.

Wang et al., SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression (arXiv
2403.07378), theorem 3.2, with the square root by eigenvectors of SVD-LLM V2 (arXiv 2503.12340), theorem 3.1.
W S = U Sigma V^T with S S^T = H; W_k = U_k Sigma_k V_k^T S^-1 = U_k U_k^T W (see `solvers.truncation`).

The closed-form update of the first versions of 2403.07378: with H' = E[x' x'^T] of the inputs after the compressed
blocks and W_k = A B, B [k, n] stays and A [m, k] becomes the one with the least E|(W - A B) x'|^2,
A <- W H' B^T (B H' B^T)^-1. On H' = H this changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from coppice.lazy import torch
from coppice.methods.declaration import LayerMethod, Source
from coppice.methods.incompatible import DECOMPOSE
from coppice.methods.solvers.loss import relative_error
from coppice.methods.solvers.moments import second_moment
from coppice.methods.solvers.truncation import (
    RankOptions,
    Truncation,
    break_even,
    cholesky_root,
    chosen_rank,
    factors,
    stays_dense,
    truncate,
    truncate_outputs,
)
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.replacements import LowRank, Unchanged
from coppice.records.base import Json

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Source(
    "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
    "arXiv 2403.07378",
    "theorem 3.2: W_k = U_k Sigma_k V_k^T S^-1, S S^T = E[x x^T]",
    "LLaMA-7B with 20 % of its parameters removed has a perplexity of 7.94 on WikiText-2 (dense: 5.68); an independent "
    "reproduction finds 7.88.",
)


class Options(RankOptions):
    whitening: Literal["eigen", "cholesky"] = Field(
        default="eigen",
        description="The square root of E[x x^T]: by eigenvectors, exact also where inputs depend on each other; or "
        "the paper's Cholesky factor, which needs damping there.",
    )
    update: bool = Field(
        default=False,
        description="Refit the second factor to the inputs after the blocks already compressed, in closed form.",
    )

    @model_validator(mode="after")
    def _update_needs_the_parents_inputs(self) -> Options:
        if self.update and self.sequential:
            raise ValueError(
                "'update' truncates on the parent's inputs and refits on those after the compressed blocks, and "
                "'sequential' does both on the latter, where a refit changes nothing: give one of them"
            )
        return self

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"sequential_moments"} if self.update else frozenset())


def compress(linear: Linear, statistics: LinearStatistics, options: Options) -> LowRank | Unchanged:
    """The rank-k factors with the least E|(W - W_k) x|^2; a linear whose rank reaches break-even stays dense.

    Raises UserError when the weight holds values that are not finite, or when the statistics are unfit (see
    `solvers.truncation`).
    """
    weight, moment = linear.weight, statistics.second_moment
    rank = chosen_rank(options, *weight.shape)
    if rank >= break_even(*weight.shape):
        return stays_dense(rank, *weight.shape)
    record: Json = {}
    if options.whitening == "cholesky":
        root, record["damping"] = cholesky_root(moment)
        truncation = truncate(weight, rank, root)
    else:
        truncation = truncate_outputs(weight, rank, moment)
    if options.update:
        assert linear.sequential is not None  # `update` needs it
        sequential = linear.sequential.second_moment
        before = relative_error(weight - truncation.second @ truncation.first, weight, sequential)
        truncation = Truncation(
            truncation.first, update_second_factor(weight, truncation, sequential), truncation.error
        )
        after = relative_error(weight - truncation.second @ truncation.first, weight, sequential)
        record |= {"behind_error_before_update": before, "behind_error": after}
    return factors(truncation, rank, record)


def update_second_factor(weight: Tensor, truncation: Truncation, moment: Tensor) -> Tensor:
    """The second factor A [m, k] with the least tr((W - A B) H' (W - A B)^T), H' [n, n], in W's type.

    Computed as A + (W - A B) H' B^T (B H' B^T)^+, which is W H' B^T (B H' B^T)^-1 where that inverse exists; where the
    inputs leave part of A without effect, that part stays as it is. Raises UserError when H' is unfit (see
    `solvers.moments`).
    """
    # What the sums of the moment leave open, relative to the terms of a sum.
    rounding = torch.finfo(moment.dtype).eps
    moment = second_moment(moment)
    first, second = truncation.first.double(), truncation.second.double()
    passed = first @ moment
    power = passed @ first.T
    # Each direction by its own power, which is nothing where it is but the rounding of what cancels in it, or where its
    # outputs are lost in the rounding of the strongest direction's factors.
    sizes = power.diagonal()
    terms = (first.abs() @ moment.diagonal().sqrt()).square()
    outputs = sizes * second.square().sum(dim=0)
    lost = (len(moment) * torch.finfo(weight.dtype).eps) ** 2 * outputs.max()
    inverse = torch.where((sizes > rounding * terms) & (outputs > lost), sizes, torch.inf).rsqrt()
    values, vectors = torch.linalg.eigh(inverse[:, None] * power * inverse)
    seen = values > len(moment) * rounding * values[-1].clamp(min=0)
    basis = inverse[:, None] * vectors[:, seen] / values[seen].sqrt()
    residual = (weight.double() - second @ first) @ passed.T
    return (second + residual @ basis @ basis.T).to(weight.dtype)


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    needs=frozenset({"moments"}),
    adds_traits=frozenset({"factorized"}),
    incompatible_with=DECOMPOSE,
    compress=compress,
)
