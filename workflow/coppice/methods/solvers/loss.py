"""The layer loss that every layer method is measured by."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from coppice.errors import UserError
from coppice.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def relative_error(difference: Tensor, weight: Tensor, second_moment: Tensor | None) -> float:
    """tr(dW H dW^T) / tr(W H W^T): the mean squared error of a linear's outputs over their mean square, without unit.

    difference dW: [m, n], weight minus its replacement; weight W: [m, n]; second_moment H: [n, n] E[x x^T], or
    None for H = I, where the ratio is that of squared Frobenius norms. 0 for no difference.
    Raises UserError when the ratio is not finite, or when H is not positive semidefinite (see `output_power`).
    """
    error, scale = (
        each.double().square().sum().item() if second_moment is None else output_power(each, second_moment)
        for each in (difference, weight)
    )
    if error == 0:
        return 0.0
    ratio = error / scale if scale > 0 else math.inf
    if not math.isfinite(ratio):
        raise UserError(
            "The error of this layer is not finite: its weights, their replacement or its statistics hold "
            "values that are not numbers, or overflow."
        )
    return ratio


def output_power(weight: Tensor, second_moment: Tensor, images: Tensor | None = None) -> float:
    """tr(W H W^T): the mean squared norm of the outputs, at least 0. images: W H, where it is at hand.

    Raises UserError when it is more negative than rounding explains (10 n eps tr(H) |W|^2, with eps that of float32, in
    which second moments are summed).
    """
    if images is None:
        images = weight @ second_moment.to(weight.dtype)
    power = (images.double() * weight).sum().item()
    rounding = 10 * len(second_moment) * torch.finfo(torch.float32).eps
    if power < -rounding * second_moment.diagonal().sum().item() * weight.double().square().sum().item():
        raise UserError(
            "The second moment of this layer's inputs is not positive semidefinite (an error of its outputs has a "
            "negative mean square): the statistics are damaged, so calibrate again."
        )
    return max(power, 0.0)
