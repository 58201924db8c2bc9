"""AWP: pruning, rounding or both by gradient steps on the output error, each followed by a projection.

AWP: Activation-Aware Weight Pruning and Quantization with Projected Gradient Descent (arXiv 2506.10205), equation for
T in the constraint set with the least |(W - T) C^(1/2)|_F^2, W: [m, n], C = E[x x^T]: [n, n]:

    Z = T + eta (W - T) C,    T <- Proj(Z),    eta = 2 / |C|_F (1.5 / |C|_F where T is rounded), or 1 / lambda_max(C).

Pruning: Proj keeps the largest |Z| of each output's row, or of each group of an N:M pattern; begins at Wanda's mask.
Rounding: Proj rounds Z on the min-max grid of each group of Z; begins at round-to-nearest. Both: the share to prune
grows linearly over the first half of the iterations, which begin at W; from then on Proj prunes and rounds.

With eta lambda_max(C) above 1 the error may rise from one step to the next, so the best T is what is returned. After
pruning alone, the weights on its support are the exact least-squares refit (see `solvers.refit`). Differs from the
paper: that refit, and the rule to stop, a step smaller than `tolerance` |T|_F, which does not depend on the scale of C.

Rounding alone gains little. On a grid that stays fixed the iteration never leaves round-to-nearest unless a step
exceeds half a scale somewhere, since T lies on the grid already; only refitting the grids to Z moves it.
Where a few inputs are far stronger than the rest, pruning with rounding may find nothing better than its first
candidate, Wanda's mask rounded to nearest; `best_iteration` is then 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from coppice.lazy import torch
from coppice.methods.declaration import LayerMethod, Source
from coppice.methods.incompatible import PRUNE_AND_ROUND
from coppice.methods.solvers.grid import (
    OptionalGridOptions,
    decode,
    fit_groups,
    grid_record,
    group_of_inputs,
    group_width,
    make_grid,
)
from coppice.methods.solvers.loss import output_power
from coppice.methods.solvers.mask import (
    REFIT_DAMPING,
    REFIT_DAMPING_DESCRIPTION,
    PruningOptions,
    comparison_group,
    keep_largest,
    nothing_to_prune,
    pruning_record,
)
from coppice.methods.solvers.moments import second_moment
from coppice.methods.solvers.refit import refit
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.replacements import Masked, Quantized, Unchanged
from coppice.records.base import Json

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Source(
    "AWP: Activation-Aware Weight Pruning and Quantization with Projected Gradient Descent",
    "arXiv 2506.10205",
    "T <- Proj(T + eta (W - T) C)",
)

_PRUNING_ITERATIONS, _ROUNDING_ITERATIONS, _JOINT_ITERATIONS = 200, 10, 100


class Options(PruningOptions, OptionalGridOptions):
    """A sparsity or a pattern prunes, bits round, both do both."""

    step: Literal["frobenius", "spectral"] = Field(
        default="frobenius",
        description="Length of a gradient step: 2 / |C|_F (1.5 / |C|_F with bits), or 1 / lambda_max(C), with which "
        "pruning never raises the error.",
    )
    iterations: int | None = Field(
        default=None,
        ge=1,
        description="Projections at most; when left out, 200 to prune, 10 to round and 100 to do both.",
    )
    tolerance: float = Field(default=1e-5, ge=0, description="Stop at a step smaller than this share of |T|_F.")
    refit_damping: float = Field(default=REFIT_DAMPING, ge=0, le=1, description=REFIT_DAMPING_DESCRIPTION)

    @model_validator(mode="after")
    def _something_to_do(self) -> Options:
        if not self.prunes and self.bits is None:
            raise ValueError("give 'sparsity' or 'pattern' to prune, 'bits' to round, or both to do both")
        return self

    @property
    def prunes(self) -> bool:
        return self.sparsity is not None or self.pattern is not None


@dataclass(frozen=True)
class _Point:
    """T [m, n], where it is not pruned (bool), and its codes [m, n], scale and zero point [m, groups] where rounded."""

    weight: Tensor
    mask: Tensor
    grid: tuple[Tensor, Tensor, Tensor] | None


class _Projection:
    """Onto the constraint set of one linear."""

    def __init__(self, linear: Linear, options: Options) -> None:
        inputs = linear.weight.shape[1]
        self.parent_mask = linear.mask
        self.size, self.count = comparison_group(options, inputs, inputs) if options.prunes else (inputs, 0)
        self.width = inputs if options.bits is None else group_width(options, inputs)
        self.grid = None if options.bits is None else make_grid(linear, options)

    def __call__(self, weight: Tensor, scores: Tensor, share: float = 1.0) -> _Point:
        """Keeps the largest scores, pruning this share of what is to be pruned; rounds only when that is all of it."""
        mask = keep_largest(scores, self.size, round(share * self.count), self.parent_mask)
        weight = weight.masked_fill(~mask, 0)
        if self.grid is None or share < 1:
            return _Point(weight, mask, None)
        scale, zero_point = fit_groups(self.grid, weight, self.width)
        values, parameters = weight.unflatten(1, (-1, self.width)), (scale[:, :, None], zero_point[:, :, None])
        codes = self.grid.encode(values, *parameters)
        return _Point(decode(codes, *parameters).flatten(1), mask, (codes.flatten(1), scale, zero_point))


def traits(parent: frozenset[str], options: Options) -> frozenset[str]:
    """Masked where it prunes, quantized where it rounds."""
    return (
        parent
        | ({"masked"} if options.prunes else frozenset())
        | (frozenset() if options.bits is None else {"quantized"})
    )


def compress(linear: Linear, statistics: LinearStatistics, options: Options) -> Masked | Quantized | Unchanged:
    """The best T of the iteration. Weights of dead inputs become zero.

    Raises UserError when M of N:M does not divide the width, when the group size does not and `indivisible` is "error",
    or when the statistics are unfit (see `solvers.damping` and `solvers.loss`).
    """
    if options.sparsity == 0 and options.bits is None:
        return nothing_to_prune()
    moment = second_moment(statistics.second_moment)
    power = moment.diagonal()
    dead = power == 0
    weight = linear.weight.masked_fill(dead, 0)
    project = _Projection(linear, options)
    step = _step(moment, options)
    first = project(weight, weight.abs() * power.sqrt().to(weight.dtype))
    best, steps = _descend(weight, moment.to(weight.dtype), step, first, project, options)
    record: Json = {**steps, "step": step, "dead_inputs": int(dead.sum())}
    if options.prunes:
        record |= pruning_record(options, best.mask)
    if best.grid is None or project.grid is None:
        refitted = refit(weight, best.weight, best.mask, moment, options.refit_damping)
        return Masked(refitted.weight, best.mask, record=record | refitted.record)
    groups = group_of_inputs(weight.shape[1], project.width, weight.device)
    record |= grid_record(options, project.width)
    return Quantized(*best.grid, groups, project.grid.bits, project.width, options.symmetric, record=record)


def _step(moment: Tensor, options: Options) -> float:
    """eta."""
    if options.step == "spectral":
        return 1 / torch.linalg.eigvalsh(moment)[-1].item()
    return (2.0 if options.bits is None else 1.5) / moment.norm().item()


def _descend(
    weight: Tensor, moment: Tensor, step: float, first: _Point, project: _Projection, options: Options
) -> tuple[_Point, dict[str, int]]:
    """The point with the least error among `first` and the iterates in the constraint set."""
    joint = options.prunes and options.bits is not None
    iterations = options.iterations or (
        _JOINT_ITERATIONS if joint else _PRUNING_ITERATIONS if options.prunes else _ROUNDING_ITERATIONS
    )
    ramp = iterations // 2 if joint else 0
    current = weight if ramp else first.weight
    gradient = (weight - current) @ moment
    best, best_iteration, least = first, 0, output_power(weight - first.weight, moment)
    done = 0
    for done in range(1, iterations + 1):
        share = min(done / ramp, 1.0) if ramp else 1.0
        moved = current + step * gradient
        point = project(moved, moved.abs(), share)
        converged = share == 1 and (point.weight - current).norm() <= options.tolerance * point.weight.norm()
        current = point.weight
        gradient = (weight - current) @ moment
        if share == 1 and (error := output_power(weight - current, moment, gradient)) < least:
            best, best_iteration, least = point, done, error
        if converged:
            break
    return best, {"iterations": done, "best_iteration": best_iteration}


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    needs=frozenset({"moments"}),
    adds_traits=frozenset({"masked", "quantized"}),
    incompatible_with=PRUNE_AND_ROUND,
    traits=traits,
    compress=compress,
)
