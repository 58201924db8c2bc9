"""Which units of a kind go, given their scores."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from coppice.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def whole_units(ratio: float, count: int) -> int:
    """floor(ratio * count) for a ratio below 1, as its decimal digits say it.

    In binary, 0.29 * 100 is below 29.
    """
    return int(Fraction(str(ratio)) * count)


def lowest(scores: Tensor, number: int) -> tuple[int, ...]:
    """The indices of the `number` lowest of `scores` [units], in increasing order; of equal scores the first go."""
    return tuple(sorted(torch.argsort(scores, stable=True)[:number].tolist()))
