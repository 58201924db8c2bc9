"""Goodness of fit, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from law_points import TRUTH, curve, power

from coppice.laws.engine.metrics import average_slope_difference, metrics


def test_slope_difference() -> None:
    # T-A5
    points = curve(3, noise=0.05)
    loss = points["loss"]
    assert average_slope_difference(points, loss) == (0, 0)
    predicted = power(TRUTH, points)
    difference, relative = average_slope_difference(points, predicted)
    assert average_slope_difference(points, predicted + 3)[0] == pytest.approx(difference, rel=1e-9)
    rescaled = average_slope_difference(points | {"tokens": 1000 * points["tokens"]}, predicted)
    assert rescaled == pytest.approx((difference / 1000, relative))
    two = {"run": np.array(["a", "a", "a"]), "tokens": np.array([3.0, 1.0, 2.0]), "loss": np.array([4.0, 9.0, 6.0])}
    # Slopes -3 and -2 against -1 and -1.
    assert average_slope_difference(two, np.array([7.0, 9.0, 8.0])) == pytest.approx((1.5, 0.6))


def test_slope_difference_where_there_is_no_slope() -> None:
    single = curve(2, tokens=(4.0, 4.0))
    assert average_slope_difference(single, single["loss"]) == (None, None)
    flat = curve() | {"loss": np.ones(5)}
    assert average_slope_difference(flat, np.ones(5)) == (0, None)


def test_metrics_by_hand() -> None:
    points = {"run": np.array(["a", "a"]), "tokens": np.array([1.0, 2.0]), "loss": np.array([3.0, 1.0])}
    values = metrics(points, np.array([3.0005, 1.5]))
    assert values["r2"] == pytest.approx(1 - (0.5**2 + 0.0005**2) / 2)
    assert values["huber"] == pytest.approx((0.0005**2 / 2 + 1e-3 * (0.5 - 5e-4)) / 2)
    assert values["rmse"] == pytest.approx(np.sqrt((0.5**2 + 0.0005**2) / 2))
    assert metrics(points | {"loss": np.ones(2)}, np.ones(2))["r2"] is None
