"""The engine under the laws: bounded least squares from many starts, what the data identify, and held-out error.

A law is a module of this package with SOURCE, UNITS, PARAMETERS, COLUMNS, NEEDS, POINTS, Options, FORM, RIVALS,
HELD_OUT, `predict`, `points`, `units`, `notes` and `recommend`; `p2` shows each. Points are a dict of columns [n], one
row an observed loss: `run` (str), `tokens`, `loss` (nats per token), and whatever else the law's formula names.

Sources: P2 Law: Scaling Law for Post-Training After Model Pruning (arXiv 2411.10272) for the metrics and the held-out
protocols; Chinchilla Scaling: A Replication Attempt (arXiv 2404.10102) for the many starts, the bootstrap and the test
of convergence by the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coppice.uncertainty import percentile_interval

Points = dict[str, np.ndarray]
Parameters = dict[str, Any]

_HUBER_DELTA = 1e-3  # Besiroglu et al.
FEWEST_RUNS = 4
_HELD_OUT_STARTS = 8
_RANK_TOLERANCE = 1e-6
_ZERO_COLUMN = 1e-8  # a parameter of a term that the search has left at its bound of 0
_GRADIENT_TOLERANCE = 1e-5
_SEARCH_TOLERANCE = 1e-4
_SAME_OPTIMUM = 1e-7  # of the size of the losses
_EXACT = 1e-10  # residuals below this part of the losses are rounding


@dataclass(frozen=True)
class Parameter:
    """Bounds of a parameter, the range its starts are drawn from, and whether it is searched by its logarithm."""

    bounds: tuple[float, float]
    start: tuple[float, float]
    logarithmic: bool = False


@dataclass(frozen=True)
class Form:
    """A formula to fit.

    `predict(parameters, points)` gives the loss [n]; it broadcasts over parameters of shape [..., 1] and is analytic,
    since it is differentiated by a complex step. `reduce(points)` gives the parameters that the design of the points
    cannot tell, with the value each is fixed at, and the sentences that say so.
    """

    parameters: dict[str, Parameter]
    predict: Callable[[Parameters, Points], np.ndarray]
    reduce: Callable[[Points], tuple[dict[str, float], list[str]]]


@dataclass(frozen=True)
class Fit:
    """An optimum of the squared residuals.

    `fixed` are the parameters that were not fitted; `unidentified` those that were, but that the points cannot tell;
    `starts` [m, p] the parameters of every start that ended as low as the best, in the order of `parameters`.
    """

    parameters: dict[str, float]
    fixed: dict[str, float]
    unidentified: tuple[str, ...]
    converged: bool
    starts: np.ndarray
    notes: list[str] = field(default_factory=list)

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the fitted parameters."""
        return tuple(name for name in self.parameters if name not in self.fixed)


def count(points: Points) -> int:
    """Number of points."""
    return len(points["loss"])


def select(points: Points, rows: np.ndarray) -> Points:
    """The points at `rows`, a mask or indices."""
    return {name: column[rows] for name, column in points.items()}


def levels(values: np.ndarray, gap: float = 0.05) -> np.ndarray:
    """Level of each of the positive `values` [n]: values closer than a relative `gap` share one; ascending from 0.

    Ratios that were asked to be equal differ a little once whole units were removed.
    """
    distinct, inverse = np.unique(values, return_inverse=True)
    return np.concatenate([[0], np.cumsum(distinct[1:] > distinct[:-1] * (1 + gap))])[inverse]


# Least squares


def jacobian(form: Form, parameters: dict[str, float], points: Points, names: tuple[str, ...]) -> np.ndarray:
    """d predict / d theta [n, k] of the named parameters, exact to rounding."""
    return _slopes(form, np.array([list(parameters.values())]), points, names)[0].T


def unidentified(columns: np.ndarray, names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the parameters that have a part in the null space of the Jacobian `columns` [n, k].

    Columns are scaled to length 1, save those below 1e-8 of the longest, which count as 0; singular values below 1e-6
    of the largest span the null space. A parameter is identified where its axis is orthogonal to that space.
    """
    lengths = np.linalg.norm(columns, axis=0)
    scaled = np.where(lengths > _ZERO_COLUMN * lengths.max(), columns / np.where(lengths > 0, lengths, 1), 0)
    values, axes = np.linalg.svd(scaled, full_matrices=True)[1:]
    rank = int(np.sum(values > _RANK_TOLERANCE * values.max(initial=0)))
    share = np.linalg.norm(axes[rank:], axis=0)
    return tuple(name for name, part in zip(names, share, strict=True) if part > 1e-4)


def least_squares_fit(
    form: Form, points: Points, starts: int = 32, seed: int = 0, fixed: dict[str, float] | None = None
) -> Fit:
    """Minimum over theta of sum (predict(theta) - loss)^2 within the bounds, from `starts` Latin-hypercube starts.

    `fixed` replaces what the form's `reduce` would fix. Works with any number of points above zero: what they do not
    identify is named in `unidentified`.
    """
    reduced, notes = form.reduce(points) if fixed is None else (fixed, [])
    names = tuple(name for name in form.parameters if name not in reduced)
    ends = descend(form, points, names, reduced, _starts(form, names, starts, seed))
    scores = np.sqrt(np.mean(_residuals(form, columns(form, ends), points) ** 2, axis=1))
    near = ends[scores <= scores.min() + _SAME_OPTIMUM * _root_mean_square(points["loss"])]
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
    )


def gradient_ratio(form: Form, parameters: dict[str, float], points: Points, names: tuple[str, ...]) -> float:
    """How far from stationary the parameters are: 0 at an optimum, without unit, at most 1.

    max_k |J_k| |theta_k - clip(theta_k - J_k . r / |J_k|^2)| / |r|: the cosine between the residuals r and the column
    J_k, save that a parameter at its bound is not asked to cross it. 0 where the residuals are rounding.
    """
    residuals = _residuals(form, parameters, points)
    size = np.linalg.norm(residuals)
    if size <= _EXACT * np.linalg.norm(points["loss"]):
        return 0.0
    columns = jacobian(form, parameters, points, names)
    lengths = np.linalg.norm(columns, axis=0)
    values = np.array([parameters[name] for name in names])
    low, high = np.array([form.parameters[name].bounds for name in names]).T
    squares = np.where(lengths > 0, lengths, 1) ** 2
    moved = np.clip(values - columns.T @ residuals / squares, low, high)
    return float(np.max(lengths * np.abs(moved - values)) / size)


def _polished(
    form: Form, points: Points, names: tuple[str, ...], fixed: dict[str, float], start: np.ndarray
) -> dict[str, float]:
    """The optimum near `start` [p] to rounding, by the trust-region search of Branch, Coleman and Li."""
    # scipy is slow to import, and reading a study asks a law for its options.
    from scipy.optimize import least_squares

    logarithmic, low, high = _search_space(form, names)

    def parameters(searched: np.ndarray) -> dict[str, float]:
        return dict(zip(form.parameters, _completed(form, names, fixed, searched[None])[0].tolist(), strict=True))

    def slopes(searched: np.ndarray) -> np.ndarray:
        return _searched_jacobian(form, _completed(form, names, fixed, searched[None])[0], points, names)

    result = least_squares(
        lambda searched: _residuals(form, parameters(searched), points),
        np.clip(_searched(start[_places(form, names)], logarithmic), low, high),
        slopes,
        bounds=(low, high),
        method="trf",
        x_scale="jac",
        ftol=1e-15,
        xtol=1e-15,
        gtol=1e-15,
        max_nfev=200,
    )
    return parameters(result.x)


def descend(
    form: Form,
    points: Points,
    names: tuple[str, ...],
    fixed: dict[str, float],
    starts: np.ndarray,
    weights: np.ndarray | None = None,
    rounds: int = 100,
) -> np.ndarray:
    """Least squares from many starts, or under many weights, at once: parameters [m, p] from `starts` [m, p].

    Projected Levenberg-Marquardt: theta <- clip(theta - (A + lambda diag A)^-1 g), A = J^T W J, g = J^T W r, over the
    parameters that no bound holds back; lambda falls where a step lowers r^T W r and grows where it does not. A row
    ends where max_k |g_k| / sqrt(A_kk r^T W r) <= 1e-4, or r is rounding, or no step lowers it. W is the diagonal of
    `weights` [m, n].
    """
    logarithmic, low, high = _search_space(form, names)
    weights = np.ones((len(starts), count(points))) if weights is None else weights
    searched = np.clip(_searched(starts[:, _places(form, names)], logarithmic), low, high)
    damping = np.full(len(starts), 1e-3)
    rounding = _EXACT**2 * weights @ points["loss"] ** 2
    active = np.arange(len(starts))

    def costs(at: np.ndarray) -> np.ndarray:
        values = _completed(form, names, fixed, at)
        return np.sum(weights[active] * _residuals(form, columns(form, values), points) ** 2, axis=1)

    for _ in range(rounds):
        here = searched[active]
        cost = costs(here)
        gradient, curvature = _normal_equations(form, points, names, fixed, here, weights[active])
        diagonal = np.einsum("mkk->mk", curvature).copy()
        held = ((here <= low) & (gradient >= 0)) | ((here >= high) & (gradient <= 0)) | (diagonal <= 0)
        gradient[held], diagonal[held] = 0, 1
        steepness = np.max(np.abs(gradient) / np.sqrt(diagonal), axis=1)
        going = (steepness > _SEARCH_TOLERANCE * np.sqrt(cost)) & (cost > rounding[active]) & (damping[active] < 1e8)
        if not going.any():
            break
        curvature *= ~(held[:, :, None] | held[:, None, :])
        curvature += (diagonal * np.where(held, 1, damping[active][:, None]))[:, :, None] * np.eye(len(names))
        trial = np.clip(here - np.linalg.solve(curvature, gradient[..., None])[..., 0], low, high)
        lower = costs(trial) < cost
        searched[active] = np.where((lower & going)[:, None], trial, here)
        # The floor keeps the matrix regular where parameters are not identified.
        damping[active] = np.maximum(damping[active] * np.where(lower, 0.2, 4), 1e-10)
        active = active[going]
    return _completed(form, names, fixed, searched)


def _normal_equations(
    form: Form,
    points: Points,
    names: tuple[str, ...],
    fixed: dict[str, float],
    searched: np.ndarray,
    weights: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """J^T W r [m, k] and J^T W J [m, k, k] in search coordinates, at `searched` [m, k] under `weights` [m, n]."""
    values = _completed(form, names, fixed, searched)
    residuals = _residuals(form, columns(form, values), points)
    slopes = _searched_slopes(form, values, points, names)
    weighted = slopes * weights[:, None, :]
    return np.einsum("mkn,mn->mk", weighted, residuals), weighted @ slopes.transpose(0, 2, 1)


def _slopes(form: Form, values: np.ndarray, points: Points, names: tuple[str, ...]) -> np.ndarray:
    """The transposed Jacobians [m, k, n] of the named parameters at `values` [m, p]: Im f(theta + i h) / h."""
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
    logarithmic = np.array([form.parameters[name].logarithmic for name in names])
    low, high = _searched(np.array([form.parameters[name].bounds for name in names]).T, logarithmic)
    return logarithmic, low, high


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


def _searched(values: np.ndarray, logarithmic: np.ndarray) -> np.ndarray:
    """Search coordinates of parameter values: their logarithm where `logarithmic`."""
    return np.where(logarithmic, np.log(np.where(logarithmic, values, 1)), values)


def _searched_slopes(form: Form, values: np.ndarray, points: Points, names: tuple[str, ...]) -> np.ndarray:
    """The transposed Jacobians [m, k, n] in search coordinates at `values` [m, p]: d f / d log theta = theta f'."""
    logarithmic, _, _ = _search_space(form, names)
    stretch = np.where(logarithmic, values[:, _places(form, names)], 1)
    return _slopes(form, values, points, names) * stretch[..., None]


def _searched_jacobian(form: Form, values: np.ndarray, points: Points, names: tuple[str, ...]) -> np.ndarray:
    """The Jacobian [n, k] in search coordinates at `values` [p]."""
    return _searched_slopes(form, values[None], points, names)[0].T


def _starts(form: Form, names: tuple[str, ...], number: int, seed: int) -> np.ndarray:
    """A Latin hypercube of `number` starts over the parameters' start ranges: [number, p]; those not named are 1."""
    generator = np.random.default_rng(seed)
    starts = np.ones((number, len(form.parameters)))
    for place, (name, parameter) in enumerate(form.parameters.items()):
        if name in names:
            part = (generator.permutation(number) + generator.random(number)) / number
            low, high = parameter.start
            starts[:, place] = low * (high / low) ** part if parameter.logarithmic else low + part * (high - low)
    return starts


def _residuals(form: Form, parameters: Parameters, points: Points) -> np.ndarray:
    return form.predict(parameters, points) - points["loss"]


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


# Uncertainty


def bootstrap(
    form: Form,
    points: Points,
    fit: Fit,
    resamples: int,
    seed: int,
    fitted: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Refits to runs drawn with replacement: parameters [draws, p], and how often each point was drawn [draws, n].

    A run is the unit that is drawn, since the points of one run share their noise. Each refit starts at the optimum.
    A draw that identifies fewer parameters than the fitted points, or that holds none of the others, is drawn again.
    `fitted` [n] marks the points that the fit has seen; by default it is all. No draws where there are fewer than
    four runs, or no more fitted points than free parameters.
    """
    fitted = np.ones(count(points), bool) if fitted is None else fitted
    runs, member = np.unique(points["run"], return_inverse=True)
    if len(runs) < FEWEST_RUNS or fitted.sum() <= len(fit.free):
        return np.empty((0, len(fit.parameters))), np.empty((0, count(points)))
    generator = np.random.default_rng(seed)
    seen = select(points, fitted)
    columns = _searched_jacobian(form, np.array(list(fit.parameters.values())), seen, fit.free)
    unknown = len(unidentified(columns, fit.free))
    counts = []
    while len(counts) < resamples:
        drawn = np.bincount(generator.integers(len(runs), size=len(runs)), minlength=len(runs))[member]
        lost = len(unidentified(columns[drawn[fitted] > 0], fit.free)) > unknown
        if not lost and (fitted.all() or drawn[~fitted].any()):
            counts.append(drawn)
    weights = np.array(counts, float).reshape(-1, count(points))
    starts = np.tile(list(fit.parameters.values()), (resamples, 1))
    return descend(form, seen, fit.free, fit.fixed, starts, weights[:, fitted]), weights


# Metrics


def metrics(points: Points, predicted: np.ndarray) -> dict[str, float | None]:
    """Goodness of `predicted` [n] losses, nats per token.

    R^2 = 1 - sum (L - L')^2 / sum (L - mean L)^2 (None where all losses are equal); Huber: the mean over points of
    r^2 / 2 within delta = 1e-3 and delta (|r| - delta / 2) outside; ASD and its unit-free variant; rmse.
    """
    residuals = predicted - points["loss"]
    size = np.abs(residuals)
    huber = np.where(size <= _HUBER_DELTA, size**2 / 2, _HUBER_DELTA * (size - _HUBER_DELTA / 2))
    variation = np.sum((points["loss"] - points["loss"].mean()) ** 2)
    difference, relative = average_slope_difference(points, predicted)
    return {
        "r2": float(1 - np.sum(residuals**2) / variation) if variation > 0 else None,
        "huber": float(huber.mean()),
        "asd": difference,
        "asd_relative": relative,
        "rmse": _root_mean_square(residuals),
    }


def average_slope_difference(points: Points, predicted: np.ndarray) -> tuple[float | None, float | None]:
    """ASD (arXiv 2411.10272): mean over runs of mean_i |s_i - s'_i|, and that over the mean over runs of mean_i |s_i|.

    s_i = (L_{i+1} - L_i) / (D_{i+1} - D_i) over consecutive checkpoints of a run, s'_i the same of the predictions; the
    unit is nats per token over the unit of `tokens`. The paper's formula was not readable: this is the one that
    fits its name. None where no run has two token counts, and for the variant where all slopes are zero.
    """
    differences, slopes = [], []
    for run in np.unique(points["run"]):
        rows = np.flatnonzero(points["run"] == run)
        tokens, first = np.unique(points["tokens"][rows], return_index=True)
        if len(tokens) > 1:
            observed = np.diff(points["loss"][rows][first]) / np.diff(tokens)
            fitted = np.diff(predicted[rows][first]) / np.diff(tokens)
            differences.append(np.mean(np.abs(observed - fitted)))
            slopes.append(np.mean(np.abs(observed)))
    if not differences:
        return None, None
    difference, slope = float(np.mean(differences)), float(np.mean(slopes))
    return difference, difference / slope if slope > 0 else None


# Held-out tests: each gives the mask of the points to hold out, or the sentence that says why it cannot.


def later_tokens(points: Points) -> np.ndarray | str:
    """Holds out what follows the first 80% of each run's points, by tokens."""
    held_out = np.zeros(count(points), bool)
    for run in np.unique(points["run"]):
        rows = np.flatnonzero(points["run"] == run)
        if len(rows) > 1:
            rows = rows[np.argsort(points["tokens"][rows], kind="stable")]
            held_out[rows[4 * len(rows) // 5 :]] = True
    return held_out if held_out.any() else "No run has two points, so there is no later point to predict."


def largest(points: Points, column: str, name: str) -> np.ndarray | str:
    """Holds out the largest level of `column`; two levels must remain, since one shows no trend to extend."""
    level = levels(points[column])
    if level.max() < 2:
        return f"This test needs three {name}s, two to fit and one to predict, and the points have {level.max() + 1}."
    return level == level.max()


def held_out_error(
    form: Form, points: Points, held_out: np.ndarray | str, options: dict[str, Any]
) -> dict[str, float | str | None]:
    """Error on the points at `held_out` of the form fitted to the others.

    rmse (nats per token) with its bootstrap interval by runs, the fit repeated in each draw; relative = the mean of
    |L' - L| / L; `unidentified` names what the fitted points could not tell, where the error hangs on the start.
    {"reason": sentence} where the test cannot be made.
    """
    if isinstance(held_out, str):
        return {"reason": held_out}
    seen, unseen = select(points, ~held_out), select(points, held_out)
    fit = least_squares_fit(form, seen, min(options["starts"], _HELD_OUT_STARTS), options["seed"])
    if count(seen) <= len(fit.free):
        free = len(fit.free)
        return {"reason": f"The {count(seen)} points left to fit are too few for the {free} parameters of this law."}
    errors = _residuals(form, fit.parameters, unseen)
    samples, counts = bootstrap(form, points, fit, options["bootstrap"], options["seed"], ~held_out)
    low, high = None, None
    if len(samples):
        squares = _residuals(form, columns(form, samples), unseen) ** 2
        low, high = percentile_interval(np.sqrt(np.average(squares, axis=1, weights=counts[:, held_out])))
    return {
        "rmse": _root_mean_square(errors),
        "relative": float(np.mean(np.abs(errors) / unseen["loss"])),
        "low": low,
        "high": high,
        "unidentified": list(fit.unidentified),
    }


def columns(form: Form, samples: np.ndarray) -> Parameters:
    """Parameters of shape [k, 1] from `samples` [k, p], to predict for all samples at once."""
    return {name: samples[:, [place]] for place, name in enumerate(form.parameters)}
