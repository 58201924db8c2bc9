"""Low-rank factors that are best for the inputs a linear really sees.

Sources: Wang et al., SVD-LLM (arXiv 2403.07378), theorem 3.2; Wang et al., SVD-LLM V2 (arXiv 2503.12340), theorem 3.1,
for the square root by eigenvectors.

For a scaling S [n, n] with S S^T = H = E[x x^T] and M S = U Sigma V^T, the rank-k matrix
M_k = U_k Sigma_k V_k^T S^-1 minimises E|(M - M_k) x|^2 = tr((M - M_k) H (M - M_k)^T), whose minimum is
sum_{i > k} sigma_i^2. S = I gives the plain truncated SVD.

As U_k^T M S = Sigma_k V_k^T, M_k = U_k U_k^T M. This form needs no inverse: it stays exact where H is singular or
nearly so, and treats inputs that the calibration did not see by the same projection instead of dropping them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from coppice.errors import UserError
from coppice.lazy import torch
from coppice.methods.base import Factors, LayerOptions, Unchanged
from coppice.methods.solvers.budget import share_of
from coppice.methods.solvers.moments import second_moment

if TYPE_CHECKING:
    from torch import Tensor


class RankOptions(LayerOptions):
    """The rank of the factors: exactly one of keep and rank."""

    keep: float | None = Field(
        default=None, gt=0, le=1, description="Share of the linear's parameters that its factors have, at most."
    )
    rank: int | None = Field(default=None, ge=1, description="Rank of every linear.")
    align: int = Field(
        default=1,
        ge=1,
        description="Round the rank down to a multiple of this; a rank below one multiple stays as it is.",
    )

    @model_validator(mode="after")
    def _one_budget(self) -> RankOptions:
        if (self.keep is None) == (self.rank is None):
            raise ValueError("give exactly one of 'keep' and 'rank'")
        return self


@dataclass(frozen=True)
class Truncation:
    """first: [k, n] and second: [m, k], M_k = second first. error: sum_{i > k} sigma_i^2 / sum_i sigma_i^2."""

    first: Tensor
    second: Tensor
    error: float


def square_root(moment: Tensor) -> Tensor:
    """S = Q Lambda^(1/2) [n, n] of H = Q Lambda Q^T [n, n], in float64; eigenvalues that rounding left below 0 are 0.

    Raises UserError when an eigenvalue is more negative than rounding explains (10 n eps lambda_max, with eps that of
    float32, in which second moments are summed), or when the statistics are unfit (see `moments`).
    """
    moment = second_moment(moment)
    values, vectors = torch.linalg.eigh(moment)
    if values[0] < -10 * len(values) * torch.finfo(torch.float32).eps * values[-1]:
        raise UserError(
            "The second moment of this layer's inputs is not positive semidefinite (its smallest eigenvalue is "
            f"{values[0]:.3g}, its largest {values[-1]:.3g}): the statistics are damaged, so calibrate again."
        )
    return vectors * values.clamp(min=0).sqrt()


def truncate(matrix: Tensor, rank: int, scaling: Tensor | None) -> Truncation:
    """The best approximation of M [m, n] of rank k = min(rank, m, n) under the scaling S [n, n] (None: I), in M's type.

    The norm of each of the k terms is shared equally between the factors, so that neither overflows a narrow type.
    Raises UserError when M holds values that are not finite.
    """
    if not torch.isfinite(matrix).all():
        raise UserError("This layer's weights hold values that are not finite, so they cannot be factorized.")
    scaled = matrix if scaling is None else matrix @ scaling.to(matrix.dtype)
    left, values, _ = torch.linalg.svd(scaled, full_matrices=False)
    left = left[:, :rank]
    images = left.T @ matrix
    roots = images.norm(dim=1, keepdim=True).sqrt()
    first = images / roots.clamp(min=torch.finfo(roots.dtype).tiny)
    power = values.double().square()
    total = power.sum().item()
    error = power[rank:].sum().item() / total if total > 0 else 0.0
    return Truncation(first, left * roots.T, error)


def chosen_rank(options: RankOptions, rows: int, columns: int) -> int:
    """The asked rank, or floor(keep m n / (m + n)), rounded down to a multiple of align, at least 1."""
    rank = options.rank or max(share_of(options.keep, rows * columns / (rows + columns)), 1)
    return rank // options.align * options.align or rank


def break_even(rows: int, columns: int) -> int:
    """floor(m n / (m + n)): factors of this rank or more save nothing."""
    return rows * columns // (rows + columns)


def stays_dense(rank: int, rows: int, columns: int) -> Unchanged:
    """The linear whose rank reaches break-even."""
    reason = f"Rank {rank} reaches {break_even(rows, columns)}, where factors of {rows} x {columns} save no parameters."
    return Unchanged(record={"unchanged": reason, "rank_asked": rank, "keep": 1.0})


def factors(truncation: Truncation, rank_asked: int) -> Factors:
    """The truncation as a replacement, with its rank, its share of the parameters and its error on record."""
    first, second = truncation.first, truncation.second
    rank, (rows, columns) = len(first), (len(second), first.shape[1])
    record = {
        "rank_asked": rank_asked,
        "rank": rank,
        "keep": rank * (rows + columns) / (rows * columns),
        "truncation_error": truncation.error,
    }
    return Factors(first, second, record=record)
