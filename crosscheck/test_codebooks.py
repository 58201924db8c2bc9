"""Tables of values and block-wise codes against bitsandbytes' tables and kernels, in float32."""

from __future__ import annotations

import bitsandbytes.functional as bitsandbytes
import pytest
import torch

from coppice.methods.quantize import k_bit
from coppice.methods.solvers.codebook import (
    dequantize,
    dynamic_table,
    float_table,
    integer_table,
    normal_float_table,
    quantize_blocks,
)

BITS = range(3, 9)
# Below it lies no entry but 0, which float32 misses by as much in tables of evenly spaced values.
SMALLEST = 1e-7


def entries(table: torch.Tensor) -> torch.Tensor:
    """The distinct values: bitsandbytes fills its tables up to 256 entries with zeros."""
    return torch.where(table.abs() < SMALLEST, 0, table).float().unique()


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = entries(ours), entries(theirs)
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def test_normal_float(agreement):
    ours = normal_float_table()
    for theirs in (bitsandbytes.get_4bit_type("nf4", device="cpu"), bitsandbytes.create_normal_map()):
        found = difference(ours, theirs)
        assert found < 1e-6
        agreement("k-bit", "table, normal", "bitsandbytes", 1, found)


@pytest.mark.parametrize("bits", BITS)
def test_dynamic_exponent_and_integers(bits, agreement):
    for name, ours, theirs in (
        ("dynamic", dynamic_table(bits), bitsandbytes.create_dynamic_map(True, bits - 1, bits)),
        ("int", integer_table(bits), bitsandbytes.create_linear_map(True, bits)),
    ):
        found = difference(ours, theirs)
        assert found < 1e-6
        agreement("k-bit", f"table, {name}, 3 to 8 bits", "bitsandbytes", 1, found)


@pytest.mark.parametrize("bits, exponent_bits", [(bits, e) for bits in BITS for e in (1, 2, 3) if e < bits])
def test_floats_agree_but_for_subnormals(bits, exponent_bits, agreement):
    """bitsandbytes' subnormals are a quarter of Coppice's, which continue the spacing of the smallest normals."""
    mantissa_bits = bits - 1 - exponent_bits
    ours = entries(float_table(bits, exponent_bits))
    theirs = entries(bitsandbytes.create_fp8_map(True, exponent_bits, mantissa_bits, bits))
    subnormals = 2**mantissa_bits
    distance = (torch.arange(len(ours)) - len(ours) // 2).abs()
    expected = torch.where(distance < subnormals, ours / 4, ours)
    torch.testing.assert_close(theirs, expected, rtol=1e-6, atol=0)
    normal = distance >= subnormals
    agreement("k-bit", "table, float, normal values", "bitsandbytes", 1, difference(ours[normal], theirs[normal]))


def test_spacing_of_floats_near_zero():
    """What makes a subnormal: up to twice the smallest normal, values are evenly spaced."""
    for bits, exponent_bits in ((4, 2), (8, 4), (8, 3)):
        mantissas = 2 ** (bits - 1 - exponent_bits)
        positive = float_table(bits, exponent_bits)[2 ** (bits - 1) :][: 2 * mantissas + 1]
        torch.testing.assert_close(positive.diff(), positive[1].expand(len(positive) - 1))


@pytest.mark.parametrize("block", [32, 64, 256])
def test_codes_of_normal_float(problem, block, agreement):
    ours = k_bit.compress(problem.linear, None, k_bit.Options(bits=4, type="normal", block=block))
    # As one row: the kernel for processors reads a matrix wrongly where a block goes over the end of a row.
    packed, state = bitsandbytes.quantize_4bit(problem.weight.flatten(), blocksize=block, quant_type="nf4")
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).view(problem.weight.shape)
    assert torch.equal(ours.absmax, state.absmax)
    theirs = bitsandbytes.dequantize_4bit(packed, state).view(problem.weight.shape)
    equal = compare(problem, f"codes, normal, block {block}", dequantize(ours), theirs, agreement)
    assert equal == (ours.codes == codes).double().mean().item() > 0.9999


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_the_dynamic_exponent(problem, bits, agreement):
    """The kernel does not take the nearest entry everywhere."""
    ours = dequantize(quantize_blocks(problem.weight, dynamic_table(bits), bits, 64))
    packed, state = bitsandbytes.quantize_blockwise(
        problem.weight, code=bitsandbytes.create_dynamic_map(True, bits - 1, bits), blocksize=64
    )
    theirs = bitsandbytes.dequantize_blockwise(packed, state)
    equal = compare(problem, f"codes, dynamic, {bits} bits, block 64", ours, theirs, agreement)
    assert equal > 0.997


def compare(problem, setting, ours, theirs, agreement) -> float:
    """The share of weights that are read back alike; of the others, none is nearer to its weight than Coppice's."""
    error, of_theirs = ((problem.weight - weight).abs() for weight in (ours, theirs))
    largest = problem.weight.abs().max()
    assert (error <= of_theirs + 1e-6 * largest).all()
    same = (ours - theirs).abs() <= 1e-6 * largest
    equal = same.double().mean().item()
    found = ((ours - theirs)[same].abs().max() / largest).item()
    agreement("k-bit", setting, "bitsandbytes", equal, found, (error.square().sum() / of_theirs.square().sum()).item())
    return equal
