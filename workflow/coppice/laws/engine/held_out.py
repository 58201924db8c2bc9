"""Held-out tests of laws: what is held out, how far off the prediction is, and which of rival forms is best.

Sources: P2 Law: Scaling Law for Post-Training After Model Pruning (arXiv 2411.10272) for the protocols of later tokens,
larger models and higher ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from coppice.laws.engine.forms import Form, parameter_columns
from coppice.laws.engine.inference import draw_runs, refit, sample_interval
from coppice.laws.engine.metrics import root_mean_square
from coppice.laws.engine.points import Points, count, levels, run_rows, select
from coppice.laws.engine.search import Effort, fit_form

# The points that a test holds out: a mask [n], or masks [folds, n] of which each is held out in turn; or the sentence
# that says why the points allow no such test.
HoldOut = Callable[[Points], np.ndarray | str]

FOLD_STARTS = 8  # of each fold's fit, since there are many
_DRAWS = 200  # every form is refitted in each draw of each fold


class HeldOutError(TypedDict, total=False):
    """A form's error in one test, as fit.json has it: `reason` alone where there was no test, else all of the others.

    rmse: in the unit of y; low, high: its 95% interval; relative: sum |y' - y| / sum |y|; naive: the rmse of a
    prediction that knows no law; folds: the rmse of each; unidentified: what the fitted points did not identify.
    """

    reason: str
    rmse: float
    relative: float
    low: float | None
    high: float | None
    naive: float
    folds: list[float]
    unidentified: list[str]


class Rank(TypedDict):
    """A form's place in one test, as fit.json has it.

    behind: by how much its rmse is above the best one's, with the interval of that difference over draws that both
    share; first: the part of the draws in which it is lowest.
    """

    form: str
    rmse: float
    behind: float
    low: float | None
    high: float | None
    first: float | None


# What is held out


def later_tokens(points: Points) -> np.ndarray | str:
    """Holds out what follows the first 80% of each run's points, by tokens."""
    held_out = np.zeros(count(points), bool)
    for run in np.unique(points["run"]):
        rows = run_rows(points, run)
        if len(rows) > 1:
            held_out[rows[4 * len(rows) // 5 :]] = True
    return held_out if held_out.any() else "No run has two points, so there is no later point to predict."


def largest(points: Points, column: str, name: str) -> np.ndarray | str:
    """Holds out the largest level of `column`; two levels must remain, since one shows no trend to extend."""
    level = levels(points[column])
    if level.max() < 2:
        return f"This test needs three {name}s, two to fit and one to predict, and the points have {level.max() + 1}."
    return level == level.max()


def highest_of_each(points: Points, column: str, name: str, by: str) -> np.ndarray | str:
    """Holds out the largest level of `column` of each group of `by` that has two; two levels must remain in all."""
    held_out = np.zeros(count(points), bool)
    for group in np.unique(points[by]):
        rows = np.flatnonzero(points[by] == group)
        level = levels(points[column][rows])
        held_out[rows[level == level.max()]] = level.max() > 0
    if not held_out.any() or levels(points[column][~held_out]).max() < 1:
        return f"This test needs three {name}s, two to fit and one to predict, and the points have fewer."
    return held_out


def lowest_of_each(points: Points, column: str, name: str, by: str) -> np.ndarray | str:
    """Holds out the smallest level of `column` of each group of `by` that has two; two levels must remain in all."""
    return highest_of_each(points | {column: 1 / points[column]}, column, name, by)


def leave_one_out(points: Points, column: str, name: str) -> np.ndarray | str:
    """Holds out each value, or each level of a number, of `column` in turn: masks [values, n]; two must remain."""
    values = points[column]
    group = levels(values) if values.dtype.kind == "f" else np.unique(values, return_inverse=True)[1]
    if group.max() < 2:
        return f"This test needs three {name}s, two to fit and one to predict, and the points have {group.max() + 1}."
    return group == np.arange(group.max() + 1)[:, None]


# How far off the prediction is


def summarize_errors(differences: np.ndarray, observed: np.ndarray, naive: np.ndarray) -> HeldOutError:
    """The entry in fit.json of `differences` [n] = y' - y from the `observed` y [n], without an interval.

    naive [n]: the differences of a prediction that knows no law.
    """
    return {
        "rmse": root_mean_square(differences),
        "relative": float(np.abs(differences).sum() / (np.abs(observed).sum() or 1)),
        "low": None,
        "high": None,
        "naive": root_mean_square(naive),
        "unidentified": [],
    }


def held_out_test(
    forms: Mapping[str, Form],
    points: Points,
    held_out: np.ndarray | str,
    effort: Effort,
    axis: str | None = None,
    base: str | None = None,
) -> tuple[dict[str, HeldOutError], list[Rank]]:
    """Errors on the points at `held_out` of the forms fitted to the others, and the forms ranked by them, best first.

    The interval of an error comes from drawing runs, the fit repeated in each draw. Where the fitted points leave a
    parameter unidentified, the error depends on the start.
    """
    if isinstance(held_out, str):
        return {name: {"reason": held_out} for name in forms}, []
    folds = [_test_fold(forms, points, fold, effort, axis, base) for fold in np.atleast_2d(held_out)]
    errors: dict[str, HeldOutError] = {}
    draws: dict[str, np.ndarray] = {}
    for name in forms:
        own = [fold[name] for fold in folds]
        reasons = [each for each in own if isinstance(each, str)]
        tested = [each for each in own if isinstance(each, _FoldErrors)]
        if reasons:
            errors[name] = {"reason": reasons[0]}
            continue
        draws[name] = np.sqrt(sum(each.drawn_squares for each in tested) / sum(each.drawn_count for each in tested))
        # Where every draw must hold all of the runs to identify the parameters, draws are one and the same.
        several = len(draws[name]) > 0 and np.ptp(draws[name]) > 0
        low, high = sample_interval(draws[name]) if several else (None, None)
        summary = summarize_errors(
            np.concatenate([each.differences for each in tested]),
            np.concatenate([each.observed for each in tested]),
            np.concatenate([each.naive for each in tested]),
        )
        errors[name] = summary | {
            "low": low,
            "high": high,
            "folds": [root_mean_square(each.differences) for each in tested],
            "unidentified": sorted({lost for each in tested for lost in each.unidentified}),
        }
    return errors, _rank(errors, draws)


@dataclass(frozen=True)
class _FoldErrors:
    """A form's differences on the held-out points of one fold [n], and their summed squares in each draw [draws]."""

    differences: np.ndarray
    observed: np.ndarray
    naive: np.ndarray
    drawn_squares: np.ndarray
    drawn_count: np.ndarray
    unidentified: tuple[str, ...]


def _test_fold(
    forms: Mapping[str, Form],
    points: Points,
    held_out: np.ndarray,
    effort: Effort,
    axis: str | None,
    base: str | None,
) -> dict[str, _FoldErrors | str]:
    """One fold of a test: each form's errors on the held-out points, or the reason why it has none."""
    fitted, held_out_points = select(points, ~held_out), select(points, held_out)
    fits = {name: fit_form(form, fitted, min(effort.starts, FOLD_STARTS), effort.seed) for name, form in forms.items()}
    testable = [fit for fit in fits.values() if count(fitted) > len(fit.free)]
    resamples = min(effort.bootstrap, _DRAWS)
    weights = (
        draw_runs(points["run"], testable, resamples, effort.seed, ~held_out)
        if testable
        else np.empty((0, count(points)))
    )
    errors: dict[str, _FoldErrors | str] = {}
    for name, fit in fits.items():
        if count(fitted) <= len(fit.free):
            errors[name] = (
                f"The {count(fitted)} points left to fit are too few for the {len(fit.free)} parameters of this law."
            )
            continue
        form = forms[name]
        observed = held_out_points[form.target]
        samples = refit(fit, weights[:, ~held_out], effort.threads)
        squares = (form.predict(parameter_columns(form, samples), held_out_points) - observed) ** 2
        errors[name] = _FoldErrors(
            differences=fit.predict(held_out_points) - observed,
            observed=observed,
            naive=_predict_without_law(form.target, fitted, held_out_points, axis, base) - observed,
            drawn_squares=np.sum(squares * weights[:, held_out], axis=1),
            drawn_count=weights[:, held_out].sum(axis=1),
            unidentified=fit.unidentified,
        )
    return errors


def _predict_without_law(
    target: str, fitted: Points, held_out_points: Points, axis: str | None, base: str | None
) -> np.ndarray:
    """What one would predict of the held-out points [n] without any law.

    Of a run with fitted points, its value nearest along `axis`: that nothing changes. Of another, the mean of the
    values fitted; where the column `base` holds what each starts from (the dense model's loss), the mean of
    what lies above it.
    """
    above = np.mean(fitted[target] - fitted[base]) if base else np.mean(fitted[target])
    guess = above + (held_out_points[base] if base else np.zeros(count(held_out_points)))
    for place, run in enumerate(held_out_points["run"]):
        rows = np.flatnonzero(fitted["run"] == run)
        if axis is not None and len(rows):
            guess[place] = fitted[target][rows[np.argmin(np.abs(fitted[axis][rows] - held_out_points[axis][place]))]]
    return guess


def _rank(errors: dict[str, HeldOutError], draws: dict[str, np.ndarray]) -> list[Rank]:
    """The forms whose error is known, from the lowest, each with the excess of its error."""
    order = sorted(draws, key=lambda name: errors[name]["rmse"])
    if not order:
        return []
    drawn = np.array([draws[name] for name in order])
    # Forms that are the same law here share the draws in which they are lowest.
    lowest = drawn <= drawn.min(axis=0) * (1 + 1e-9) if drawn.shape[1] else None
    ranking: list[Rank] = []
    for place, name in enumerate(order):
        low, high = sample_interval(draws[name] - draws[order[0]])
        ranking.append(
            {
                "form": name,
                "rmse": errors[name]["rmse"],
                "behind": errors[name]["rmse"] - errors[order[0]]["rmse"],
                "low": low,
                "high": high,
                "first": None if lowest is None else float(np.mean(lowest[place] / lowest.sum(axis=0))),
            }
        )
    return ranking
