from __future__ import annotations

import dataclasses

import pytest
import torch
from pydantic import ValidationError

from coppice.errors import UserError
from coppice.methods.prune import wanda
from coppice.methods.prune.sparsegpt import Options, compress, traits
from coppice.methods.quantize import rtn
from coppice.methods.solvers.grid import dequantize
from coppice.methods.solvers.refit import refit
from coppice.models.contracts import Linear
from coppice.models.replacements import Unchanged

# Read by tests/rows.py.
ROWS = [{"sparsity": 0.5, "block": 8}, {"pattern": "2:4"}, {"sparsity": 0.5, "bits": 4, "group_size": -1}]
CLEARS_UNSEEN_INPUTS = True


def test_each_block_hits_the_sparsity_exactly(linear, statistics):
    pruned = compress(linear, statistics, Options(sparsity=0.4, block=10))
    assert [int((~part).sum()) for part in pruned.mask.split(10, dim=1)] == [80, 80, 32]
    assert (pruned.weight[~pruned.mask] == 0).all()
    assert pruned.record["sparsity"] == pytest.approx(0.4)
    assert pruned.record["damping"] == 0.01


def test_a_diagonal_moment_leaves_the_weights_and_ranks_by_saliency(linear, statistics, statistics_with):
    powers = statistics.second_moment.diagonal()
    pruned = compress(linear, statistics_with(powers.diag()), Options(sparsity=0.5, block=8, damping=0))
    assert torch.equal(pruned.weight[pruned.mask], linear.weight[pruned.mask])
    saliency = linear.weight.square() * powers
    for scores, mask in zip(saliency.split(8, dim=1), pruned.mask.split(8, dim=1), strict=True):
        assert scores[mask].min() >= scores[~mask].max()


def test_pattern_keeps_n_of_m_whatever_the_block(linear, statistics):
    one = compress(linear, statistics, Options(pattern="1:4", block=24))
    other = compress(linear, statistics, Options(pattern="1:4", block=3))
    assert (one.mask.view(20, 6, 4).sum(2) == 1).all()
    assert torch.equal(one.mask, other.mask)
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-10, atol=1e-10)


def test_beats_wanda_on_its_own_inputs(linear, statistics, loss):
    for options in ({"sparsity": 0.5}, {"pattern": "2:4"}):
        ours = compress(linear, statistics, Options(**options)).weight
        theirs = wanda.compress(linear, statistics, wanda.Options(**options)).weight
        assert loss(linear.weight - ours) < loss(linear.weight - theirs)


def test_what_is_pruned_stays_pruned_and_counts(linear, statistics):
    kept = torch.ones(20, 24, dtype=torch.bool)
    kept[:, 20:] = False
    pruned = compress(Linear(linear.weight * kept, kept), statistics, Options(sparsity=0.5))
    assert not (pruned.mask & ~kept).any()
    assert int((~pruned.mask).sum()) == 240
    again = compress(Linear(pruned.weight, pruned.mask), statistics, Options(sparsity=0.5))
    assert torch.equal(again.mask, pruned.mask)
    assert torch.equal(again.weight, pruned.weight)


def test_dead_inputs(linear, statistics, statistics_with):
    moment = statistics.second_moment.clone()
    moment[5] = 0
    moment[:, 5] = 0
    pruned = compress(linear, statistics_with(moment), Options(sparsity=0.5))
    assert not pruned.mask[:, 5].any()
    assert int((~pruned.mask).sum()) == 240
    assert pruned.record["dead_inputs"] == 1


def test_float32_agrees_with_float64(linear, statistics):
    single = compress(Linear(linear.weight.float()), statistics, Options(sparsity=0.5))
    double = compress(linear, statistics, Options(sparsity=0.5))
    assert single.weight.dtype == torch.float32
    assert torch.equal(single.mask, double.mask)
    torch.testing.assert_close(single.weight.double(), double.weight, rtol=1e-3, atol=1e-4)


def test_zero_sparsity_changes_nothing(linear, statistics):
    assert isinstance(compress(linear, statistics, Options(sparsity=0)), Unchanged)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("budget", [{"sparsity": 0.5, "block": 12}, {"pattern": "2:4"}])
def test_joint_zeros_are_exact_and_grids_are_those_of_the_dense_weight(linear, statistics, loss, budget, symmetric):
    options = Options(**budget, bits=4, group_size=8, symmetric=symmetric)
    joint = compress(linear, statistics, options)
    dense = rtn.compress(linear, None, rtn.Options(bits=4, group_size=8, symmetric=symmetric))
    assert torch.equal(joint.scale, dense.scale) and torch.equal(joint.zero_point, dense.zero_point)
    at_zero = joint.codes == joint.zero_point[:, joint.group_index.long()]
    weight = dequantize(joint)
    assert (weight[at_zero] == 0).all()
    for part in at_zero.split(12, dim=1):
        assert int(part.sum()) >= 120
    if "pattern" in budget:
        assert (at_zero.view(20, 6, 4).sum(2) >= 2).all()
    assert joint.record["sparsity"] == 0.5 and joint.record["bits"] == 4 and joint.record["damping"] == 0.01
    # Against the rounded weights of Wanda's mask, which nothing makes up for.
    pruned = wanda.compress(linear, statistics, wanda.Options(pattern=budget.get("pattern", "6:12")))
    assert loss(linear.weight - weight) < loss(linear.weight - dequantize(dense) * pruned.mask)


def test_joint_with_nothing_to_prune_under_white_inputs_is_rounding(linear, statistics_with):
    statistics = statistics_with(torch.eye(24, dtype=torch.float64))
    joint = compress(linear, statistics, Options(sparsity=0, bits=3, group_size=-1))
    assert torch.equal(joint.codes, rtn.compress(linear, None, rtn.Options(bits=3, group_size=-1)).codes)


def test_joint_keeps_what_is_pruned_and_dead_at_zero(linear, statistics, statistics_with):
    moment = statistics.second_moment.clone()
    moment[5], moment[:, 5] = 0, 0
    kept = torch.ones(20, 24, dtype=torch.bool)
    kept[:, 20:] = False
    joint = compress(
        Linear(linear.weight * kept, kept, storage=torch.float16),
        statistics_with(moment),
        Options(sparsity=0.5, bits=4, group_size=8),
    )
    weight = dequantize(joint)
    assert (weight[:, 20:] == 0).all() and (weight[:, 5] == 0).all()
    assert torch.equal(joint.scale, joint.scale.half().double())


def test_the_refit_of_its_mask_is_never_above_the_sweep(linear, statistics, loss):
    swept = compress(linear, statistics, Options(sparsity=0.6))
    for damping in (0.0, 0.01, 1.0):
        found = refit(linear.weight, swept.weight, swept.mask, statistics.second_moment, damping)
        assert loss(linear.weight - found.weight) < loss(linear.weight - swept.weight)


def test_marks_follow_the_options():
    assert traits(frozenset({"smaller"}), Options(sparsity=0.5)) == {"smaller", "masked"}
    assert traits(frozenset(), Options(pattern="2:4", bits=4)) == {"masked", "quantized"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4, "refit": True}, "'refit' moves the kept weights off the grid"),
        ({"symmetric": True}, "'symmetric' requires 'bits'"),
    ],
)
def test_bad_joint_options(options, message):
    with pytest.raises(ValidationError, match=message):
        Options(sparsity=0.5, **options)


def test_bad_inputs(linear, statistics):
    with pytest.raises(
        UserError, match="The pattern 2:5 needs a number of inputs that 5 divides, and this layer has 24"
    ):
        compress(linear, statistics, Options(pattern="2:5"))
    damaged = dataclasses.replace(statistics, second_moment=statistics.second_moment * float("nan"))
    with pytest.raises(UserError, match="not finite"):
        compress(linear, damaged, Options(sparsity=0.5))
    for bad in ({"damping": -1}, {"damping": 1.5}, {"block": 0}):
        with pytest.raises(ValidationError, match="Input should be"):
            Options(sparsity=0.5, **bad)
