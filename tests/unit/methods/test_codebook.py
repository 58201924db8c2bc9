from __future__ import annotations

import dataclasses

import pytest
import torch

from coppice.errors import UserError
from coppice.methods.solvers.codebook import (
    dequantize,
    dynamic_table,
    encode,
    float_table,
    integer_table,
    normal_float_table,
    quantile_table,
    quantize_blocks,
)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.fixture(scope="module")
def sample() -> torch.Tensor:
    return torch.randn(4096, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def relative_error(weight: torch.Tensor, table: torch.Tensor, bits: int, block: int = 64) -> float:
    return ((dequantize(quantize_blocks(weight, table, bits, block)) - weight).norm() / weight.norm()).item()


@pytest.mark.parametrize(
    ("make", "bits", "expected"),
    [
        (integer_table, 3, 0.251),
        (integer_table, 4, 0.1077),
        (integer_table, 5, 0.0503),
        (integer_table, 8, 0.0059),
        (lambda bits: float_table(bits, 2), 3, 0.226),
        (lambda bits: float_table(bits, 2), 4, 0.1057),
        (lambda bits: float_table(bits, 3), 4, 0.188),
        (lambda bits: float_table(bits, 2), 5, 0.0519),
        (lambda bits: float_table(bits, 4), 8, 0.0248),
        (dynamic_table, 3, 0.251),
        (dynamic_table, 4, 0.139),
        (dynamic_table, 8, 0.0095),
        (lambda bits: normal_float_table(), 4, 0.0919),
    ],
)
def test_known_errors_on_normal_weights(sample, make, bits, expected):
    assert relative_error(sample, make(bits), bits) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("block", "integers", "floats"),
    [(32, 0.0972, 0.1014), (128, 0.1177, 0.1090), (256, 0.1266, 0.1116), (1024, 0.1431, 0.1153)],
)
def test_floats_lose_less_to_large_blocks(sample, block, integers, floats):
    assert relative_error(sample, integer_table(4), 4, block) == pytest.approx(integers, rel=0.01)
    assert relative_error(sample, float_table(4, 2), 4, block) == pytest.approx(floats, rel=0.01)


@pytest.mark.parametrize("bits", range(3, 9))
def test_tables_are_sorted_and_hold_zero_and_the_ends(bits):
    tables = [integer_table(bits), quantile_table(bits, normal(5000)), dynamic_table(bits)]
    tables += [float_table(bits, exponent) for exponent in range(bits)]
    for table in tables:
        assert table.shape == (2**bits,) and table.dtype == torch.float64
        assert (table.diff() >= 0).all()
        assert (table == 0).any() and table[-1] == 1
        assert not torch.signbit(table[table == 0]).any()
    for table in tables:
        assert table[0] == -1 or table is tables[2]
    # As published, the dynamic exponent lacks -1; otherwise its values come with both signs.
    assert torch.equal(-tables[2][: 2 ** (bits - 1) - 1].flip(0), tables[2][2 ** (bits - 1) : -1])


def test_normal_float_is_the_published_table():
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    expected = torch.tensor(published, dtype=torch.float64)
    torch.testing.assert_close(normal_float_table(), expected, rtol=0, atol=1e-6)


def test_floats_by_hand():
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64) / 6
    torch.testing.assert_close(float_table(4, 2), torch.cat([-e2m1.flip(0), e2m1]), rtol=0, atol=0)
    e4m3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    # The hardware type gives one code of each sign to NaN; the largest value of the format itself is 480.
    ours = float_table(8, 4) * 480
    assert set(e4m3[torch.isfinite(e4m3)].tolist()) == set(ours[ours.abs() < 480].tolist())


@pytest.mark.parametrize("bits", range(3, 9))
def test_floats_without_exponent_are_integers(bits):
    torch.testing.assert_close(float_table(bits, 0).unique(), integer_table(bits).unique())


@pytest.mark.parametrize("make", [integer_table, dynamic_table, lambda bits: quantile_table(bits, normal(20000))])
def test_more_bits_lose_less(sample, make):
    errors = [relative_error(sample, make(bits), bits) for bits in range(3, 9)]
    assert errors == sorted(errors, reverse=True)


def test_quantiles_code_equally_many():
    values = normal(20000)
    table = quantile_table(4, values)
    edges = torch.quantile(values, (torch.arange(17, dtype=torch.float64) + 0.5) / 17)
    middles = (edges[1:] + edges[:-1]) / 2
    torch.testing.assert_close(table[1:-1], (middles / middles.abs().max())[1:-1], rtol=0, atol=0.06)
    counts = torch.bincount(encode(values / middles.abs().max(), table).long(), minlength=16)
    # The cells beside the 0 that was put in are off by a little more.
    assert counts[1:-1].min() > 0.75 * 20000 / 17 and counts[1:-1].max() < 1.3 * 20000 / 17
    assert relative_error(values[:19200].view(-1, 64), table, 4) < 0.1


@pytest.mark.parametrize("values", [normal(100).abs() + 1, -normal(100).abs() - 1, torch.zeros(9), torch.ones(1)])
def test_quantiles_of_odd_values(values):
    table = quantile_table(3, values)
    assert len(table) == 8 and (table.diff() >= 0).all()
    assert table[0] == -1 and table[-1] == 1 and (table == 0).any()


def test_quantiles_leave_pruned_weights_out():
    values = normal(1000)
    torch.testing.assert_close(quantile_table(4, torch.cat([values, torch.zeros(5000)])), quantile_table(4, values))


def test_codes_are_the_nearest_entries():
    values = 2 * torch.rand(3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    for table in (integer_table(3), float_table(5, 3), dynamic_table(8), normal_float_table()):
        codes = encode(values, table)
        assert codes.dtype == torch.int32
        distances = (values[:, None] - table).abs()
        torch.testing.assert_close((values - table[codes]).abs(), distances.amin(1), rtol=0, atol=1e-15)


def test_blocks_run_through_rows_and_the_last_is_short():
    weight = normal(3, 10)
    found = quantize_blocks(weight, integer_table(8), 8, 4)
    flat = weight.flatten()
    assert found.absmax.tolist() == [part.abs().max().item() for part in flat.split(4)]
    assert len(found.absmax) == 8
    assert ((dequantize(found).flatten() - flat).abs() <= found.absmax[torch.arange(30) // 4] / 254 + 1e-12).all()


def test_order_of_blocks_does_not_matter():
    weight, order = normal(6, 64), torch.randperm(6, generator=torch.Generator().manual_seed(0))
    table = float_table(4, 2)
    one, other = quantize_blocks(weight, table, 4, 64), quantize_blocks(weight[order], table, 4, 64)
    assert torch.equal(one.codes[order], other.codes) and torch.equal(one.absmax[order], other.absmax)


def test_one_block():
    found = quantize_blocks(normal(6, 10), integer_table(4), 4, -1)
    assert found.block == 60 and found.absmax.shape == (1,)
    assert torch.equal(found.codes, quantize_blocks(normal(6, 10), integer_table(4), 4, 1000).codes)


def test_zeros_stay_zero():
    weight = normal(4, 64)
    weight[:, ::3] = 0
    weight[1] = 0
    for table in (
        integer_table(4),
        float_table(4, 2),
        dynamic_table(4),
        normal_float_table(),
        quantile_table(4, weight),
    ):
        values = dequantize(quantize_blocks(weight, table, 4, 64))
        assert (values[:, ::3] == 0).all() and (values[1] == 0).all() and torch.isfinite(values).all()


def test_scales_as_stored():
    weight = 1.37 * normal(8, 64).float()
    found = quantize_blocks(weight, integer_table(8), 8, 64, storage=torch.bfloat16)
    assert found.absmax.dtype == found.table.dtype == torch.float32
    assert torch.equal(found.absmax.bfloat16().float(), found.absmax)
    nearest = (weight[:, :, None] - found.absmax[:, None, None] * found.table).abs().amin(2)
    torch.testing.assert_close((dequantize(found) - weight).abs(), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_scales_outside_the_stored_range(size):
    values = dequantize(quantize_blocks(size * normal(2, 64).float(), integer_table(4), 4, 64, storage=torch.float16))
    assert torch.isfinite(values).all()


def test_outliers_are_kept_whole():
    weight, outliers = normal(5, 12), torch.tensor([2, 7])
    found = quantize_blocks(weight, integer_table(3), 3, 10, outliers)
    assert found.codes.shape == (5, 10) and found.absmax.shape == (5,)
    assert torch.equal(dequantize(found)[:, outliers], weight[:, outliers])
    rest = [column for column in range(12) if column not in (2, 7)]
    plain = quantize_blocks(weight[:, rest], integer_table(3), 3, 10)
    assert torch.equal(dequantize(found)[:, rest], dequantize(plain))
    assert torch.equal(dequantize(dataclasses.replace(found, transposed=True)), dequantize(found).T)


def test_weights_that_are_not_finite():
    weight = normal(2, 4)
    weight[1, 1] = float("nan")
    with pytest.raises(UserError, match="weights hold values that are not finite"):
        quantize_blocks(weight, integer_table(4), 4, 4)
