"""A linear on a uniform grid: every weight to its nearest point, or by a sweep that compensates for the error.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (arXiv 2210.17323),
section 4 and algorithm 1; the grid is `solvers.grid`'s, the sweep `solvers.sweep`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from coppice.lazy import torch
from coppice.methods.options import LayerOptions
from coppice.methods.solvers.grid import GridOptions, fit_groups, grid_record, group_of_inputs, group_width, make_grid
from coppice.methods.solvers.moments import input_power
from coppice.methods.solvers.sweep import Quantizer, cholesky_factor, sweep
from coppice.models.contracts import Linear
from coppice.models.replacements import Quantized

if TYPE_CHECKING:
    from torch import Tensor


class SweepOptions(LayerOptions):
    """How the sweep goes over the inputs."""

    act_order: bool = Field(
        default=False,
        description="Sweep the inputs from the largest mean square down, on groups fitted to the original weights.",
    )
    damping: float = Field(default=0.01, ge=0, le=1, description="Share of mean(diag H) added to H's diagonal.")
    block: int = Field(default=128, ge=1, description="Inputs swept before the rest is corrected; changes speed only.")


class SweptGridOptions(GridOptions, SweepOptions):
    """The grid, and how the sweep goes over the inputs."""


def round_to_nearest(linear: Linear, options: GridOptions) -> Quantized:
    """Rounds each group of consecutive inputs to its own grid; zeros stay zeros.

    Raises UserError when the group size does not divide the width and `indivisible` is "error".
    """
    weight = linear.weight
    width = group_width(options, weight.shape[1])
    grid = make_grid(linear, options)
    scale, zero_point = fit_groups(grid, weight, width)
    codes = grid.encode(weight.unflatten(1, (-1, width)), scale[:, :, None], zero_point[:, :, None]).flatten(1)
    return Quantized(
        codes,
        scale,
        zero_point,
        group_of_inputs(weight.shape[1], width, weight.device),
        options.bits,
        width,
        options.symmetric,
        record=grid_record(options, width),
    )


def sweep_to_grid(linear: Linear, moment: Tensor, options: SweptGridOptions) -> Quantized:
    """Sweeps the weight over its inputs, in order or from the largest H_jj down; pruned weights stay zero.

    moment: H [n, n]. In order, a group's grid is fitted to the weights as corrected when the sweep reaches it. With
    act_order it is fitted to the original weights, so that groups stay runs of consecutive inputs and storage needs no
    permutation. Raises UserError when the group size does not divide the width and `indivisible` is "error", or when
    the statistics are unfit (see `solvers.sweep`).
    """
    weight, mask = linear.weight, linear.mask
    inputs = weight.shape[1]
    width = group_width(options, inputs)
    grid = make_grid(linear, options)
    groups = group_of_inputs(inputs, width, weight.device)
    order = torch.arange(inputs, device=weight.device)
    parameters = None
    if options.act_order:
        power = input_power(moment)
        order = torch.sort(power, descending=True, stable=True).indices
        parameters = fit_groups(grid, weight.masked_fill(power == 0, 0), width)
    # The moment itself where it is not permuted: linears that share it share its factor.
    factor = cholesky_factor(moment[order][:, order] if options.act_order else moment, options.damping)
    swept = sweep(
        weight[:, order],
        factor,
        options.block,
        kept=None if mask is None else mask[:, order],
        quantizer=Quantizer(grid, width, groups[order], parameters),
    )
    codes, scale, zero_point = swept.on_grid
    return Quantized(
        codes[:, torch.argsort(order)],
        scale,
        zero_point,
        groups,
        options.bits,
        width,
        options.symmetric,
        record=grid_record(options, width) | factor.record,
    )
