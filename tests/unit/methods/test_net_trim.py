from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from pydantic import ValidationError

from coppice.errors import UserError
from coppice.methods.prune.net_trim import Options, compress, kkt_residual
from coppice.methods.solvers.loss import relative_error
from coppice.models.contracts import Linear
from coppice.models.replacements import Unchanged

# Read by tests/rows.py.
ROWS = [{"epsilon": 0.3, "iterations": 20}, {"sparsity": 0.5, "iterations": 20}]
CLEARS_UNSEEN_INPUTS = True

EVERY = torch.ones(20, 12, dtype=torch.bool)


def options(**given) -> Options:
    return Options(**({"tolerance": 1e-7, "iterations": 1000, "refit": False} | given))


@pytest.fixture
def linear() -> Linear:
    return Linear(torch.randn(20, 12, generator=torch.Generator().manual_seed(8), dtype=torch.float64))


@pytest.fixture
def statistics(inputs, statistics_with):
    """Of 12 inputs of a condition in which the solver is quick."""
    inputs = (inputs / inputs.norm(dim=0))[:, :12]
    inputs = inputs + 0.1 * torch.randn(200, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return statistics_with(inputs.T @ inputs / 200)


def error_of(pruned, linear, statistics) -> float:
    return math.sqrt(relative_error(linear.weight - pruned.weight, linear.weight, statistics.second_moment))


def test_meets_its_conditions_of_optimality(linear, statistics):
    pruned = compress(linear, statistics, options(epsilon=0.2))
    multiplier = pruned.record["multiplier"]
    gradient = (linear.weight - pruned.weight) @ statistics.second_moment
    kept = pruned.weight != 0
    assert torch.equal(kept, pruned.mask) and 0.05 < pruned.record["sparsity"] < 0.95
    torch.testing.assert_close(gradient[kept], multiplier * pruned.weight[kept].sign(), rtol=1e-6, atol=0)
    assert gradient[~kept].abs().max() <= multiplier * (1 + 1e-6)
    assert pruned.record["kkt_residual"] < 1e-6
    # The constraint is met, and holds with equality up to the search.
    assert 0.999 * 0.2 <= error_of(pruned, linear, statistics) <= 0.2
    assert pruned.record["epsilon"] == pytest.approx(error_of(pruned, linear, statistics), rel=1e-6)


def test_no_feasible_point_has_a_smaller_norm(linear, statistics):
    moment, pruned = statistics.second_moment, compress(linear, statistics, options(epsilon=0.2))
    bound = error_of(pruned, linear, statistics)
    generator = torch.Generator().manual_seed(4)
    for scale in (1e-3, 1e-2, 0.1, 1.0):
        other = pruned.weight + scale * torch.randn(20, 12, generator=generator, dtype=torch.float64) * pruned.mask
        # On the segment to W, which has no error, at the same bound.
        error = math.sqrt(relative_error(other - linear.weight, linear.weight, moment))
        other = linear.weight + min(bound / error, 1.0) * (other - linear.weight)
        assert other.abs().sum() > pruned.weight.abs().sum() * (1 - 1e-9)


def test_white_inputs_give_soft_thresholds(linear, statistics_with):
    pruned = compress(linear, statistics_with(2 * torch.eye(12, dtype=torch.float64)), options(epsilon=0.5))
    expected = torch.nn.functional.softshrink(linear.weight, pruned.record["multiplier"] / 2)
    torch.testing.assert_close(pruned.weight, expected, rtol=1e-9, atol=1e-12)


def test_residual_of_what_is_not_optimal(linear, statistics):
    moment = statistics.second_moment
    multiplier = 0.5 * (linear.weight @ moment).abs().max().item()
    assert kkt_residual(torch.zeros(20, 12), linear.weight, moment, EVERY, multiplier) == pytest.approx(1.0)
    assert kkt_residual(linear.weight, linear.weight, moment, EVERY, multiplier) == pytest.approx(1.0)


def test_a_larger_error_leaves_fewer_weights(linear, statistics):
    found = [compress(linear, statistics, options(epsilon=epsilon)) for epsilon in (0.02, 0.1, 0.3, 0.7)]
    sparsity = [each.record["sparsity"] for each in found]
    norms = [each.weight.abs().sum() for each in found]
    assert sparsity == sorted(set(sparsity))
    assert norms == sorted(norms, reverse=True)


def test_a_small_error_leaves_the_weights(linear, statistics):
    pruned = compress(linear, statistics, options(epsilon=1e-5))
    torch.testing.assert_close(pruned.weight, linear.weight, rtol=0, atol=1e-3)


def test_no_error_leaves_the_weights_or_cannot_be_asked(linear, statistics, statistics_with):
    assert isinstance(compress(linear, statistics, options(epsilon=0)), Unchanged)
    few = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(UserError, match=r"An epsilon of 0 .* is singular"):
        compress(linear, statistics_with(few.T @ few), options(epsilon=0))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_a_sparsity_is_met_exactly(linear, statistics, sparsity):
    pruned = compress(linear, statistics, options(sparsity=sparsity))
    assert int((~pruned.mask).sum()) == int(sparsity * 240 + 1e-9)
    assert (pruned.weight[~pruned.mask] == 0).all()
    assert pruned.record["sparsity"] == pytest.approx(sparsity)
    assert pruned.record["kkt_residual"] < 1e-6


def test_the_refit_keeps_the_support_and_lowers_the_error(linear, statistics):
    for budget in ({"epsilon": 0.2}, {"sparsity": 0.5}):
        plain = compress(linear, statistics, options(**budget))
        ours = compress(linear, statistics, options(**budget, refit=True, refit_damping=0))
        assert torch.equal(ours.mask, plain.mask)
        assert error_of(ours, linear, statistics) < 0.9 * error_of(plain, linear, statistics)
        gradient = (ours.weight - linear.weight) @ statistics.second_moment
        assert gradient[ours.mask].abs().max() < 1e-8 * gradient.abs().max()
        assert ours.record["refit_damping"] == 0


def test_singular_statistics(linear, statistics_with):
    few = torch.randn(6, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    statistics = statistics_with(few.T @ few / 6)
    pruned = compress(linear, statistics, options(epsilon=0.2, tolerance=1e-3, iterations=1000, refit=True))
    # No more weights than tokens are needed in a row.
    assert (pruned.mask.sum(1) <= 6).all()
    assert error_of(pruned, linear, statistics) <= 0.2
    assert pruned.record["kkt_residual"] < 1e-2


def test_poorly_conditioned_inputs(inputs, statistics_with):
    statistics = statistics_with(inputs.T @ inputs / 200)
    linear = Linear(torch.randn(20, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    for budget in ({"epsilon": 0.05}, {"sparsity": 0.5}):
        assert compress(linear, statistics, options(**budget, tolerance=1e-3)).record["kkt_residual"] <= 1e-3
    # What a single step leaves to be done is on record.
    assert compress(linear, statistics, options(sparsity=0.3, iterations=1)).record["kkt_residual"] > 1e-3


def test_what_is_pruned_stays_pruned_and_counts(linear, statistics):
    kept = EVERY.clone()
    kept[:, 10:] = False
    parent = Linear(linear.weight * kept, kept)
    for budget in ({"epsilon": 0.2}, {"sparsity": 0.5}, {"sparsity": 0.1}):
        pruned = compress(parent, statistics, options(**budget, refit=True))
        assert not (pruned.mask & ~kept).any()
        assert (pruned.weight[~pruned.mask] == 0).all()
        assert pruned.record["kkt_residual"] < 1e-6
        if budget != {"epsilon": 0.2}:
            assert int((~pruned.mask).sum()) == max(round(budget["sparsity"] * 240), 40)


def test_dead_inputs(linear, statistics, statistics_with):
    moment = statistics.second_moment.clone()
    moment[5], moment[:, 5] = 0, 0
    for budget in ({"epsilon": 0.2}, {"sparsity": 0.5}):
        pruned = compress(linear, statistics_with(moment), options(**budget, refit=True))
        assert not pruned.mask[:, 5].any() and torch.isfinite(pruned.weight).all()
        assert pruned.record["dead_inputs"] == 1


def test_scale_of_the_moment_does_not_matter(linear, statistics, statistics_with):
    one = compress(linear, statistics, options(epsilon=0.2))
    other = compress(linear, statistics_with(2.0**20 * statistics.second_moment), options(epsilon=0.2))
    torch.testing.assert_close(other.weight, one.weight, rtol=1e-6, atol=1e-8)


def test_edges(linear, statistics):
    assert isinstance(compress(linear, statistics, options(sparsity=0)), Unchanged)
    zero = compress(Linear(torch.zeros(20, 12)), statistics, options(epsilon=0.2))
    assert zero.weight.dtype == torch.float32 and not zero.weight.any()
    damaged = dataclasses.replace(statistics, second_moment=statistics.second_moment * float("nan"))
    with pytest.raises(UserError, match="not finite"):
        compress(linear, damaged, options(epsilon=0.2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of 'epsilon' and 'sparsity'"),
        ({"epsilon": 0.1, "sparsity": 0.5}, "exactly one of 'epsilon' and 'sparsity'"),
        ({"epsilon": 1.0}, "less than 1"),
        ({"epsilon": 0.1, "allocation": {"by": "owl"}}, "'allocation' spreads a 'sparsity'"),
    ],
)
def test_bad_options(given, message):
    with pytest.raises(ValidationError, match=message):
        Options(**given)
