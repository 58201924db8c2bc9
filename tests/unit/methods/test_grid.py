from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from coppice.errors import UserError
from coppice.methods.solvers.grid import Grid, GridOptions, decode, fit_groups, group_of_inputs, group_width


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def round_trip(grid: Grid, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and values on the grid of each row."""
    scale, zero_point = grid.fit(values)
    codes = grid.encode(values, scale[:, None], zero_point[:, None])
    return codes, scale, decode(codes, scale[:, None], zero_point[:, None])


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels(bits):
    symmetric, asymmetric = Grid(bits, True, torch.float32), Grid(bits, False, torch.float32)
    assert (symmetric.low, symmetric.high) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (asymmetric.low, asymmetric.high) == (0, 2**bits - 1)


def test_asymmetric_by_hand():
    grid = Grid(2, False, torch.float64)
    codes, scale, values = round_trip(grid, torch.tensor([[-1.0, 0.0, 0.4, 2.0]], dtype=torch.float64))
    assert scale.tolist() == [1.0]
    assert codes.tolist() == [[0, 1, 1, 3]]
    assert values.tolist() == [[-1.0, 0.0, 0.0, 2.0]]


def test_symmetric_by_hand():
    grid = Grid(2, True, torch.float64)
    codes, scale, values = round_trip(grid, torch.tensor([[-1.5, 0.2, 0.8, 1.5]], dtype=torch.float64))
    assert scale.tolist() == [1.0]  # 2 * 1.5 / 3
    assert codes.tolist() == [[-2, 0, 1, 1]]
    assert values.tolist() == [[-2.0, 0.0, 1.0, 1.0]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_error_is_at_most_half_a_step(bits, symmetric):
    for values in (normal(40, 16), normal(40, 16).abs(), -normal(40, 16).abs() - 1):
        codes, scale, rounded = round_trip(Grid(bits, symmetric, torch.float64), values)
        assert ((values - rounded).abs() <= scale[:, None] / 2 * (1 + 1e-9)).all()
        low = -(2 ** (bits - 1)) if symmetric else 0
        assert codes.min() >= low and codes.max() <= low + 2**bits - 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_again_changes_nothing(symmetric):
    grid = Grid(4, symmetric, torch.float64)
    scale, zero_point = (part[:, None] for part in grid.fit(normal(40, 16)))
    codes = grid.encode(normal(40, 16), scale, zero_point)
    assert torch.equal(grid.encode(decode(codes, scale, zero_point), scale, zero_point), codes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_on_every_grid(symmetric):
    values = normal(40, 16) + 3
    values[:, ::3] = 0
    _, _, rounded = round_trip(Grid(3, symmetric, torch.float64), values)
    assert (rounded[:, ::3] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_stays_zero(symmetric):
    codes, scale, rounded = round_trip(Grid(4, symmetric, torch.bfloat16), torch.zeros(2, 8))
    assert (scale == 1).all() and (codes == 0).all() and (rounded == 0).all()


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_chosen_against_the_scale_as_stored(storage, symmetric):
    values = normal(200, 16).float()
    codes, scale, rounded = round_trip(Grid(4, symmetric, storage), values)
    assert scale.dtype == torch.float32
    assert torch.equal(scale.to(storage).float(), scale)
    # Storing a scale moves the ends of the range by up to eps times the range, which is 15 steps.
    bound = scale[:, None] * (0.5 + 15 * torch.finfo(storage).eps)
    assert ((values - rounded).abs() <= bound).all()
    inner = (codes > codes.amin(1, keepdim=True)) & (codes < codes.amax(1, keepdim=True))
    assert ((values - rounded).abs() <= scale[:, None] * (0.5 + 1e-5))[inner].all()


def test_a_range_below_the_smallest_stored_number():
    values = torch.full((1, 4), 1e-9)
    _, scale, rounded = round_trip(Grid(4, False, torch.float16), values)
    assert scale.item() == pytest.approx(torch.finfo(torch.float16).tiny)
    assert (rounded == 0).all()


def test_groups_are_runs_of_inputs_in_a_row():
    weight = normal(3, 12)
    scale, zero_point = fit_groups(Grid(4, False, torch.float64), weight, 4)
    one_scale, one_zero_point = Grid(4, False, torch.float64).fit(weight[1:2, 4:8])
    assert scale.shape == (3, 3)
    assert scale[1, 1] == one_scale[0] and zero_point[1, 1] == one_zero_point[0]
    assert group_of_inputs(12, 4, torch.device("cpu")).tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_agrees_with_compressed_tensors(bits, symmetric):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils.helpers import calculate_qparams

    values = normal(50, 32).float()
    arguments = quantization.QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="channel")
    scale, zero_point = calculate_qparams(values.amin(1, keepdim=True), values.amax(1, keepdim=True), arguments)
    theirs = fake_quantize(values, scale, zero_point, arguments)
    _, our_scale, ours = round_trip(Grid(bits, symmetric, torch.float32), values)
    torch.testing.assert_close(our_scale[:, None], scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_group_width():
    assert group_width(GridOptions(bits=4, group_size=32), 96) == 32
    assert group_width(GridOptions(bits=4, group_size=-1), 172) == 172
    assert group_width(GridOptions(bits=4, group_size=32, indivisible="row"), 172) == 172
    with pytest.raises(UserError, match=r"32 does not divide the 172 inputs .* choose one of 1, 2, 4, 43, 86, 172, or"):
        group_width(GridOptions(bits=4, group_size=32), 172)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Field required"),
        ({"bits": 1}, "greater than or equal to 2"),
        ({"bits": 9}, "less than or equal to 8"),
        ({"bits": 4, "group_size": 0}, "positive number of inputs, or -1 for the whole row, not 0"),
        ({"bits": 4, "group_size": -2}, "positive number of inputs, or -1 for the whole row, not -2"),
        ({"bits": 4, "indivisible": "pad"}, "'error' or 'row'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValidationError, match=message):
        GridOptions(**options)
