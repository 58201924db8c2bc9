from __future__ import annotations

import dataclasses

import pytest
import torch
from pydantic import ValidationError

from coppice.methods.prune.magnitude import Options, compress
from coppice.models.contracts import Linear
from coppice.models.replacements import Unchanged

# Read by tests/rows.py.
ROWS = [{"sparsity": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.5, "scope": "row", "refit": True}]


def prune(linear, **options):
    return compress(linear, None, Options(**options))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
def test_the_smallest_of_the_matrix_go_in_exact_number(linear, sparsity):
    pruned = prune(linear, sparsity=sparsity)
    size = linear.weight.abs()
    assert int((~pruned.mask).sum()) == int(sparsity * 480 + 1e-9)
    assert size[pruned.mask].min() >= size[~pruned.mask].max()
    assert torch.equal(pruned.weight, torch.where(pruned.mask, linear.weight, 0.0))
    assert pruned.record["sparsity"] == int((~pruned.mask).sum()) / 480
    assert pruned.record["sparsity_asked"] == sparsity


def test_row_scope_prunes_each_row_alike(linear):
    pruned = prune(linear, sparsity=0.5, scope="row")
    assert (pruned.mask.sum(1) == 12).all()
    for size, mask in zip(linear.weight.abs(), pruned.mask, strict=True):
        assert size[mask].min() >= size[~mask].max()


def test_exact_under_bfloat16_ties():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert len(weight.abs().unique()) < weight.numel() / 2
    assert int((~prune(Linear(weight), sparsity=0.5).mask).sum()) == 2048


def test_idempotent(linear):
    once = prune(linear, sparsity=0.5)
    again = prune(Linear(once.weight, once.mask), sparsity=0.5)
    assert torch.equal(again.mask, once.mask) and torch.equal(again.weight, once.weight)


def test_signs_do_not_matter(linear):
    signs = torch.randn(20, 24, generator=torch.Generator().manual_seed(1)).sign()
    assert torch.equal(prune(linear, sparsity=0.5).mask, prune(Linear(linear.weight * signs), sparsity=0.5).mask)


def test_pattern_keeps_two_of_four(linear):
    pruned = prune(linear, pattern="2:4")
    assert (pruned.mask.view(20, 6, 4).sum(2) == 2).all()
    size = linear.weight.abs().view(20, 6, 4)
    assert torch.equal(pruned.weight.view(20, 6, 4).abs().sum(2), size.topk(2, dim=2).values.sum(2))


def test_masks_nest(linear):
    first = prune(linear, sparsity=0.3)
    second = prune(Linear(first.weight, first.mask), sparsity=0.6)
    assert not (second.mask & ~first.mask).any()
    assert int((~second.mask).sum()) == 288


def test_zero_sparsity_changes_nothing(linear):
    unchanged = prune(linear, sparsity=0.0)
    assert isinstance(unchanged, Unchanged)
    assert "prunes nothing" in unchanged.record["unchanged"]


def test_pruned_places_hold_positive_zero(linear):
    negative = dataclasses.replace(linear, weight=-linear.weight.abs())
    assert not torch.signbit(prune(negative, sparsity=0.5).weight[~prune(negative, sparsity=0.5).mask]).any()


@pytest.mark.parametrize("scope", ["layer", "row"])
def test_a_refit_gains_on_the_same_mask(linear, statistics, loss, scope):
    plain = prune(linear, sparsity=0.5, scope=scope)
    ours = compress(linear, statistics, Options(sparsity=0.5, scope=scope, refit=True))
    assert torch.equal(ours.mask, plain.mask) and (ours.weight[~ours.mask] == 0).all()
    assert loss(linear.weight - ours.weight) < loss(linear.weight - plain.weight)
    assert ours.record["refit_damping"] == 0.001


def test_scope_does_not_go_with_a_pattern():
    with pytest.raises(ValidationError, match="'scope' requires 'sparsity'"):
        Options(pattern="2:4", scope="row")


def test_a_pattern_is_read_back_with_its_defaults():
    options = Options(pattern="2:4")
    assert Options(**options.model_dump(mode="json")) == options
