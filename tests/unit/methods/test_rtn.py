from __future__ import annotations

import dataclasses

import pytest
import torch

from coppice.errors import UserError
from coppice.methods.quantize.rtn import Options, compress
from coppice.methods.solvers.grid import Grid, dequantize
from coppice.models.contracts import Linear

# Read by tests/rows.py.
ROWS = [{"bits": 4, "group_size": -1}, {"bits": 2, "symmetric": True, "group_size": -1}]


def relative(difference, weight):
    return (difference.norm() / weight.norm()).item()


def quantize(linear, **options):
    return compress(linear, None, Options(**options))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [1, 8, 24, -1])
def test_error_is_at_most_half_a_step(linear, symmetric, group_size):
    quantized = quantize(linear, bits=3, group_size=group_size, symmetric=symmetric)
    error = (linear.weight - dequantize(quantized)).abs()
    assert (error <= quantized.scale[:, quantized.group_index.long()] / 2 * (1 + 1e-9)).all()


def test_shapes_and_types(linear):
    quantized = quantize(linear, bits=4, group_size=8)
    assert quantized.codes.shape == (20, 24) and quantized.codes.dtype == torch.int32
    assert quantized.scale.shape == (20, 3) and quantized.scale.dtype == linear.weight.dtype
    assert quantized.zero_point.shape == (20, 3) and quantized.zero_point.dtype == torch.int32
    assert quantized.group_index.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert quantized.group_index.dtype == torch.int32
    assert quantized.record == {"bits": 4, "symmetric": False, "group_size_asked": 8, "group_size": 8}


def test_the_nearest_point_of_the_grid_is_taken(linear):
    quantized = quantize(linear, bits=3, group_size=8)
    points = torch.arange(8)[:, None, None] - quantized.zero_point
    points = (points * quantized.scale).repeat_interleave(8, dim=2)
    nearest = (points - linear.weight).abs().amin(0)
    torch.testing.assert_close((linear.weight - dequantize(quantized)).abs(), nearest, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("group_size", "error"), [(32, 0.097), (64, 0.108), (128, 0.118), (256, 0.127), (1024, 0.143)])
def test_error_on_normal_weights(group_size, error):
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    ours = quantize(Linear(weight), bits=4, group_size=group_size, symmetric=True)
    # The known values are those of the grid with scale max|w| / 7, which is wider than ours, max|w| / 7.5.
    wider = ours.scale * 7.5 / 7
    rounded = Grid(4, True, torch.float32).encode(weight.unflatten(1, (-1, group_size)), wider[:, :, None], 0)
    assert relative(weight - (rounded * wider[:, :, None]).flatten(1), weight) == pytest.approx(error, rel=0.01)
    assert relative(weight - dequantize(ours), weight) < error


def test_idempotent(linear):
    once = dequantize(quantize(linear, bits=4, group_size=8))
    again = dequantize(quantize(Linear(once), bits=4, group_size=8))
    torch.testing.assert_close(again, once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
def test_pruned_weights_stay_zero(linear, symmetric):
    mask = torch.rand(20, 24, generator=torch.Generator().manual_seed(0)) > 0.5
    masked = Linear(linear.weight.masked_fill(~mask, 0), mask)
    assert (dequantize(quantize(masked, bits=2, group_size=8, symmetric=symmetric))[~mask] == 0).all()


def test_storage_of_the_checkpoint(linear):
    stored = dataclasses.replace(linear, weight=linear.weight.float(), storage=torch.bfloat16)
    scale = quantize(stored, bits=4, group_size=8).scale
    assert scale.dtype == torch.float32
    assert torch.equal(scale.bfloat16().float(), scale)


def test_indivisible_group_size(linear):
    with pytest.raises(UserError, match="A group size of 7 does not divide the 24 inputs of this layer"):
        quantize(linear, bits=4, group_size=7)
    row = quantize(linear, bits=4, group_size=7, indivisible="row")
    assert row.group_size == 24 and row.scale.shape == (20, 1)
    assert row.record["group_size_asked"] == 7
