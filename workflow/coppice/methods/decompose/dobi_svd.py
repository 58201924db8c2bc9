"""Dobi-SVD: ranks learned through the loss by truncating outputs, and factors half of which are stored in 8 bits.

Wang et al., Dobi-SVD: Differentiable SVD for LLM Compression and Some New Perspectives (arXiv 2502.02723).

1. Positions. The output of each linear on a window is Y [t, m] = U Sigma V^T, of at most q = min(t, m, n) components.
   Its truncation at the position gamma is Y' = U diag(g) Sigma V^T, g_i = (tanh(beta (gamma - i)) + 1) / 2, i = 1 .. q.
   The rank of a position is c gamma with c = min(m, n) / q, a real number; it is the rank that Adam
   learns for each linear, as a share of min(m, n), on

       loss + lambda |share(ranks) - keep| + sum over linears of relu(-gamma)^2 + relu(gamma - q)^2,

   share = sum min(k s, m n) / sum m n, s = m + n, or max(m, n) with remapping. The paper takes q = t, which is the same
   where windows are no longer than min(m, n), and elsewhere would count components that do not exist.
2. Weights. W_k = V_k V_k^T W with the first eigenvectors V_k [m, k] of E[y y^T] = W H W^T: of all matrices of rank k,
   the one with the least E|(W - W_k) x|^2, the same as SVD-LLM's (see `solvers.truncation`). The published code
   approaches it by an incremental principal component analysis of centred, unweighted bases.
3. Remapping. W_k = sum_i u_i sigma_i v_i^T. With m >= n, all of v_i [n] and the first n entries of sigma_i u_i [m] are
   stored as 8-bit codes of the dynamic table (see `solvers.codebook`), each with one scale, and the m - n entries left
   as they are; mirrored where n > m. At 16 bits a number, a rank takes 2 max(m, n) bytes plus the scales, so that
   the share of bytes is k / min(m, n) and every rank saves some. It is storage that is saved: arithmetic is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from coppice.errors import UserError
from coppice.lazy import torch
from coppice.methods.declaration import LayerMethod, Resources, Source
from coppice.methods.incompatible import DECOMPOSE
from coppice.methods.solvers.codebook import dynamic_table, quantize_blocks
from coppice.methods.solvers.ranks import PlannedRank, RankTarget
from coppice.methods.solvers.selection import share_of
from coppice.methods.solvers.stable_svd import apply_gates
from coppice.methods.solvers.truncation import (
    RankOptions,
    Truncation,
    align_rank,
    break_even,
    chosen_rank,
    factors,
    factors_record,
    stays_dense,
    truncate_outputs,
)
from coppice.models.contracts import Decoder, Linear, LinearStatistics
from coppice.models.replacements import Codebook, LowRank, Unchanged
from coppice.records.base import Json

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Source(
    "Dobi-SVD: Differentiable SVD for LLM Compression and Some New Perspectives",
    "arXiv 2502.02723",
    "g_i = (tanh(beta (gamma - i)) + 1) / 2; W_k = V_k V_k^T W; remapping",
    "LLaMA-7B with 40 % of its bytes kept has a perplexity of 9.07 on WikiText-2. Without remapping, with 80 % of its "
    "parameters kept, learned ranks reach 8.54 and uniform ones 8.87, as the authors of Swift-SVD report.",
)

_BITS = 8


class Options(RankOptions):
    # The ranks are learned, and with remap they are not paid for in parameters.
    RULES = frozenset({"uniform"})

    remap: bool = Field(
        default=True,
        description="Store part of both factors in 8 bits, and read `keep` as the share of bytes at 16 bits a number; "
        "false stores plain factors, and `keep` is the share of parameters.",
    )
    learn: bool = Field(
        default=True, description="Learn the ranks through the loss on the calibration windows; false: uniform ranks."
    )
    steps: int = Field(
        default=256,
        ge=1,
        description="Steps of learning, one window each; the last pass over the windows is taken whole. The paper "
        "takes 20 to 50 passes over 256 windows.",
    )
    learning_rate: float = Field(
        default=0.0025,
        gt=0,
        description="Adam's, as a share of a linear's ranks, falling by a fifth along a cosine. The paper's 5 to 4 "
        "positions of 2048.",
    )
    beta: float = Field(default=10, gt=0, description="Slope of the gate, per position.")
    penalty: float = Field(
        default=20,
        ge=0,
        description="Weight lambda of the distance from the target. The paper takes 30 to 400 with the perplexity.",
    )
    loss: Literal["cross-entropy", "perplexity"] = Field(
        default="cross-entropy", description="The loss; the paper's is the perplexity, its exponential."
    )

    @model_validator(mode="after")
    def _learning_spreads_the_budget(self) -> Options:
        if self.learn and self.keep is None:
            raise ValueError("learned ranks share a target: give 'keep' instead of 'rank', or set 'learn: false'")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"windows"} if self.learn else frozenset())


def traits(parent: frozenset[str], options: Options) -> frozenset[str]:
    return parent | {"factorized", "quantized"} if options.remap else parent | {"factorized"}


def plan(decoder: Decoder, options: Options) -> dict[str, PlannedRank]:
    """The learned rank of each linear, scaled to meet the target; nothing where ranks are uniform.

    Raises UserError when the loss or an output is not finite.
    """
    if not options.learn:
        return {}
    target = RankTarget.of(decoder, options.keep, options.align, options.remap)
    sizes = dict(zip(decoder.names, learn(decoder, target, options).tolist(), strict=True))
    plans = target.plans(target.in_proportion(sizes))
    return {name: PlannedRank(each.rank, each.record | {"rank_learned": sizes[name]}) for name, each in plans.items()}


def learn(decoder: Decoder, target: RankTarget, options: Options) -> Tensor:
    """The real-valued rank of each linear [linears], at least 1, after the pass with the lowest mean objective."""
    device = decoder.linear(decoder.names[0]).weight.device
    costs = RankCosts.of(target, device)
    generator = torch.Generator().manual_seed(decoder.seed)
    windows = torch.randperm(decoder.windows, generator=generator)[: options.steps]
    passes = math.ceil(options.steps / len(windows))
    shares = costs.uniform(target.keep).requires_grad_()
    adam = torch.optim.Adam([shares], lr=options.learning_rate)
    best, lowest = shares.detach().clone(), math.inf
    for number in range(passes):
        total = 0.0
        for place, chosen in enumerate(torch.randperm(len(windows), generator=generator).tolist()):
            progress = (number + place / len(windows)) / passes
            for group in adam.param_groups:
                group["lr"] = options.learning_rate * (0.9 + 0.1 * math.cos(math.pi * progress))
            with torch.enable_grad():
                value = objective(decoder, int(windows[chosen]), shares, costs, options)
                (shares.grad,) = torch.autograd.grad(value, [shares])
            if not (torch.isfinite(value) and torch.isfinite(shares.grad).all()):
                raise UserError(
                    f"The loss or its gradient is not finite in pass {number + 1} of learning ranks: lower "
                    "'learning_rate' or 'beta', or set 'learn: false'."
                )
            adam.step()
            total += value.item()
        if total < lowest:
            best, lowest = shares.detach().clone(), total
    return (best * costs.ranks).clamp(min=1)


@dataclass(frozen=True)
class RankCosts:
    """What ranks cost. index: the place of each linear; [linears] each: ranks min(m, n), price of a rank, size m n."""

    index: dict[str, int]
    ranks: Tensor
    price: Tensor
    size: Tensor

    @classmethod
    def of(cls, target: RankTarget, device: torch.device) -> RankCosts:
        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        shapes = list(target.shapes.values())
        return cls(
            {name: place for place, name in enumerate(target.shapes)},
            tensor([min(shape) for shape in shapes]),
            tensor([target.quantum(name) for name in target.shapes]),
            tensor([rows * columns for rows, columns in shapes]),
        )

    def uniform(self, keep: float) -> Tensor:
        """[linears] the share of min(m, n) that costs `keep` of each linear."""
        return keep * self.size / (self.price * self.ranks)

    def total_share(self, shares: Tensor) -> Tensor:
        """The share of sum m n that ranks [linears], as shares of min(m, n), cost."""
        cost = (shares.clamp(min=0) * self.ranks * self.price).minimum(self.size)
        return cost.sum() / self.size.sum()


def objective(decoder: Decoder, window: int, shares: Tensor, costs: RankCosts, options: Options) -> Tensor:
    """The loss of a window with every output truncated, with its penalties; shares: [linears] ranks over min(m, n)."""
    barriers = []

    def truncate_output(name: str, outputs: Tensor) -> Tensor:
        place = costs.index[name]
        count = int(min(len(outputs), costs.ranks[place].item()))
        position = shares[place] * count
        barriers.append(torch.relu(-position).square() + torch.relu(position - count).square())
        return soft_truncation(outputs, position, options.beta, count)

    loss = decoder.loss([window], outputs=truncate_output)
    if options.loss == "perplexity":
        loss = loss.exp()
    assert options.keep is not None  # learned ranks share it
    distance = (costs.total_share(shares) - options.keep).abs()
    return loss + options.penalty * distance + torch.stack(barriers).sum()


def soft_truncation(outputs: Tensor, position: Tensor, beta: float, count: int) -> Tensor:
    """Y' [t, m] in Y's type: the first `count` components of Y, each through its gate; position: a scalar."""
    wide = outputs if outputs.dtype == torch.float64 else outputs.float()
    number = torch.arange(1, count + 1, device=wide.device)
    gate = (torch.tanh(beta * (position - number)) + 1) / 2
    return apply_gates(wide, gate.to(wide.dtype)).to(outputs.dtype)


def compress(linear: Linear, statistics: LinearStatistics, options: Options) -> LowRank | Unchanged:
    """The rank-k factors with the least E|(W - W_k) x|^2, remapped or plain.

    A plain linear whose rank reaches break-even stays dense. Raises UserError when the weight holds values that are not
    finite, or when the statistics are unfit (see `solvers.truncation`).
    """
    weight, moment = linear.weight, statistics.second_moment
    rows, columns = weight.shape
    record = {} if linear.plan is None else linear.plan.record
    if options.remap:
        short = min(rows, columns)
        uniform = align_rank(_uniform_rank(options, short), options.align)
        requested = uniform if linear.plan is None else linear.plan.rank
        rank = min(requested, short)
        record = record | {"keep_bytes_asked": options.keep or requested / short, "keep_bytes": rank / short}
        truncation = truncate_outputs(weight, rank, moment)
        return remap_factors(truncation, linear.storage or weight.dtype, factors_record(truncation, requested) | record)
    rank = chosen_rank(options, rows, columns) if linear.plan is None else linear.plan.rank
    if rank >= break_even(rows, columns):
        return stays_dense(rank, rows, columns, record)
    return factors(truncate_outputs(weight, rank, moment), rank, record)


def _uniform_rank(options: Options, short: int) -> int:
    """The requested rank, or the share of min(m, n) that is as large as the share of bytes to keep."""
    if options.rank is not None:
        return options.rank
    assert options.keep is not None  # exactly one of both is given
    return share_of(options.keep, short)


def remap_factors(truncation: Truncation, storage: torch.dtype, record: Json) -> LowRank:
    """The factors sigma_i u_i and v_i (mirrored where n > m) with min(m, n) entries of each in 8 bits."""
    orthonormal, upper = torch.linalg.qr(truncation.second)
    left, values, right = torch.linalg.svd(upper @ truncation.first, full_matrices=False)
    left = (orthonormal @ left).T
    rows, columns = left.shape[1], right.shape[1]
    if rows >= columns:
        left = values[:, None] * left
    else:
        right = values[:, None] * right
    short = min(rows, columns)
    second = replace(_encode(left, short, storage), transposed=True)
    return LowRank(_encode(right, short, storage), second, record=record)


def _encode(vectors: Tensor, count: int, storage: torch.dtype) -> Codebook:
    """The rows of [k, w]: the first `count` entries of each as codes with one scale, the others as they are."""
    width = vectors.shape[1]
    rest = torch.arange(count, width, device=vectors.device) if count < width else None
    return quantize_blocks(vectors, dynamic_table(_BITS), _BITS, count, rest, storage)


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    needs=frozenset({"moments"}),
    adds_traits=frozenset({"factorized", "quantized"}),
    incompatible_with=DECOMPOSE,
    traits=traits,
    compress=compress,
    plan=plan,
    draws=True,
    resources=Resources(reach="model"),
)
