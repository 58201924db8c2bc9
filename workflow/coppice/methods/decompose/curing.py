"""CURing: CUR decomposition of a linear into some of its own columns and rows, and a small matrix that links them.

Park and Moon, CURing: Large Models Compression via CUR Decomposition (arXiv 2501.04211). Rows I and columns J of W
[m, n] are picked by the discrete empirical interpolation method on S = |W| a, a_j = sqrt(H_jj) the root mean square of
input j, from the r leading singular vectors of S. C = W[:, J] [m, r], R = W[I, :] [r, n], U [r, r]; y = C (U (R x)).

Link of the paper: U = C^+ W R^+, the least |W - C U R|_F. Link on the data: the least tr((W - C U R) H (W - C U R)^T),
whose gradient by U vanishes where C^T C U R H R^T = C^T W H R^T, so that U = C^+ W H R^T (R H R^T)^+.

A linear costs m r + r^2 + r n parameters and as many multiply-adds per token, instead of m n.
"""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from coppice.errors import UserError
from coppice.lazy import torch
from coppice.methods.declaration import LayerMethod, Resources, Source
from coppice.methods.incompatible import DECOMPOSE
from coppice.methods.options import LayerOptions
from coppice.methods.solvers.moments import input_power, second_moment
from coppice.methods.solvers.selection import lowest, share_of
from coppice.methods.solvers.truncation import require_finite
from coppice.models.contracts import Decoder, Linear, LinearStatistics
from coppice.models.replacements import CUR, Unchanged

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Source(
    "CURing: Large Models Compression via CUR Decomposition",
    "arXiv 2501.04211",
    "W = C U R with U = C^+ W R^+, rows and columns by DEIM on |W| |x|",
    "The authors compress Llama-3.1-8B to 7.32 billion parameters (9 % fewer) in 129 seconds.",
)
ROLES = ("q", "k", "gate")
RANK = 256


class Options(LayerOptions):
    """At most one of rank and keep. `target_modules` left out means q_proj, k_proj and gate_proj, as in the paper."""

    rank: int | None = Field(
        default=None,
        ge=1,
        description=f"Rows and columns kept of every linear; {RANK}, the paper's, when keep is left out as well.",
    )
    keep: float | None = Field(
        default=None, gt=0, le=1, description="Share of the linear's parameters that rows, columns and link have."
    )
    blocks: int | None = Field(
        default=None,
        ge=1,
        description="Only this many blocks, those that turn the last token's hidden state the least; never the first "
        "and the last. All blocks when left out.",
    )
    importance: Literal["wanda", "weight"] = Field(
        default="wanda",
        description="What rows and columns are picked by: weights times the root mean square of their inputs, or "
        "weights alone.",
    )
    link: Literal["paper", "data"] = Field(
        default="paper",
        description="What the link is best for: the weights (`paper`) or the outputs on the calibration text (`data`).",
    )

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | (frozenset() if self.blocks is None else frozenset({"blocks"}))

    @model_validator(mode="after")
    def _one_budget(self) -> Options:
        if self.rank is not None and self.keep is not None:
            raise ValueError("give at most one of 'rank' and 'keep'")
        return self


def plan(decoder: Decoder, options: Options) -> dict[str, bool]:
    """For each linear whether its block is among those to compress.

    These have the least angular distance arccos(cos(h_in, h_out)) / pi between input and output, of blocks 1 .. L - 2.
    Raises UserError when they are fewer than requested, or when a distance is not finite.
    """
    if options.blocks is None:
        return dict.fromkeys(decoder.names, True)
    distance = decoder.tensors("blocks")["angular_distance"]
    inner = distance[1:-1]
    if options.blocks > len(inner):
        raise UserError(
            f"curing is to decompose {options.blocks} blocks, but this model has {len(inner)} between its first and "
            "its last; lower blocks."
        )
    if not torch.isfinite(inner).all():
        raise UserError("The angular distance of a block is not finite; check the model's weights and calibrate again.")
    chosen = {index + 1 for index in lowest(inner, options.blocks)}
    return {name: _block(name) in chosen for name in decoder.names}


def compress(linear: Linear, statistics: LinearStatistics, options: Options) -> CUR | Unchanged:
    """Rows, columns and their link; a linear that is not chosen, or whose rank reaches break-even, stays dense.

    Raises UserError when the weight holds values that are not finite, or when the statistics are unfit (see
    `solvers.moments`).
    """
    weight = linear.weight
    rank = chosen_rank(options, *weight.shape)
    if reason := _stays_dense(linear, rank, options):
        return Unchanged(record={"unchanged": reason, "rank_asked": rank, "keep": 1.0})
    require_finite(weight)
    scores = weight.double().abs()
    if options.importance == "wanda":
        scores = scores * input_power(statistics.second_moment).sqrt()
    rows, columns = select(scores, rank)
    record = {"rank_asked": rank, "rank": rank, "keep": parameters(rank, *weight.shape) / weight.numel()}
    link = paper_link(weight, rows, columns)
    if options.link == "data":
        link, record["directions"] = data_link(weight, rows, columns, link, statistics.second_moment)
    return CUR(weight[rows], link.to(weight.dtype), weight[:, columns], record=record)


def parameters(rank: int, rows: int, columns: int) -> int:
    """m r + r^2 + r n."""
    return rank * (rows + rank + columns)


def affordable_rank(budget: int, rows: int, columns: int) -> int:
    """The largest r with m r + r^2 + r n <= budget."""
    sides = rows + columns
    return (isqrt(sides**2 + 4 * budget) - sides) // 2


def break_even(rows: int, columns: int) -> int:
    """r_max: the rank from which nothing is saved."""
    return affordable_rank(rows * columns, rows, columns)


def chosen_rank(options: Options, rows: int, columns: int) -> int:
    """The requested rank, or the largest that the share affords, at least 1."""
    if options.keep is None:
        return options.rank or RANK
    return max(affordable_rank(share_of(options.keep, rows * columns), rows, columns), 1)


def select(scores: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Rows I and columns J [r] of the scores S [m, n], by the discrete empirical interpolation method on both sides."""
    left, right = leading_vectors(scores, rank)
    return interpolation_indices(left), interpolation_indices(right)


def leading_vectors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading singular vectors, left [m, r] and right [n, r], up to their signs, of a matrix in float64.

    Those of the shorter side are eigenvectors of its Gram matrix. Where singular values are zero, any orthonormal ones.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, left = leading_vectors(matrix.T, rank)
        return left, right
    right = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -rank:].flip(1)
    return torch.linalg.qr(matrix @ right).Q, right


def interpolation_indices(vectors: Tensor) -> Tensor:
    """The r rows that the discrete empirical interpolation method picks of a basis u_1 .. u_r [m, r], in order.

    Row j is where u_j differs most from the combination of u_1 .. u_(j-1) that equals it in the rows before. This
    difference is u_j after the first j - 1 steps of Gaussian elimination, so that the rows are its partial pivots.
    """
    pivots = torch.linalg.lu_factor(vectors).pivots.tolist()
    rows = list(range(len(vectors)))
    for step, pivot in enumerate(pivots):
        rows[step], rows[pivot - 1] = rows[pivot - 1], rows[step]
    return torch.tensor(rows[: len(pivots)], device=vectors.device)


def paper_link(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """U = C^+ W R^+ [r, r] in float64. With C = Q T and R^T = P L, U = T^+ (Q^T W P) (L^+)^T."""
    exact = weight.double()
    left, upper = torch.linalg.qr(exact[:, columns])
    right, lower = torch.linalg.qr(exact[rows].T)
    return _inverse(upper, weight.dtype) @ (left.T @ exact @ right) @ _inverse(lower, weight.dtype).T


def data_link(weight: Tensor, rows: Tensor, columns: Tensor, start: Tensor, moment: Tensor) -> tuple[Tensor, int]:
    """The U nearest to `start` of those with the least tr((W - C U R) H (W - C U R)^T), and the rank of R H R^T.

    U = U_0 + C^+ (W - C U_0 R) H R^T (R H R^T)^+. Directions of R x whose power is below the rounding of H are taken
    for unseen: there U_0 stays. So the loss is never above that of U_0.
    """
    exact, moment_type = weight.double(), moment.dtype
    kept_rows, kept_columns = exact[rows], exact[:, columns]
    images = second_moment(moment) @ kept_rows.T
    gram = kept_rows @ images
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    seen = values > len(values) * torch.finfo(moment_type).eps * values[-1].clamp(min=0)
    vectors = vectors[:, seen]
    residual = exact @ images - kept_columns @ (start @ gram)
    left, upper = torch.linalg.qr(kept_columns)
    projected = _inverse(upper, weight.dtype) @ (left.T @ residual)
    return start + (projected @ vectors / values[seen]) @ vectors.T, int(seen.sum())


def _inverse(triangle: Tensor, weight_type: torch.dtype) -> Tensor:
    """T^+ [r, r]; singular values below the rounding of the weights are zero."""
    return torch.linalg.pinv(triangle, rtol=len(triangle) * torch.finfo(weight_type).eps)


def _block(name: str) -> int:
    """7 of model.layers.7.mlp.gate_proj."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def _stays_dense(linear: Linear, rank: int, options: Options) -> str:
    """Why this linear is left alone; empty when it is not."""
    shape = linear.weight.shape
    kind = linear.name.rpartition(".")[-1]
    if options.target_modules is None and linear.role not in ROLES:
        return f"CURing leaves {kind} alone unless `target_modules` names it; it takes {', '.join(ROLES)}."
    if linear.plan is False:
        return f"The block is not among the {options.blocks} with the least angular distance."
    limit = break_even(*shape)
    if rank >= limit:
        return f"Rank {rank} reaches {limit}, where rows, columns and link of {shape[0]} x {shape[1]} save nothing."
    return ""


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    needs=frozenset({"moments"}),
    adds_traits=frozenset({"factorized"}),
    incompatible_with={**DECOMPOSE, "quantized": "packed integers have no rows to keep; decompose before quantizing"},
    compress=compress,
    plan=plan,
    resources=Resources(reach="model"),
)
