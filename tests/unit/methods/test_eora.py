from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from coppice.compression.allocation import allocate
from coppice.methods.compensate.eora import Options, compress
from coppice.methods.decompose import svd
from coppice.methods.prune import magnitude
from coppice.methods.quantize import rtn
from coppice.methods.solvers.grid import dequantize
from coppice.methods.solvers.loss import output_power
from coppice.methods.solvers.truncation import truncate
from coppice.models.contracts import Linear

# Read by tests/rows.py.
ROWS = [{"rank": 2}]


@pytest.fixture
def compressed(linear) -> Linear:
    rounded = dequantize(rtn.compress(linear, None, rtn.Options(bits=2, group_size=8)))
    return Linear(rounded, reference=linear.weight)


def added(compensation) -> torch.Tensor:
    return compensation.second @ compensation.first


def test_full_rank_gives_the_reference(compressed, statistics):
    compensation = compress(compressed, statistics, Options(rank=20))
    torch.testing.assert_close(compressed.weight + added(compensation), compressed.reference, rtol=1e-9, atol=1e-9)


def test_error_is_what_was_dropped(compressed, inputs, statistics, loss):
    residual = compressed.reference - compressed.weight
    compensation = compress(compressed, statistics, Options(rank=4))
    assert compensation.first.shape == (4, 24) and compensation.second.shape == (20, 4)
    singular = torch.linalg.svdvals(inputs @ residual.T).square()
    assert loss(residual - added(compensation)) == pytest.approx(singular[4:].sum().item(), rel=1e-9)
    assert compensation.record["truncation_error"] == pytest.approx((singular[4:].sum() / singular.sum()).item())


def test_beats_the_plain_truncation_of_the_residual(compressed, statistics, loss):
    residual = compressed.reference - compressed.weight
    plain = truncate(residual, 4, None)
    ours = compress(compressed, statistics, Options(rank=4))
    assert loss(residual - added(ours)) < loss(residual - plain.second @ plain.first) < loss(residual)


def test_white_inputs_give_the_plain_truncation_of_the_residual(compressed, statistics_with):
    ours = compress(compressed, statistics_with(torch.eye(24, dtype=torch.float64)), Options(rank=4))
    residual = Linear(compressed.reference - compressed.weight)
    plain = svd.compress(residual, None, svd.Options(rank=4))
    torch.testing.assert_close(added(ours), plain.second @ plain.first, rtol=1e-9, atol=1e-9)


def test_nothing_lost_nothing_added(linear, statistics):
    compensation = compress(Linear(linear.weight, reference=linear.weight), statistics, Options(rank=4))
    assert not compensation.first.any() and not compensation.second.any()


def test_error_falls_with_rank(compressed, statistics, loss):
    residual = compressed.reference - compressed.weight
    losses = [loss(residual - added(compress(compressed, statistics, Options(rank=r)))) for r in range(1, 21)]
    assert losses == sorted(losses, reverse=True)


def test_a_mask_is_left_alone(linear, statistics):
    pruned = magnitude.compress(linear, None, magnitude.Options(pattern="2:4"))
    before = pruned.weight.clone()
    compress(Linear(pruned.weight, pruned.mask, linear.weight), statistics, Options(rank=4))
    assert torch.equal(pruned.weight, before)


def test_rank_is_at_most_that_of_the_linear(compressed, statistics):
    compensation = compress(compressed, statistics, Options(rank=99))
    assert compensation.record["rank"] == 20 and compensation.record["rank_asked"] == 99


@pytest.mark.parametrize("options", [{}, {"rank": 0}])
def test_bad_options(options):
    with pytest.raises(ValidationError):
        Options(**options)


def test_ranks_spread_by_water_filling_pay_the_same_and_lose_less(linear, statistics):
    """Two linears, one rounded far more coarsely than the other: it gets the ranks."""
    pairs = []
    for bits in (2, 6):
        rounded = dequantize(rtn.compress(linear, None, rtn.Options(bits=bits, group_size=8)))
        pairs.append((f"model.layers.0.bits_{bits}", Linear(rounded, reference=linear.weight), statistics))

    def lost(options_of):
        return sum(
            output_power(each.reference - each.weight - added(compress(each, seen, options_of[name])), moment)
            for name, each, seen in pairs
        )

    moment = statistics.second_moment
    spread, record = allocate(pairs, Options(rank=4, allocation={"by": "water-filling", "floor": 0.25}))
    assert [options.rank for options in spread.values()] == [7, 1]
    assert record["asked"] == record["achieved"] == pytest.approx(8 * 44 / (2 * 20 * 24))
    assert lost(spread) < lost({name: Options(rank=4) for name in spread})
    assert all(options.allocation.by == "uniform" for options in spread.values())


def test_other_rules_do_not_spread_ranks():
    with pytest.raises(ValidationError, match="the allocation 'owl' does not go with this method"):
        Options(rank=4, allocation={"by": "owl"})
