from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from coppice.errors import UserError
from coppice.methods.solvers.mask import SparsityOptions, comparison_group, keep_largest, masked_replacement


def test_ties_are_broken_by_position_and_the_count_is_exact():
    mask = keep_largest(torch.ones(3, 8), 8, 3, None)
    assert mask.tolist() == [[False] * 3 + [True] * 5] * 3


@pytest.mark.parametrize("count", [0, 1, 37, 59])
def test_count_is_exact_with_many_ties(count):
    scores = torch.randint(0, 3, (4, 15), generator=torch.Generator().manual_seed(0)).float()
    mask = keep_largest(scores, 60, count, None)
    assert int((~mask).sum()) == count
    if count:
        assert scores[mask].min() >= scores[~mask].max()


def test_groups_are_consecutive_and_row_by_row():
    scores = torch.tensor([[4.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    assert keep_largest(scores, 2, 1, None).tolist() == [[True, False, False, True], [False, True, False, True]]


def test_pruned_weights_count_first_and_stay_pruned():
    scores = torch.tensor([[9.0, 1.0, 2.0, 3.0]])
    kept = torch.tensor([[False, True, True, True]])
    assert keep_largest(scores, 4, 2, kept).tolist() == [[False, False, True, True]]
    assert keep_largest(scores, 4, 0, kept).tolist() == [[False, True, True, True]]


def test_more_pruned_than_asked_stay_pruned():
    kept = torch.tensor([[False, False, False, True]])
    assert keep_largest(torch.ones(1, 4), 4, 1, kept).tolist() == kept.tolist()


def test_a_pattern_keeps_n_of_m():
    assert comparison_group(SparsityOptions(pattern="1:4"), 999, 8) == (4, 3)
    assert SparsityOptions(pattern="1:4").pruned_share == 0.75


def test_a_share_that_rounding_spoils_is_not_lost():
    assert int(0.29 * 100) == 28
    assert comparison_group(SparsityOptions(sparsity=0.29), 100, 10) == (100, 29)


def test_a_row_is_never_pruned_whole():
    assert comparison_group(SparsityOptions(sparsity=0.99), 10, 10) == (10, 9)


def test_pattern_must_divide_the_width():
    with pytest.raises(
        UserError, match=r"The pattern 2:4 needs a number of inputs that 4 divides, and this layer has 6"
    ):
        comparison_group(SparsityOptions(pattern="2:4"), 6, 6)


def test_a_refit_reads_moments():
    assert SparsityOptions(sparsity=0.5).needs == frozenset()
    assert SparsityOptions(sparsity=0.5, refit=True).needs == {"moments"}
    assert SparsityOptions(pattern="2:4", refit=True).needs == {"moments"}


def test_a_sparsity_can_be_allocated():
    assert SparsityOptions.TARGET == "sparsity"
    assert {"uniform", "sensitivity", "owl", "mosaic", "knapsack"} == SparsityOptions.RULES
    assert SparsityOptions(sparsity=0.5, allocation={"by": "owl"}).needs == {"moments"}


def test_masked_is_what_was_pruned_unless_a_refit_is_asked_for(linear, statistics):
    mask = linear.weight > 0
    pruned = linear.weight * mask
    plain = masked_replacement(linear.weight, pruned, mask, None, SparsityOptions(sparsity=0.5))
    assert plain.weight is pruned and plain.mask is mask
    assert plain.record == {"sparsity_asked": 0.5, "sparsity": int((~mask).sum()) / 480}
    options = SparsityOptions(sparsity=0.5, refit=True, refit_damping=0.1)
    refitted = masked_replacement(linear.weight, pruned, mask, statistics, options)
    assert refitted.record == plain.record | {"refit_damping_asked": 0.1, "refit_damping": 0.1}
    assert not torch.equal(refitted.weight, pruned) and (refitted.weight[~mask] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4", "allocation": {"by": "owl"}}, "'allocation' spreads a 'sparsity' over the linears"),
        ({"sparsity": 0.5, "refit_damping": 2.0}, "less than or equal to 1"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": -0.1}, "greater than or equal to 0"),
        ({}, "exactly one of 'sparsity' and 'pattern'"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "exactly one of 'sparsity' and 'pattern'"),
        ({"pattern": "4:4"}, "the pattern '4:4' is not 'N:M' with 1 <= N < M"),
        ({"pattern": "0:4"}, "the pattern '0:4' is not 'N:M' with 1 <= N < M"),
        ({"pattern": "2/4"}, "the pattern '2/4' is not 'N:M' with 1 <= N < M"),
        ({"sparsity": 0.5, "spasity": 1}, "Extra inputs are not permitted"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValidationError, match=message):
        SparsityOptions(**options)
