"""The border where calibration statistics enter the mathematics.

H = E[x x^T], [n, n], is symmetric and positive semidefinite in exact arithmetic; sums in float32 leave it so up to
rounding. Every solver works on it in float64.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from coppice.errors import UserError
from coppice.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")


def compute_once_for_shared(function: Callable[..., Result]) -> Callable[..., Result]:
    """function(moment, *rest), computed once while it is called with the same tensor and equal rest.

    Linears that share an input (q, k and v; gate and up) share its second moment. The last result is kept as long as
    its moment is: it must not be changed in place, nor the moment, and it is given up with the moment's memory.
    """
    of: weakref.ref[Tensor] | None = None
    key: tuple[object, ...] = ()
    result: Any = None

    def forget(gone: weakref.ref[Tensor]) -> None:
        nonlocal of, result
        if gone is of:
            of = result = None

    @wraps(function)
    def compute_once(moment: Tensor, *rest: object) -> Result:
        nonlocal of, key, result
        if of is None or of() is not moment or key != rest:
            # Two results never take memory at once.
            of = result = None
            result = function(moment, *rest)
            of, key = weakref.ref(moment, forget), rest
        return result

    return compute_once


def second_moment(moment: Tensor) -> Tensor:
    """(H + H^T) / 2 in float64, [n, n]. Raises UserError as `input_power` does, or when H has infinite entries."""
    input_power(moment)
    # NaN is both the least and the greatest.
    if not torch.isfinite(torch.stack(torch.aminmax(moment))).all():
        raise UserError(_NOT_FINITE)
    # A contiguous copy of the transpose is added several times faster than one read across.
    return (moment.T.contiguous().double() + moment).mul_(0.5)


def input_power(moment: Tensor) -> Tensor:
    """diag(H) in float64, [n]: the mean square of each input.

    Raises UserError when it is not finite, negative somewhere, or zero everywhere.
    """
    return input_size(moment.diagonal(), "mean square")


def input_size(sizes: Tensor, what: str) -> Tensor:
    """Sizes of the inputs (such as E|x|, called `what` in sentences) in float64, [n].

    Raises UserError when they are not finite, negative somewhere, or zero everywhere.
    """
    sizes = sizes.double()
    if not torch.isfinite(sizes).all():
        raise UserError(_NOT_FINITE)
    if (sizes < 0).any():
        raise UserError(
            f"The statistics of this layer's inputs hold a negative {what}, so they are damaged: calibrate again."
        )
    if not sizes.any():
        raise UserError(
            "The statistics of this layer's inputs are zero everywhere, so nothing indicates which weights matter: "
            "calibrate on text that reaches this layer."
        )
    return sizes


_NOT_FINITE = (
    "The statistics of this layer's inputs hold values that are not finite: its activations overflowed during "
    "calibration, so calibrate in float32 or check the parent's weights."
)
