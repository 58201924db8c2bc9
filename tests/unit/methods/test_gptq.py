from __future__ import annotations

import dataclasses

import pytest
import torch
from pydantic import ValidationError

from coppice.errors import UserError
from coppice.methods.quantize import rtn
from coppice.methods.quantize.gptq import Options, compress
from coppice.methods.solvers.grid import dequantize
from coppice.models.contracts import Linear

# Read by tests/rows.py.
ROWS = [{"bits": 4, "group_size": -1}, {"bits": 3, "act_order": True, "symmetric": True, "block": 4, "group_size": -1}]
CLEARS_UNSEEN_INPUTS = True


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_diagonal_moment_gives_rounding_to_nearest(linear, statistics, statistics_with, symmetric, act_order):
    diagonal = statistics_with(statistics.second_moment.diagonal().diag())
    grid = {"bits": 3, "group_size": 8, "symmetric": symmetric}
    ours = compress(linear, diagonal, Options(**grid, act_order=act_order))
    theirs = rtn.compress(linear, None, rtn.Options(**grid))
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.scale, theirs.scale)
    assert torch.equal(ours.zero_point, theirs.zero_point)
    assert torch.equal(ours.group_index, theirs.group_index)


def test_two_inputs_by_hand(statistics_with):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(500, 2, generator=generator, dtype=torch.float64)
    moment = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    options = {"bits": 3, "group_size": -1}
    ours = compress(Linear(weight), statistics_with(moment), Options(**options, damping=0))
    scale, zero_point = ours.scale[:, 0], ours.zero_point[:, 0]
    nearest = rtn.compress(Linear(weight), None, rtn.Options(**options))
    assert torch.equal(ours.codes[:, 0], nearest.codes[:, 0])
    # Given q_0, the best value of input 1 is w_1 + (w_0 - q_0) H_01 / H_11, and the best code that closest to it.
    points = scale[:, None] * (torch.arange(8) - zero_point[:, None])
    first = dequantize(ours)[:, :1]
    differences = torch.stack([(weight[:, :1] - first).expand(-1, 8), weight[:, 1:] - points], dim=2)
    losses = torch.einsum("rci,ij,rcj->rc", differences, moment, differences)
    assert torch.equal(ours.codes[:, 1].long(), losses.argmin(1))
    assert (ours.codes[:, 1] != nearest.codes[:, 1]).any()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [16, -1])
def test_beats_rounding_to_nearest(statistics_with, bits, act_order, group_size):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(64, 48, generator=generator, dtype=torch.float64)
    inputs = torch.randn(400, 48, generator=generator, dtype=torch.float64)
    inputs = inputs + 2 * inputs[:, :6] @ torch.randn(6, 48, generator=generator, dtype=torch.float64)
    options = {"bits": bits, "group_size": group_size}
    ours = compress(Linear(weight), statistics_with(inputs.T @ inputs), Options(**options, act_order=act_order))
    nearest = rtn.compress(Linear(weight), None, rtn.Options(**options))
    loss, baseline = ((inputs @ (weight - dequantize(one)).T).square().sum() for one in (ours, nearest))
    assert loss < 0.8 * baseline


@pytest.mark.parametrize("act_order", [True, False])
def test_block_does_not_matter(linear, statistics, act_order):
    options = {"bits": 3, "group_size": 6, "act_order": act_order}
    one, other = (compress(linear, statistics, Options(**options, block=block)) for block in (4, 128))
    assert torch.equal(one.codes, other.codes)
    torch.testing.assert_close(one.scale, other.scale, rtol=1e-10, atol=0)


def test_act_order_is_the_sweep_of_permuted_inputs(linear, statistics, statistics_with):
    order = torch.sort(statistics.second_moment.diagonal(), descending=True).indices
    permuted = compress(
        Linear(linear.weight[:, order]),
        statistics_with(statistics.second_moment[order][:, order]),
        Options(bits=3, group_size=-1),
    )
    ours = compress(linear, statistics, Options(bits=3, group_size=-1, act_order=True))
    assert torch.equal(ours.codes[:, order], permuted.codes)
    assert not torch.equal(ours.codes, compress(linear, statistics, Options(bits=3, group_size=-1)).codes)


def test_act_order_keeps_the_groups_of_the_original_weights(linear, statistics):
    ours = compress(linear, statistics, Options(bits=3, group_size=8, act_order=True))
    nearest = rtn.compress(linear, None, rtn.Options(bits=3, group_size=8))
    assert torch.equal(ours.scale, nearest.scale)
    assert ours.group_index.tolist() == [0] * 8 + [1] * 8 + [2] * 8


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_pruned_weights_stay_zero(linear, statistics, symmetric, act_order):
    mask = torch.rand(20, 24, generator=torch.Generator().manual_seed(0)) > 0.5
    masked = Linear(linear.weight.masked_fill(~mask, 0), mask)
    quantized = compress(masked, statistics, Options(bits=3, group_size=8, symmetric=symmetric, act_order=act_order))
    assert (dequantize(quantized)[~mask] == 0).all()
    zero_points = quantized.zero_point[:, quantized.group_index.long()]
    assert torch.equal(quantized.codes[~mask], zero_points[~mask])
    assert (dequantize(quantized)[mask] != 0).any()


def test_weights_on_the_grid_stay(linear, statistics):
    rounded = dequantize(rtn.compress(linear, None, rtn.Options(bits=4, group_size=8)))
    again = dequantize(compress(Linear(rounded), statistics, Options(bits=4, group_size=8)))
    torch.testing.assert_close(again, rounded, rtol=1e-9, atol=1e-9)


def test_storage_of_the_checkpoint(linear, statistics):
    stored = dataclasses.replace(linear, weight=linear.weight.float(), storage=torch.float16)
    quantized = compress(stored, statistics, Options(bits=4, group_size=8))
    assert quantized.scale.dtype == torch.float32
    assert torch.equal(quantized.scale.half().float(), quantized.scale)


@pytest.mark.parametrize("act_order", [True, False])
def test_dead_inputs_become_zero(linear, statistics, statistics_with, act_order):
    moment = statistics.second_moment.clone()
    moment[5] = 0
    moment[:, 5] = 0
    quantized = compress(linear, statistics_with(moment), Options(bits=3, group_size=8, act_order=act_order))
    assert (dequantize(quantized)[:, 5] == 0).all()
    assert quantized.record["dead_inputs"] == 1
    alive = linear.weight.clone()
    alive[:, 5] = 0
    assert torch.equal(
        quantized.scale[:, 0], rtn.compress(Linear(alive), None, rtn.Options(bits=3, group_size=8)).scale[:, 0]
    )


def test_fewer_tokens_than_inputs(linear, inputs, statistics_with, loss):
    statistics = statistics_with(inputs[:10].T @ inputs[:10] / 10)
    undamped = compress(linear, statistics, Options(bits=4, group_size=8, damping=0))
    assert undamped.record["damping_asked"] == 0 and undamped.record["damping"] == 0.01
    damped = compress(linear, statistics, Options(bits=4, group_size=8))
    assert torch.equal(undamped.codes, damped.codes)
    assert torch.isfinite(dequantize(damped)).all()


def test_bad_inputs(linear, statistics):
    with pytest.raises(UserError, match="A group size of 7 does not divide the 24 inputs of this layer"):
        compress(linear, statistics, Options(bits=4, group_size=7))
    zero = dataclasses.replace(statistics, second_moment=torch.zeros_like(statistics.second_moment))
    for act_order in (True, False):
        with pytest.raises(UserError, match="zero everywhere"):
            compress(linear, zero, Options(bits=4, group_size=8, act_order=act_order))
    for bad in ({"damping": -1}, {"damping": 1.5}, {"block": 0}):
        with pytest.raises(ValidationError, match="Input should be"):
            Options(bits=4, **bad)
