"""Net-Trim: the sparsest weights, in the 1-norm, whose outputs stay within a given error.

Aghasi et al., Fast Convex Pruning of Deep Neural Networks (arXiv 1806.06457), for a linear without its activation: the
constraints of a ReLU fall away and the inputs enter by H = E[x x^T] alone. Over the whole matrix W [m, n],

    min |U|_1  subject to  tr((U - W) H (U - W)^T) <= epsilon^2 tr(W H W^T).

With the multiplier lambda of the constraint, one number for the matrix, this is min 1/2 tr((U - W) H (U - W)^T) +
lambda |U|_1, which falls apart into rows. The error grows with lambda, and U is zero from max |W H| on; lambda is found
by regula falsi on its logarithm, each problem beginning from the solution of the one before. A problem is solved by
ADMM, the paper's own way, for all rows at once: with D = diag(H), rho a number and Y the scaled dual,

    V <- W + rho (U - Y - W) D (H + rho D)^-1,    V <- alpha V + (1 - alpha) U,
    U_ij <- soft(V_ij + Y_ij, lambda / (rho H_jj)),    Y <- Y + V - U,    soft(v, t) = sign(v) max(|v| - t, 0).

Between runs of such steps the weights that are not zero take a Newton step, cut where it lowers a row's objective the
most; the dual of the next run is the slope there. What is left to be done is on record: the largest distance of
((W - U) H) / lambda from the subgradients of |U|_1, which are sign(U_ij), or [-1, 1] where U_ij = 0. Differs from the
paper: those Newton steps; a sparsity as the target, met exactly; and a least-squares refit on the support, which undoes
the shrinkage of the 1-norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from coppice.errors import UserError
from coppice.lazy import torch
from coppice.methods.declaration import LayerMethod, Source
from coppice.methods.incompatible import PRUNE
from coppice.methods.options import TargetOptions
from coppice.methods.solvers.damping import damp
from coppice.methods.solvers.loss import relative_error
from coppice.methods.solvers.mask import REFIT_DAMPING, REFIT_DAMPING_DESCRIPTION, keep_largest, nothing_to_prune
from coppice.methods.solvers.moments import second_moment
from coppice.methods.solvers.refit import refit, solve_free
from coppice.methods.solvers.selection import share_of
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.replacements import Masked, Unchanged
from coppice.records.base import Json

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Source(
    "Fast Convex Pruning of Deep Neural Networks",
    "arXiv 1806.06457",
    "min |U|_1 within an output error of epsilon, for a linear without activation",
)

_STEPS_BETWEEN = 50
_RELAXATION = 1.6  # alpha
_LEAST_PENALTY = 0.03  # rho
_PENALTY_FACTORS = (1.0, 8.0, 64.0)  # of rho, in turn: where one makes a row slow, another does not
_NEWTON_DAMPING = 1e-9
_NEWTON_LENGTHS = (1.0, 0.5, 0.25, 0.125)
_LEAST_MULTIPLIER = 1e-8  # of max |W H|
_MISS = 1e-3  # how far below its target the error may end, as a share
_ZEROS_MISS = 5e-3  # and the number of zeros, to which the smallest weights that are left are added
_SEARCH_TOLERANCE = 0.03  # of the residual, until lambda is nearly found
_STRIDE, _SHORT_STRIDE = math.log(4), 0.005  # of log lambda, first steps of a search
_EVALUATIONS = 16


class Options(TargetOptions):
    """Exactly one of epsilon and sparsity."""

    TARGET = "sparsity"
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
        default=1e-3,
        gt=0,
        description="The solver ends when the conditions of optimality hold up to this, in units of lambda.",
    )
    iterations: int = Field(default=1000, ge=1, description="Steps of ADMM at most, for each lambda that is tried.")
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
    """U [m, n] float64 of a multiplier."""

    weight: Tensor
    multiplier: float


@dataclass(frozen=True)
class _Goal:
    """What grows with lambda, as a function of U, and where it should be: at most `most`, and `least` is enough."""

    measure: Callable[[Tensor], float]
    least: float
    most: float


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
    problem = _Problem(weight, moment, free & ~dead, options.iterations)
    solution = _search(problem, _goal(weight, moment, options, count), options.tolerance)
    pruned, mask = solution.weight, solution.weight != 0
    if options.sparsity is not None:
        scores = pruned.abs() * moment.diagonal().sqrt()
        mask = keep_largest(scores, weight.numel(), count, free if solution.multiplier == 0 else mask)
        pruned = pruned.masked_fill(~mask, 0)
    record: Json = {
        "epsilon_asked": options.epsilon,
        "sparsity_asked": options.sparsity,
        "sparsity": 1 - mask.sum().item() / mask.numel(),
        "multiplier": solution.multiplier,
        "kkt_residual": kkt_residual(solution.weight, weight, moment, free & ~dead, solution.multiplier),
        "iterations": problem.iterations,
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
    return _residuals(solution, weight, moment, free, multiplier).max().item()


def _residuals(solution: Tensor, weight: Tensor, moment: Tensor, free: Tensor, multiplier: float) -> Tensor:
    """The residual of each row, [m]."""
    slope = (weight - solution) @ moment / multiplier
    violation = torch.where(solution == 0, (slope.abs() - 1).clamp(min=0), (slope - solution.sign()).abs())
    return violation.masked_fill_(~free, 0).amax(dim=1)


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


def _goal(weight: Tensor, moment: Tensor, options: Options, count: int) -> _Goal:
    """The error, or the number of zeros."""
    if options.epsilon is None:
        return _Goal(lambda solution: float((solution == 0).sum()), count - max(_ZEROS_MISS * count, 1), count)
    epsilon = options.epsilon
    return _Goal(
        lambda solution: math.sqrt(relative_error(solution - weight, weight, moment)), (1 - _MISS) * epsilon, epsilon
    )


def _search(problem: _Problem, goal: _Goal, tolerance: float) -> _Solution:
    """The solution of the largest lambda found that meets the goal; W itself where that is enough or none is found."""
    weight, moment, free = problem.weight, problem.moment, problem.free
    unchanged = _Solution(weight, 0.0)
    largest = (weight @ moment).abs().masked_fill(~free, 0).max().item()
    if largest == 0 or goal.measure(weight) >= goal.least:
        return unchanged
    bounds = _LEAST_MULTIPLIER * largest, largest
    # Where inputs do not correlate, this lambda prunes half of the weights.
    half = (weight.abs() * moment.diagonal())[free].median().item()
    begin = _Solution(weight, min(max(half, bounds[0]), bounds[1]))
    near = _seek(problem, goal, begin, bounds, _STRIDE, max(tolerance, _SEARCH_TOLERANCE))
    if near is None:
        return unchanged
    return _seek(problem, goal, near, bounds, _SHORT_STRIDE, tolerance) or near


def _seek(
    problem: _Problem, goal: _Goal, begin: _Solution, bounds: tuple[float, float], stride: float, tolerance: float
) -> _Solution | None:
    """The solution of the largest lambda found that meets the goal, if any does.

    From the lambda of `begin` in strides of log lambda that double. Each begins from the U of the one before.
    """
    bracket, solution = _Bracket(stride), None
    position, current = math.log(begin.multiplier), begin.weight
    for _ in range(_EVALUATIONS):
        multiplier = math.exp(position)
        current = problem.solve(multiplier, current, tolerance)
        reached = goal.measure(current)
        if reached <= goal.most:
            solution = _Solution(current, multiplier)
            if reached >= goal.least:
                break
        following = bracket.after(position, reached - (goal.least + goal.most) / 2)
        following = min(max(following, math.log(bounds[0])), math.log(bounds[1]))
        if following == position:
            break
        position = following
    return solution


class _Bracket:
    """Where a growing function is zero: by strides that double, then by regula falsi in the Illinois form."""

    def __init__(self, stride: float) -> None:
        self.stride = stride
        self.ends: dict[bool, tuple[float, float]] = {}
        self.moved: bool | None = None

    def after(self, position: float, value: float) -> float:
        """The position to try next."""
        above = value > 0
        self.ends[above] = position, value
        if len(self.ends) < 2:
            stride, self.stride = self.stride, 2 * self.stride
            return position - stride if above else position + stride
        if self.moved is above:
            # The other end stays again: without this it could for ever.
            stays, height = self.ends[not above]
            self.ends[not above] = stays, height / 2
        self.moved = above
        (low, depth), (high, height) = self.ends[False], self.ends[True]
        return (low * height - high * depth) / (height - depth)


class _Problem:
    """min 1/2 tr((U - W) H (U - W)^T) + lambda |U|_1 over the free weights, for one lambda after another.

    weight W: [m, n] float64. moment H: [n, n]. free: [m, n] bool, the others stay zero; none of a dead input.
    most: steps for each lambda; iterations: those taken so far.
    """

    def __init__(self, weight: Tensor, moment: Tensor, free: Tensor, most: int) -> None:
        self.weight, self.moment, self.free, self.most = weight, moment, free, most
        power = moment.diagonal()
        power = torch.where(power > 0, power, 1.0)
        # Steps are taken in units in which every input has the same power, which conditions H better.
        units = power.sqrt()
        units = units * units[:, None]
        scaled = moment / units
        # Directions of the inputs with much less power than rho converge slowly, those with much more hardly shrink.
        self.penalty = torch.linalg.eigvalsh(scaled).median().clamp(min=_LEAST_PENALTY) * power
        self.inverses = [torch.linalg.inv(moment + (factor * self.penalty).diag()) for factor in _PENALTY_FACTORS]
        self.damped = damp(scaled, _NEWTON_DAMPING).moment * units
        self.iterations = 0

    def solve(self, multiplier: float, start: Tensor, tolerance: float) -> Tensor:
        """From `start`, until every row's residual is within the tolerance.

        Steps of ADMM settle which weights are zero; between runs of them the others take Newton steps, without which a
        poorly conditioned H would need thousands. Rows that are done take no more of either.
        """
        solution = start.clone()
        rows = torch.arange(len(solution), device=solution.device)
        left, turn = self.most, -1
        while left and len(rows):
            turn = (turn + 1) % len(_PENALTY_FACTORS)
            count = min(left, _STEPS_BETWEEN)
            left, self.iterations = left - count, self.iterations + count
            solution[rows] = self._alternate(solution[rows], rows, multiplier, count, turn)
            rows = self._select_unsolved(solution, rows, multiplier, tolerance)
            if len(rows):
                solution[rows] = self._newton(solution[rows], rows, multiplier)
                rows = self._select_unsolved(solution, rows, multiplier, tolerance)
        return solution

    def _select_unsolved(self, solution: Tensor, rows: Tensor, multiplier: float, tolerance: float) -> Tensor:
        residuals = _residuals(solution[rows], self.weight[rows], self.moment, self.free[rows], multiplier)
        return rows[residuals > tolerance]

    def _alternate(self, current: Tensor, rows: Tensor, multiplier: float, count: int, turn: int) -> Tensor:
        """Steps of ADMM, with the penalty whose turn it is."""
        penalty, inverse = _PENALTY_FACTORS[turn] * self.penalty, self.inverses[turn]
        weight, pinned, thresholds = self.weight[rows], ~self.free[rows], multiplier / penalty
        slope = (weight - current) @ self.moment
        dual = torch.where(pinned, slope, slope.clamp(-multiplier, multiplier)) / penalty
        for _ in range(count):
            close = weight + ((current - dual - weight) * penalty) @ inverse
            sought = _RELAXATION * close + (1 - _RELAXATION) * current + dual
            current = (sought - sought.clamp(-thresholds, thresholds)).masked_fill_(pinned, 0)
            dual = sought - current
        return current

    def _newton(self, current: Tensor, rows: Tensor, multiplier: float) -> Tensor:
        """U after a step towards the least objective on its support with its signs; no row's objective rises.

        Of some lengths of the step, each row takes the best; weights that would change sign become zero.
        """
        weight, signs = self.weight[rows], current.sign()
        slope = (weight - current) @ self.moment - multiplier * signs
        step = solve_free(slope, current != 0, self.damped)

        def objective(solution: Tensor) -> Tensor:
            difference = solution - weight
            return ((difference @ self.moment) * difference).sum(dim=1) / 2 + multiplier * solution.abs().sum(dim=1)

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


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    needs=frozenset({"moments"}),
    adds_traits=frozenset({"masked"}),
    incompatible_with=PRUNE,
    compress=compress,
)
