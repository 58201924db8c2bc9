"""A problem of fitting: a form, its points, and the parameters that are fixed.

Values are parameters [m, p] in the form's order. Search coordinates [m, k] are the free ones alone, by their logarithm
where the form says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from coppice.laws.engine.forms import Form, Parameters, parameter_columns
from coppice.laws.engine.points import Points, count

_COMPLEX_STEP = 1e-30


@dataclass(frozen=True)
class Problem:
    """What is fitted: the parameters of `form` that are not `fixed`, to `points`."""

    form: Form
    points: Points
    fixed: dict[str, float] = field(default_factory=dict)

    @cached_property
    def free(self) -> tuple[str, ...]:
        """Names of the parameters that are fitted [k]."""
        return tuple(name for name in self.form.parameters if name not in self.fixed)

    def with_fixed(self, name: str, value: float) -> Problem:
        """The same with one more parameter fixed."""
        return replace(self, fixed=self.fixed | {name: value})

    # The objective

    @cached_property
    def target(self) -> np.ndarray:
        """y [n]."""
        return self.points[self.form.target]

    @cached_property
    def scale(self) -> np.ndarray:
        """What a residual is a part of [n]: the target, or 1 where residuals are logarithmic."""
        return np.ones_like(self.target) if self.form.objective.residuals == "logarithmic" else self.target

    def residuals(self, parameters: Parameters) -> np.ndarray:
        """r [n], or [m, n] with parameters [m, 1]; infinite where a logarithm has no value."""
        predicted, observed = self.form.predict(parameters, self.points), self.target
        if self.form.objective.residuals == "absolute":
            return predicted - observed
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(predicted > 0, np.log(predicted) - np.log(observed), np.inf)

    def objective(self, parameters: Parameters) -> np.ndarray:
        """Sum over points of the loss of the residuals: a number, or [m] with parameters [m, 1]."""
        return np.sum(self.form.objective.loss(self.residuals(parameters)), axis=-1)

    # Slopes

    def jacobian(self, parameters: dict[str, float]) -> np.ndarray:
        """d residual / d theta [n, k] of the free parameters, exact to rounding."""
        return self._slopes(self.row(parameters)[None])[0].T

    def search_jacobian(self, values: np.ndarray) -> np.ndarray:
        """The Jacobian [n, k] in search coordinates at `values` [p]."""
        return self.search_slopes(values[None])[0].T

    def search_slopes(self, values: np.ndarray) -> np.ndarray:
        """The transposed Jacobians [m, k, n] in search coordinates at `values` [m, p]: d r / d log theta = theta r'."""
        stretch = np.where(self._logarithmic, values[:, self._places], 1)
        return self._slopes(values) * stretch[..., None]

    def _slopes(self, values: np.ndarray) -> np.ndarray:
        """The transposed Jacobians of the residuals [m, k, n] of the free parameters at `values` [m, p]."""
        at = parameter_columns(self.form, values)
        if self.form.slopes is None:
            slopes = self._complex_step(values)
        else:
            by_name = self.form.slopes(at, self.points)
            shape = (len(values), count(self.points))
            slopes = np.stack([np.broadcast_to(by_name[name], shape) for name in self.free], axis=1)
        if self.form.objective.residuals == "logarithmic":
            slopes = slopes / self.form.predict(at, self.points)[:, None, :]
        return slopes

    def _complex_step(self, values: np.ndarray) -> np.ndarray:
        """d predict / d theta [m, k, n] = Im f(theta + i h) / h."""
        stepped = {}
        for place, name in enumerate(self.form.parameters):
            direction = np.array([name == other for other in self.free])
            stepped[name] = (values[:, place, None] + 1j * _COMPLEX_STEP * direction)[..., None]
        return self.form.predict(stepped, self.points).imag / _COMPLEX_STEP

    # Coordinates

    def row(self, parameters: dict[str, float]) -> np.ndarray:
        """Values [p] of the parameters."""
        return np.array([parameters[name] for name in self.form.parameters], float)

    @cached_property
    def _places(self) -> list[int]:
        """Places of the free parameters in the form's order."""
        return [list(self.form.parameters).index(name) for name in self.free]

    @cached_property
    def _logarithmic(self) -> np.ndarray:
        """Which free parameters are searched by their logarithm [k]."""
        return np.array([self.form.parameters[name].logarithmic for name in self.free], bool)

    @cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bounds [k] of the free parameters."""
        low, high = np.array([self.form.parameters[name].bounds for name in self.free], float).reshape(-1, 2).T
        return low, high

    @cached_property
    def search_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bounds [k] in search coordinates."""
        low, high = (self._search_coordinates(bounds) for bounds in self.bounds)
        return low, high

    def _search_coordinates(self, free: np.ndarray) -> np.ndarray:
        """Search coordinates of values [..., k] of the free parameters."""
        return np.where(self._logarithmic, np.log(np.where(self._logarithmic, free, 1)), free)

    def to_search(self, values: np.ndarray) -> np.ndarray:
        """Search coordinates [m, k] of `values` [m, p], clipped to the bounds."""
        return np.clip(self._search_coordinates(values[:, self._places]), *self.search_bounds)

    def from_search(self, searched: np.ndarray) -> np.ndarray:
        """Values [m, p] of search coordinates [m, k], the others as fixed."""
        values = np.empty((len(searched), len(self.form.parameters)))
        for place, name in enumerate(self.form.parameters):
            if name in self.fixed:
                values[:, place] = self.fixed[name]
            else:
                column = searched[:, self.free.index(name)]
                values[:, place] = np.exp(column) if self.form.parameters[name].logarithmic else column
        return values
