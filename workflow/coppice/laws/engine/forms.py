"""Forms: formulas to fit, the bounds of their parameters, and the objective that a fit minimises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from coppice.laws.engine.points import Points

# Parameter -> its value: a number, or [k, 1] to predict for k samples at once.
Parameters = dict[str, Any]
# The parameters that the design of the points leaves open, with the value each is fixed at, and why, as sentences.
Reduction = tuple[dict[str, float], list[str]]


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

    def loss(self, residual: np.ndarray) -> np.ndarray:
        """h(r)."""
        if self.huber is None:
            return residual**2 / 2
        size = np.abs(residual)
        return np.where(size <= self.huber, residual**2 / 2, self.huber * (size - self.huber / 2))

    def slope(self, residual: np.ndarray) -> np.ndarray:
        """h'(r): the residual, cut at delta."""
        return residual if self.huber is None else np.clip(residual, -self.huber, self.huber)


def fix_nothing(points: Points) -> Reduction:
    """The `reduce` of a form that any points identify."""
    return {}, []


@dataclass(frozen=True)
class Form:
    """A formula to fit.

    `predict(parameters, points)` gives the target [n]; it broadcasts over parameters of shape [..., 1] and is analytic,
    since it is differentiated by a complex step, unless `slopes(parameters, points)` gives d predict / d theta by the
    name of each parameter. `reduce(points)` gives the parameters that the design of the points cannot identify, with
    the value each is fixed at, and the sentences that say so. `target` is the column that is predicted.
    """

    parameters: Mapping[str, Parameter]
    predict: Callable[[Parameters, Points], np.ndarray]
    reduce: Callable[[Points], Reduction] = fix_nothing
    target: str = "loss"
    objective: Objective = Objective()
    slopes: Callable[[Parameters, Points], Mapping[str, np.ndarray]] | None = None


def without(form: Form, name: str, value: float = 0.0) -> Form:
    """The rival of a form that has the named parameter at `value`, whatever the points are."""

    def predict(parameters: Parameters, points: Points) -> np.ndarray:
        return form.predict(parameters | {name: value}, points)

    def reduce(points: Points) -> Reduction:
        fixed, notes = form.reduce(points)
        return {other: at for other, at in fixed.items() if other != name}, notes

    others = {other: parameter for other, parameter in form.parameters.items() if other != name}
    return replace(form, parameters=others, predict=predict, reduce=reduce, slopes=None)


def parameter_columns(form: Form, samples: np.ndarray) -> dict[str, np.ndarray]:
    """Parameters of shape [k, 1] from `samples` [k, p], to predict for all samples at once."""
    return {name: samples[:, [place]] for place, name in enumerate(form.parameters)}
