"""How many units a share is, and which units go, given their scores."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

from coppice.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def share_of(share: float, size: float) -> int:
    """floor(share * size), where a product that rounding error leaves just below an integer counts as that integer."""
    return math.floor(round(share * size, 6))


def whole_units(ratio: float, count: int) -> int:
    """floor(ratio * count) for a ratio below 1, from its decimal digits.

    In binary, 0.29 * 100 is below 29.
    """
    return int(Fraction(str(ratio)) * count)


def lowest(scores: Tensor, number: int) -> tuple[int, ...]:
    """The indices of the `number` lowest of `scores` [units], in increasing order; of equal scores the first go."""
    return tuple(sorted(torch.argsort(scores, stable=True)[:number].tolist()))
