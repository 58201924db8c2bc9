"""One sweep over the inputs of a linear that prunes its weights, quantizes them or both, while the inputs not yet swept
compensate for the error.

Sources: Frantar and Alistarh, SparseGPT (arXiv 2301.00774), algorithm 1; Frantar et al., GPTQ (arXiv 2210.17323),
algorithm 1 and equations 2 to 4.

With H = E[x x^T] + damping mean(diag H) I, d_j the change of the weights of input j and R upper triangular, R R^T = H,
input j = 0 .. n-1 in turn: w_j = its weights + sum_{k<j} d_k R_kj / R_jj, the best correction given the inputs already
swept; q_j = w_j with its pruned entries at zero, rounded to the grid; d_j = its weights - q_j. With e_j = (w_j - q_j)
R_jj, sum_j |e_j|^2 = tr((W - Q) H (W - Q)^T).

The papers write the same step as w_k <- w_k - e_j U_jk, U^T U = H^-1. R is the inverse of U, and is computed without
inverting (Chee et al., QuIP, arXiv 2307.13304, prove the two equal). In between they differ: w_k for k > j is here not
yet the weight that input k would take were all inputs from j on free. What is decided for several inputs at once is
decided from those weights, w + c with sum_{j<=i<=k} c_i R_ik = sum_{i<j} d_i R_ik.

| the papers' symbol | name here |
|---|---|
| W, before the sweep | `weight`; `original`, transposed, of a block of inputs |
| W, as it is updated | `current`, transposed: a row for each input |
| U = Cholesky(H^-1)^T | the inverse of `factor.upper` = R |
| U_jj, the pivot [H_F^-1]_jj^(1/2) | 1 / `pivots[j]` = 1 / R_jj |
| quant(w_j), or w_j masked; Q_:,j | `value`; `swept` for the inputs of a block |
| E_:,j-i = (W_:,j - Q_:,j) U_jj^-1 | `errors[j - start]` (e_j above) |
| B, the block of lazy updates | `block` |
| B_s, the block whose mask is chosen at once | `selection.width` |
| w^2 / [H^-1]_cc^2, the score | `scores` |
| M, the mask of what is kept | the complement of `pruned` |
| g, the group size | `quantizer.width` |
| (none: d_j above) | `changes[j - start]` |
| (none: R_kj / R_jj above) | `ratios[k - start, j - start]` |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coppice.lazy import torch
from coppice.methods.solvers.damping import damp
from coppice.methods.solvers.grid import Grid, decode
from coppice.methods.solvers.moments import compute_once_for_shared
from coppice.records.base import Json

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CholeskyFactor:
    """upper: [n, n] float64, R with R R^T = damped H: the inverse of the papers' U. Its trailing blocks are those of
    trailing blocks of H. dead: [n] bool, inputs that were zero on every token.

    damping: the share of mean(diag H) that was added; requested: the share that was requested.
    """

    upper: Tensor
    dead: Tensor
    damping: float
    requested: float

    @property
    def record(self) -> Json:
        return {"damping_asked": self.requested, "damping": self.damping, "dead_inputs": int(self.dead.sum())}


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

    @property
    def on_grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """codes, scale and zero_point of a sweep with a quantizer."""
        assert self.codes is not None and self.scale is not None and self.zero_point is not None
        return self.codes, self.scale, self.zero_point


@compute_once_for_shared
def cholesky_factor(moment: Tensor, damping: float) -> CholeskyFactor:
    """R of the damped second moment [n, n]; computed once for linears that share an input (see `moments`).

    Where H + damping mean(diag H) I is not positive definite the damping grows tenfold, to at most 1 (see `damping`).
    Raises UserError when that does not help, or when the statistics are unfit (see `moments`).
    """
    damped = damp(moment, damping)
    # With J the reversal, J H J = L L^T makes J L J the upper triangular R.
    return CholeskyFactor(damped.lower.flip(0, 1), damped.dead, damped.damping, damped.requested)


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

    kept: [m, n] bool, True where a weight may be other than zero. Inputs after the current block of `block` are
    corrected only when the block is done, in one matrix product: the result does not depend on it. Weights of dead
    inputs become zero.
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
        # The ratios that the block needs: those of its own inputs, and, where a window is longer than the block and
        # begins with it, of all inputs of that window. In the first block nothing has corrected the window yet.
        last = min(width, max([stop, *(start + window for window in windows)])) if start else stop
        ratios = (factor.upper[start:last, start:] / factor.upper.diagonal()[start:]).to(weight.dtype)
        original = weight[:, start:last].masked_fill(factor.dead[start:last], 0).T.contiguous()
        swept, changes = current.new_empty(2, stop - start, rows)
        for j in range(start, stop):
            here = j - start
            if any(j % window == 0 for window in windows):
                # What is chosen or fitted for a window is so for all of its inputs at once, before the sweep corrects
                # the later ones for the earlier: from the weights that they would have were all of them free.
                remaining = ratios[here:, here:], original[here:] if j else None, current[j:]
            if selection is not None and j % selection.width == 0:
                window = slice(j, j + selection.width)
                scores = (_free_weights(*remaining, selection.width) * pivots[window, None]).square()
                pruned[window] = ~selection.choose(scores.T, ~pruned[window].T).T
            value = current[j].masked_fill(pruned[j], 0)
            if quantizer is not None:
                group = groups[j]
                if quantizer.parameters is None and j % quantizer.width == 0:
                    # What is pruned must not stretch the grid: where a mask is chosen here, that comes first.
                    window = slice(j, j + quantizer.width)
                    fitted = _free_weights(*remaining, quantizer.width).masked_fill(pruned[window], 0)
                    scales[group], zero_points[group] = quantizer.grid.fit(fitted.T)
                scale, zero_point = scales[group], zero_points[group]
                codes[j] = quantizer.grid.encode(value, scale, zero_point)
                value = decode(codes[j], scale, zero_point)
            swept[here] = value
            # From the weight before the sweep, not from the corrected one: the ratios already account for what earlier
            # inputs passed on to this one.
            change = torch.sub(original[here], value, out=changes[here])
            current[j + 1 : stop].addr_(ratios[here, here + 1 : stop - start], change)
        # `current` still holds w_j, as each input was when its turn came: the loss is that of w_j against q_j.
        errors = (current[start:stop] - swept) * pivots[start:stop, None]
        loss += errors.double().square().sum()
        current[start:stop] = swept
        # All inputs after the block at once.
        current[stop:].addmm_(ratios[: stop - start, stop - start :].T, changes)
        start = stop

    final, mask = current.T.contiguous(), ~pruned.T.contiguous()
    if quantizer is None:
        return Swept(final, mask, None, None, None, loss.item())
    codes, scales, zero_points = (each.T.contiguous() for each in (codes, scales, zero_points))
    return Swept(final, mask, codes, scales, zero_points, loss.item())


def _free_weights(ratios: Tensor, original: Tensor | None, current: Tensor, width: int) -> Tensor:
    """The weights of the next `width` inputs, were they and all after them free.

    ratios: R_kj / R_jj of the next inputs; original and current: their weights before the sweep and now, original None
    where they are the same.
    """
    current = current[:width]
    if original is None:
        return current
    original = original[:width]
    triangle = ratios[: len(current), : len(current)].T
    return original + torch.linalg.solve_triangular(triangle, current - original, upper=False, unitriangular=True)


def _block_end(start: int, block: int, width: int, windows: list[int]) -> int:
    """Where the block that begins at `start` ends: before any window of inputs that would straddle its end.

    What is chosen for a window is then chosen from weights that every earlier input has corrected.
    """
    stop = min(start + block, width)
    while cuts := [first for window in windows if start < (first := stop // window * window) < stop]:
        stop = min(cuts)
    return stop
