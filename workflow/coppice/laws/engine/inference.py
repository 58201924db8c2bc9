"""How sure a fit is: refits to resampled runs, intervals of the parameters, and profiles of the objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np

from coppice.laws.engine.forms import parameter_columns
from coppice.laws.engine.points import count
from coppice.laws.engine.search import Fit, descend, unidentified
from coppice.uncertainty import percentile_interval

FEWEST_RUNS = 4  # with fewer no bootstrap is made
_DRAWS_A_RESAMPLE = 100  # after so many draws for each resample requested, too few identify the parameters
_PROFILE_STEPS = 41


class ParameterReport(TypedDict):
    """A parameter in fit.json: value, 95% interval and standard error (None without draws), and what it is worth."""

    value: float | None
    low: float | None
    high: float | None
    stderr: float | None
    identified: bool
    spread: float | None
    at_bound: bool


class Profile(TypedDict):
    """The lowest objective at each of a parameter's values."""

    values: list[float]
    objective: list[float]


def bootstrap(
    fit: Fit, resamples: int, seed: int, threads: int = 1, progress: Callable[[int], object] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Refits to runs drawn with replacement: parameters [draws, p], and how often each point was drawn [draws, n].

    A run is the unit that is drawn, since the points of one run share their noise. Each refit starts at the optimum.
    The conditions of the draws are those of `draw_runs`.
    """
    points = fit.problem.points
    weights = draw_runs(points["run"], [fit], resamples, seed, np.ones(count(points), bool))
    return refit(fit, weights, threads, progress), weights


def draw_runs(runs: np.ndarray, fits: Sequence[Fit], resamples: int, seed: int, fitted: np.ndarray) -> np.ndarray:
    """How often each point was drawn [draws, n], given the run of each point [n].

    `fitted` [n] marks the points that were fitted. A draw that identifies fewer parameters of any fit than the
    fitted points do, or that holds none of the other points, is repeated. No draws where there are fewer than four
    runs, or no more fitted points than free parameters, or where hardly a draw identifies the parameters.
    """
    names, member = np.unique(runs, return_inverse=True)
    most = max(len(fit.free) for fit in fits)
    if len(names) < FEWEST_RUNS or fitted.sum() <= most:
        return np.empty((0, len(runs)))
    slopes = [(fit.problem.search_jacobian(fit.values), fit.free) for fit in fits]
    unknown = [len(unidentified(*each)) for each in slopes]
    generator = np.random.default_rng(seed)
    counts: list[np.ndarray] = []
    for _ in range(_DRAWS_A_RESAMPLE * resamples):
        if len(counts) == resamples:
            break
        drawn = np.bincount(generator.integers(len(names), size=len(names)), minlength=len(names))[member]
        there = drawn[fitted] > 0
        lost = any(
            len(unidentified(rows[there], free)) > known for (rows, free), known in zip(slopes, unknown, strict=True)
        )
        if not lost and (fitted.all() or drawn[~fitted].any()):
            counts.append(drawn)
    # Where hardly a draw identifies the parameters, the few that do are not a sample of anything.
    return np.array(counts if len(counts) == resamples else [], float).reshape(-1, len(runs))


def refit(
    fit: Fit, weights: np.ndarray, threads: int = 1, progress: Callable[[int], object] | None = None
) -> np.ndarray:
    """Parameters [draws, p] of refits to the fitted points under `weights` [draws, n], each from the fit's optimum."""
    starts = np.tile(fit.values, (len(weights), 1))
    return descend(fit.problem, starts, weights, threads=threads, progress=progress)


def sample_interval(samples: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """95% interval of `samples` [draws]; None for both ends where there are no draws."""
    return percentile_interval(samples) if len(samples) else (None, None)


def profile(fit: Fit, name: str, values: np.ndarray) -> np.ndarray:
    """The lowest objective [v] where parameter `name` is held at each of `values` [v], from the optimum outward.

    A flat profile is a parameter that the points hardly identify.
    """
    lowest = np.empty(len(values))
    after = values >= fit.parameters[name]
    for side in (np.flatnonzero(after), np.flatnonzero(~after)[::-1]):
        start = fit.values
        for place in side:
            problem = fit.problem.with_fixed(name, float(values[place]))
            start = descend(problem, start[None], rounds=400, tolerance=1e-6)[0]
            lowest[place] = problem.objective(parameter_columns(problem.form, start[None]))[0]
    return lowest


def report_profile(fit: Fit, samples: np.ndarray, name: str) -> Profile:
    """The objective along a parameter, over twice its bootstrap interval, or half to double its value without one."""
    value = fit.parameters[name]
    column = samples[:, list(fit.parameters).index(name)]
    low, high = percentile_interval(column) if len(column) else (value / 1.5, value * 1.5)
    bounds = fit.problem.form.parameters[name].bounds
    values = np.clip(np.linspace(2 * low - value, 2 * high - value, _PROFILE_STEPS), *bounds)
    return {"values": values.tolist(), "objective": profile(fit, name, values).tolist()}


def report_parameters(fit: Fit, samples: np.ndarray) -> dict[str, ParameterReport]:
    """Each parameter's entry in fit.json: its value, its 95% interval and standard error over `samples` [draws, p].

    With them whether it is identified, without which it has no interval; its spread over equally good starts; and
    whether it lies at a bound of the search, where the interval is about the bounds and not about the points.
    """
    spread = np.ptp(fit.starts, axis=0)
    reports: dict[str, ParameterReport] = {}
    for place, (name, value) in enumerate(fit.parameters.items()):
        identified = name not in fit.fixed and name not in fit.unidentified
        known = identified and len(samples) > 1
        low, high = sample_interval(samples[:, place]) if known else (None, None)
        reports[name] = {
            "value": value,
            "low": low,
            "high": high,
            "stderr": float(np.std(samples[:, place], ddof=1)) if known else None,
            "identified": identified,
            "spread": float(spread[place]),
            "at_bound": name in fit.at_bound,
        }
    return reports
