"""Bootstraps, intervals and profiles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from law_points import HUBER, POWER, TRUTH, curve, heavy_tailed, power

from coppice.laws.engine.forms import Parameter
from coppice.laws.engine.inference import bootstrap, profile, report_parameters
from coppice.laws.engine.problem import Problem
from coppice.laws.engine.search import fit_form


def test_intervals_follow_the_spread_between_runs_not_between_points() -> None:
    shifted = curve(12, tokens=np.geomspace(1, 100, 8), shift=0.1)
    fit = fit_form(POWER, shifted, starts=4)
    samples, counts = bootstrap(fit, 120, seed=0)
    assert samples[:, 0].std() == pytest.approx(0.1 / np.sqrt(12), rel=0.4)
    assert np.array_equal(counts[:, ::8].sum(axis=1), np.full(120, 12))
    again, _ = bootstrap(fit, 120, seed=0)
    assert np.array_equal(samples, again)


def test_intervals_cover_the_truth() -> None:
    covered = 0
    for seed in range(20):
        points = curve(12)
        points["loss"] += 0.02 * np.random.default_rng(seed).standard_normal(len(points["loss"]))
        fit = fit_form(POWER, points, starts=3)
        low, high = np.quantile(bootstrap(fit, 40, seed)[0], [0.025, 0.975], axis=0)
        covered += np.sum((low <= list(TRUTH.values())) & (list(TRUTH.values()) <= high))
    assert 0.8 <= covered / 60 <= 1


def test_no_interval_without_four_runs_or_spare_points() -> None:
    three, tight = curve(3, noise=0.01), curve(4, tokens=(1.0,), noise=0.01)
    assert len(bootstrap(fit_form(POWER, three), 50, 0)[0]) == 0
    tight = {name: column[:3] for name, column in tight.items()}
    assert len(bootstrap(fit_form(POWER, tight), 50, 0)[0]) == 0


def test_a_draw_never_identifies_less_than_the_points() -> None:
    # Only the last run has a second and third token count, so that each draw must hold it.
    points = {
        "run": np.array(["a", "b", "c", "d", "d", "d", "d"]),
        "tokens": np.array([1.0, 1.0, 1.0, 1.0, 2.0, 4.0, 8.0]),
    }
    points["loss"] = power(TRUTH, points) + 0.01 * np.random.default_rng(0).standard_normal(7)
    _, counts = bootstrap(fit_form(POWER, points), 100, 0)
    assert counts[:, 3].min() == 1


def test_a_bootstrap_does_not_depend_on_the_number_of_threads() -> None:
    points = heavy_tailed(8)
    fit = fit_form(HUBER, points, starts=4)
    seen = []
    one, _ = bootstrap(fit, 140, 0, progress=seen.append)  # more than one array of searches
    three, _ = bootstrap(fit, 140, 0, threads=3)
    assert np.array_equal(one, three)
    assert sum(seen) == 140
    assert not np.array_equal(one[:5], bootstrap(fit, 5, 1)[0])


def test_profile_is_the_best_objective_at_each_value() -> None:
    points = curve(4, noise=0.01)
    fit = fit_form(POWER, points)
    values = np.array([1.2, 1.4, fit.parameters["floor"], 1.6])
    found = profile(fit, "floor", values)
    for value, lowest in zip(values, found, strict=True):
        refit = fit_form(POWER, points, fixed={"floor": value})
        assert lowest == pytest.approx(float(Problem(POWER, points).objective(refit.parameters)), rel=1e-6)
    assert found.argmin() == 2


def test_parameters_at_a_bound_of_the_search_say_so() -> None:
    below = curve(4) | {"loss": power(TRUTH | {"floor": -0.5}, curve(4))}
    fit = fit_form(POWER, below, starts=4)
    samples, _ = bootstrap(fit, 20, seed=0)
    entries = report_parameters(fit, samples)
    assert {name: entry["at_bound"] for name, entry in entries.items()} == {
        "floor": True,
        "scale": False,
        "exponent": False,
    }
    assert entries["floor"]["identified"]
    steep = curve() | {"loss": power(TRUTH | {"exponent": 3.5}, curve())}
    assert fit_form(POWER, steep, starts=4).at_bound == ("exponent",)
    assert fit_form(POWER, curve(), starts=4).at_bound == ()
    # What the points cannot tell, or what was not fitted, lies where it lies.
    assert fit_form(POWER, below, starts=4, fixed={"floor": 0.0}).at_bound == ()
    unused = {"unused": Parameter(bounds=(0, 1), start=(0, 0))}
    fit = fit_form(replace(POWER, parameters=POWER.parameters | unused), curve(), starts=4)
    assert fit.parameters["unused"] == pytest.approx(0, abs=1e-6)
    assert (fit.unidentified, fit.at_bound) == (("unused",), ())
