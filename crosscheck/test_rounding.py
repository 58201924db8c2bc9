"""Uniform grids: rounding to nearest against compressed-tensors, GPTQ against llm-compressor, in float32."""

from __future__ import annotations

import pytest
import torch

from coppice.methods.quantize import gptq, rtn
from coppice.methods.solvers.grid import Grid, dequantize, fit_groups, group_of_inputs
from coppice.methods.solvers.sweep import Quantizer, cholesky_factor, sweep
from crosscheck import libraries

GROUPS = (32, -1)
KINDS = {"symmetric": True, "asymmetric": False}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_to_nearest(problem, bits, group_size, kind, agreement):
    grid = {"bits": bits, "group_size": group_size, "symmetric": KINDS[kind]}
    ours = rtn.compress(problem.linear, None, rtn.Options(**grid))
    theirs = libraries.round_to_nearest(problem.weight, **grid)
    for name in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(dequantize(ours), theirs.weight)
    agreement("rtn", f"W{bits} {kind}, {_groups(group_size)}", "compressed-tensors", equal=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["in order", "act-order"])
@pytest.mark.parametrize("group_size", GROUPS)
def test_gptq(problem, group_size, order, kind, agreement):
    grid = {"bits": 4, "group_size": group_size, "symmetric": KINDS[kind]}
    act_order = order == "act-order"
    # The library fits its grids to the weights of dead inputs too, which it then sets to zero.
    weight = problem.weight.masked_fill(problem.moment.diagonal() == 0, 0)
    theirs = libraries.gptq(weight, problem.moment.clone(), **grid, act_order=act_order)
    if group_size == -1 or act_order:
        ours = gptq.compress(problem.linear, problem.statistics, gptq.Options(**grid, act_order=act_order))
        codes, scale, swept = ours.codes, ours.scale, dequantize(ours)
    else:
        codes, scale, swept = _groups_of_the_original_weights(weight, problem.moment, **grid)
    assert torch.equal(scale, theirs.scale)
    equal = (codes == theirs.codes).double().mean().item()
    assert equal >= 0.999
    ratio = problem.loss(swept) / problem.loss(theirs.weight)
    assert ratio == pytest.approx(1, abs=1e-3)
    # Where a weight falls between two codes by less than the rounding of float32, its row goes another way from there.
    rows = (codes == theirs.codes).all(dim=1)
    difference = ((swept - theirs.weight)[rows].abs().max() / weight.abs().max()).item()
    assert difference < 1e-6
    agreement("gptq", f"W4 {kind}, {_groups(group_size)}, {order}", "llm-compressor", equal, difference, ratio)


def _groups_of_the_original_weights(weight, moment, bits, group_size, symmetric):
    """Codes, scales and weights of the sweep in order on grids fixed in advance, which the method itself fits again."""
    grid = Grid(bits, symmetric, torch.float32)
    groups = group_of_inputs(weight.shape[1], group_size, weight.device)
    quantizer = Quantizer(grid, group_size, groups, fit_groups(grid, weight, group_size))
    swept = sweep(weight, cholesky_factor(moment, 0.01), 128, quantizer=quantizer)
    return swept.codes, swept.scale, swept.weight


def _groups(size: int) -> str:
    return "rows" if size == -1 else f"groups of {size}"
