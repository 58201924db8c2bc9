"""Net-Trim: the sparsest weights, in the 1-norm, whose outputs stay within a given error.

Aghasi et al., Fast Convex Pruning of Deep Neural Networks (arXiv 1806.06457), for a linear without its activation: the
constraints of a ReLU fall away and the inputs enter by H = E[x x^T] alone. Over the whole matrix W [m, n],

    min |U|_1  subject to  tr((U - W) H (U - W)^T) <= epsilon^2 tr(W H W^T).

With the multiplier lambda of the constraint, one number for the matrix, this is min 1/2 tr((U - W) H (U - W)^T) +
lambda |U|_1, which falls apart into rows. lambda is found by bisection: the error grows with it, and U is zero from
max |W H| on. Each problem is solved by coordinate descent over the inputs, for all rows at once: with G = (W - U) H,

    U_ij <- soft(G_ij + H_jj U_ij, lambda) / H_jj,    soft(v, t) = sign(v) max(|v| - t, 0).

Every few sweeps the weights that are not zero take a Newton step, cut where it lowers a row's objective the most.
What is left to be done is on record: the largest distance of G / lambda from the subgradients of |U|_1, which are
sign(U_ij), or [-1, 1] where U_ij = 0. Differs from the paper: coordinate descent instead of ADMM; a sparsity as the
target, met exactly; and a least-squares refit on the support, which undoes the shrinkage of the 1-norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from coppice.errors import UserError
from coppice.lazy import torch
from coppice.methods.base import BudgetOptions, Linear, LinearStatistics, Masked, Source, Unchanged
from coppice.methods.solvers.budget import share_of
from coppice.methods.solvers.damping import damp
from coppice.methods.solvers.loss import relative_error
from coppice.methods.solvers.mask import REFIT_DAMPING, REFIT_DAMPING_DESCRIPTION, keep_largest, nothing_to_prune
from coppice.methods.solvers.moments import second_moment
from coppice.methods.solvers.refit import refit, solve_free

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Source(
    "Fast Convex Pruning of Deep Neural Networks",
    "arXiv 1806.06457",
    "min |U|_1 within an output error of epsilon, for a linear without activation",
)
NEEDS = frozenset({"moments"})
MAKES = frozenset({"masked"})
REFUSES = {
    "quantized": "because packed integers cannot be masked; prune before quantizing",
    "compensated": "because the compensation was fitted to the weights as they are; prune before compensating",
}

_BLOCK = 128
_SWEEPS_BETWEEN = 5
_NEWTON_DAMPING = 1e-9
_NEWTON_LENGTHS = (1.0, 0.5, 0.25, 0.125)
_LEAST_MULTIPLIER = 1e-8  # of max |W H|
_BISECTIONS = 24
_MISS = 1e-3  # how far below its target the bisection may end, as a share


class Options(BudgetOptions):
    """Exactly one of epsilon and sparsity."""

    BUDGET = "sparsity"
    RULES = frozenset({"uniform", "sensitivity", "owl", "mosaic", "knapsack"})

    epsilon: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Largest error of the outputs, as a share of their size (root mean squares); sparsity is what "
        "results.",
    )
    sparsity: float | None = Field(
        default=None, ge=0, lt=1, description="Share of the matrix to prune; the error is what results."
    )
    tolerance: float = Field(
        default=1e-3, gt=0, description="Coordinate descent ends when no weight would move by more, in units of lambda."
    )
    sweeps: int = Field(
        default=50, ge=1, description="Sweeps of coordinate descent at most, for each lambda that is tried."
    )
    refit: bool = Field(
        default=True, description="Least-squares refit of the weights that stay; false returns the 1-norm's own."
    )
    refit_damping: float = Field(default=REFIT_DAMPING, ge=0, le=1, description=REFIT_DAMPING_DESCRIPTION)

    @model_validator(mode="after")
    def _one_budget(self) -> Options:
        if (self.epsilon is None) == (self.sparsity is None):
            raise ValueError("give exactly one of 'epsilon' and 'sparsity'")
        if self.sparsity is None and self.allocation.by != "uniform":
            raise ValueError(
                f"'allocation' spreads a 'sparsity' over the linears, and none is given: leave {self.allocation.by!r} "
                "out, or give 'sparsity'"
            )
        return self


@dataclass(frozen=True)
class _Solution:
    """U [m, n] float64 of a multiplier, and the sweeps that it took."""

    weight: Tensor
    multiplier: float
    sweeps: int


def compress(linear: Linear, statistics: LinearStatistics, options: Options) -> Masked | Unchanged:
    """The least 1-norm within the error, or the mask of a sparsity that it leads to.

    Weights of dead inputs become zero. Raises UserError when epsilon is 0 where H is singular, or when the statistics
    are unfit (see `solvers.damping`).
    """
    if options.sparsity == 0:
        return nothing_to_prune()
    moment = second_moment(statistics.second_moment)
    if options.epsilon == 0:
        return _exact(moment)
    dead = moment.diagonal() == 0
    weight = linear.weight.double().masked_fill(dead, 0)
    free = torch.ones_like(weight, dtype=torch.bool) if linear.mask is None else linear.mask
    count = 0 if options.sparsity is None else share_of(options.sparsity, weight.numel())
    measure, target = _target(weight, moment, options, count)
    solution, sweeps = _bisect(weight, moment, free & ~dead, measure, target, options)
    pruned, mask = solution.weight, solution.weight != 0
    if options.sparsity is not None:
        scores = pruned.abs() * moment.diagonal().sqrt()
        mask = keep_largest(scores, weight.numel(), count, free if solution.multiplier == 0 else mask)
        pruned = pruned.masked_fill(~mask, 0)
    record = {
        "epsilon_asked": options.epsilon,
        "sparsity_asked": options.sparsity,
        "sparsity": 1 - mask.sum().item() / mask.numel(),
        "multiplier": solution.multiplier,
        "kkt_residual": kkt_residual(solution.weight, weight, moment, free & ~dead, solution.multiplier),
        "sweeps": sweeps,
        "dead_inputs": int(dead.sum()),
    }
    if options.refit:
        refitted = refit(weight, pruned, mask, moment, options.refit_damping)
        pruned, record = refitted.weight, record | refitted.record
    record["epsilon"] = math.sqrt(relative_error(pruned - weight, weight, moment))
    return Masked(pruned.to(linear.weight.dtype), mask, record=record)


def kkt_residual(solution: Tensor, weight: Tensor, moment: Tensor, free: Tensor, multiplier: float) -> float:
    """The largest distance of ((W - U) H)_ij / lambda from the subgradients of |U_ij|, over the free weights.

    solution U, weight W: [m, n] float64. moment H: [n, n]. free: [m, n] bool, the others are zero by constraint. 0 for
    lambda = 0, where U = W.
    """
    if multiplier == 0:
        return 0.0
    slope = (weight - solution) @ moment / multiplier
    violation = torch.where(solution == 0, (slope.abs() - 1).clamp(min=0), (slope - solution.sign()).abs())
    return violation.masked_fill_(~free, 0).max().item()


def _exact(moment: Tensor) -> Unchanged:
    """Only W itself has its outputs where the inputs span the space."""
    live = moment.diagonal() > 0
    if damp(moment[live][:, live], 0.0).damping > 0:
        raise UserError(
            "An epsilon of 0 asks for the sparsest weights with the same outputs, but the second moment of this "
            "layer's inputs is singular, so nothing bounds the search: give a small epsilon, or calibrate on more "
            "tokens."
        )
    return Unchanged(record={"unchanged": "An epsilon of 0 leaves no weights but these.", "epsilon_asked": 0.0})


def _target(weight: Tensor, moment: Tensor, options: Options, count: int) -> tuple[Callable[[Tensor], float], float]:
    """What grows with lambda, as a function of U, and where it should be: the error, or the number of zeros."""
    if options.epsilon is None:
        return lambda solution: float((solution == 0).sum()), float(count)
    return lambda solution: math.sqrt(relative_error(solution - weight, weight, moment)), options.epsilon


def _bisect(
    weight: Tensor,
    moment: Tensor,
    free: Tensor,
    measure: Callable[[Tensor], float],
    target: float,
    options: Options,
) -> tuple[_Solution, int]:
    """The solution of the largest lambda found with measure(U) <= target, and the sweeps of the whole search.

    Each lambda begins from the solution of the one before. Ends when the measure is within a thousandth of its target.
    """
    best, current, sweeps = _Solution(weight, 0.0, 0), weight, 0
    if measure(weight) >= (1 - _MISS) * target:
        return best, sweeps
    largest = (weight @ moment).abs().masked_fill(~free, 0).max().item()
    low, high = math.log(_LEAST_MULTIPLIER), 0.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        found = _solve(weight, moment, free, largest * math.exp(middle), current, options)
        current, sweeps = found.weight, sweeps + found.sweeps
        reached = measure(current)
        if reached > target:
            high = middle
            continue
        best, low = found, middle
        if reached >= (1 - _MISS) * target:
            break
    return best, sweeps


def _solve(
    weight: Tensor, moment: Tensor, free: Tensor, multiplier: float, start: Tensor, options: Options
) -> _Solution:
    """From `start`, until a sweep moves no weight by more than tolerance lambda / H_jj.

    Sweeps settle which weights are zero; every few of them, the others take a Newton step, without which a poorly
    conditioned H would need thousands.
    """
    # Transposed, so that the weights of one input lie together.
    current = start.T.clone(memory_format=torch.contiguous_format)
    target, pinned = weight.T, ~free.T
    sweeps = 0
    while sweeps < options.sweeps:
        sweeps += 1
        if _sweep(current, target, pinned, moment, multiplier) <= options.tolerance * multiplier:
            break
        if sweeps % _SWEEPS_BETWEEN == 0:
            current = _newton(current.T, weight, moment, multiplier).T.contiguous()
    return _Solution(current.T.contiguous(), multiplier, sweeps)


def _sweep(current: Tensor, target: Tensor, pinned: Tensor, moment: Tensor, multiplier: float) -> Tensor:
    """One sweep of coordinate descent over U^T = current [n, m], in place; W^T = target [n, m], pinned: [n, m] bool.

    Returns the largest H_jj |change of U_ij|.
    """
    power = moment.diagonal()
    curvature = torch.where(power > 0, power, 1.0)
    largest = torch.zeros((), dtype=current.dtype, device=current.device)
    for begin in range(0, len(current), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        slopes = moment[block] @ (target - current)
        local = moment[block, block]
        before = current[block].clone()
        for j in range(len(slopes)):
            i = begin + j
            sought = torch.nn.functional.softshrink(slopes[j] + power[i] * current[i], multiplier) / curvature[i]
            change = (sought - current[i]).masked_fill_(pinned[i], 0)
            current[i] += change
            slopes[j + 1 :].addr_(local[j + 1 :, j], change, alpha=-1)
        moved = (current[block] - before).abs() * power[block, None]
        largest = torch.maximum(largest, moved.max())
    return largest


def _newton(current: Tensor, weight: Tensor, moment: Tensor, multiplier: float) -> Tensor:
    """U [m, n] after a step towards the least objective on its support with its signs; no row's objective rises.

    Of some lengths of the step, each row takes the best; weights that would change sign become zero.
    """
    signs = current.sign()
    slope = (weight - current) @ moment - multiplier * signs
    step = solve_free(slope, current != 0, damp(moment, _NEWTON_DAMPING).moment)

    def objective(solution: Tensor) -> Tensor:
        difference = solution - weight
        return ((difference @ moment) * difference).sum(dim=1) / 2 + multiplier * solution.abs().sum(dim=1)

    # At the length where the first weight of a row reaches zero the objective is below where it was.
    crossing = torch.where(step * signs < 0, -current / step, torch.inf)
    first = crossing.amin(dim=1, keepdim=True).clamp(max=1)
    best, least = current, objective(current)
    for length in (*_NEWTON_LENGTHS, first):
        moved = current + length * step
        moved = torch.where(moved.sign() == signs, moved, 0.0)
        reached = objective(moved)
        best = torch.where((reached < least)[:, None], moved, best)
        least = torch.minimum(reached, least)
    return best
