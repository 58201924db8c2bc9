"""A matrix whose singular values pass through gates, with a gradient that is finite where they meet or vanish.

Wang et al., Dobi-SVD: Differentiable SVD for LLM Compression and Some New Perspectives (arXiv 2502.02723), the gradient
of the truncated decomposition. For Y [t, m] = U Sigma V^T, of which q components are taken, Y' = U diag(g) Sigma V^T,
the gradient G [t, m] of a loss by Y', M = U^T G V [q, q] and E_ij = 1 / (sigma_i^2 - sigma_j^2), E_ii = 0,

    dg_i = sigma_i M_ii,   dY = U N V^T + (I - U U^T) G V diag(g) V^T + U diag(g) U^T G (I - V V^T),
    N_ij = g_j M_ij + E_ij (g_i - g_j) sigma_i (sigma_i M_ij + sigma_j M_ji).

This is the gradient through U, Sigma and V with its terms collected: no singular value is divided by, and E counts only
between components whose gates differ. Exact where the components beyond q have no power.

Where sigma_i and sigma_j <= sigma_i are closer than the type resolves, E_ij = sigma_i^-2 sum_{k=0}^{10} (sigma_j /
sigma_i)^(2k), the first terms of its series, at most 11 / sigma_i^2; two that vanish have E_ij = 0, as nothing comes of
how they turn into each other. The paper's bound is 1e-10 in the activations' own unit; here it is relative to the
largest singular value, so that the unit does not matter.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from coppice.errors import UserError
from coppice.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_TERMS = 10


def apply_gates(matrix: Tensor, gate: Tensor) -> Tensor:
    """Y' [t, m]: the first q components of Y [t, m] by falling singular value, each times its gate [q].

    Raises UserError when Y holds values that are not finite.
    """
    if not torch.isfinite(matrix).all():
        raise UserError(
            "The outputs of this layer hold values that are not finite, so they cannot be truncated: calibrate in a "
            "wider dtype or check the parent's weights."
        )
    return _function().apply(matrix, gate)


def inverse_gaps(values: Tensor) -> Tensor:
    """E [q, q] of singular values [q] in falling order."""
    information = torch.finfo(values.dtype)
    resolution = (information.eps * values[0]).clamp(min=information.tiny**0.5)
    high, low = torch.maximum(values[:, None], values), torch.minimum(values[:, None], values)
    ratio = (low / high.clamp(min=resolution)).square()
    series = torch.ones_like(ratio)
    for _ in range(_TERMS):
        series = 1 + ratio * series
    close = high - low <= resolution
    exact = 1 / ((high - low) * (high + low)).masked_fill(close, 1)
    size = torch.where(close, series / high.clamp(min=resolution).square(), exact)
    size = size.masked_fill(high <= resolution, 0)
    return size.triu(1) - size.tril(-1)


@cache
def _function() -> Any:
    """The autograd function; its class needs torch, which is imported at first use."""

    class Gated(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, matrix: Tensor, gate: Tensor) -> Tensor:
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            count = len(gate)
            left, values, right = left[:, :count], values[:count], right[:count].T
            context.save_for_backward(left, values, right, gate)
            return (left * (values * gate)) @ right.T

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
            left, values, right, gate = context.saved_tensors
            left_gradient, right_gradient = left.T @ gradient, gradient @ right
            inner = left_gradient @ right
            of_gate = values * inner.diagonal()
            if not context.needs_input_grad[0]:
                return None, of_gate
            turns = inverse_gaps(values) * (gate[:, None] - gate) * values[:, None]
            within = inner * gate + turns * (values[:, None] * inner + values * inner.T)
            outside_left = (right_gradient - left @ inner) * gate
            outside_right = gate[:, None] * (left_gradient - inner @ right.T)
            return (left @ within + outside_left) @ right.T + left @ outside_right, of_gate

    return Gated
