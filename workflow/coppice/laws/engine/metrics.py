"""Goodness of fit.

Source: P2 Law: Scaling Law for Post-Training After Model Pruning (arXiv 2411.10272).
"""

from __future__ import annotations

import numpy as np

from coppice.laws.engine.forms import Objective
from coppice.laws.engine.points import Points

_HUBER = Objective(huber=1e-3)  # of the metric: Besiroglu et al.


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def metrics(points: Points, predicted: np.ndarray, target: str = "loss") -> dict[str, float | None]:
    """Goodness of `predicted` [n], in the unit of the target.

    R^2 = 1 - sum (L - L')^2 / sum (L - mean L)^2 (None where all targets are equal); Huber: the mean over points of
    r^2 / 2 within delta = 1e-3 and delta (|r| - delta / 2) outside. rmse; and for losses along runs ASD and its
    unit-free variant.
    """
    observed = points[target]
    difference = predicted - observed
    variation = np.sum((observed - observed.mean()) ** 2)
    values: dict[str, float | None] = {
        "r2": float(1 - np.sum(difference**2) / variation) if variation > 0 else None,
        "huber": float(_HUBER.loss(difference).mean()),
        "rmse": root_mean_square(difference),
    }
    if "tokens" in points:
        values["asd"], values["asd_relative"] = average_slope_difference(points, predicted, target)
    return values


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
