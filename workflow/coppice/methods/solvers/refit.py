"""The exact correction of the weights that are free for the error of those that are not.

With free places R and fixed places E of one output's row w, the error e = w - w_hat on E, and H = E[x x^T],
E|(w - w_hat)^T x|^2 is least over the free weights at w_hat_R = w_R + d_R with

    d_R = H_RR^-1 H_RE e_E.

A refit of what a mask keeps is the case e_E = w_E. Begun from any w_hat that is zero on E, with its error e on every
place, the same minimum is reached by d_R = H_RR^-1 (H e)_R; a damped H_RR then minimises
E|(w - w_hat - d)^T x|^2 + damping mean(diag H) |d|^2, which never ends above the error that it began with.

Source: Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon (NIPS 1992), equation 5,
for several weights at once; it is the least-squares problem of each row on the inputs that it keeps. Rows differ in R,
so that each has a system of its own: they are solved in batches of rows with about as many free places, padded with
rows and columns of the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coppice.errors import UserError
from coppice.lazy import torch
from coppice.methods.solvers.damping import damp
from coppice.methods.solvers.moments import second_moment
from coppice.records.base import Json

if TYPE_CHECKING:
    from torch import Tensor

# Of the gathered [k, k] matrices of a batch; their Cholesky factors take as much again.
_BATCH_BYTES = 2**30


@dataclass(frozen=True)
class Refit:
    """weight: [m, n] in the type of the weight that was refitted. damping: the share of mean(diag H), as in `damping`;
    requested: the share that was requested.
    """

    weight: Tensor
    damping: float
    requested: float

    @property
    def record(self) -> Json:
        return {"refit_damping_asked": self.requested, "refit_damping": self.damping}


def refit(weight: Tensor, start: Tensor, mask: Tensor, moment: Tensor, damping: float) -> Refit:
    """The weights on the mask with the least E|(w - w_hat)^T x|^2 in each row, held to `start` by the damping.

    weight: [m, n] w. start: [m, n], zero outside the mask ([m, n] bool). moment: [n, n] E[x x^T]. Weights of dead
    inputs stay as they are in `start`. Raises UserError when the statistics are unfit (see `damping`).
    """
    damped = damp(moment, damping)
    target = (weight.double() - start.double()) @ second_moment(moment)
    refitted = start + solve_free(target, mask, damped.moment)
    return Refit(refitted.to(weight.dtype), damped.damping, damping)


def compensate(error: Tensor, free: Tensor, moment: Tensor) -> Tensor:
    """d [m, n] float64, d_R = H_RR^-1 H_RE e_E in each row, zero outside R: to be added to the free weights.

    error: [m, n] e = w - w_hat on the places that are not free; what it holds on the free places does not count.
    free: [m, n] bool. moment: [n, n] float64, damped already. Raises UserError when it is singular on a row's free
    places.
    """
    return solve_free(error.double().masked_fill(free, 0) @ moment, free, moment)


def solve_free(target: Tensor, free: Tensor, moment: Tensor) -> Tensor:
    """x [m, n] float64 with H_RR x_R = t_R in each row and zero outside R.

    target: [m, n] float64. free: [m, n] bool. moment: [n, n] float64, positive definite. Raises UserError where it is
    not.
    """
    solution = torch.zeros_like(target)
    counts = free.sum(dim=1)
    if (free == free[:1]).all():
        places = free[0].nonzero().squeeze(1)
        system = moment[places][:, places]
        solution[:, places] = torch.cholesky_solve(target[:, places].T, _factor(system)).T
        return solution
    order = torch.argsort(counts)
    # The free places of each row first, in order.
    places = torch.argsort(~free, dim=1, stable=True)
    sizes = counts[order].tolist()
    stop = len(sizes)
    while stop and (size := sizes[stop - 1]):
        start = max(stop - max(_BATCH_BYTES // (8 * size * size), 1), 0)
        rows = order[start:stop]
        index = places[rows, :size]
        padding = torch.arange(size, device=index.device) >= counts[rows, None]
        system = moment[index[:, :, None], index[:, None, :]]
        system.masked_fill_(padding[:, :, None] | padding[:, None, :], 0)
        system.diagonal(dim1=1, dim2=2)[padding] = 1
        right = target[rows].gather(1, index).masked_fill_(padding, 0)
        free_weights = torch.cholesky_solve(right[:, :, None], _factor(system)).squeeze(2)
        # Padding points at places that are not free, where zero is written again.
        solution[rows] = solution[rows].scatter(1, index, free_weights)
        stop = start
    return solution


def _factor(systems: Tensor) -> Tensor:
    lower, failed = torch.linalg.cholesky_ex(systems)
    if failed.any():
        raise UserError(
            "The second moment of this layer's inputs is singular on the weights that are free to change, so no "
            "correction is determined: use a larger damping, or calibrate on more tokens."
        )
    return lower
