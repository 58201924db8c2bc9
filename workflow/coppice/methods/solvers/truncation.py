"""Low-rank factors that are best for the inputs a linear really sees.

Sources: Wang et al., SVD-LLM (arXiv 2403.07378), theorem 3.2; Wang et al., SVD-LLM V2 (arXiv 2503.12340), theorem 3.1,
for the square root by eigenvectors.

For a scaling S [n, n] with S S^T = H = E[x x^T] and M S = U Sigma V^T, the rank-k matrix
M_k = U_k Sigma_k V_k^T S^-1 minimises E|(M - M_k) x|^2 = tr((M - M_k) H (M - M_k)^T), whose minimum is
sum_{i > k} sigma_i^2. S = I gives the plain truncated SVD.

As U_k^T M S = Sigma_k V_k^T, M_k = U_k U_k^T M. This form needs no inverse: it stays exact where H is singular or
nearly so, and treats inputs that the calibration did not see by the same projection instead of dropping them. U_k are
also the first eigenvectors of M H M^T, the second moment of the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from coppice.errors import UserError
from coppice.lazy import torch
from coppice.methods.options import TargetOptions
from coppice.methods.solvers.moments import compute_once_for_shared, second_moment
from coppice.methods.solvers.selection import share_of
from coppice.models.replacements import LowRank, Unchanged
from coppice.records.base import Json, JsonMapping

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST_DAMPING = 1.0


class RankOptions(TargetOptions):
    """The rank of the factors: exactly one of keep and rank."""

    TARGET: ClassVar[str] = "keep"
    RULES: ClassVar[frozenset[str]] = frozenset({"uniform", "sensitivity", "svd-llm-v2", "water-filling", "knapsack"})

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
        if self.rank is not None and self.allocation.by != "uniform":
            raise ValueError(
                f"a rank is the same for every linear, and the allocation {self.allocation.by!r} spreads a target: "
                "give 'keep' instead of 'rank', or leave the allocation uniform"
            )
        return self


@dataclass(frozen=True)
class Truncation:
    """first: [k, n] and second: [m, k], M_k = second first. error: sum_{i > k} sigma_i^2 / sum_i sigma_i^2."""

    first: Tensor
    second: Tensor
    error: float


@compute_once_for_shared
def square_root(moment: Tensor) -> Tensor:
    """S = Q Lambda^(1/2) [n, n] of H = Q Lambda Q^T [n, n], in float64; eigenvalues that rounding left below 0 are 0.

    Computed once for linears that share an input (see `moments`). Raises UserError when an eigenvalue is more negative
    than rounding explains (10 n eps lambda_max, with eps that of float32, in which second moments are summed), or when
    the statistics are unfit (see `moments`).
    """
    moment = second_moment(moment)
    values, vectors = torch.linalg.eigh(moment)
    _require_semidefinite(values, "inputs", values[-1])
    return vectors * values.clamp(min=0).sqrt()


@compute_once_for_shared
def cholesky_root(moment: Tensor) -> tuple[Tensor, float]:
    """L [n, n], lower triangular with L L^T = H + damping mean(diag H) I in float64, and the damping.

    The damping is 0 where H [n, n] has such a factor; otherwise it grows tenfold from 1e-8, to at most 1. Computed once
    for linears that share an input (see `moments`). Raises UserError when damping does not help, or when the statistics
    are unfit (see `moments`).
    """
    moment = second_moment(moment)
    mean = moment.diagonal().mean()
    damping = 0.0
    while True:
        damped = moment.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return lower, damping
        if damping >= _LARGEST_DAMPING:
            raise UserError(
                "The second moment of this layer's inputs is not positive semidefinite, even when damped by its mean "
                "diagonal: the statistics are damaged, so calibrate again."
            )
        damping = 10 * damping or 1e-8


def truncate(matrix: Tensor, rank: int, scaling: Tensor | None) -> Truncation:
    """The best approximation of M [m, n] of rank k = min(rank, m, n) under the scaling S, in M's type.

    scaling: S [n, n], the diagonal [n] of a diagonal S, or None for I. The norm of each of the k terms is shared
    equally between the factors, so that neither overflows a narrow type; the first terms are those of a smaller rank.
    Raises UserError when M holds values that are not finite.
    """
    require_finite(matrix)
    if scaling is None:
        scaled = matrix
    elif scaling.dim() == 1:
        scaled = matrix * scaling.to(matrix.dtype)
    else:
        scaled = matrix @ scaling.to(matrix.dtype)
    left, values, _ = torch.linalg.svd(scaled, full_matrices=False)
    return _projection(matrix, left[:, :rank], values.double().square())


def truncate_outputs(matrix: Tensor, rank: int, moment: Tensor) -> Truncation:
    """`truncate` under S S^T = H [n, n], by eigenvectors of the smaller of M H M^T [m, m] and H.

    Raises UserError when M holds values that are not finite, or when the statistics are unfit (see `square_root`).
    """
    require_finite(matrix)
    rows, columns = matrix.shape
    if rows > columns:
        return truncate(matrix, rank, square_root(moment))
    power, vectors = torch.linalg.eigh(outputs_moment(matrix, moment))
    _require_semidefinite(power, "outputs", _largest_power(matrix, moment))
    left = vectors.flip(1)[:, :rank].to(matrix.dtype)
    return _projection(matrix, left, power.flip(0).clamp(min=0))


def outputs_spectrum(matrix: Tensor, moment: Tensor) -> Tensor:
    """sigma_1^2, sigma_2^2, .. [min(m, n)] of M S with S S^T = H [n, n], in float64.

    Raises UserError when M holds values that are not finite, or when the statistics are unfit (see `square_root`).
    """
    require_finite(matrix)
    rows, columns = matrix.shape
    if rows > columns:
        return torch.linalg.svdvals(matrix @ square_root(moment).to(matrix.dtype)).double().square()
    power = torch.linalg.eigvalsh(outputs_moment(matrix, moment))
    _require_semidefinite(power, "outputs", _largest_power(matrix, moment))
    return power.flip(0).clamp(min=0)


def outputs_moment(matrix: Tensor, moment: Tensor) -> Tensor:
    """M H M^T [m, m] in float64: the second moment of the outputs."""
    wide = matrix.double()
    return wide @ second_moment(moment) @ wide.T


def _largest_power(matrix: Tensor, moment: Tensor) -> Tensor:
    """tr(H) |M|_F^2: no eigenvalue of M H M^T is larger, whatever the signs of those of H."""
    return moment.diagonal().double().sum() * matrix.double().square().sum()


def _require_semidefinite(values: Tensor, what: str, largest: Tensor) -> None:
    """Raises UserError when one of the eigenvalues, in rising order, is more negative than rounding explains."""
    if values[0] < -10 * len(values) * torch.finfo(torch.float32).eps * largest:
        raise UserError(
            f"The second moment of this layer's {what} is not positive semidefinite (its smallest eigenvalue is "
            f"{values[0]:.3g}, its largest {values[-1]:.3g}): the statistics are damaged, so calibrate again."
        )


def require_finite(matrix: Tensor) -> None:
    """Raises UserError when an entry is not finite."""
    if not torch.isfinite(matrix).all():
        raise UserError(
            "This layer's weights hold values that are not finite, so they cannot be factorized: check the parent."
        )


def _projection(matrix: Tensor, left: Tensor, power: Tensor) -> Truncation:
    """U U^T M for orthonormal U [m, k]; power: the squares of all singular values, from the largest down."""
    images = left.T @ matrix
    # In float64, where no square leaves the range of numbers.
    roots = images.double().norm(dim=1, keepdim=True).sqrt()
    first = (images / roots.clamp(min=torch.finfo(roots.dtype).tiny)).to(matrix.dtype)
    total = power.sum().item()
    error = power[left.shape[1] :].sum().item() / total if total > 0 else 0.0
    return Truncation(first, (left * roots.T).to(matrix.dtype), error)


def chosen_rank(options: RankOptions, rows: int, columns: int) -> int:
    """The requested rank, or floor(keep m n / (m + n)), rounded down to a multiple of align, at least 1."""
    if options.rank is not None:
        return align_rank(options.rank, options.align)
    assert options.keep is not None  # exactly one of both is given
    return align_rank(share_of(options.keep, rows * columns / (rows + columns)), options.align)


def align_rank(rank: int, align: int) -> int:
    """The rank, at least 1, rounded down to a multiple of align; below one multiple it stays as it is."""
    rank = max(rank, 1)
    return rank // align * align or rank


def break_even(rows: int, columns: int) -> int:
    """floor(m n / (m + n)): factors of this rank or more save nothing."""
    return rows * columns // (rows + columns)


def stays_dense(rank: int, rows: int, columns: int, record: JsonMapping | None = None) -> Unchanged:
    """The linear whose rank reaches break-even; `record` is added to its record."""
    reason = f"Rank {rank} reaches {break_even(rows, columns)}, where factors of {rows} x {columns} save no parameters."
    return Unchanged(record={"unchanged": reason, "rank_asked": rank, "keep": 1.0, **(record or {})})


def factors(truncation: Truncation, requested: int, record: JsonMapping | None = None) -> LowRank:
    """The truncation as a replacement, with its rank, its share of the parameters and its error on record.

    `record` is added.
    """
    first, second = truncation.first, truncation.second
    return LowRank(first, second, record={**factors_record(truncation, requested), **(record or {})})


def factors_record(truncation: Truncation, requested: int) -> Json:
    rank, columns = truncation.first.shape
    rows = len(truncation.second)
    return {
        "rank_asked": requested,
        "rank": rank,
        "keep": rank * (rows + columns) / (rows * columns),
        "truncation_error": truncation.error,
    }
