"""sensitivity: more where the relative error of the outputs at the uniform target is larger.

With e_i = |dW X| / |W X| at the uniform target, c_i / n_i is in proportion to e_i; for bits, whose error halves with
each, log2 e_i more than a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy

from coppice.compression.allocation.entries import Entry
from coppice.compression.allocation.spreading import Array, shift_shares, spread_groups


def costs(entries: Sequence[Entry], capacity: int, by_error: Callable[..., Array]) -> Array:
    """The cost of each linear as a real number.

    by_error(errors, sizes, least, most, total): what turns errors into costs, `proportional` or `logarithmic`.
    """
    every = [list(range(len(entries)))]
    return spread_groups(entries, every, capacity, lambda errors, limits, total: by_error(errors, *limits, total))


def logarithmic(errors: Array, sizes: Array, least: Array, most: Array, total: float) -> Array:
    """Costs (log2 e_i + t) n_i, cut to [least_i, most_i]: a bit more for each doubling of the error."""
    largest = errors.max()
    errors = numpy.maximum(errors, 1e-12 * largest) if largest > 0 else numpy.ones_like(errors)
    return shift_shares(numpy.log2(errors), sizes, least, most, total)
