"""The engine under the laws: bounded fits from many starts, what the data identify, and uncertainty.

A law's file says what it is by a `Law` (see `coppice.laws`). Points are a dict of columns [n], one row an observation:
`run` (str), what the law predicts (its form's `target`), and whatever else its formula names.

What is minimised is the sum over points of Huber's loss of the residuals r, or of r^2 / 2 where there is no delta:

    h(r) = r^2 / 2 for |r| <= delta, delta (|r| - delta / 2) beyond;    r = y' - y, or ln y' - ln y

Sources: Chinchilla Scaling: A Replication Attempt (arXiv 2404.10102) for the objective (a sum, never a mean), the many
starts, the bootstrap and the test of convergence by the gradient; P2 Law: Scaling Law for Post-Training After Model
Pruning (arXiv 2411.10272) for the metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from coppice.errors import UserError
from coppice.uncertainty import percentile_interval

if TYPE_CHECKING:
    import pandas as pd

Points = dict[str, np.ndarray]
Parameters = dict[str, Any]

FEWEST_RUNS = 4
_HUBER_DELTA = 1e-3  # of the metric: Besiroglu et al.
_RANK_TOLERANCE = 1e-6
_ZERO_COLUMN = 1e-8  # a parameter of a term that the search has left at its bound of 0
_GRADIENT_TOLERANCE = 1e-5
_SEARCH_TOLERANCE = 1e-4
_SAME_OPTIMUM = 1e-7  # of the size of the targets
_EXACT = 1e-10  # residuals below this part of the targets are rounding
_ROWS_AT_ONCE = 128  # searches that share an array; results do not depend on the number of threads


@dataclass(frozen=True)
class Parameter:
    """Bounds of a parameter, the range its starts are drawn from, and whether it is searched by its logarithm."""

    bounds: tuple[float, float]
    start: tuple[float, float]
    logarithmic: bool = False


@dataclass(frozen=True)
class Objective:
    """What a residual is (y' - y, or ln y' - ln y), and the delta past which Huber's loss is linear (None: never)."""

    residuals: Literal["absolute", "logarithmic"] = "absolute"
    huber: float | None = None


def nothing_fixed(points: Points) -> tuple[dict[str, float], list[str]]:
    """The `reduce` of a form that any points identify."""
    return {}, []


@dataclass(frozen=True)
class Form:
    """A formula to fit.

    `predict(parameters, points)` gives the target [n]; it broadcasts over parameters of shape [..., 1] and is analytic,
    since it is differentiated by a complex step, unless `slopes(parameters, points)` gives d predict / d theta by the
    name of each parameter. `reduce(points)` gives the parameters that the design of the points cannot tell, with the
    value each is fixed at, and the sentences that say so. `target` is the column that is predicted.
    """

    parameters: dict[str, Parameter]
    predict: Callable[[Parameters, Points], np.ndarray]
    reduce: Callable[[Points], tuple[dict[str, float], list[str]]] = nothing_fixed
    target: str = "loss"
    objective: Objective = Objective()
    slopes: Callable[[Parameters, Points], Mapping[str, np.ndarray]] | None = None


@dataclass(frozen=True)
class Fit:
    """An optimum of the objective.

    `fixed` are the parameters that were not fitted; `unidentified` those that were, but that the points cannot tell;
    `starts` [m, p] the parameters of every start that ended as low as the best, in the order of `parameters`;
    `at_bound` those that the points tell, but whose best value is the last that the search allows.
    """

    parameters: dict[str, float]
    fixed: dict[str, float]
    unidentified: tuple[str, ...]
    converged: bool
    starts: np.ndarray
    notes: list[str] = field(default_factory=list)
    at_bound: tuple[str, ...] = ()

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the fitted parameters."""
        return tuple(name for name in self.parameters if name not in self.fixed)


def without(form: Form, name: str, value: float = 0.0) -> Form:
    """The rival of a form that has the named parameter at `value`, whatever the points are."""

    def predict(parameters: Parameters, points: Points) -> np.ndarray:
        return form.predict(parameters | {name: value}, points)

    def reduce(points: Points) -> tuple[dict[str, float], list[str]]:
        fixed, notes = form.reduce(points)
        return {other: at for other, at in fixed.items() if other != name}, notes

    kept = {other: parameter for other, parameter in form.parameters.items() if other != name}
    return replace(form, parameters=kept, predict=predict, reduce=reduce, slopes=None)


# Points


def points_of(table: pd.DataFrame, columns: dict[str, type]) -> Points:
    """The rows of a table as points: its `columns`, each of the type it is given."""
    return {name: table[name].to_numpy(dtype=kind) for name, kind in columns.items()}


def count(points: Points) -> int:
    """Number of points."""
    return len(points["run"])


def select(points: Points, rows: np.ndarray) -> Points:
    """The points at `rows`, a mask or indices."""
    return {name: column[rows] for name, column in points.items()}


def levels(values: np.ndarray, gap: float = 0.05) -> np.ndarray:
    """Level of each of the positive `values` [n], ascending from 0: those within a relative `gap` of its first.

    Ratios that were asked to be equal differ a little once whole units were removed. A level does not grow from
    neighbour to neighbour, so that a fine scale of values is many levels and not one.
    """
    distinct, inverse = np.unique(values, return_inverse=True)
    level, first = np.zeros(len(distinct), int), distinct[0]
    for place, value in enumerate(distinct[1:], 1):
        opens = value > first * (1 + gap)
        level[place] = level[place - 1] + opens
        first = value if opens else first
    return level[inverse]


def is_single(values: np.ndarray) -> bool:
    """Whether all of the positive `values` [n] share one level."""
    return bool(levels(values).max() == 0)


def powers_of_a_thousand(points: Points, names: tuple[str, ...]) -> dict[str, float]:
    """Units: for each named column the largest power of a thousand, from 1 to 1e15, that its largest value reaches."""
    powers = 1000.0 ** np.arange(6)
    return {name: float(powers[powers <= max(points[name].max(), 1)][-1]) for name in names}


def columns(form: Form, samples: np.ndarray) -> Parameters:
    """Parameters of shape [k, 1] from `samples` [k, p], to predict for all samples at once."""
    return {name: samples[:, [place]] for place, name in enumerate(form.parameters)}


# The objective


def residuals(form: Form, parameters: Parameters, points: Points) -> np.ndarray:
    """r [n], or [m, n] with parameters [m, 1]; infinite where a logarithm has no value."""
    predicted, observed = form.predict(parameters, points), points[form.target]
    if form.objective.residuals == "absolute":
        return predicted - observed
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(predicted > 0, np.log(predicted) - np.log(observed), np.inf)


def objective(form: Form, parameters: Parameters, points: Points) -> np.ndarray:
    """Sum over points of the loss of the residuals: a number, or [m] with parameters [m, 1]."""
    return np.sum(_penalty(form.objective, residuals(form, parameters, points)), axis=-1)


def _penalty(objective: Objective, residual: np.ndarray) -> np.ndarray:
    """h(r)."""
    if objective.huber is None:
        return residual**2 / 2
    size = np.abs(residual)
    return np.where(size <= objective.huber, residual**2 / 2, objective.huber * (size - objective.huber / 2))


def _pull(objective: Objective, residual: np.ndarray) -> np.ndarray:
    """h'(r): the residual, cut at delta."""
    return residual if objective.huber is None else np.clip(residual, -objective.huber, objective.huber)


def _size(form: Form, points: Points) -> np.ndarray:
    """The size of what residuals are residuals of [n]: the target, or 1 where they are logarithmic."""
    observed = points[form.target]
    return np.ones_like(observed) if form.objective.residuals == "logarithmic" else observed


# Slopes


def jacobian(form: Form, parameters: dict[str, float], points: Points, names: tuple[str, ...]) -> np.ndarray:
    """d residual / d theta [n, k] of the named parameters, exact to rounding."""
    return _slopes(form, np.array([list(parameters.values())]), points, names)[0].T


def _slopes(form: Form, values: np.ndarray, points: Points, names: tuple[str, ...]) -> np.ndarray:
    """The transposed Jacobians of the residuals [m, k, n] of the named parameters at `values` [m, p]."""
    at = columns(form, values)
    if form.slopes is None:
        found = _complex_step(form, values, points, names)
    else:
        given = form.slopes(at, points)
        shape = (len(values), count(points))
        found = np.stack([np.broadcast_to(given[name], shape) for name in names], axis=1)
    if form.objective.residuals == "logarithmic":
        found = found / form.predict(at, points)[:, None, :]
    return found


def _complex_step(form: Form, values: np.ndarray, points: Points, names: tuple[str, ...]) -> np.ndarray:
    """d predict / d theta [m, k, n] = Im f(theta + i h) / h."""
    step = 1e-30
    stepped: Parameters = {}
    for place, name in enumerate(form.parameters):
        direction = np.array([name == other for other in names])
        stepped[name] = (values[:, place, None] + 1j * step * direction)[..., None]
    return form.predict(stepped, points).imag / step


def _places(form: Form, names: tuple[str, ...]) -> list[int]:
    """Where the named parameters stand in the order of the form's parameters."""
    return [list(form.parameters).index(name) for name in names]


def _search_space(form: Form, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which named parameters are searched by their logarithm [k], and the bounds [k] in search coordinates."""
    logarithmic = np.array([form.parameters[name].logarithmic for name in names], bool)
    bounds = np.array([form.parameters[name].bounds for name in names], float).reshape(-1, 2)
    low, high = _searched(bounds.T, logarithmic)
    return logarithmic, low, high


def _searched(values: np.ndarray, logarithmic: np.ndarray) -> np.ndarray:
    """Search coordinates of parameter values: their logarithm where `logarithmic`."""
    return np.where(logarithmic, np.log(np.where(logarithmic, values, 1)), values)


def _completed(form: Form, names: tuple[str, ...], fixed: dict[str, float], searched: np.ndarray) -> np.ndarray:
    """Parameters [m, p] from search coordinates [m, k] of the named ones, the others as fixed."""
    values = np.empty((len(searched), len(form.parameters)))
    for place, name in enumerate(form.parameters):
        if name in fixed:
            values[:, place] = fixed[name]
        else:
            column = searched[:, names.index(name)]
            values[:, place] = np.exp(column) if form.parameters[name].logarithmic else column
    return values


def _searched_slopes(form: Form, values: np.ndarray, points: Points, names: tuple[str, ...]) -> np.ndarray:
    """The transposed Jacobians [m, k, n] in search coordinates at `values` [m, p]: d r / d log theta = theta r'."""
    logarithmic, _, _ = _search_space(form, names)
    stretch = np.where(logarithmic, values[:, _places(form, names)], 1)
    return _slopes(form, values, points, names) * stretch[..., None]


def _searched_jacobian(form: Form, values: np.ndarray, points: Points, names: tuple[str, ...]) -> np.ndarray:
    """The Jacobian [n, k] in search coordinates at `values` [p]."""
    return _searched_slopes(form, values[None], points, names)[0].T


# The search


def fit_form(form: Form, points: Points, starts: int = 32, seed: int = 0, fixed: dict[str, float] | None = None) -> Fit:
    """The minimum of the objective within the bounds, from `starts` Latin-hypercube starts.

    `fixed` replaces what the form's `reduce` would fix. Works with any number of points above zero: what they do not
    identify is named in `unidentified`. Raises UserError where no start gives finite values.
    """
    reduced, notes = form.reduce(points) if fixed is None else (fixed, [])
    names = tuple(name for name in form.parameters if name not in reduced)
    ends = descend(form, points, names, reduced, _starts(form, reduced, starts, seed))
    scores = np.sqrt(2 * objective(form, columns(form, ends), points) / count(points))
    if not np.isfinite(scores).any():
        raise UserError(
            "The formula has no finite value at these points wherever its search begins; look for sizes, tokens, "
            f"ratios or {form.target} that are below 0 or far beyond what the law is about."
        )
    near = ends[scores <= np.min(scores) + _SAME_OPTIMUM * root_mean_square(_size(form, points))]
    best = _polished(form, points, names, reduced, ends[np.argmin(scores)])
    # At one of several optima a term can have vanished, and its parameters with it.
    unknown = {name for end in near for name in unidentified(_searched_jacobian(form, end, points, names), names)}
    return Fit(
        parameters=best,
        fixed=reduced,
        unidentified=tuple(name for name in names if name in unknown),
        converged=gradient_ratio(form, best, points, names) <= _GRADIENT_TOLERANCE,
        starts=near,
        notes=notes,
        at_bound=tuple(name for name in names if name not in unknown and _at_bound(best[name], form.parameters[name])),
    )


def _at_bound(value: float, parameter: Parameter) -> bool:
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


def gradient_ratio(form: Form, parameters: dict[str, float], points: Points, names: tuple[str, ...]) -> float:
    """How far from stationary the parameters are: 0 at an optimum, without unit, at most 1.

    max_k |J_k| |theta_k - clip(theta_k - J_k . h'(r) / |J_k|^2)| / |h'(r)|: the cosine between the pull h'(r) of the
    residuals and the column J_k, save that a parameter at its bound is not asked to cross it. 0 where the residuals
    are rounding. It does not depend on the scale of the objective, so that a search which ended because a mean is
    small is found out.
    """
    found = residuals(form, parameters, points)
    if np.linalg.norm(found) <= _EXACT * np.linalg.norm(_size(form, points)) or not names:
        return 0.0
    pull = _pull(form.objective, found)
    slopes = jacobian(form, parameters, points, names)
    lengths = np.linalg.norm(slopes, axis=0)
    values = np.array([parameters[name] for name in names])
    low, high = np.array([form.parameters[name].bounds for name in names]).T
    squares = np.where(lengths > 0, lengths, 1) ** 2
    moved = np.clip(values - slopes.T @ pull / squares, low, high)
    return float(np.max(lengths * np.abs(moved - values)) / np.linalg.norm(pull))


def _polished(
    form: Form, points: Points, names: tuple[str, ...], fixed: dict[str, float], start: np.ndarray
) -> dict[str, float]:
    """The optimum near `start` [p] to rounding."""
    if form.objective.huber is None and names:
        start = _trust_region(form, points, names, fixed, start)
    ends = descend(form, points, names, fixed, start[None], rounds=1000, tolerance=1e-9)
    return dict(zip(form.parameters, ends[0].tolist(), strict=True))


def _trust_region(
    form: Form, points: Points, names: tuple[str, ...], fixed: dict[str, float], start: np.ndarray
) -> np.ndarray:
    """The least squares [p] near `start` [p], by the trust-region search of Branch, Coleman and Li."""
    # scipy is slow to import, and reading a study asks a law for its options.
    from scipy.optimize import least_squares

    logarithmic, low, high = _search_space(form, names)

    def values(searched: np.ndarray) -> np.ndarray:
        return _completed(form, names, fixed, searched[None])

    result = least_squares(
        lambda searched: residuals(form, columns(form, values(searched)), points)[0],
        np.clip(_searched(start[_places(form, names)], logarithmic), low, high),
        lambda searched: _searched_jacobian(form, values(searched)[0], points, names),
        bounds=(low, high),
        method="trf",
        x_scale="jac",
        ftol=1e-15,
        xtol=1e-15,
        gtol=1e-15,
        max_nfev=200,
    )
    return values(result.x)[0]


def descend(
    form: Form,
    points: Points,
    names: tuple[str, ...],
    fixed: dict[str, float],
    starts: np.ndarray,
    weights: np.ndarray | None = None,
    rounds: int = 100,
    tolerance: float = _SEARCH_TOLERANCE,
    threads: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """The objective's minima from many starts, or under many weights, at once: parameters [m, p] from `starts` [m, p].

    Projected Levenberg-Marquardt: theta <- clip(theta - (A + lambda diag A)^-1 g), g = J^T W h'(r), A = J^T W C J, over
    the parameters that no bound holds back. C is 1 where |r| <= delta and mu delta / |r| beyond: mu = 0 is Newton's
    curvature of Huber's loss, mu = 1 that of the parabola which bounds it from above. lambda and mu fall where a step
    lowers the objective and grow where it does not. A row ends where max_k |g_k| / sqrt(A_kk h'^T W h') <= tolerance,
    with A for C = 1, or r is rounding, or no step lowers it. W is the diagonal of `weights` [m, n]. `progress` is told
    how many rows have ended.
    """
    weights = np.ones((len(starts), count(points))) if weights is None else weights
    pieces = [slice(first, first + _ROWS_AT_ONCE) for first in range(0, len(starts), _ROWS_AT_ONCE)]

    def descended(piece: slice) -> np.ndarray:
        found = _descended(form, points, names, fixed, starts[piece], weights[piece], rounds, tolerance)
        if progress:
            progress(len(found))
        return found

    if not names or not pieces:
        return starts
    with ThreadPoolExecutor(threads) as pool:
        return np.concatenate(list(pool.map(descended, pieces)))


def _descended(
    form: Form,
    points: Points,
    names: tuple[str, ...],
    fixed: dict[str, float],
    starts: np.ndarray,
    weights: np.ndarray,
    rounds: int,
    tolerance: float,
) -> np.ndarray:
    logarithmic, low, high = _search_space(form, names)
    searched = np.clip(_searched(starts[:, _places(form, names)], logarithmic), low, high)
    damping = np.ones(len(starts))
    rounding = _EXACT**2 * weights @ _size(form, points) ** 2
    active = np.arange(len(starts))

    def costs(at: np.ndarray) -> np.ndarray:
        found = residuals(form, columns(form, _completed(form, names, fixed, at)), points)
        with np.errstate(invalid="ignore"):
            return np.nan_to_num(
                np.sum(weights[active] * _penalty(form.objective, found), axis=1), nan=np.inf, posinf=np.inf
            )

    # A start without a finite objective goes nowhere.
    active = active[np.isfinite(costs(searched))]
    for _ in range(rounds):
        here = searched[active]
        cost = costs(here)
        gradient, curvature, squares, pulled = _normal_equations(
            form, points, names, fixed, here, weights[active], np.minimum(damping[active], 1)
        )
        held = ((here <= low) & (gradient >= 0)) | ((here >= high) & (gradient <= 0)) | (squares <= 0)
        gradient[held] = 0
        steepness = np.max(np.abs(gradient) / np.sqrt(np.where(held, 1, squares)), axis=1)
        going = (steepness > tolerance * np.sqrt(pulled)) & (2 * cost > rounding[active]) & (damping[active] < 1e11)
        if not going.any():
            break
        diagonal = np.where(held, 1, np.maximum(np.einsum("mkk->mk", curvature), 1e-6 * squares))
        curvature *= ~(held[:, :, None] | held[:, None, :])
        curvature += (diagonal * np.where(held, 1, 1e-3 * damping[active][:, None]))[:, :, None] * np.eye(len(names))
        trial = np.clip(here - np.linalg.solve(curvature, gradient[..., None])[..., 0], low, high)
        lower = costs(trial) < cost
        searched[active] = np.where((lower & going)[:, None], trial, here)
        # The floor keeps the matrix regular where parameters are not identified.
        damping[active] = np.maximum(damping[active] * np.where(lower, 0.2, 4), 1e-7)
        active = active[going]
    return _completed(form, names, fixed, searched)


def _normal_equations(
    form: Form,
    points: Points,
    names: tuple[str, ...],
    fixed: dict[str, float],
    searched: np.ndarray,
    weights: np.ndarray,
    blend: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What a step at `searched` [m, k] needs, with mu = `blend` [m].

    J^T W h' [m, k], J^T W C J [m, k, k], the diagonal of J^T W J [m, k], and h'^T W h' [m].
    """
    values = _completed(form, names, fixed, searched)
    found = residuals(form, columns(form, values), points)
    slopes = _searched_slopes(form, values, points, names)
    pull = _pull(form.objective, found)
    bent = weights
    if form.objective.huber is not None:
        size = np.abs(found)
        bent = weights * np.where(
            size <= form.objective.huber, 1, blend[:, None] * form.objective.huber / np.maximum(size, 1e-300)
        )
    return (
        np.einsum("mkn,mn->mk", slopes, weights * pull),
        (slopes * bent[:, None, :]) @ slopes.transpose(0, 2, 1),
        np.einsum("mkn,mkn,mn->mk", slopes, slopes, weights),
        np.sum(weights * pull**2, axis=1),
    )


def _starts(form: Form, fixed: dict[str, float], number: int, seed: int) -> np.ndarray:
    """A Latin hypercube of `number` starts over the free parameters' start ranges: [number, p], the others as fixed."""
    generator = np.random.default_rng(seed)
    starts = np.empty((number, len(form.parameters)))
    for place, (name, parameter) in enumerate(form.parameters.items()):
        if name in fixed:
            starts[:, place] = fixed[name]
        else:
            part = (generator.permutation(number) + generator.random(number)) / number
            low, high = parameter.start
            starts[:, place] = low * (high / low) ** part if parameter.logarithmic else low + part * (high - low)
    return starts


# Uncertainty


def bootstrap(
    form: Form,
    points: Points,
    fit: Fit,
    resamples: int,
    seed: int,
    fitted: np.ndarray | None = None,
    threads: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Refits to runs drawn with replacement: parameters [draws, p], and how often each point was drawn [draws, n].

    A run is the unit that is drawn, since the points of one run share their noise. Each refit starts at the optimum.
    A draw that identifies fewer parameters than the fitted points, or that holds none of the others, is drawn again.
    `fitted` [n] marks the points that the fit has seen; by default it is all. No draws where there are fewer than
    four runs, or no more fitted points than free parameters.
    """
    fitted = np.ones(count(points), bool) if fitted is None else fitted
    weights = drawn_runs(points, {"": (form, fit)}, resamples, seed, fitted)
    return refitted(form, points, fit, weights, fitted, threads, progress), weights


def drawn_runs(
    points: Points, fits: Mapping[str, tuple[Form, Fit]], resamples: int, seed: int, fitted: np.ndarray
) -> np.ndarray:
    """How often each point was drawn [draws, n], under the conditions of `bootstrap` for every one of the fits."""
    runs, member = np.unique(points["run"], return_inverse=True)
    most = max(len(fit.free) for _, fit in fits.values())
    if len(runs) < FEWEST_RUNS or fitted.sum() <= most:
        return np.empty((0, count(points)))
    seen = select(points, fitted)
    slopes = [
        (_searched_jacobian(form, np.array(list(fit.parameters.values())), seen, fit.free), fit.free)
        for form, fit in fits.values()
    ]
    unknown = [len(unidentified(*each)) for each in slopes]
    generator = np.random.default_rng(seed)
    counts: list[np.ndarray] = []
    for _ in range(100 * resamples):
        if len(counts) == resamples:
            break
        drawn = np.bincount(generator.integers(len(runs), size=len(runs)), minlength=len(runs))[member]
        there = drawn[fitted] > 0
        lost = any(
            len(unidentified(rows[there], names)) > known for (rows, names), known in zip(slopes, unknown, strict=True)
        )
        if not lost and (fitted.all() or drawn[~fitted].any()):
            counts.append(drawn)
    # Where hardly a draw identifies the parameters, the few that do are no sample of anything.
    return np.array(counts if len(counts) == resamples else [], float).reshape(-1, count(points))


def refitted(
    form: Form,
    points: Points,
    fit: Fit,
    weights: np.ndarray,
    fitted: np.ndarray,
    threads: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """Parameters [draws, p] of refits to the fitted points under `weights` [draws, n], each from the fit's optimum."""
    starts = np.tile(list(fit.parameters.values()), (len(weights), 1))
    seen = select(points, fitted)
    return descend(form, seen, fit.free, fit.fixed, starts, weights[:, fitted], threads=threads, progress=progress)


def profile(form: Form, points: Points, fit: Fit, name: str, values: np.ndarray) -> np.ndarray:
    """The lowest objective [v] where parameter `name` is held at each of `values` [v], found from the optimum outward.

    A flat profile is a parameter that the points hardly tell.
    """
    best = np.array(list(fit.parameters.values()))
    names = tuple(other for other in fit.free if other != name)
    found = np.empty(len(values))
    after = values >= fit.parameters[name]
    for side in (np.flatnonzero(after), np.flatnonzero(~after)[::-1]):
        start = best
        for place in side:
            fixed = fit.fixed | {name: float(values[place])}
            start = descend(form, points, names, fixed, start[None], rounds=400, tolerance=1e-6)[0]
            found[place] = objective(form, columns(form, start[None]), points)[0]
    return found


def drawn_interval(samples: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """95% interval of `samples` [draws]; None for both ends where there are no draws."""
    return percentile_interval(samples) if len(samples) else (None, None)


def fitted_parameters(fit: Fit, samples: np.ndarray) -> dict[str, dict[str, Any]]:
    """What fit.json says of each parameter: its value, its 95% interval and standard error over `samples` [draws, p].

    Beside them whether it is identified, without which it has no interval; its spread over equally good starts; and
    whether it lies at a bound of the search, where the interval tells of the bounds and not of the points.
    """
    spread = np.ptp(fit.starts, axis=0)
    found = {}
    for place, (name, value) in enumerate(fit.parameters.items()):
        identified = name not in fit.fixed and name not in fit.unidentified
        known = identified and len(samples) > 1
        low, high = drawn_interval(samples[:, place]) if known else (None, None)
        found[name] = {
            "value": value,
            "low": low,
            "high": high,
            "stderr": float(np.std(samples[:, place], ddof=1)) if known else None,
            "identified": identified,
            "spread": float(spread[place]),
            "at_bound": name in fit.at_bound,
        }
    return found


# Metrics


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def metrics(points: Points, predicted: np.ndarray, target: str = "loss") -> dict[str, float | None]:
    """Goodness of `predicted` [n], in the unit of the target.

    R^2 = 1 - sum (L - L')^2 / sum (L - mean L)^2 (None where all targets are equal); Huber: the mean over points of
    r^2 / 2 within delta = 1e-3 and delta (|r| - delta / 2) outside; rmse; and for losses along runs ASD and its
    unit-free variant.
    """
    observed = points[target]
    difference = predicted - observed
    variation = np.sum((observed - observed.mean()) ** 2)
    found: dict[str, float | None] = {
        "r2": float(1 - np.sum(difference**2) / variation) if variation > 0 else None,
        "huber": float(_penalty(Objective(huber=_HUBER_DELTA), difference).mean()),
        "rmse": root_mean_square(difference),
    }
    if "tokens" in points:
        found["asd"], found["asd_relative"] = average_slope_difference(points, predicted, target)
    return found


def average_slope_difference(
    points: Points, predicted: np.ndarray, target: str = "loss"
) -> tuple[float | None, float | None]:
    """ASD (arXiv 2411.10272): mean over runs of mean_i |s_i - s'_i|, and that over the mean over runs of mean_i |s_i|.

    s_i = (L_{i+1} - L_i) / (D_{i+1} - D_i) over consecutive checkpoints of a run, s'_i the same of the predictions; the
    unit is that of the target over the unit of `tokens`. The paper's formula was not readable: this is the one that
    fits its name. None where no run has two token counts, and for the variant where all slopes are zero.
    """
    differences, slopes = [], []
    for run in np.unique(points["run"]):
        rows = np.flatnonzero(points["run"] == run)
        tokens, first = np.unique(points["tokens"][rows], return_index=True)
        if len(tokens) > 1:
            observed = np.diff(points[target][rows][first]) / np.diff(tokens)
            fitted = np.diff(predicted[rows][first]) / np.diff(tokens)
            differences.append(np.mean(np.abs(observed - fitted)))
            slopes.append(np.mean(np.abs(observed)))
    if not differences:
        return None, None
    difference, slope = float(np.mean(differences)), float(np.mean(slopes))
    return difference, difference / slope if slope > 0 else None
