"""Levels of values."""

from __future__ import annotations

import numpy as np

from coppice.laws.engine.points import levels


def test_a_fine_scale_of_values_is_many_levels() -> None:
    assert levels(np.geomspace(1, 10, 50)).max() > 20
    assert levels(np.array([0.5, 0.51, 0.52, 0.53])).tolist() == [0, 0, 0, 1]
