from __future__ import annotations

import dataclasses

import pytest
import torch

from coppice.errors import UserError
from coppice.methods.quantize.flattenquant import Options, compress, flatten, layout, scales, split
from coppice.methods.solvers.loss import relative_error
from coppice.models.contracts import Linear, LinearStatistics

# Read by tests/rows.py.
ROWS = [{"bits": 8}, {"solver": "gptq", "smoothing": 1, "fence": 0}]

float64 = torch.float64


def flatten_inputs(x: torch.Tensor, source: torch.Tensor, piece: torch.Tensor, threshold: float) -> torch.Tensor:
    """Column by column, as the text of `base.Flattened` has it."""
    columns = []
    for j, k in zip(source.tolist(), piece.tolist(), strict=True):
        column = x[:, j]
        if k >= 0:
            last = k == max(other for at, other in zip(source.tolist(), piece.tolist(), strict=True) if at == j)
            size = (column.abs() - k * threshold).clamp(0, torch.inf if last else threshold)
            column = column.sign() * size
        columns.append(column)
    return torch.stack(columns, dim=1)


def statistics_of(x: torch.Tensor) -> LinearStatistics:
    return LinearStatistics(x.T @ x / len(x), x.mean(0), x.abs().mean(0), x.abs().amax(0), len(x))


@pytest.fixture
def skewed() -> torch.Tensor:
    """[200, 30] inputs, four of them far larger than the others."""
    x = torch.randn(200, 30, generator=torch.Generator().manual_seed(1), dtype=float64)
    x[:, [3, 7, 20, 29]] *= torch.tensor([3.0, 5.0, 4.0, 9.0], dtype=float64)
    return x


@pytest.fixture
def wide() -> Linear:
    """[16, 30] weights, two columns of them far larger than the others."""
    weight = torch.randn(16, 30, generator=torch.Generator().manual_seed(2), dtype=float64)
    weight[:, [7, 11]] *= 4
    return Linear(weight)


def merged(flat, width: int = 30) -> torch.Tensor:
    """[m, n] the weights, from the columns that the first piece of each input has."""
    first = flat.piece <= 0
    weight = torch.zeros(len(flat.codes), width, dtype=flat.scale.dtype)
    return weight.index_add(1, flat.source[first], flat.codes[:, first] * flat.scale)


def test_flattened_outputs_are_the_outputs_before_rounding(skewed, wide):
    threshold, pieces = split(skewed.abs().amax(0), torch.ones(30, dtype=float64), 12, Options())
    weight_threshold, weight_pieces = split(wide.weight.abs().amax(0), pieces.double(), 4, Options())
    assert (pieces > 1).any() and (weight_pieces > 1).any()
    source, piece, weight_piece = layout(pieces, weight_pieces)
    x = flatten_inputs(skewed, source, piece, threshold)
    torch.testing.assert_close(x, flatten(skewed, source, piece, threshold), rtol=0, atol=0)
    weight = flatten(wide.weight, source, weight_piece, weight_threshold)
    torch.testing.assert_close(x @ weight.T, skewed @ wide.weight.T, rtol=1e-13, atol=1e-12)
    assert x.abs().max() <= threshold * (1 + 1e-12)
    assert weight.abs().max() <= weight_threshold * (1 + 1e-12)
    # Beyond what the calibration saw the last piece goes on.
    torch.testing.assert_close(
        flatten_inputs(3 * skewed, source, piece, threshold) @ weight.T, 3 * skewed @ wide.weight.T, rtol=0, atol=1e-11
    )


def test_channels_of_one_size_stay_whole():
    pieces = torch.ones(5, dtype=torch.int64)
    source, piece, weight_piece = layout(pieces, pieces)
    assert source.tolist() == [0, 1, 2, 3, 4]
    assert piece.tolist() == weight_piece.tolist() == [-1] * 5
    threshold, found = split(torch.full((5,), 2.0, dtype=float64), torch.ones(5, dtype=float64), 5, Options())
    assert threshold == 2 and found.tolist() == [1] * 5


def test_threshold_is_the_fence_where_there_is_room():
    maxima = torch.tensor([1.0, 2, 3, 4, 5, 100, 0], dtype=float64)
    threshold, pieces = split(maxima, torch.ones(7, dtype=float64), 100, Options(fence=1.5))
    # Quartiles 2.25 and 4.75 of the six that are not zero.
    assert threshold == pytest.approx(4.75 + 1.5 * 2.5)
    assert pieces.tolist() == [1, 1, 1, 1, 1, 12, 1]


@pytest.mark.parametrize("spare", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("cost", [1, 2])
def test_threshold_is_the_least_that_the_room_allows(spare, cost):
    maxima = torch.cat([torch.ones(20), torch.tensor([6.0, 10.0, 12.0])]).double()
    costs = torch.full((23,), float(cost), dtype=float64)
    threshold, pieces = split(maxima, costs, spare, Options(fence=0))
    assert ((pieces - 1) * cost).sum() <= spare
    assert torch.equal(pieces, torch.ceil(maxima / threshold - 1e-12).clamp(min=1).long())
    lower = torch.ceil(maxima / (threshold * (1 - 1e-9))).clamp(min=1)
    assert ((lower - 1) * cost).sum() > spare


@pytest.mark.parametrize("expansion", [1.0, 1.1, 1.2, 2.0])
def test_columns_stay_within_the_expansion(skewed, wide, expansion):
    flat = compress(wide, statistics_of(skewed), Options(bits=8, expansion=expansion))
    assert flat.codes.shape == (16, len(flat.source)) and len(flat.source) <= 30 * expansion
    assert flat.record["expansion"] == len(flat.source) / 30
    assert flat.record["effective_bits"] == pytest.approx(8 * len(flat.source) / 30)
    assert set(flat.source.tolist()) == set(range(30))
    if expansion == 1:
        assert (flat.piece == -1).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_codes_are_on_one_grid_and_match_the_inputs(skewed, wide, bits, solver):
    statistics = statistics_of(skewed)
    flat = compress(wide, statistics, Options(bits=bits, solver=solver, expansion=2))
    top = 2 ** (bits - 1) - 1
    assert flat.codes.dtype == torch.int32 and flat.codes.abs().max() <= top
    assert flat.scale.shape == (1,)
    assert flat.record["flattened_inputs"] == 4 and flat.record["split_columns"] >= 2
    weight = merged(flat)
    # Every piece of an input meets the same weights, so the layer is the merged weight.
    x = flatten_inputs(skewed, flat.source, flat.piece, flat.threshold)
    torch.testing.assert_close(x @ (flat.codes * flat.scale).T, skewed @ weight.T, rtol=1e-12, atol=1e-11)
    error = relative_error(wide.weight - weight, wide.weight, statistics.second_moment)
    assert flat.record["weight_error"] == pytest.approx(error, rel=1e-9)
    if solver == "rtn":
        assert (wide.weight - weight).abs().max() <= flat.scale / 2 * (1 + 1e-9)


def test_splitting_shrinks_the_error_bound_by_threshold_over_maximum(skewed, wide):
    flat = compress(wide, statistics_of(skewed), Options(bits=8, expansion=2))
    whole = compress(wide, statistics_of(skewed), Options(bits=8, expansion=1))
    assert whole.threshold == pytest.approx(skewed.abs().max().item())
    for layer in (flat, whole):
        x = flatten_inputs(skewed, layer.source, layer.piece, layer.threshold)
        step = layer.threshold / 127
        rounded = step * torch.round(x / step).clamp(-127, 127)
        first = torch.zeros(200, 30, dtype=float64)
        # Pieces of weights repeat an input, which is counted once.
        seen = {}
        for column, key in enumerate(zip(layer.source.tolist(), layer.piece.tolist(), strict=True)):
            seen.setdefault(key, column)
        columns = torch.tensor(list(seen.values()))
        error = (first.index_add(1, layer.source[columns], rounded[:, columns]) - skewed).abs().max()
        assert error <= step / 2 * (1 + 1e-9)
    assert flat.threshold < whole.threshold / 2
    assert flat.record["input_error"] < whole.record["input_error"] / 4


def test_predicted_error_is_that_of_the_rounded_layer(skewed, wide):
    flat = compress(wide, statistics_of(skewed), Options(bits=8))
    x = flatten_inputs(skewed, flat.source, flat.piece, flat.threshold)
    step = flat.threshold / 127
    outputs = step * torch.round(x / step).clamp(-127, 127) @ (flat.codes * flat.scale).T
    exact = skewed @ wide.weight.T
    measured = ((outputs - exact).square().sum() / exact.square().sum()).item()
    assert flat.record["weight_error"] + flat.record["input_error"] == pytest.approx(measured, rel=0.2)


def test_bits_follow_the_tolerance(skewed, wide):
    statistics = statistics_of(skewed)
    four = compress(wide, statistics, Options(bits=4))
    error = four.record["weight_error"] + four.record["input_error"]
    chosen = compress(wide, statistics, Options(tolerance=error * 1.01))
    assert chosen.bits == 4 and torch.equal(chosen.codes, four.codes)
    assert "error_at_8_bits" not in chosen.record
    other = compress(wide, statistics, Options(tolerance=error * 0.99))
    assert other.bits == 8 and other.record["error_at_4_bits"] == pytest.approx(error)
    assert torch.equal(other.codes, compress(wide, statistics, Options(bits=8)).codes)


def test_gptq_has_the_smaller_error(inputs, linear):
    statistics = statistics_of(inputs)
    nearest = compress(linear, statistics, Options(bits=4))
    swept = compress(linear, statistics, Options(bits=4, solver="gptq"))
    assert swept.record["weight_error"] < nearest.record["weight_error"]
    assert swept.record["damping"] == 0.01


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_pruned_weights_stay_zero(skewed, wide, solver):
    mask = torch.rand(16, 30, generator=torch.Generator().manual_seed(3)) < 0.5
    pruned = Linear(wide.weight * mask, mask=mask)
    flat = compress(pruned, statistics_of(skewed), Options(solver=solver))
    assert (merged(flat)[~mask] == 0).all()


def test_scale_is_rounded_to_its_storage(skewed, wide):
    flat = compress(dataclasses.replace(wide, storage=torch.bfloat16), statistics_of(skewed), Options(bits=4))
    assert torch.equal(flat.scale.to(torch.bfloat16).to(float64), flat.scale)


def test_weights_of_zero(skewed):
    flat = compress(Linear(torch.zeros(4, 30, dtype=float64)), statistics_of(skewed), Options())
    assert flat.bits == 4 and not flat.codes.any()


def test_dead_inputs(skewed, wide):
    skewed[:, 5] = 0
    flat = compress(wide, statistics_of(skewed), Options(bits=8, solver="gptq"))
    assert not flat.codes[:, flat.source == 5].any() and flat.record["dead_inputs"] == 1


def test_fewer_tokens_than_inputs(skewed, wide):
    flat = compress(wide, statistics_of(skewed[:7]), Options(bits=8, solver="gptq"))
    assert flat.record["weight_error"] < 1e-3


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_smoothing_shares_the_ranges(skewed, wide, exponent):
    other = Linear(wide.weight.flip(0) * 2)
    skewed[:, 4] = 0
    s = scales([wide, other], statistics_of(skewed), Options(smoothing=exponent))
    inputs, weights = skewed.abs().amax(0), other.weight.abs().amax(0)
    assert s[4] == 1
    live = inputs > 0
    torch.testing.assert_close(s[live], (inputs**exponent / weights ** (1 - exponent))[live])
    torch.testing.assert_close((skewed / s) @ (wide.weight * s).T, skewed @ wide.weight.T)
    smooth = ((inputs / s)[live], (weights * s)[live])
    if exponent == 0.5:
        torch.testing.assert_close(*smooth)
    elif exponent == 1:
        torch.testing.assert_close(smooth[0], torch.ones(29, dtype=float64))
    assert scales([wide], statistics_of(skewed), Options(smoothing=None)) is None


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [("absmax", float("nan"), "largest values"), ("absmax", 0.0, "largest values"), ("second_moment", 0.0, "zero")],
)
def test_unfit_statistics(skewed, wide, field, value, match):
    statistics = statistics_of(skewed)
    damaged = dataclasses.replace(statistics, **{field: torch.full_like(getattr(statistics, field), value)})
    with pytest.raises(UserError, match=match):
        compress(wide, damaged, Options())
    with pytest.raises(UserError, match=match):
        scales([wide], damaged, Options())


def test_unfit_weights(skewed, wide):
    with pytest.raises(UserError, match="not finite"):
        compress(Linear(wide.weight * float("inf")), statistics_of(skewed), Options())
