"""Objective and slopes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from law_points import HUBER, POWER, TRUTH, curve, heavy_tailed, power

from coppice.laws.engine.points import Points
from coppice.laws.engine.problem import Problem
from coppice.laws.engine.search import fit_form


def test_jacobian_is_exact() -> None:
    points = curve()
    tokens = points["tokens"]
    expected = [np.ones(5), tokens**-0.5, -2.0 * tokens**-0.5 * np.log(tokens)]
    columns = Problem(POWER, points).jacobian(TRUTH)
    assert np.allclose(columns, np.transpose(expected), rtol=1e-15, atol=1e-15)


def test_given_slopes_replace_the_complex_step() -> None:
    def slopes(parameters, points: Points) -> dict[str, np.ndarray]:
        falling = points["tokens"] ** -parameters["exponent"]
        return {
            "floor": np.ones_like(falling),
            "scale": falling,
            "exponent": -parameters["scale"] * falling * np.log(points["tokens"]),
        }

    points = heavy_tailed(12)
    for form in (POWER, HUBER):
        given = Problem(replace(form, slopes=slopes), points).jacobian(TRUTH)
        assert given == pytest.approx(Problem(form, points).jacobian(TRUTH), rel=1e-12)
    assert fit_form(replace(HUBER, slopes=slopes), points, starts=4).parameters == pytest.approx(
        fit_form(HUBER, points, starts=4).parameters, rel=1e-6
    )


def test_objective_is_hubers_loss_of_the_log_residuals() -> None:
    points = curve()
    off = points | {"loss": power(TRUTH, points) * np.exp([0.0, 5e-4, -5e-4, 2e-3, -1e-2])}
    within, beyond = 5e-4**2, 1e-3 * (2e-3 - 5e-4) + 1e-3 * (1e-2 - 5e-4)
    assert Problem(HUBER, off).objective(TRUTH) == pytest.approx(within + beyond, rel=1e-9)
    assert Problem(POWER, off | {"loss": off["loss"]}).objective(TRUTH) == pytest.approx(
        np.sum((power(TRUTH, points) - off["loss"]) ** 2) / 2
    )
