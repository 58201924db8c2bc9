from __future__ import annotations

import dataclasses

import pytest
import torch

from coppice.errors import UserError
from coppice.methods.quantize import rtn
from coppice.methods.quantize.awq import Options, _candidate, compress, scales
from coppice.methods.solvers.grid import dequantize
from coppice.models.contracts import Linear, LinearStatistics

# Read by tests/rows.py.
ROWS = [{"bits": 4, "group_size": -1}, {"bits": 4, "duo_scaling": True, "clip": False, "group_size": -1}]

GRID = {"bits": 3, "group_size": 8}


@pytest.fixture
def heavy() -> tuple[Linear, torch.Tensor, LinearStatistics]:
    """Weights [32, 48], inputs [600, 48] of which three are a hundred times larger, and their statistics."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(32, 48, generator=generator, dtype=torch.float64)
    inputs = torch.randn(600, 48, generator=generator, dtype=torch.float64)
    inputs[:, [5, 17, 40]] *= 100
    return Linear(weight), inputs, statistics_of(inputs)


def statistics_of(inputs: torch.Tensor) -> LinearStatistics:
    moment = inputs.T @ inputs / len(inputs)
    return LinearStatistics(moment, inputs.mean(0), inputs.abs().mean(0), inputs.abs().amax(0), len(inputs))


def scaled_loss(linear: Linear, inputs: torch.Tensor, factors: torch.Tensor, grid: dict) -> float:
    """|(W - Q(W s) / s) X|^2, from the inputs themselves."""
    rounded = dequantize(rtn.compress(Linear(linear.weight * factors), None, rtn.Options(**grid))) / factors
    return (inputs @ (linear.weight - rounded).T).square().sum().item()


@pytest.mark.parametrize("duo", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_beat_rounding_to_nearest(heavy, bits, duo):
    linear, inputs, statistics = heavy
    grid = {"bits": bits, "group_size": 8}
    found = scales([linear], statistics, Options(**grid, duo_scaling=duo))
    assert scaled_loss(linear, inputs, found, grid) < 0.7 * scaled_loss(linear, inputs, torch.ones(48), grid)


def test_scales_are_the_best_of_the_grid(heavy):
    linear, inputs, statistics = heavy
    found = scales([linear], statistics, Options(**GRID))
    a = statistics.absmean
    candidates = []
    for step in range(20):
        powers = a ** (step / 20)
        candidates.append(powers / (powers.max() * powers.min()).sqrt())
    losses = [scaled_loss(linear, inputs, candidate, GRID) for candidate in candidates]
    best = candidates[losses.index(min(losses))]
    torch.testing.assert_close(found, best, rtol=1e-9, atol=0)


def test_shared_inputs_are_scaled_for_the_sum(heavy):
    one, _, statistics = heavy
    other = Linear(one.weight.flip(0) * torch.linspace(0.1, 3, 48, dtype=torch.float64))
    found = scales([one, other], statistics, Options(**GRID))
    stacked = scales([Linear(torch.cat([one.weight, other.weight]))], statistics, Options(**GRID))
    torch.testing.assert_close(found, stacked, rtol=1e-12, atol=0)


def test_none_where_nothing_beats_rounding_to_nearest(heavy):
    linear, _, statistics = heavy
    rounded = dequantize(rtn.compress(linear, None, rtn.Options(**GRID)))
    # On the grid already: no error to remove.
    assert scales([Linear(rounded)], statistics, Options(**GRID)) is None


def test_equal_activations_need_no_scales(heavy):
    linear, inputs, _ = heavy
    statistics = statistics_of(inputs.sign())
    assert scales([linear], statistics, Options(**GRID)) is None


@pytest.mark.parametrize("duo", [False, True])
@pytest.mark.parametrize("factor", [1e-6, 1e5])
def test_size_of_all_activations_does_not_matter(heavy, factor, duo):
    linear, inputs, statistics = heavy
    options = Options(**GRID, duo_scaling=duo)
    torch.testing.assert_close(
        scales([linear], statistics_of(factor * inputs), options),
        scales([linear], statistics, options),
        rtol=1e-9,
        atol=0,
    )


def test_duo_scaling_by_hand():
    absmean, sizes = torch.tensor([1.0, 3.0]).double(), torch.tensor([0.25, 0.5]).double()
    first = (0.5**0.5) / (0.25**0.5 + 1e-4)
    second = (1.5**0.5) / (0.5**0.5 + 1e-4)
    expected = torch.tensor([first, second]).double() / (first * second) ** 0.5
    torch.testing.assert_close(_candidate(absmean, sizes, 0.5), expected, rtol=1e-6, atol=0)


def test_unseen_inputs_are_not_scaled(heavy):
    linear, inputs, _ = heavy
    inputs[:, 7] = 0
    found = scales([linear], statistics_of(inputs), Options(**GRID))
    assert found[7] == 1 and torch.isfinite(found).all() and (found > 0).all()
    live = torch.arange(48) != 7
    assert found[live].max() * found[live].min() == pytest.approx(1)


def test_without_clipping_it_is_rounding_to_nearest(linear, statistics):
    nearest = rtn.compress(linear, None, rtn.Options(**GRID))
    off = compress(linear, statistics, Options(**GRID, clip=False))
    query = compress(dataclasses.replace(linear, role="q"), statistics, Options(**GRID))
    for found in (off, query):
        assert torch.equal(found.codes, nearest.codes) and torch.equal(found.scale, nearest.scale)
        assert "clipped_groups" not in found.record
    named = dataclasses.replace(linear, role="q")
    assert "clipped_groups" in compress(named, statistics, Options(**GRID, clip_attention=True)).record


@pytest.mark.parametrize("symmetric", [False, True])
def test_clipping_lowers_the_loss_of_every_group(linear, statistics, symmetric):
    grid = GRID | {"symmetric": symmetric}
    ours = compress(linear, statistics, Options(**grid))
    nearest = rtn.compress(linear, None, rtn.Options(**grid))
    losses = []
    for found in (ours, nearest):
        difference = (linear.weight - dequantize(found)).unflatten(1, (-1, 8))
        blocks = torch.stack([statistics.second_moment[j : j + 8, j : j + 8] for j in range(0, 24, 8)])
        losses.append(torch.einsum("mgi,gij,mgj->mg", difference, blocks, difference))
    assert (losses[0] <= losses[1] * (1 + 1e-12)).all()
    assert losses[0].sum() < 0.98 * losses[1].sum()
    cut = (ours.scale != nearest.scale).double().mean().item()
    assert ours.record["clipped_groups"] == cut > 0.1
    assert (ours.scale / nearest.scale >= 0.5).all()


def test_the_best_range_of_one_group():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 16, generator=generator, dtype=torch.float64)
    weight[0, 3] = 6
    inputs = torch.randn(90, 16, generator=generator, dtype=torch.float64)
    inputs[:, 3] *= 0.1
    found = compress(Linear(weight), statistics_of(inputs), Options(bits=3, group_size=-1))
    losses = []
    for step in range(10):
        limit = 6 * (1 - step / 20)
        low, high = max(weight.min().item(), -limit), min(weight.max().item(), limit)
        scale = (high - low) / 7
        zero = round(-low / scale)
        rounded = ((weight / scale).round() + zero).clamp(0, 7).sub(zero) * scale
        losses.append((inputs @ (weight - rounded).T).square().sum().item())
    ours = (inputs @ (weight - dequantize(found)).T).square().sum().item()
    assert ours == pytest.approx(min(losses)) and losses.index(min(losses)) > 0


def test_pruned_weights_stay_zero(linear, statistics):
    mask = torch.rand(20, 24, generator=torch.Generator().manual_seed(0)) > 0.5
    masked = Linear(linear.weight.masked_fill(~mask, 0), mask)
    assert (dequantize(compress(masked, statistics, Options(**GRID)))[~mask] == 0).all()


def test_storage_of_the_checkpoint(linear, statistics):
    stored = dataclasses.replace(linear, weight=linear.weight.float(), storage=torch.bfloat16)
    found = compress(stored, statistics, Options(**GRID))
    assert torch.equal(found.scale.bfloat16().float(), found.scale)


def test_bad_inputs(linear, statistics):
    options = Options(**GRID)
    for call in (lambda bad: compress(linear, bad, options), lambda bad: scales([linear], bad, options)):
        with pytest.raises(UserError, match="zero everywhere"):
            call(dataclasses.replace(statistics, second_moment=torch.zeros(24, 24).double()))
        with pytest.raises(UserError, match="not finite"):
            call(dataclasses.replace(statistics, second_moment=statistics.second_moment * float("nan")))
    with pytest.raises(UserError, match="negative mean absolute value"):
        scales([linear], dataclasses.replace(statistics, absmean=-statistics.absmean), options)
    indefinite = statistics.second_moment - 2 * statistics.second_moment.trace() * torch.ones(24, 24) / 24
    indefinite.diagonal().copy_(statistics.second_moment.diagonal())
    with pytest.raises(UserError, match="not positive semidefinite"):
        scales([Linear(torch.ones(1, 24).double() * torch.linspace(0.9, 1, 24))],
               dataclasses.replace(statistics, second_moment=indefinite), options)  # fmt: skip
    with pytest.raises(UserError, match="A group size of 7 does not divide the 24 inputs"):
        compress(linear, statistics, Options(bits=4, group_size=7))
