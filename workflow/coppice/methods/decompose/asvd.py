"""ASVD: singular value decomposition weighted by the size of each input, with ranks searched by sensitivity.

Yuan et al., ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models (arXiv
2312.05821), with its sensitivity-based truncation rank search (STRS).
d_j = (mean |x_j|)^alpha or (max |x_j|)^alpha [n]; W diag(d) = U Sigma V^T; W_k = U_k Sigma_k V_k^T diag(d)^-1
= U_k U_k^T W (see `solvers.truncation`).

The search: the sensitivity of every linear at every share of a grid is the calibration loss with that linear alone
replaced (`strs`), or -sqrt(|W|_F^2 / sigma_1^2) keep^0.1 (`spectrum`). Pairs of linear and share are accepted from the
least sensitive on, as few as meet the budget; a linear gets the least share among its accepted pairs, and without one
stays dense. What is then left of the budget goes to the linear of the last accepted pair, and after it to all, from the
most sensitive on.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from coppice.errors import UserError, error_context
from coppice.lazy import torch
from coppice.methods.declaration import LayerMethod, Resources, Source
from coppice.methods.incompatible import DECOMPOSE
from coppice.methods.solvers.moments import input_size
from coppice.methods.solvers.ranks import PlannedRank, RankTarget
from coppice.methods.solvers.selection import share_of
from coppice.methods.solvers.truncation import (
    RankOptions,
    align_rank,
    break_even,
    chosen_rank,
    factors,
    require_finite,
    stays_dense,
    truncate,
)
from coppice.models.contracts import Decoder, Linear, LinearStatistics
from coppice.models.replacements import LowRank, Unchanged

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Source(
    "ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models",
    "arXiv 2312.05821",
    "W diag(d) = U Sigma V^T, d_j = (mean |x_j|)^alpha; STRS",
    "LLaMA-7B on WikiText-2 (dense: 5.68): perplexity 5.78, 6.09 and 6.80 with 95, 90 and 85 % of its parameters kept; "
    "11.14 with 80 %, as the authors of SVD-LLM report.",
)

_SIZES = {"absmean": "mean absolute value", "absmax": "largest absolute value"}


class Options(RankOptions):
    alpha: float = Field(default=0.5, ge=0, description="Exponent of the inputs' size; 0 gives the plain truncation.")
    statistic: Literal["absmean", "absmax"] = Field(
        default="absmean", description="The size of an input over the calibration tokens: mean |x| or max |x|."
    )
    search: Literal["none", "strs", "spectrum"] = Field(
        default="none",
        description="How ranks are chosen: the same share for every linear; by the loss with one linear replaced at a "
        "time, which measures the loss for every linear and every share of the grid; or by its spectrum alone.",
    )
    grid: tuple[float, ...] = Field(
        default=(0.4, 0.5, 0.6, 0.7, 0.8, 0.9), min_length=1, description="Shares of parameters that the search tries."
    )
    search_windows: int | None = Field(
        default=None, ge=1, description="Calibration windows that `strs` measures the loss on; all when left out."
    )

    @field_validator("grid")
    @classmethod
    def _holds_shares(cls, grid: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < keep < 1 for keep in grid):
            raise ValueError("every share of the grid is above 0 and below 1")
        return grid

    @model_validator(mode="after")
    def _search_meets_its_budget(self) -> Options:
        if self.search == "none":
            return self
        if self.keep is None:
            raise ValueError(f"the search {self.search!r} spreads a share of the parameters: give 'keep', not 'rank'")
        if self.allocation.by != "uniform":
            raise ValueError(
                f"the search {self.search!r} and the allocation {self.allocation.by!r} both choose the ranks: give one"
            )
        if self.keep < min(self.grid):
            raise ValueError(
                f"a search over shares from {min(self.grid)} on cannot reach a keep of {self.keep}: add lower shares "
                "to 'grid'"
            )
        return self

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"windows"} if self.search == "strs" else frozenset())


@dataclass(frozen=True)
class Candidate:
    """A linear at one share of the grid."""

    name: str
    rank: int
    sensitivity: float


def plan(decoder: Decoder, options: Options) -> dict[str, PlannedRank]:
    """The rank of each linear that the search finds; nothing without a search."""
    if options.search == "none":
        return {}
    target = RankTarget.of(decoder, options.keep, options.align)
    measure = _by_loss if options.search == "strs" else _by_spectrum
    return target.plans(search(list(measure(decoder, options)), target))


def search(candidates: list[Candidate], target: RankTarget) -> dict[str, int]:
    """The ranks after accepting as few candidates, from the least sensitive on, as meet the target."""
    candidates = sorted(candidates, key=lambda candidate: candidate.sensitivity)

    def ranks(count: int) -> dict[str, int]:
        least = {name: target.largest(name) for name in target.shapes}
        for candidate in candidates[:count]:
            least[candidate.name] = min(least[candidate.name], candidate.rank)
        return least

    # The cost falls with every candidate accepted.
    counts = range(len(candidates))
    count = bisect_left(counts, True, key=lambda count: target.total(ranks(count)) <= target.capacity)
    accepted = ranks(count)
    if count:
        accepted = target.fill(accepted, [candidates[count - 1].name])
    order = dict.fromkeys(candidate.name for candidate in reversed(candidates))
    return target.fill(accepted, list(order))


def _by_loss(decoder: Decoder, options: Options) -> Iterator[Candidate]:
    """Candidates by the calibration loss with one linear replaced; a loss that is not finite is the worst."""
    windows = None if options.search_windows is None else range(options.search_windows)
    if windows is not None and len(windows) > decoder.windows:
        raise UserError(
            f"search_windows is {options.search_windows}, and calibration has {decoder.windows} windows: lower it, or "
            "leave it out to take all."
        )
    for name in decoder.names:
        weight = decoder.linear(name).weight
        ranks = _grid_ranks(options, *weight.shape)
        with error_context(name):
            truncation = truncate(weight, max(ranks, default=1), scaling(decoder.statistics(name), options))
        for rank in ranks:
            replaced = truncation.second[:, :rank] @ truncation.first[:rank]
            with torch.no_grad():
                loss = decoder.loss(windows, weights={name: replaced}).item()
            yield Candidate(name, rank, loss if math.isfinite(loss) else math.inf)


def _by_spectrum(decoder: Decoder, options: Options) -> Iterator[Candidate]:
    """Candidates by -sqrt(|W|_F^2 / sigma_1^2) keep^0.1; of a zero matrix, which every rank fits, the first to go."""
    for name in decoder.names:
        weight = decoder.linear(name).weight.double()
        with error_context(name):
            require_finite(weight)
        short = weight if weight.shape[0] <= weight.shape[1] else weight.T
        largest = torch.linalg.eigvalsh(short @ short.T)[-1].clamp(min=0).sqrt().item()
        spread = torch.linalg.matrix_norm(weight).item() / largest if largest > 0 else math.inf
        for rank, keep in _grid_ranks(options, *weight.shape).items():
            yield Candidate(name, rank, -spread * keep**0.1)


def _grid_ranks(options: Options, rows: int, columns: int) -> dict[int, float]:
    """The ranks below break-even that the grid comes to, with their share of it, from the lowest up."""
    ranks = {}
    for keep in sorted(options.grid):
        rank = align_rank(share_of(keep, rows * columns / (rows + columns)), options.align)
        if rank < break_even(rows, columns):
            ranks[rank] = keep
    return ranks


def scaling(statistics: LinearStatistics, options: Options) -> Tensor:
    """d [n] in float64. Raises UserError when the statistics are unfit (see `solvers.moments`)."""
    return input_size(getattr(statistics, options.statistic), _SIZES[options.statistic]) ** options.alpha


def compress(linear: Linear, statistics: LinearStatistics, options: Options) -> LowRank | Unchanged:
    """The rank-k factors with the least sum_ij d_j^2 (W - W_k)_ij^2; from break-even on the linear stays dense.

    Inputs that were always zero do not influence U_k (unless alpha is 0); their columns are projected on it like the
    others. Raises UserError when the weight holds values that are not finite, or when the statistics are unfit.
    """
    rows, columns = linear.weight.shape
    rank = chosen_rank(options, rows, columns)
    record: dict[str, float] = {}
    if linear.plan is not None:
        rank, record = linear.plan.rank, linear.plan.record
    if rank >= break_even(rows, columns):
        return stays_dense(rank, rows, columns, record)
    return factors(truncate(linear.weight, rank, scaling(statistics, options)), rank, record)


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    needs=frozenset({"moments"}),
    adds_traits=frozenset({"factorized"}),
    incompatible_with=DECOMPOSE,
    compress=compress,
    plan=plan,
    resources=Resources(reach="model"),
)
