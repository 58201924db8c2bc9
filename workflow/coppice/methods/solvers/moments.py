"""The border where calibration statistics enter the mathematics.

H = E[x x^T], [n, n], is symmetric and positive semidefinite in exact arithmetic; sums in float32 leave it so up to
rounding. Every solver works on it in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coppice.errors import UserError
from coppice.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def second_moment(moment: Tensor) -> Tensor:
    """(H + H^T) / 2 in float64, [n, n]. Raises UserError as `input_power` does, or when H has infinite entries."""
    input_power(moment)
    if not torch.isfinite(moment).all():
        raise UserError(_NOT_FINITE)
    moment = moment.double()
    return (moment + moment.T) / 2


def input_power(moment: Tensor) -> Tensor:
    """diag(H) in float64, [n]: the mean square of each input.

    Raises UserError when it is not finite, negative somewhere, or zero everywhere.
    """
    power = moment.diagonal().double()
    if not torch.isfinite(power).all():
        raise UserError(_NOT_FINITE)
    if (power < 0).any():
        raise UserError(
            "The statistics of this layer's inputs hold a negative mean square, so they are damaged: calibrate again."
        )
    if not power.any():
        raise UserError(
            "The statistics of this layer's inputs are zero everywhere, so nothing says which weights matter: "
            "calibrate on text that reaches this layer."
        )
    return power


_NOT_FINITE = (
    "The statistics of this layer's inputs hold values that are not finite: its activations overflowed during "
    "calibration, so calibrate in float32 or check the parent's weights."
)
