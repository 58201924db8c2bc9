"""The 95% intervals of metrics that are means over items, as the entries `low` and `high` of metrics.json.

A normal interval of the standard error has no width where all items are alike, and leaves the values' range near its
ends: 300 right answers of 300 are not a certainty, and no accuracy is above 1. So a share of right answers has
Wilson's score interval, and every other mean the percentile bootstrap of its items, whose means are within the items'.
"""

from __future__ import annotations

import numpy as np

from coppice import uncertainty

FEW = 10  # items; a bootstrap of fewer is much too narrow, so that they have a standard error alone


def of_proportion(values: np.ndarray) -> dict[str, float]:
    """`low` and `high` of the share of ones among `values` [n >= 1], each 0 or 1."""
    low, high = uncertainty.proportion_interval(int(np.sum(values)), len(values))
    return {"low": low, "high": high}


def of_means(columns: np.ndarray) -> list[dict[str, float]]:
    """`low` and `high` of the mean of each column of `columns` [n, k], in its unit; nothing below FEW items."""
    if len(columns) < FEW:
        return [{} for _ in range(columns.shape[1])]
    ends = uncertainty.bootstrap_intervals(columns)
    return [{"low": low, "high": high} for low, high in ends.T.tolist()]
