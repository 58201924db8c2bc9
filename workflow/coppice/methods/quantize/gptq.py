"""GPTQ: rounding one input after the other while the inputs still to come make up for the error.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (arXiv 2210.17323),
algorithm 1; the sweep is `solvers.sweep`'s, the grid `solvers.grid`'s.
"""

from __future__ import annotations

from pydantic import Field

from coppice.lazy import torch
from coppice.methods.base import Linear, LinearStatistics, Quantized, Source
from coppice.methods.solvers.grid import (
    GridOptions,
    fit_groups,
    grid_record,
    group_of_inputs,
    group_width,
    make_grid,
)
from coppice.methods.solvers.moments import input_power
from coppice.methods.solvers.sweep import Quantizer, inverse_factor, sweep

SOURCE = Source(
    "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    "arXiv 2210.17323",
    "algorithm 1",
)
NEEDS = frozenset({"moments"})
MAKES = frozenset({"quantized"})
REFUSES = {
    "quantized": "because the weights are on a grid already; quantize once",
    "compensated": "because the compensation was fitted to the weights as they are; quantize before compensating",
}


class Options(GridOptions):
    act_order: bool = Field(
        default=False,
        description="Sweep the inputs from the largest mean square down, on groups fitted to the original weights.",
    )
    damping: float = Field(default=0.01, ge=0, le=1, description="Share of mean(diag H) added to H's diagonal.")
    block: int = Field(default=128, ge=1, description="Inputs swept before the rest is corrected; changes speed only.")


def compress(linear: Linear, statistics: LinearStatistics, options: Options) -> Quantized:
    """Sweeps the weight over its inputs, in order or from the largest H_jj down; pruned weights stay zero.

    In order, a group's grid is fitted to the weights as corrected when the sweep reaches it. With act_order it is
    fitted to the original weights, so that groups stay runs of consecutive inputs and storage needs no permutation.
    Raises UserError when the group size does not divide the width and `indivisible` is "error", or when the statistics
    are unfit (see `solvers.sweep`).
    """
    weight, moment, mask = linear.weight, statistics.second_moment, linear.mask
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
    factor = inverse_factor(moment[order][:, order], options.damping)
    swept = sweep(
        weight[:, order],
        factor,
        options.block,
        kept=None if mask is None else mask[:, order],
        quantizer=Quantizer(grid, width, groups[order], parameters),
    )
    return Quantized(
        swept.codes[:, torch.argsort(order)],
        swept.scale,
        swept.zero_point,
        groups,
        options.bits,
        width,
        options.symmetric,
        record=grid_record(options, width) | factor.record,
    )
