"""The search: the minimum of a problem's objective within its bounds, and which parameters the points identify."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from coppice.errors import UserError
from coppice.laws.engine.forms import Form, Parameter, parameter_columns
from coppice.laws.engine.metrics import root_mean_square
from coppice.laws.engine.points import Points, count
from coppice.laws.engine.problem import Problem

_RANK_TOLERANCE = 1e-6
_ZERO_COLUMN = 1e-8  # a parameter of a term that the search has left at its bound of 0
_GRADIENT_TOLERANCE = 1e-5
_SEARCH_TOLERANCE = 1e-4
_SAME_OPTIMUM = 1e-7  # of the size of the targets
_EXACT = 1e-10  # residuals below this part of the targets are rounding
_ROWS_AT_ONCE = 128  # searches that share an array; results do not depend on the number of threads


@dataclass(frozen=True)
class Effort:
    """How many starts a search has, how many resamples of the runs the intervals come from, their seed, and threads."""

    starts: int = 32
    bootstrap: int = 200
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True)
class Fit:
    """An optimum of a problem's objective.

    `unidentified` are the free parameters that the points do not identify; `starts` [m, p] the values of every start
    that ended as low as the best. `at_bound` the identified parameters whose best value is the last that the search
    allows; `notes` sentences on what the design of the points fixes.
    """

    problem: Problem
    parameters: dict[str, float]
    unidentified: tuple[str, ...]
    converged: bool
    starts: np.ndarray
    notes: list[str] = field(default_factory=list)
    at_bound: tuple[str, ...] = ()

    @property
    def fixed(self) -> dict[str, float]:
        """The parameters that were not fitted."""
        return self.problem.fixed

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the fitted parameters."""
        return self.problem.free

    @cached_property
    def values(self) -> np.ndarray:
        """The parameters [p] in the form's order."""
        return self.problem.row(self.parameters)

    @property
    def objective(self) -> float:
        """The objective at the optimum."""
        return float(self.problem.objective(self.parameters))

    def predict(self, points: Points) -> np.ndarray:
        """The target [n] at `points`, in the fit's units."""
        return self.problem.form.predict(self.parameters, points)


def fit_form(form: Form, points: Points, starts: int = 32, seed: int = 0, fixed: dict[str, float] | None = None) -> Fit:
    """The minimum of the objective within the bounds, from `starts` Latin-hypercube starts.

    `fixed` replaces what the form's `reduce` would fix. Works with any number of points above zero: what they do not
    identify is named in `unidentified`. Raises UserError where no start gives finite values.
    """
    reduced, notes = form.reduce(points) if fixed is None else (fixed, [])
    problem = Problem(form, points, reduced)
    ends = descend(problem, _starts(problem, starts, seed))
    scores = np.sqrt(2 * problem.objective(parameter_columns(form, ends)) / count(points))
    if not np.isfinite(scores).any():
        raise UserError(
            "The formula has no finite value at these points wherever its search begins; look for sizes, tokens, "
            f"ratios or {form.target} that are below 0 or far beyond what the law is about."
        )
    near = ends[scores <= np.min(scores) + _SAME_OPTIMUM * root_mean_square(problem.scale)]
    best = _polish(problem, ends[np.argmin(scores)])
    # At one of several optima a term can have vanished, and its parameters with it.
    unknown = {name for end in near for name in unidentified(problem.search_jacobian(end), problem.free)}
    return Fit(
        problem,
        parameters=best,
        unidentified=tuple(name for name in problem.free if name in unknown),
        converged=gradient_ratio(problem, best) <= _GRADIENT_TOLERANCE,
        starts=near,
        notes=notes,
        at_bound=tuple(
            name for name in problem.free if name not in unknown and _is_at_bound(best[name], form.parameters[name])
        ),
    )


def _starts(problem: Problem, number: int, seed: int) -> np.ndarray:
    """A Latin hypercube of `number` starts over the free parameters' start ranges: [number, p], the others as fixed."""
    generator = np.random.default_rng(seed)
    starts = np.empty((number, len(problem.form.parameters)))
    for place, (name, parameter) in enumerate(problem.form.parameters.items()):
        if name in problem.fixed:
            starts[:, place] = problem.fixed[name]
        else:
            part = (generator.permutation(number) + generator.random(number)) / number
            low, high = parameter.start
            starts[:, place] = low * (high / low) ** part if parameter.logarithmic else low + part * (high - low)
    return starts


# What the optimum is worth


def _is_at_bound(value: float, parameter: Parameter) -> bool:
    if parameter.logarithmic:
        return bool(np.min(np.abs(np.log(np.divide(parameter.bounds, value)))) <= 1e-6)
    return bool(np.min(np.abs(np.subtract(parameter.bounds, value))) <= 1e-6 * max(1.0, abs(value)))


def unidentified(columns: np.ndarray, names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the parameters that have a part in the null space of the Jacobian `columns` [n, k].

    Columns are scaled to length 1, save those below 1e-8 of the longest, which count as 0; singular values below 1e-6
    of the largest span the null space. A parameter is identified where its axis is orthogonal to that space.
    """
    if not names:
        return ()
    lengths = np.linalg.norm(columns, axis=0)
    scaled = np.where(lengths > _ZERO_COLUMN * lengths.max(), columns / np.where(lengths > 0, lengths, 1), 0)
    values, axes = np.linalg.svd(scaled, full_matrices=True)[1:]
    rank = int(np.sum(values > _RANK_TOLERANCE * values.max(initial=0)))
    share = np.linalg.norm(axes[rank:], axis=0)
    return tuple(name for name, part in zip(names, share, strict=True) if part > 1e-4)


def gradient_ratio(problem: Problem, parameters: dict[str, float]) -> float:
    """How far from stationary the parameters are: 0 at an optimum, without unit, at most 1.

    max_k |J_k| |theta_k - clip(theta_k - J_k . h'(r) / |J_k|^2)| / |h'(r)|: the cosine between the pull h'(r) of the
    residuals and the column J_k, save that a parameter at its bound need not cross it. 0 where the residuals
    are rounding. It does not depend on the scale of the objective, so that it detects a search which ended because a
    mean is small.
    """
    residuals = problem.residuals(parameters)
    if np.linalg.norm(residuals) <= _EXACT * np.linalg.norm(problem.scale) or not problem.free:
        return 0.0
    pull = problem.form.objective.slope(residuals)
    slopes = problem.jacobian(parameters)
    lengths = np.linalg.norm(slopes, axis=0)
    values = np.array([parameters[name] for name in problem.free])
    squares = np.where(lengths > 0, lengths, 1) ** 2
    moved = np.clip(values - slopes.T @ pull / squares, *problem.bounds)
    return float(np.max(lengths * np.abs(moved - values)) / np.linalg.norm(pull))


# One optimum to rounding


def _polish(problem: Problem, start: np.ndarray) -> dict[str, float]:
    """The optimum near `start` [p] to rounding."""
    if problem.form.objective.huber is None and problem.free:
        start = _trust_region(problem, start)
    ends = descend(problem, start[None], rounds=1000, tolerance=1e-9)
    return dict(zip(problem.form.parameters, ends[0].tolist(), strict=True))


def _trust_region(problem: Problem, start: np.ndarray) -> np.ndarray:
    """The least squares [p] near `start` [p], by the trust-region search of Branch, Coleman and Li."""
    # scipy is slow to import, and reading a study reads the laws' options.
    from scipy.optimize import least_squares

    def residuals(searched: np.ndarray) -> np.ndarray:
        return problem.residuals(parameter_columns(problem.form, problem.from_search(searched[None])))[0]

    result = least_squares(
        residuals,
        problem.to_search(start[None])[0],
        lambda searched: problem.search_jacobian(problem.from_search(searched[None])[0]),
        bounds=problem.search_bounds,
        method="trf",
        x_scale="jac",
        ftol=1e-15,
        xtol=1e-15,
        gtol=1e-15,
        max_nfev=200,
    )
    return problem.from_search(result.x[None])[0]


# Many optima at once


def descend(
    problem: Problem,
    starts: np.ndarray,
    weights: np.ndarray | None = None,
    rounds: int = 100,
    tolerance: float = _SEARCH_TOLERANCE,
    threads: int = 1,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """The objective's minima from many starts, or under many weights, at once: values [m, p] from `starts` [m, p].

    Projected Levenberg-Marquardt: theta <- clip(theta - (A + lambda diag A)^-1 g), g = J^T W h'(r), A = J^T W C J, over
    the parameters that no bound holds back. C is 1 where |r| <= delta and mu delta / |r| beyond: mu = 0 is Newton's
    curvature of Huber's loss, mu = 1 that of the parabola which bounds it from above. lambda and mu fall where a step
    lowers the objective and grow where it does not. A row ends where max_k |g_k| / sqrt(A_kk h'^T W h') <= tolerance,
    with A for C = 1, or r is rounding, or no step lowers it. W is the diagonal of `weights` [m, n]. `progress` is
    called with the number of rows that have ended.
    """
    weights = np.ones((len(starts), count(problem.points))) if weights is None else weights
    pieces = [slice(first, first + _ROWS_AT_ONCE) for first in range(0, len(starts), _ROWS_AT_ONCE)]

    def descend_piece(piece: slice) -> np.ndarray:
        ends = _descend(problem, starts[piece], weights[piece], rounds, tolerance)
        if progress:
            progress(len(ends))
        return ends

    if not problem.free or not pieces:
        return starts
    with ThreadPoolExecutor(threads) as pool:
        return np.concatenate(list(pool.map(descend_piece, pieces)))


def _descend(problem: Problem, starts: np.ndarray, weights: np.ndarray, rounds: int, tolerance: float) -> np.ndarray:
    """`descend` for rows that share an array; a row that has ended leaves `active`."""
    low, high = problem.search_bounds
    searched = problem.to_search(starts)
    damping = np.ones(len(starts))  # lambda in units of 1e-3; below 1 it is mu as well
    rounding = _EXACT**2 * weights @ problem.scale**2

    def costs(at: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The weighted objective [a] of the `rows` [a] at search coordinates [a, k]; infinite where it has no value."""
        residuals = problem.residuals(parameter_columns(problem.form, problem.from_search(at)))
        with np.errstate(invalid="ignore"):
            total = np.sum(weights[rows] * problem.form.objective.loss(residuals), axis=1)
        return np.nan_to_num(total, nan=np.inf, posinf=np.inf)

    # A start without a finite objective goes nowhere.
    active = np.flatnonzero(np.isfinite(costs(searched, np.arange(len(starts)))))
    for _ in range(rounds):
        here = searched[active]
        cost = costs(here, active)
        gradient, curvature, squares, pulled = _normal_equations(
            problem, here, weights[active], np.minimum(damping[active], 1)
        )
        # At a bound that the gradient points across, or without any slope, a parameter stays.
        held = ((here <= low) & (gradient >= 0)) | ((here >= high) & (gradient <= 0)) | (squares <= 0)
        gradient[held] = 0
        steepness = np.max(np.abs(gradient) / np.sqrt(np.where(held, 1, squares)), axis=1)
        going = (steepness > tolerance * np.sqrt(pulled)) & (2 * cost > rounding[active]) & (damping[active] < 1e11)
        if not going.any():
            break
        diagonal = np.where(held, 1, np.maximum(np.einsum("mkk->mk", curvature), 1e-6 * squares))
        curvature *= ~(held[:, :, None] | held[:, None, :])
        ridge = diagonal * np.where(held, 1, 1e-3 * damping[active][:, None])
        curvature += ridge[:, :, None] * np.eye(len(problem.free))
        trial = np.clip(here - np.linalg.solve(curvature, gradient[..., None])[..., 0], low, high)
        lower = costs(trial, active) < cost
        searched[active] = np.where((lower & going)[:, None], trial, here)
        # The floor keeps the matrix regular where parameters are not identified.
        damping[active] = np.maximum(damping[active] * np.where(lower, 0.2, 4), 1e-7)
        active = active[going]
    return problem.from_search(searched)


def _normal_equations(
    problem: Problem, searched: np.ndarray, weights: np.ndarray, blend: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What a step at `searched` [m, k] needs, with mu = `blend` [m].

    J^T W h' [m, k], J^T W C J [m, k, k], the diagonal of J^T W J [m, k], and h'^T W h' [m].
    """
    values = problem.from_search(searched)
    residuals = problem.residuals(parameter_columns(problem.form, values))
    slopes = problem.search_slopes(values)
    pull = problem.form.objective.slope(residuals)
    bent, delta = weights, problem.form.objective.huber
    if delta is not None:
        size = np.abs(residuals)
        bent = weights * np.where(size <= delta, 1, blend[:, None] * delta / np.maximum(size, 1e-300))
    return (
        np.einsum("mkn,mn->mk", slopes, weights * pull),
        (slopes * bent[:, None, :]) @ slopes.transpose(0, 2, 1),
        np.einsum("mkn,mkn,mn->mk", slopes, slopes, weights),
        np.sum(weights * pull**2, axis=1),
    )
