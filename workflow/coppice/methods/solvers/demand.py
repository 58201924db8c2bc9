"""What a linear loses at each level of a target, without compressing the whole model: tr(dW H dW^T), H = E[x x^T].

- masking: the sum of the pruned w_ij^2 H_jj, which leaves out the cross terms between pruned weights of an output
  (Sun et al., Wanda, arXiv 2306.11695, whose scores these are);
- truncation to rank k: sum_{i > k} sigma_i^2 with W H^(1/2) = U Sigma V^T (see `solvers.truncation`), exact;
- rounding: tr((W - Q) H (W - Q)^T) for the nearest points Q of the grid, exact for round to nearest.

And the share of outliers, by which OWL (Yin et al., arXiv 2310.05175) and Mosaic (arXiv 2504.06323) spread a sparsity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from coppice.errors import UserError
from coppice.lazy import torch
from coppice.methods.solvers.grid import GridOptions, dequantize
from coppice.methods.solvers.loss import output_power
from coppice.methods.solvers.moments import input_power, second_moment
from coppice.methods.solvers.rounding import round_to_nearest
from coppice.methods.solvers.selection import share_of
from coppice.methods.solvers.truncation import outputs_spectrum
from coppice.models.contracts import Linear

if TYPE_CHECKING:
    from torch import Tensor

# Weights that are sorted at once.
_CHUNK = 2**22


def masking_losses(weight: Tensor, moment: Tensor, sparsities: Sequence[float]) -> list[float]:
    """The loss of pruning the floor(s n) smallest w_ij^2 H_jj of each output, for each sparsity s from 0 to 1.

    weight: [m, n]; moment: H [n, n]. At s = 1 it is the sum of all. Raises UserError when the weight is not finite, or
    when the statistics are unfit (see `solvers.moments`).
    """
    _require_finite(weight)
    power = input_power(moment)
    counts = torch.tensor([share_of(sparsity, len(power)) for sparsity in sparsities], device=weight.device)
    losses = power.new_zeros(len(counts))
    for rows in weight.split(max(_CHUNK // len(power), 1)):
        scores = (rows.double().square() * power).sort(dim=1).values
        sums = torch.nn.functional.pad(scores.cumsum(dim=1).sum(dim=0), (1, 0))
        losses += sums[counts]
    return losses.tolist()


def truncation_losses(weight: Tensor, moment: Tensor) -> list[float]:
    """The loss at rank 0, 1, .. min(m, n): sum_{i > k} sigma_i^2.

    weight: [m, n]; moment: H [n, n]. Raises UserError when the weight is not finite, or when the statistics are unfit
    (see `solvers.truncation`).
    """
    _require_finite(weight)
    powers = outputs_spectrum(weight, moment)
    return torch.nn.functional.pad(powers.flip(0).cumsum(0), (1, 0)).flip(0).tolist()


def rounding_losses(linear: Linear, moment: Tensor, options: GridOptions, bits: Sequence[int]) -> list[float]:
    """The loss of rounding to nearest on the options' grid at each number of bits.

    moment: H [n, n]. Raises UserError when the weight is not finite, when the group size does not divide the width, or
    when the statistics are unfit (see `solvers.moments`).
    """
    _require_finite(linear.weight)
    moment = second_moment(moment)
    return [
        output_power(
            linear.weight - dequantize(round_to_nearest(linear, options.model_copy(update={"bits": number}))), moment
        )
        for number in bits
    ]


def outlier_scores(weight: Tensor, moment: Tensor) -> Tensor:
    """|W_ij| sqrt(H_jj), [m, n] in float32 or the weight's wider type.

    Raises UserError when the weight is not finite, or when the statistics are unfit (see `solvers.moments`).
    """
    _require_finite(weight)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.abs().to(dtype) * input_power(moment).sqrt().to(dtype)


def outlier_share(scores: Sequence[Tensor], factor: float) -> float:
    """The share of all scores together that are more than `factor` times their mean."""
    count = sum(each.numel() for each in scores)
    mean = sum(each.double().sum().item() for each in scores) / count
    return sum(int((each > factor * mean).sum()) for each in scores) / count


def _require_finite(weight: Tensor) -> None:
    if not torch.isfinite(weight).all():
        raise UserError(
            "This layer's weights hold values that are not finite, so no loss can be measured on them: check the "
            "parent."
        )
