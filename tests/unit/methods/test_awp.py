from __future__ import annotations

import dataclasses

import pytest
import torch
from pydantic import ValidationError

from coppice.errors import UserError
from coppice.methods.prune import magnitude, wanda
from coppice.methods.prune.awp import Options, compress, traits
from coppice.methods.quantize import rtn
from coppice.methods.solvers.grid import dequantize
from coppice.methods.solvers.refit import refit
from coppice.models.contracts import Linear
from coppice.models.replacements import Unchanged

# Read by tests/rows.py.
ROWS = [
    {"sparsity": 0.5, "iterations": 20},
    {"sparsity": 0.5, "iterations": 20, "step": "spectral"},
    {"bits": 4, "iterations": 3, "group_size": -1},
    {"sparsity": 0.5, "bits": 4, "iterations": 4, "group_size": -1},
]
CLEARS_UNSEEN_INPUTS = True

WHITE = 3.0 * torch.eye(24, dtype=torch.float64)


def grid(**options):
    return options | {"bits": 3, "group_size": 8}


@pytest.mark.parametrize("step", ["frobenius", "spectral"])
@pytest.mark.parametrize("budget", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_pruning_is_feasible_and_beats_a_refitted_wanda(linear, statistics, loss, step, budget):
    pruned = compress(linear, statistics, Options(**budget, step=step, refit_damping=0))
    assert (pruned.mask.sum(1) == 12).all()
    if "pattern" in budget:
        assert (pruned.mask.view(20, 6, 4).sum(2) == 2).all()
    assert (pruned.weight[~pruned.mask] == 0).all()
    start = wanda.compress(linear, statistics, wanda.Options(**budget, refit=True, refit_damping=0))
    assert loss(linear.weight - pruned.weight) < loss(linear.weight - start.weight)
    assert pruned.record["sparsity"] == 0.5
    assert 0 < pruned.record["best_iteration"] <= pruned.record["iterations"] <= 200


def test_ends_in_the_exact_refit_of_its_support(linear, statistics):
    pruned = compress(linear, statistics, Options(sparsity=0.5, refit_damping=0))
    exact = refit(linear.weight, pruned.weight, pruned.mask, statistics.second_moment, 0.0).weight
    torch.testing.assert_close(pruned.weight, exact, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("options", [grid(), grid(sparsity=0.5), grid(pattern="2:4")])
def test_rounding_never_ends_above_its_start(linear, statistics, loss, options, iterations):
    ours = dequantize(compress(linear, statistics, Options(**options, iterations=iterations)))
    mask = torch.ones(20, 24, dtype=torch.bool)
    if len(options) > 2:
        budget = {name: value for name, value in options.items() if name in ("sparsity", "pattern")}
        mask = wanda.compress(linear, statistics, wanda.Options(**budget)).mask
    start = rtn.compress(Linear(linear.weight * mask, mask), None, rtn.Options(**grid()))
    assert loss(linear.weight - ours) <= loss(linear.weight - dequantize(start)) * (1 + 1e-12)


@pytest.mark.parametrize("budget", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_joint_gains_and_its_zeros_are_exact_and_on_the_grid(linear, inputs, statistics_with, budget):
    mild = inputs / inputs.norm(dim=0) + 0.05 * torch.randn(200, 24, generator=torch.Generator().manual_seed(2))
    statistics = statistics_with(mild.T @ mild)
    joint = compress(linear, statistics, Options(**grid(**budget)))
    weight = dequantize(joint)
    assert (joint.codes >= 0).all() and (joint.codes <= 7).all()
    assert ((weight == 0).sum(1) >= 12).all()
    if "pattern" in budget:
        assert ((weight == 0).view(20, 6, 4).sum(2) >= 2).all()
    pruned = wanda.compress(linear, statistics, wanda.Options(**budget))
    start = rtn.compress(Linear(pruned.weight, pruned.mask), None, rtn.Options(**grid()))
    ours, theirs = ((mild @ (linear.weight - each).T).norm() for each in (weight, dequantize(start)))
    assert ours < theirs
    assert joint.record["best_iteration"] >= 50
    assert joint.record["bits"] == 3 and joint.record["sparsity"] == 0.5


def test_white_inputs_give_the_largest_weights(linear, statistics_with):
    ours = compress(linear, statistics_with(WHITE), Options(sparsity=0.4))
    expected = magnitude.compress(linear, None, magnitude.Options(sparsity=0.4, scope="row"))
    assert torch.equal(ours.mask, expected.mask)
    torch.testing.assert_close(ours.weight, expected.weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_stays_where_it_is_under_white_inputs(linear, statistics_with, symmetric):
    ours = compress(linear, statistics_with(WHITE), Options(**grid(), symmetric=symmetric))
    expected = rtn.compress(linear, None, rtn.Options(**grid(), symmetric=symmetric))
    assert torch.equal(ours.codes, expected.codes) and torch.equal(ours.scale, expected.scale)


def test_nothing_to_prune(linear, statistics):
    assert isinstance(compress(linear, statistics, Options(sparsity=0)), Unchanged)
    # All weights may stay: the mask is full and the refit returns them.
    kept = compress(linear, statistics, Options(sparsity=0.01))
    assert kept.mask.all()
    assert torch.equal(kept.weight, linear.weight)


def test_scale_of_the_moment_does_not_matter(linear, statistics, statistics_with):
    for options in (Options(sparsity=0.5), Options(pattern="2:4", step="spectral"), Options(**grid(sparsity=0.5))):
        one = compress(linear, statistics, options)
        other = compress(linear, statistics_with(2.0**20 * statistics.second_moment), options)
        for name in ("mask", "codes"):
            assert torch.equal(getattr(one, name, torch.ones(1)), getattr(other, name, torch.ones(1)))


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, grid(), grid(sparsity=0.5)])
def test_what_is_pruned_stays_pruned(linear, statistics, options):
    kept = torch.ones(20, 24, dtype=torch.bool)
    kept[:, 20:] = False
    replacement = compress(Linear(linear.weight * kept, kept), statistics, Options(**options))
    weight = dequantize(replacement) if "bits" in options else replacement.weight
    assert (weight[~kept] == 0).all()
    if "sparsity" in options:
        assert replacement.record["sparsity"] == 0.5


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, grid(), grid(sparsity=0.5)])
def test_dead_inputs(linear, statistics, statistics_with, options):
    moment = statistics.second_moment.clone()
    moment[5], moment[:, 5] = 0, 0
    replacement = compress(linear, statistics_with(moment), Options(**options))
    weight = dequantize(replacement) if "bits" in options else replacement.weight
    assert (weight[:, 5] == 0).all() and torch.isfinite(weight).all()
    assert replacement.record["dead_inputs"] == 1


def test_float32(linear, statistics):
    pruned = compress(Linear(linear.weight.float()), statistics, Options(sparsity=0.5))
    assert pruned.weight.dtype == torch.float32
    rounded = compress(Linear(linear.weight.float(), storage=torch.float16), statistics, Options(**grid(sparsity=0.5)))
    assert torch.equal(rounded.scale, rounded.scale.half().float())


def test_marks_follow_the_options():
    parent = frozenset({"smaller"})
    assert traits(parent, Options(pattern="2:4")) == {"smaller", "masked"}
    assert traits(parent, Options(bits=4)) == {"smaller", "quantized"}
    assert traits(parent, Options(bits=4, sparsity=0.5)) == {"smaller", "masked", "quantized"}


def test_bad_inputs(linear, statistics):
    with pytest.raises(UserError, match="The pattern 2:5 needs a number of inputs that 5 divides"):
        compress(linear, statistics, Options(pattern="2:5"))
    with pytest.raises(UserError, match="A group size of 7 does not divide the 24 inputs"):
        compress(linear, statistics, Options(bits=4, group_size=7))
    damaged = dataclasses.replace(statistics, second_moment=statistics.second_moment * float("nan"))
    with pytest.raises(UserError, match="not finite"):
        compress(linear, damaged, Options(sparsity=0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give 'sparsity' or 'pattern' to prune, 'bits' to round"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "exactly one of 'sparsity' and 'pattern'"),
        ({"sparsity": 0.5, "group_size": 64}, "'group_size' requires 'bits'"),
        ({"pattern": "2:4", "allocation": {"by": "owl"}}, "'allocation' spreads a 'sparsity'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValidationError, match=message):
        Options(**options)
