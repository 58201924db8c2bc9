from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from coppice.errors import UserError
from coppice.methods.quantize import gptq, rtn
from coppice.methods.quantize.coordinate_descent import Options, compress
from coppice.methods.solvers.grid import dequantize
from coppice.models.contracts import Linear

# Read by tests/rows.py.
ROWS = [{"bits": 3, "group_size": -1}, {"bits": 3, "start": "gptq", "block": 4, "group_size": -1}]

GRID = {"bits": 3, "group_size": 8}


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("start", ["rtn", "gptq"])
def test_the_loss_never_grows(linear, statistics, loss, start, symmetric, bits):
    grid = {"bits": bits, "group_size": 8, "symmetric": symmetric}
    module = {"rtn": rtn, "gptq": gptq}[start]
    first = module.compress(linear, statistics, module.Options(**grid))
    losses = [loss(linear.weight - dequantize(first))]
    for sweeps in range(1, 5):
        found = compress(linear, statistics, Options(**grid, start=start, sweeps=sweeps))
        assert torch.equal(found.scale, first.scale) and torch.equal(found.zero_point, first.zero_point)
        losses.append(loss(linear.weight - dequantize(found)))
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]
    assert found.record["loss"] * 200 == pytest.approx(losses[-1], rel=1e-9)
    assert found.record["loss_start"] * 200 == pytest.approx(losses[0], rel=1e-9)


@pytest.mark.parametrize("start", ["rtn", "gptq"])
def test_no_single_code_can_be_improved_at_the_end(linear, statistics, loss, start):
    found = compress(linear, statistics, Options(**GRID, start=start, sweeps=50))
    assert found.record["sweeps"] < 50
    again = compress(linear, statistics, Options(**GRID, start=start, sweeps=51))
    assert torch.equal(found.codes, again.codes)
    least = loss(linear.weight - dequantize(found))
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        row, column, code = (int(torch.randint(high, (), generator=generator)) for high in (20, 24, 8))
        codes = found.codes.clone()
        codes[row, column] = code
        assert loss(linear.weight - dequantize(dataclasses.replace(found, codes=codes))) >= least * (1 - 1e-12)


def test_one_sweep_by_hand(linear, statistics):
    first = rtn.compress(linear, None, rtn.Options(**GRID))
    values, moment = dequantize(first), statistics.second_moment
    for j in range(24):
        scale, zero = first.scale[:, j // 8], first.zero_point[:, j // 8]
        target = values[:, j] + ((linear.weight - values) @ moment)[:, j] / moment[j, j]
        values[:, j] = ((target / scale).round() + zero).clamp(0, 7).sub(zero) * scale
    found = compress(linear, statistics, Options(**GRID, sweeps=1))
    torch.testing.assert_close(dequantize(found), values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", [1, 5, 24])
def test_block_does_not_matter(linear, statistics, block):
    one = compress(linear, statistics, Options(**GRID, block=block))
    assert torch.equal(one.codes, compress(linear, statistics, Options(**GRID)).codes)


@pytest.mark.parametrize("start", ["rtn", "gptq"])
def test_rounding_to_nearest_is_the_fixed_point_of_a_diagonal_moment(linear, statistics, statistics_with, start):
    diagonal = statistics_with(statistics.second_moment.diagonal().diag())
    found = compress(linear, diagonal, Options(**GRID, start=start))
    assert torch.equal(found.codes, rtn.compress(linear, None, rtn.Options(**GRID)).codes)
    assert found.record["sweeps"] == 1 and found.record["changed_codes"] == 0


def test_two_inputs_against_every_pair_of_codes(statistics_with):
    weight = torch.randn(300, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    options = {"bits": 3, "group_size": -1}
    found = compress(Linear(weight), statistics_with(moment), Options(**options, sweeps=20))
    points = found.scale * (torch.arange(8) - found.zero_point)
    differences = torch.stack(
        [
            (weight[:, :1] - points)[:, :, None].expand(-1, 8, 8),
            (weight[:, 1:] - points)[:, None].expand(-1, 8, 8),
        ],
        dim=3,
    )
    losses = torch.einsum("rabi,ij,rabj->rab", differences, moment, differences)
    row = torch.arange(300)
    first, second = found.codes.long().T
    ours = losses[row, first, second]
    # No other code of either input alone is better, and the best pair is found nearly always.
    assert (ours <= losses[row, :, second].amin(1) * (1 + 1e-12)).all()
    assert (ours <= losses[row, first].amin(1) * (1 + 1e-12)).all()
    assert (ours <= losses.flatten(1).amin(1) * (1 + 1e-12)).double().mean() > 0.8


def test_beats_gptq(statistics_with):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(64, 48, generator=generator, dtype=torch.float64)
    inputs = torch.randn(400, 48, generator=generator, dtype=torch.float64)
    inputs = inputs + 2 * inputs[:, :6] @ torch.randn(6, 48, generator=generator, dtype=torch.float64)
    statistics, options = statistics_with(inputs.T @ inputs), {"bits": 4, "group_size": 16}
    swept = gptq.compress(Linear(weight), statistics, gptq.Options(**options))
    for start in ("rtn", "gptq"):
        found = compress(Linear(weight), statistics, Options(**options, start=start))
        ours, theirs = ((inputs @ (weight - dequantize(one)).T).square().sum() for one in (found, swept))
        assert ours < theirs


@pytest.mark.parametrize("start", ["rtn", "gptq"])
def test_pruned_weights_stay_zero(linear, statistics, start):
    mask = torch.rand(20, 24, generator=torch.Generator().manual_seed(0)) > 0.5
    masked = Linear(linear.weight.masked_fill(~mask, 0), mask)
    found = compress(masked, statistics, Options(**GRID, start=start))
    assert (dequantize(found)[~mask] == 0).all()
    assert found.record["loss"] < found.record["loss_start"]


def test_unseen_inputs_keep_their_codes(linear, inputs, statistics_with):
    inputs[:, 5] = 0
    found = compress(linear, statistics_with(inputs.T @ inputs), Options(**GRID))
    nearest = rtn.compress(linear, None, rtn.Options(**GRID))
    assert torch.equal(found.codes[:, 5], nearest.codes[:, 5]) and found.record["dead_inputs"] == 1
    swept = compress(linear, statistics_with(inputs.T @ inputs), Options(**GRID, start="gptq"))
    assert (dequantize(swept)[:, 5] == 0).all()


def test_fewer_tokens_than_inputs(linear, inputs, statistics_with):
    found = compress(linear, statistics_with(inputs[:10].T @ inputs[:10] / 10), Options(**GRID, sweeps=30))
    assert 0 <= found.record["loss"] < 0.5 * found.record["loss_start"]


def test_float32_weights(linear, statistics):
    narrow = dataclasses.replace(linear, weight=linear.weight.float(), storage=torch.bfloat16)
    found = compress(narrow, statistics, Options(**GRID))
    assert found.scale.dtype == torch.float32 and found.codes.dtype == torch.int32
    assert found.record["loss"] < 0.9 * found.record["loss_start"]


def test_bad_inputs(linear, statistics, statistics_with):
    with pytest.raises(UserError, match="not finite"):
        compress(linear, statistics_with(statistics.second_moment * float("nan")), Options(**GRID))
    with pytest.raises(UserError, match="zero everywhere"):
        compress(linear, statistics_with(torch.zeros(24, 24)), Options(**GRID))
    indefinite = -10 * torch.ones(24, 24, dtype=torch.float64)
    indefinite.diagonal().fill_(1)
    with pytest.raises(UserError, match="not positive semidefinite"):
        compress(linear, statistics_with(indefinite), Options(**GRID))
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Options(**GRID, sweeps=0)
