"""Held-out tests of laws: what is held out, how far off the prediction is, and which of rival forms is best.

Sources: P2 Law: Scaling Law for Post-Training After Model Pruning (arXiv 2411.10272) for the protocols of later tokens,
larger models and higher ratios.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from coppice.laws.fit import (
    Form,
    Points,
    columns,
    count,
    drawn_interval,
    drawn_runs,
    fit_form,
    levels,
    refitted,
    root_mean_square,
    select,
)

# The points that a test holds out: a mask [n], or masks [folds, n] of which each is held out in turn; or the sentence
# that says why it cannot.
HoldOut = Callable[[Points], np.ndarray | str]

STARTS = 8  # of each fold's fit, since there are many
_DRAWS = 200  # every form is fitted again in each draw of each fold


# What is held out


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


def summary(differences: np.ndarray, observed: np.ndarray, naive: np.ndarray) -> dict[str, Any]:
    """What fit.json says of `differences` [n] = y' - y from the `observed` y [n], without an interval.

    rmse: in the unit of y; relative: sum |y' - y| / sum |y|; naive: the rmse of the differences `naive` [n] of a
    prediction that knows no law.
    """
    return {
        "rmse": root_mean_square(differences),
        "relative": float(np.abs(differences).sum() / (np.abs(observed).sum() or 1)),
        "low": None,
        "high": None,
        "naive": root_mean_square(naive),
        "unidentified": [],
    }


def held_out_error(form: Form, points: Points, held_out: np.ndarray | str, options: dict[str, Any]) -> dict[str, Any]:
    """Error of one form in one test; see `held_out_test`."""
    return held_out_test({"form": form}, points, held_out, options)[0]["form"]


def held_out_test(
    forms: dict[str, Form],
    points: Points,
    held_out: np.ndarray | str,
    options: dict[str, Any],
    axis: str | None = None,
    base: str | None = None,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Errors on the points at `held_out` of the forms fitted to the others, and the forms ranked by them.

    Each error: rmse (unit of the target) with its bootstrap interval by runs, the fit repeated in each draw;
    relative = sum |y' - y| / sum |y|; naive = the rmse of `_naive`; folds = the rmse of each;
    `unidentified` names what the fitted points could not tell, where the error hangs on the start. {"reason": sentence}
    where the test cannot be made. Each rank, best first: form, rmse, `behind` = by how much its rmse is above the best
    one's, with the interval of that difference over draws that both share, and `first` = the part of the draws in
    which it is lowest.
    """
    if isinstance(held_out, str):
        return {name: {"reason": held_out} for name in forms}, []
    folds = [_fold(forms, points, fold, options, axis, base) for fold in np.atleast_2d(held_out)]
    errors: dict[str, dict[str, Any]] = {}
    draws: dict[str, np.ndarray] = {}
    for name in forms:
        reasons = [fold[name]["reason"] for fold in folds if "reason" in fold[name]]
        if reasons:
            errors[name] = {"reason": reasons[0]}
            continue
        differences, observed, naive = (
            np.concatenate([fold[name][part] for fold in folds]) for part in ("difference", "observed", "naive")
        )
        draws[name] = np.sqrt(
            sum(fold[name]["drawn"] for fold in folds) / sum(fold[name]["drawn_count"] for fold in folds)
        )
        # Where every draw must hold all of the runs to tell the parameters, draws are one and the same.
        several = len(draws[name]) > 0 and np.ptp(draws[name]) > 0
        low, high = drawn_interval(draws[name]) if several else (None, None)
        errors[name] = summary(differences, observed, naive) | {
            "low": low,
            "high": high,
            "folds": [root_mean_square(fold[name]["difference"]) for fold in folds],
            "unidentified": sorted({lost for fold in folds for lost in fold[name]["unidentified"]}),
        }
    return errors, _ranking(errors, draws)


def _naive(target: str, seen: Points, unseen: Points, axis: str | None, base: str | None) -> np.ndarray:
    """What one would predict of the unseen points [n] without any law.

    Of a run that was seen, its value nearest along `axis`: that nothing changes. Of another, the mean of the values
    seen; where the column `base` says what each starts from (the dense model's loss), the mean of what lies above it.
    """
    above = np.mean(seen[target] - seen[base]) if base else np.mean(seen[target])
    guess = above + (unseen[base] if base else np.zeros(count(unseen)))
    for place, run in enumerate(unseen["run"]):
        rows = np.flatnonzero(seen["run"] == run)
        if axis is not None and len(rows):
            guess[place] = seen[target][rows[np.argmin(np.abs(seen[axis][rows] - unseen[axis][place]))]]
    return guess


def _fold(
    forms: dict[str, Form],
    points: Points,
    held_out: np.ndarray,
    options: dict[str, Any],
    axis: str | None,
    base: str | None,
) -> dict[str, dict[str, Any]]:
    """One fold of a test: each form's differences on the held-out points, and their squares summed in each draw."""
    seen, unseen = select(points, ~held_out), select(points, held_out)
    starts = min(options["starts"], STARTS)
    fits = {name: (form, fit_form(form, seen, starts, options["seed"])) for name, form in forms.items()}
    rich = {name: pair for name, pair in fits.items() if count(seen) > len(pair[1].free)}
    weights = (
        drawn_runs(points, rich, min(options["bootstrap"], _DRAWS), options["seed"], ~held_out)
        if rich
        else np.empty((0, count(points)))
    )
    found: dict[str, dict[str, Any]] = {}
    for name, (form, fit) in fits.items():
        if name not in rich:
            reason = f"The {count(seen)} points left to fit are too few for the {len(fit.free)} parameters of this law."
            found[name] = {"reason": reason}
            continue
        observed = unseen[form.target]
        difference = form.predict(fit.parameters, unseen) - observed
        samples = refitted(form, points, fit, weights, ~held_out, options.get("threads", 1))
        squares = (form.predict(columns(form, samples), unseen) - observed) ** 2
        found[name] = {
            "difference": difference,
            "observed": observed,
            "naive": _naive(form.target, seen, unseen, axis, base) - observed,
            "drawn": np.sum(squares * weights[:, held_out], axis=1),
            "drawn_count": weights[:, held_out].sum(axis=1),
            "unidentified": fit.unidentified,
        }
    return found


def _ranking(errors: dict[str, dict[str, Any]], draws: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The forms whose error is known, from the lowest, each with how far it is behind."""
    order = sorted(draws, key=lambda name: errors[name]["rmse"])
    if not order:
        return []
    drawn = np.array([draws[name] for name in order])
    # Forms that are the same law here share the draws in which they are lowest.
    lowest = drawn <= drawn.min(axis=0) * (1 + 1e-9) if drawn.shape[1] else None
    ranking = []
    for place, name in enumerate(order):
        low, high = drawn_interval(draws[name] - draws[order[0]])
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
