"""The search finds the optimum, and says what the points do not identify."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from law_points import HUBER, POWER, TRUTH, curve, heavy_tailed, power
from scipy.optimize import minimize

from coppice.errors import UserError
from coppice.laws.engine.forms import Objective, Parameter
from coppice.laws.engine.problem import Problem
from coppice.laws.engine.search import fit_form, gradient_ratio, unidentified


def test_every_start_finds_the_truth() -> None:
    fit = fit_form(POWER, curve())
    assert fit.parameters == pytest.approx(TRUTH, rel=1e-10)
    assert fit.converged
    assert fit.unidentified == ()
    assert fit.starts.shape == (32, 3)
    assert np.ptp(fit.starts, axis=0).max() < 1e-3


def test_many_searches_at_once_agree_with_the_polished_optimum() -> None:
    fit = fit_form(POWER, curve(4, noise=0.01))
    assert np.allclose(fit.starts, list(fit.parameters.values()), rtol=1e-3)


def test_a_bound_holds_and_the_fit_still_counts_as_converged() -> None:
    points = curve() | {"loss": power({"floor": -0.5, "scale": 2.0, "exponent": 0.5}, curve())}
    fit = fit_form(POWER, points)
    assert fit.parameters["floor"] == pytest.approx(0, abs=1e-6)
    assert fit.converged


def test_parameters_short_of_the_optimum_are_refused() -> None:
    # What stopping on a loose tolerance gives: near the optimum in loss, with a gradient that has not vanished.
    points = curve(3, noise=0.01)
    fit = fit_form(POWER, points)
    assert gradient_ratio(fit.problem, fit.parameters) < 1e-7
    early = fit.parameters | {"exponent": fit.parameters["exponent"] * 1.001}
    assert gradient_ratio(fit.problem, early) > 1e-3


def test_rank_names_the_parameters_with_a_part_in_the_null_space() -> None:
    generator = np.random.default_rng(0)
    free, shared = generator.standard_normal((20, 2)), generator.standard_normal((20, 1))
    columns = np.hstack([free * [1e5, 1e-1], shared, -1e4 * shared])
    assert unidentified(columns, ("a", "b", "c", "d")) == ("c", "d")
    assert unidentified(columns[:, :3], ("a", "b", "c")) == ()
    assert unidentified(columns[:1, :2], ("a", "b")) == ("a", "b")
    assert unidentified(np.hstack([free, np.zeros((20, 1))]), ("a", "b", "zero")) == ("zero",)
    assert unidentified(np.hstack([free, 1e-12 * shared]), ("a", "b", "vanished")) == ("vanished",)
    assert unidentified(columns[:0, :2], ("a", "b")) == ("a", "b")


@pytest.mark.parametrize("tokens", [(4.0,), (1.0, 4.0), (2.0, 2.0, 2.0, 2.0)])
def test_too_few_distinct_points_are_named_not_fatal(tokens: tuple[float, ...]) -> None:
    fit = fit_form(POWER, curve(tokens=tokens), starts=4)
    assert set(fit.unidentified) == {"floor", "scale", "exponent"}
    assert power(fit.parameters, curve(tokens=tokens)) == pytest.approx(curve(tokens=tokens)["loss"])


def test_hubers_minimum_is_no_higher_than_that_of_another_search() -> None:
    points = heavy_tailed(20)
    fit = fit_form(HUBER, points, starts=8)
    assert fit.converged
    assert gradient_ratio(fit.problem, fit.parameters) < 1e-8

    def value(searched: np.ndarray) -> float:
        return 1e3 * Problem(HUBER, points).objective(dict(zip(TRUTH, np.exp(searched), strict=True)))

    other = minimize(value, np.log(list(TRUTH.values())), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13})
    assert value(np.log(list(fit.parameters.values()))) <= other.fun * (1 + 1e-9)
    assert np.exp(other.x) == pytest.approx(list(fit.parameters.values()), rel=1e-3)


def test_huber_is_not_led_by_an_outlier() -> None:
    points = curve(4, tokens=(1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0))
    points["loss"] = points["loss"].copy()
    points["loss"][5] *= 2
    assert fit_form(HUBER, points).parameters == pytest.approx(TRUTH, rel=5e-3)
    assert abs(fit_form(POWER, points).parameters["floor"] - TRUTH["floor"]) > 0.05


def test_a_prediction_without_a_logarithm_is_never_a_minimum() -> None:
    form = replace(POWER, parameters=POWER.parameters | {"floor": Parameter(bounds=(-10, 10), start=(-10, 5))})
    points = curve(4)
    assert fit_form(replace(form, objective=Objective("logarithmic")), points).parameters == pytest.approx(TRUTH)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_points_where_the_formula_has_no_value_are_refused() -> None:
    points = curve(4) | {"tokens": np.full(20, -1.0)}
    with pytest.raises(UserError, match="no finite value at these points"):
        fit_form(POWER, points)
