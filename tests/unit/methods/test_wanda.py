from __future__ import annotations

import dataclasses

import pytest
import torch

from coppice.errors import UserError
from coppice.methods.prune import magnitude
from coppice.methods.prune.wanda import Options, compress
from coppice.models.contracts import Linear
from coppice.models.replacements import Unchanged

# Read by tests/rows.py.
ROWS = [{"sparsity": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.5, "refit": True}]


def test_scores_in_a_hand_made_row(statistics_with):
    linear = Linear(torch.tensor([[3.0, -2.0, 1.0, 0.5]]))
    statistics = statistics_with(torch.diag(torch.tensor([1.0, 1.0, 16.0, 100.0])))
    pruned = compress(linear, statistics, Options(sparsity=0.5))
    assert pruned.weight.tolist() == [[0, 0, 1.0, 0.5]]  # scores 3, 2, 4, 5


def test_equal_powers_give_magnitude_by_row(linear, statistics_with):
    statistics = statistics_with(3.7 * torch.eye(24, dtype=torch.float64))
    expected = magnitude.compress(linear, None, magnitude.Options(sparsity=0.4, scope="row"))
    assert torch.equal(compress(linear, statistics, Options(sparsity=0.4)).mask, expected.mask)


def test_rescaling_an_input_against_its_weights_leaves_the_mask(linear, statistics, statistics_with):
    factors = torch.logspace(-2, 2, 24, dtype=torch.float64).flip(0)
    moment = statistics.second_moment * factors[:, None] * factors
    rescaled = compress(Linear(linear.weight / factors), statistics_with(moment), Options(sparsity=0.5))
    assert torch.equal(rescaled.mask, compress(linear, statistics, Options(sparsity=0.5)).mask)


def test_only_the_diagonal_matters(linear, statistics, statistics_with):
    diagonal = statistics_with(torch.diag(statistics.second_moment.diagonal()))
    for options in (Options(sparsity=0.5), Options(pattern="1:4")):
        assert torch.equal(compress(linear, statistics, options).mask, compress(linear, diagonal, options).mask)


def test_exact_in_each_row_and_weights_unchanged(linear, statistics):
    pruned = compress(linear, statistics, Options(sparsity=0.7))
    assert (pruned.mask.sum(1) == 24 - 16).all()
    assert torch.equal(pruned.weight[pruned.mask], linear.weight[pruned.mask])
    assert (pruned.weight[~pruned.mask] == 0).all()


def test_pattern_keeps_n_of_m(linear, statistics):
    assert (compress(linear, statistics, Options(pattern="3:8")).mask.view(20, 3, 8).sum(2) == 3).all()


def test_what_is_pruned_stays_pruned_and_counts(linear, statistics):
    kept = torch.ones(20, 24, dtype=torch.bool)
    kept[:, 20:] = False  # the most powerful inputs
    masked = Linear(linear.weight * kept, kept)
    mask = compress(masked, statistics, Options(sparsity=0.5)).mask
    assert not (mask & ~kept).any()
    assert (mask.sum(1) == 12).all()


def test_dead_inputs_go_first(linear, statistics, statistics_with):
    moment = statistics.second_moment.clone()
    moment[[3, 17]] = 0
    moment[:, [3, 17]] = 0
    pruned = compress(linear, statistics_with(moment), Options(sparsity=2 / 24))
    assert (~pruned.mask).nonzero()[:, 1].unique().tolist() == [3, 17]
    assert pruned.record["dead_inputs"] == 2


def test_a_refit_gains_on_the_same_mask(linear, statistics, loss):
    plain = compress(linear, statistics, Options(pattern="2:4"))
    ours = compress(linear, statistics, Options(pattern="2:4", refit=True))
    assert torch.equal(ours.mask, plain.mask) and (ours.weight[~ours.mask] == 0).all()
    assert loss(linear.weight - ours.weight) < loss(linear.weight - plain.weight)
    assert ours.record["refit_damping"] == 0.001 and ours.record["dead_inputs"] == 0


def test_zero_sparsity_changes_nothing(linear, statistics):
    assert isinstance(compress(linear, statistics, Options(sparsity=0)), Unchanged)


@pytest.mark.parametrize(
    ("power", "message"),
    [(0.0, "zero everywhere"), (-1.0, "negative mean square"), (float("nan"), "not finite")],
)
def test_unfit_statistics(linear, statistics, power, message):
    moment = torch.full_like(statistics.second_moment, power)
    with pytest.raises(UserError, match=message):
        compress(linear, dataclasses.replace(statistics, second_moment=moment), Options(sparsity=0.5))
