from __future__ import annotations

import dataclasses

import pytest
import torch
from pydantic import ValidationError

from coppice.errors import UserError
from coppice.methods.quantize import rtn
from coppice.methods.quantize.learned_rounding import Options, best_format, compress, gradient, pressure, soft_rounding
from coppice.methods.solvers import codebook, grid
from coppice.models.contracts import Linear
from coppice.models.replacements import Codebook, Quantized

# Read by tests/rows.py.
ROWS = [{"bits": 4, "format": "float", "steps": 5}, {"bits": 3, "steps": 5, "group_size": -1}]

GRID = {"bits": 3, "group_size": 8}
SHORT = {"steps": 150, "learning_rate": 0.1}


def values_of(found: Quantized | Codebook) -> torch.Tensor:
    return grid.dequantize(found) if isinstance(found, Quantized) else codebook.dequantize(found)


@pytest.fixture
def problem(statistics_with):
    """A layer with correlated inputs, its statistics, and the loss of a difference of weights."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(32, 48, generator=generator, dtype=torch.float64)
    inputs = torch.randn(400, 48, generator=generator, dtype=torch.float64)
    inputs = inputs + 2 * inputs[:, :6] @ torch.randn(6, 48, generator=generator, dtype=torch.float64)
    moment = inputs.T @ inputs / 400

    def loss(difference: torch.Tensor) -> float:
        return (inputs @ difference.T).square().sum().item() / 400

    return Linear(weight), statistics_with(moment), loss


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_learned_integers_beat_the_nearest(problem, bits, symmetric):
    linear, statistics, loss = problem
    options = {"bits": bits, "group_size": 16, "symmetric": symmetric}
    found = compress(linear, statistics, Options(**options, **SHORT))
    nearest = rtn.compress(linear, None, rtn.Options(**options))
    assert torch.equal(found.scale, nearest.scale) and torch.equal(found.zero_point, nearest.zero_point)
    assert (found.codes - nearest.codes).abs().max() == 1
    ours, theirs = (loss(linear.weight - values_of(one)) for one in (found, nearest))
    assert ours < 0.6 * theirs
    assert found.record["loss"] == pytest.approx(ours) and found.record["loss_nearest"] == pytest.approx(theirs)


@pytest.mark.parametrize("exponent_bits", [1, 2, 3, None])
def test_learned_floats_beat_the_nearest(problem, exponent_bits):
    linear, statistics, loss = problem
    found = compress(linear, statistics, Options(bits=4, format="float", exponent_bits=exponent_bits, **SHORT))
    limit = found.absmax.item()
    nearest = limit * found.table[codebook.encode(linear.weight / limit, found.table)]
    theirs = loss(linear.weight - nearest)
    assert loss(linear.weight - values_of(found)) == pytest.approx(found.record["loss"])
    assert found.record["loss_nearest"] == pytest.approx(theirs)
    assert found.record["loss"] < 0.6 * theirs
    assert found.absmax.shape == (1,) and found.block == 32 * 48 and found.table.shape == (16,)


def test_the_value_of_a_float_is_one_of_its_neighbours(problem):
    linear, statistics, _ = problem
    found = compress(linear, statistics, Options(bits=4, format="float", exponent_bits=2, **SHORT))
    points = found.absmax * found.table.unique()
    index = torch.searchsorted(points, linear.weight.clamp(points[0], points[-1]))
    above, below = points[index], points[(index - 1).clamp(min=0)]
    values = values_of(found)
    # Beyond the range the two outermost values are the neighbours.
    inside = linear.weight.abs() <= points[-1]
    assert ((values == above) | (values == below))[inside].all()


def test_no_steps_help_where_the_nearest_is_best(linear, statistics, statistics_with):
    diagonal = statistics_with(statistics.second_moment.diagonal().diag())
    found = compress(linear, diagonal, Options(**GRID, steps=50))
    assert torch.equal(found.codes, rtn.compress(linear, None, rtn.Options(**GRID)).codes)
    assert found.record["moved_codes"] == 0 and found.record["loss"] == found.record["loss_nearest"]


@pytest.mark.parametrize("learning_rate", [1e-4, 10.0])
@pytest.mark.parametrize("form", ["int", "float"])
def test_never_worse_than_the_nearest(linear, statistics, form, learning_rate):
    found = compress(linear, statistics, Options(bits=3, format=form, group_size=128, indivisible="row",
                                                 steps=20, learning_rate=learning_rate))  # fmt: skip
    assert found.record["loss"] <= found.record["loss_nearest"]


def test_a_float_without_exponent_is_the_uniform_grid(problem):
    linear, statistics, _ = problem
    found = compress(linear, statistics, Options(bits=4, format="float", exponent_bits=0, **SHORT))
    steps = (found.absmax * found.table.unique()).diff()
    torch.testing.assert_close(steps, steps[:1].expand(14))
    # AdaRound on the same grid: all points and neighbours are those of integers, so is what is learned.
    scale = steps[0]
    floors = torch.floor(linear.weight / scale).clamp(-7, 6)
    ups = (values_of(found) / scale).round() - floors
    assert set(ups.unique().tolist()) <= {0.0, 1.0}
    assert found.record["loss"] < 0.6 * found.record["loss_nearest"]


def test_rounding_is_decided_at_the_end(problem):
    linear, statistics, _ = problem
    record = compress(linear, statistics, Options(bits=4, group_size=16, steps=600, learning_rate=0.1)).record
    assert record["undecided"] < 0.05
    assert compress(linear, statistics, Options(bits=4, group_size=16, steps=5)).record["undecided"] > 0.9


def test_gradient_is_that_of_the_loss():
    generator = torch.Generator().manual_seed(0)
    rest, step, values = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    root = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    moment = root @ root.T
    values[0, 0], values[1, 1] = 8, -8
    values.requires_grad_(True)
    rounding = soft_rounding(values)
    error = rest - step * rounding
    loss = ((error @ moment) * error).sum() + 0.7 * (1 - (2 * rounding - 1).abs() ** 3.5).sum()
    loss.backward()
    found = gradient(values.detach(), rest, step, moment, 0.7, 3.5)
    torch.testing.assert_close(found, values.grad, rtol=1e-10, atol=1e-12)
    assert found[0, 0] == 0 and found[1, 1] == 0


def test_pressure_comes_after_the_warm_up():
    options = Options(bits=4, steps=100, regularization=0.5)
    assert pressure(0, options) == (0, 20) and pressure(19, options)[0] == 0
    assert pressure(20, options) == (0.5, 20)
    assert pressure(60, options) == (0.5, pytest.approx(11))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_format_of_least_error(bits):
    weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[3, 3] = 40
    options = Options(bits=bits, format="float")
    exponent_bits, limit = best_format(weight, options, torch.float64)
    errors = {}
    for split in range(1, bits):
        table = codebook.float_table(bits, split)
        for step in range(48):
            largest = 40 * 2 ** (-step / 8)
            rounded = largest * table[codebook.encode(weight / largest, table)]
            errors[split, largest] = (rounded - weight).square().sum().item()
    best = min(errors, key=errors.get)
    assert exponent_bits == best[0] and limit.item() == pytest.approx(best[1])


@pytest.mark.parametrize("form", ["int", "float"])
def test_pruned_weights_stay_zero(problem, form):
    linear, statistics, _ = problem
    mask = torch.rand(32, 48, generator=torch.Generator().manual_seed(0)) > 0.5
    masked = Linear(linear.weight.masked_fill(~mask, 0), mask)
    found = compress(masked, statistics, Options(bits=3, format=form, **SHORT))if form == "float" else compress(
        masked, statistics, Options(bits=3, group_size=16, **SHORT))  # fmt: skip
    assert (values_of(found)[~mask] == 0).all()
    assert found.record["loss"] < found.record["loss_nearest"]


@pytest.mark.parametrize("form", ["int", "float"])
def test_a_layer_of_zeros(statistics, form):
    found = compress(Linear(torch.zeros(4, 24)), statistics, Options(bits=3, format=form, indivisible="row"))
    assert (values_of(found) == 0).all() and found.record["steps"] == 0


def test_unseen_inputs_go_to_the_nearest(problem):
    linear, statistics, _ = problem
    moment = statistics.second_moment.clone()
    moment[5], moment[:, 5] = 0, 0
    options = {"bits": 3, "group_size": 16}
    found = compress(linear, dataclasses.replace(statistics, second_moment=moment), Options(**options, **SHORT))
    nearest = rtn.compress(linear, None, rtn.Options(**options))
    assert torch.equal(found.codes[:, 5], nearest.codes[:, 5])


def test_runs_without_gradients_and_in_float32(problem):
    linear, statistics, _ = problem
    narrow = dataclasses.replace(linear, weight=linear.weight.float(), storage=torch.bfloat16)
    with torch.no_grad():
        found = compress(narrow, statistics, Options(bits=4, format="float", **SHORT))
    assert found.record["loss"] < 0.7 * found.record["loss_nearest"]
    assert torch.equal(found.absmax.bfloat16().float(), found.absmax) and found.absmax.dtype == torch.float32


def test_bad_inputs(linear, statistics):
    with pytest.raises(UserError, match="weights hold values that are not finite"):
        compress(Linear(linear.weight * float("nan")), statistics, Options(**GRID))
    damaged = dataclasses.replace(statistics, second_moment=statistics.second_moment * float("inf"))
    with pytest.raises(UserError, match="statistics of this layer's inputs hold values that are not finite"):
        compress(linear, damaged, Options(**GRID))
    indefinite = -10 * torch.ones(24, 24, dtype=torch.float64)
    indefinite.diagonal().fill_(1)
    shifted = Linear(linear.weight.abs())
    with pytest.raises(UserError, match="not positive semidefinite"):
        compress(shifted, dataclasses.replace(statistics, second_moment=indefinite), Options(**GRID, steps=300))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exponent_bits": 2}, "'exponent_bits' requires 'format: float'"),
        ({"format": "float", "symmetric": True}, "'symmetric' requires 'format: int'"),
        ({"format": "float", "group_size": 64}, "'group_size' requires 'format: int'"),
        ({"format": "float", "exponent_bits": 4}, "take at most 3"),
        ({"format": "float", "exponent_bits": 2, "allocation": {"by": "sensitivity"}}, "where bits are allocated"),
        ({"steps": 0}, "greater than or equal to 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValidationError, match=message):
        Options(bits=4, **options)
