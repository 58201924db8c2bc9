"""Whole numbers out of shares."""

from __future__ import annotations

import math


def share_of(share: float, size: float) -> int:
    """floor(share * size), where a product that rounding error leaves just below an integer counts as that integer."""
    return math.floor(round(share * size, 6))
