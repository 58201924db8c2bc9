"""The second moment of a linear's inputs made positive definite.

H + damping mean(diag H) I, with the mean over the inputs that are not dead. Where that is singular in float64 or
indefinite the damping grows tenfold, and both the used and the requested damping are on record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coppice.errors import UserError
from coppice.lazy import torch
from coppice.methods.solvers.moments import second_moment

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST_DAMPING = 1.0


@dataclass(frozen=True)
class Damped:
    """moment: [n, n] float64, positive definite. lower: [n, n], L with L L^T = J moment J, J the reversal.

    dead: [n] bool, inputs that were zero on every token; they have the mean power of the others on the diagonal.
    damping: the share of mean(diag H) that was added; requested: the share that was requested.
    """

    moment: Tensor
    lower: Tensor
    dead: Tensor
    damping: float
    requested: float


def damp(moment: Tensor, damping: float) -> Damped:
    """The second moment [n, n] with at least `damping` of its mean diagonal added; more, up to 1, where it needs it.

    Raises UserError when that does not help, or when the statistics are unfit (see `moments`).
    """
    moment = second_moment(moment)
    power = moment.diagonal().clone()
    dead = power == 0
    mean = power[~dead].mean()
    # A dead input takes part in no correction: any positive power serves.
    power[dead] = mean
    used = damping
    while True:
        moment.diagonal().copy_(power + used * mean)
        if (lower := _cholesky(moment)) is not None:
            return Damped(moment, lower, dead, used, damping)
        if used >= _LARGEST_DAMPING:
            raise UserError(
                "The second moment of this layer's inputs is not positive semidefinite, even when damped by its mean "
                "diagonal: the statistics are damaged, so calibrate again."
            )
        used = min(10 * max(used, 1e-3), _LARGEST_DAMPING)


def _cholesky(moment: Tensor) -> Tensor | None:
    """Lower L with L L^T = J H J, J the reversal; None when that is singular in float64 or indefinite."""
    lower, failed = torch.linalg.cholesky_ex(moment.flip(0, 1))
    pivots = lower.diagonal().square()
    floor = len(moment) * torch.finfo(moment.dtype).eps * moment.diagonal().max()
    return None if failed or pivots.min() <= floor else lower
