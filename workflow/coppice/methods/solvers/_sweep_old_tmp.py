"""One sweep over the inputs of a linear that makes its weights sparse, quantized or both, and lets the inputs that are
still to come make up for the error.

Sources: Frantar and Alistarh, SparseGPT (arXiv 2301.00774), algorithm 1; Frantar et al., GPTQ (arXiv 2210.17323),
algorithm 1 and equations 2 to 4.

With H = E[x x^T] + damping mean(diag H) I and U upper triangular, U^T U = H^-1, input j = 0 .. n-1 in turn:
q_j = the current w_j with its pruned entries at zero, rounded to the grid; e_j = (w_j - q_j) / U_jj;
w_k <- w_k - e_j U_jk for k > j. As U[j:, j:]^T U[j:, j:] = (H[j:, j:])^-1, each step is the optimal correction given
the inputs already settled, and sum_j |e_j|^2 = tr((W - Q) H (W - Q)^T).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coppice.lazy import torch
from coppice.methods.solvers.damping import damp
from coppice.methods.solvers.grid import Grid, decode
from coppice.methods.solvers.moments import once_for_shared

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class InverseFactor:
    """upper: [n, n] float64, U with U^T U = (damped H)^-1. dead: [n] bool, inputs that were zero on every token.

    damping: the share of mean(diag H) that was added; asked: the share that was asked for.
    """

    upper: Tensor
    dead: Tensor
    damping: float
    asked: float

    @property
    def record(self) -> dict[str, Any]:
        return {"damping_asked": self.asked, "damping": self.damping, "dead_inputs": int(self.dead.sum())}


@dataclass(frozen=True)
class Selection:
    """Chooses what is kept of `width` consecutive inputs when the sweep reaches the first of them.

    choose(scores [m, width], kept [m, width]) -> mask [m, width], with scores w_ij^2 / U_jj^2 of the current weights.
    """

    width: int
    choose: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Quantizer:
    """The grid of each input. groups: [n] the group of each input.

    parameters: scale and zero point, each [m, groups], fixed in advance; or None, where groups are runs of `width`
    consecutive inputs, whose parameters are fitted to the current weights when the sweep reaches them.
    """

    grid: Grid
    width: int
    groups: Tensor
    parameters: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Swept:
    """weight: [m, n] after the sweep; mask: [m, n] bool; codes [m, n] int32, scale and zero_point [m, groups]: None
    without a quantizer. loss: tr((W - Q) H (W - Q)^T) with the damped H, dead inputs left out.
    """

    weight: Tensor
    mask: Tensor
    codes: Tensor | None
    scale: Tensor | None
    zero_point: Tensor | None
    loss: float


@once_for_shared
def inverse_factor(moment: Tensor, damping: float) -> InverseFactor:
    """U of the damped second moment [n, n]; computed once for linears that share an input (see `moments`).

    Where H + damping mean(diag H) I is not positive definite the damping grows tenfold, to at most 1 (see `damping`).
    Raises UserError when that does not help, or when the statistics are unfit (see `moments`).
    """
    damped = damp(moment, damping)
    # With J the reversal, J H J = L L^T makes (J L J)^-1 the upper triangular U: no inverse of H is formed.
    identity = torch.eye(len(damped.lower), dtype=damped.lower.dtype, device=damped.lower.device)
    upper = torch.linalg.solve_triangular(damped.lower, identity, upper=False).flip(0, 1)
    return InverseFactor(upper, damped.dead, damped.damping, damped.asked)


def sweep(
    weight: Tensor,
    factor: InverseFactor,
    block: int,
    *,
    kept: Tensor | None = None,
    selection: Selection | None = None,
    quantizer: Quantizer | None = None,
) -> Swept:
    """Sweeps weight [m, n] over its inputs in order, in its own type.

    kept: [m, n] bool, True where a weight may be other than zero. Corrections reach the inputs behind the current block
    of `block` only when the block is done: the result does not depend on it. Weights of dead inputs become zero.
    """
    rows, width = weight.shape
    upper = factor.upper.to(weight.dtype)
    pivots = upper.diagonal()
    # Transposed, so that the weights of one input lie together.
    current = weight.masked_fill(factor.dead, 0).T.contiguous()
    mask = torch.ones_like(current, dtype=torch.bool) if kept is None else kept.T.contiguous()
    windows = []
    if selection is not None:
        windows.append(selection.width)
    if quantizer is not None:
        codes = torch.empty_like(current, dtype=torch.int32)
        groups = quantizer.groups.tolist()
        if quantizer.parameters is None:
            windows.append(quantizer.width)
            scales = current.new_empty(max(groups) + 1, rows)
            zero_points = torch.empty_like(scales, dtype=torch.int32)
        else:
            scales, zero_points = (parameter.T.contiguous() for parameter in quantizer.parameters)
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)

    start = 0
    while start < width:
        stop = _block_end(start, block, width, windows)
        errors = current.new_empty(stop - start, rows)
        for j in range(start, stop):
            if selection is not None and j % selection.width == 0:
                window = slice(j, j + selection.width)
                scores = (current[window] / pivots[window, None]).square()
                mask[window] = selection.choose(scores.T, mask[window].T).T
            settled = current[j].masked_fill(~mask[j], 0)
            if quantizer is not None:
                group = groups[j]
                if quantizer.parameters is None and j % quantizer.width == 0:
                    window = slice(j, j + quantizer.width)
                    scales[group], zero_points[group] = quantizer.grid.fit(
                        current[window].masked_fill(~mask[window], 0).T
                    )
                codes[j] = quantizer.grid.encode(settled, scales[group], zero_points[group])
                settled = decode(codes[j], scales[group], zero_points[group])
            error = (current[j] - settled) / pivots[j]
            current[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
            current[j] = settled
            errors[j - start] = error
        current[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        loss += errors.double().square().sum()
        start = stop

    quantized = (None, None, None) if quantizer is None else (codes, scales, zero_points)
    codes, scale, zero_point = (None if part is None else part.T.contiguous() for part in quantized)
    return Swept(current.T.contiguous(), mask.T.contiguous(), codes, scale, zero_point, loss.item())


def _block_end(start: int, block: int, width: int, windows: list[int]) -> int:
    """Where the block that begins at `start` ends: before any window of inputs that would straddle its end.

    What is chosen for a window is then chosen from weights that every earlier input has corrected.
    """
    stop = min(start + block, width)
    while cuts := [first for window in windows if start < (first := stop // window * window) < stop]:
        stop = min(cuts)
    return stop
