"""Which weights are kept: exact counts within comparison groups, with a stable tie-break.

An N:M pattern keeps N of every M consecutive inputs of an output (2:4 keeps 2 of 4; 1:4 keeps 1 and prunes 3).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pydantic import Field, field_validator, model_validator

from coppice.errors import UserError
from coppice.lazy import torch
from coppice.methods.options import TargetOptions
from coppice.methods.solvers.refit import refit
from coppice.methods.solvers.selection import share_of
from coppice.models.contracts import LinearStatistics
from coppice.models.replacements import Masked, Unchanged
from coppice.records.base import Json

if TYPE_CHECKING:
    from torch import Tensor

REFIT_DAMPING = 1e-3
REFIT_DAMPING_DESCRIPTION = (
    "Share of mean(diag H) that holds a refit to the weights before it; 0 is plain least squares, which needs more "
    "tokens than inputs."
)


class PruningOptions(TargetOptions):
    """How many weights to prune: at most one of sparsity and pattern."""

    TARGET = "sparsity"
    RULES = frozenset({"uniform", "sensitivity", "owl", "mosaic", "knapsack"})

    sparsity: float | None = Field(
        default=None, ge=0, lt=1, description="Share of weights to prune in each comparison group; 0 changes nothing."
    )
    pattern: str | None = Field(
        default=None, description="'N:M' keeps N of every M consecutive inputs of each output, 1 <= N < M."
    )

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            parts = re.fullmatch(r"(\d+):(\d+)", pattern)
            if parts is None or not 1 <= int(parts[1]) < int(parts[2]):
                raise ValueError(
                    f"the pattern {pattern!r} is not 'N:M' with 1 <= N < M, which keeps N of every M consecutive inputs"
                )
        return pattern

    @model_validator(mode="after")
    def _one_budget(self) -> PruningOptions:
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError("give exactly one of 'sparsity' and 'pattern'")
        if self.sparsity is None and self.allocation.by != "uniform":
            raise ValueError(
                f"'allocation' spreads a 'sparsity' over the linears, and none is given: leave {self.allocation.by!r} "
                "out, or give 'sparsity'"
            )
        return self

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """(N, M) of the pattern."""
        if self.pattern is None:
            return None
        kept, of = self.pattern.split(":")
        return int(kept), int(of)

    @property
    def pruned_share(self) -> float:
        """The requested share of weights to prune; where one of sparsity and pattern is given."""
        if self.kept_of is not None:
            kept, of = self.kept_of
            return 1 - kept / of
        assert self.sparsity is not None
        return self.sparsity


class SparsityOptions(PruningOptions):
    """How many weights to prune: exactly one of sparsity and pattern; and whether those that stay are refitted."""

    refit: bool = Field(
        default=False,
        description="Exact least-squares refit of the kept weights to the calibration inputs on the chosen mask.",
    )
    refit_damping: float = Field(default=REFIT_DAMPING, ge=0, le=1, description=REFIT_DAMPING_DESCRIPTION)

    @model_validator(mode="after")
    def _a_budget(self) -> SparsityOptions:
        if self.sparsity is None and self.pattern is None:
            raise ValueError("give exactly one of 'sparsity' and 'pattern'")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"moments"} if self.refit else set())


def comparison_group(options: PruningOptions, size: int, width: int) -> tuple[int, int]:
    """(weights compared with each other, how many of them to prune) in a linear of `width` inputs.

    A pattern N:M compares M consecutive inputs and prunes M - N, whatever `size`; a sparsity s compares `size` weights
    and prunes floor(s size). Raises UserError when M does not divide the width.
    """
    if options.kept_of is None:
        assert options.sparsity is not None  # one of both is given
        return size, share_of(options.sparsity, size)
    kept, of = options.kept_of
    if width % of:
        raise UserError(
            f"The pattern {options.pattern} needs a number of inputs that {of} divides, and this layer has {width}: "
            "choose another pattern or a sparsity."
        )
    return of, of - kept


def keep_largest(scores: Tensor, size: int, count: int, kept: Tensor | None) -> Tensor:
    """Mask (bool, True = kept) that prunes the `count` smallest of each `size` consecutive scores, row by row.

    scores: [m, n], >= 0; size divides m n. Exactly `count` are pruned: of equal scores, the earlier ones. What `kept`
    ([m, n]) has pruned already counts first and stays pruned, even where it is more than `count`.
    """
    if kept is not None:
        scores = scores.masked_fill(~kept, -1)
    mask = torch.ones_like(scores, dtype=torch.bool)
    if count:
        groups = scores.reshape(-1, size)
        threshold = groups.kthvalue(count, dim=1, keepdim=True).values
        below, tied = groups < threshold, groups == threshold
        spare = count - below.sum(dim=1, keepdim=True)
        mask = ~(below | (tied & (tied.cumsum(dim=1) <= spare))).view_as(scores)
    return mask if kept is None else mask & kept


def nothing_to_prune() -> Unchanged:
    return Unchanged(record={"unchanged": "A sparsity of 0 prunes nothing.", "sparsity_asked": 0.0})


def pruning_record(options: PruningOptions, mask: Tensor) -> Json:
    """The requested share and the share of weights that the mask prunes."""
    pruned = mask.numel() - int(mask.sum())
    return {"sparsity_asked": options.pruned_share, "sparsity": pruned / mask.numel()}


def masked_replacement(
    weight: Tensor, pruned: Tensor, mask: Tensor, statistics: LinearStatistics | None, options: SparsityOptions
) -> Masked:
    """`pruned` [m, n], zero outside the mask ([m, n] bool), or its refit to W x where the options ask for one.

    weight: [m, n] W before. statistics: read by a refit alone, whose damping is on record.
    """
    record = pruning_record(options, mask)
    if not options.refit:
        return Masked(pruned, mask, record=record)
    assert statistics is not None  # a refit needs moments
    refitted = refit(weight, pruned, mask, statistics.second_moment, options.refit_damping)
    return Masked(refitted.weight, mask, record=record | refitted.record)
