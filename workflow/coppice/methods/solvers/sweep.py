"""One sweep over the inputs of a linear that makes its weights sparse, quantized or both, and lets the inputs that are
still to come make up for the error.

Sources: Frantar and Alistarh, SparseGPT (arXiv 2301.00774), algorithm 1; Frantar et al., GPTQ (arXiv 2210.17323),
algorithm 1 and equations 2 to 4.

With H = E[x x^T] + damping mean(diag H) I, d_j the change of the weights of input j and R upper triangular, R R^T = H,
input j = 0 .. n-1 in turn: w_j = its weights + sum_{k<j} d_k R_kj / R_jj, the best correction given the inputs already
settled; q_j = w_j with its pruned entries at zero, rounded to the grid; d_j = its weights - q_j. With e_j = (w_j - q_j)
R_jj, sum_j |e_j|^2 = tr((W - Q) H (W - Q)^T).

The papers write the same step as w_k <- w_k - e_j U_jk, U^T U = H^-1; R is the inverse of U, and is had without
inverting (Chee et al., QuIP, arXiv 2307.13304, prove the two equal). In between they differ: w_k for k > j is here not
yet the weight that input k would take were all inputs from j on free. What is decided for several inputs at once is
decided from those weights, w + c with sum_{j<=i<=k} c_i R_ik = sum_{i<j} d_i R_ik.
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
class CholeskyFactor:
    """upper: [n, n] float64, R with R R^T = damped H: the inverse of the papers' U. Its trailing blocks are those of
    trailing blocks of H. dead: [n] bool, inputs that were zero on every token.

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

    choose(scores [m, width], kept [m, width]) -> mask [m, width], with scores (w_ij R_jj)^2 of the current weights.
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
def cholesky_factor(moment: Tensor, damping: float) -> CholeskyFactor:
    """R of the damped second moment [n, n]; computed once for linears that share an input (see `moments`).

    Where H + damping mean(diag H) I is not positive definite the damping grows tenfold, to at most 1 (see `damping`).
    Raises UserError when that does not help, or when the statistics are unfit (see `moments`).
    """
    damped = damp(moment, damping)
    # With J the reversal, J H J = L L^T makes J L J the upper triangular R.
    return CholeskyFactor(damped.lower.flip(0, 1), damped.dead, damped.damping, damped.asked)


def sweep(
    weight: Tensor,
    factor: CholeskyFactor,
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
    pivots = factor.upper.diagonal().to(weight.dtype)
    # Transposed, so that the weights of one input lie together.
    current = weight.masked_fill(factor.dead, 0).T.contiguous()
    pruned = torch.zeros_like(current, dtype=torch.bool) if kept is None else ~kept.T.contiguous()
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
        # A window that is longer than the block begins with it, and wants the corrections of all its inputs.
        reach = min(width, max([stop, *(start + window for window in windows)])) if start else stop
        # R_kj / R_jj of the block's inputs k and all from the block on, j.
        corrections = (factor.upper[start:reach, start:] / factor.upper.diagonal()[start:]).to(weight.dtype)
        original = weight[:, start:reach].masked_fill(factor.dead[start:reach], 0).T.contiguous()
        settled, changes = current.new_empty(2, stop - start, rows)
        for j in range(start, stop):
            here = j - start
            if any(j % each == 0 for each in windows):
                # Nothing has corrected the weights that the first window sees.
                ahead = corrections[here:, here:], original[here:] if j else None, current[j:]
            if selection is not None and j % selection.width == 0:
                window = slice(j, j + selection.width)
                scores = (_free(*ahead, selection.width) * pivots[window, None]).square()
                pruned[window] = ~selection.choose(scores.T, ~pruned[window].T).T
            value = current[j].masked_fill(pruned[j], 0)
            if quantizer is not None:
                group = groups[j]
                if quantizer.parameters is None and j % quantizer.width == 0:
                    window = slice(j, j + quantizer.width)
                    fitted = _free(*ahead, quantizer.width).masked_fill(pruned[window], 0)
                    scales[group], zero_points[group] = quantizer.grid.fit(fitted.T)
                scale, zero_point = scales[group], zero_points[group]
                codes[j] = quantizer.grid.encode(value, scale, zero_point)
                value = decode(codes[j], scale, zero_point)
            settled[here] = value
            change = torch.sub(original[here], value, out=changes[here])
            current[j + 1 : stop].addr_(corrections[here, here + 1 : stop - start], change)
        errors = (current[start:stop] - settled) * pivots[start:stop, None]
        loss += errors.double().square().sum()
        current[start:stop] = settled
        current[stop:].addmm_(corrections[: stop - start, stop - start :].T, changes)
        start = stop

    quantized = (None, None, None) if quantizer is None else (codes, scales, zero_points)
    codes, scale, zero_point = (None if part is None else part.T.contiguous() for part in quantized)
    return Swept(current.T.contiguous(), ~pruned.T.contiguous(), codes, scale, zero_point, loss.item())


def _free(corrections: Tensor, original: Tensor | None, current: Tensor, width: int) -> Tensor:
    """The weights of the next `width` inputs, were they and all behind them free.

    corrections: R_kj / R_jj of the next inputs; original and current: their weights before the sweep and now,
    None where they are the same.
    """
    current = current[:width]
    if original is None:
        return current
    original = original[:width]
    triangle = corrections[: len(current), : len(current)].T
    return original + torch.linalg.solve_triangular(triangle, current - original, upper=False, unitriangular=True)


def _block_end(start: int, block: int, width: int, windows: list[int]) -> int:
    """Where the block that begins at `start` ends: before any window of inputs that would straddle its end.

    What is chosen for a window is then chosen from weights that every earlier input has corrected.
    """
    stop = min(start + block, width)
    while cuts := [first for window in windows if start < (first := stop // window * window) < stop]:
        stop = min(cuts)
    return stop
