"""Wanda and SparseGPT against llm-compressor's own functions, on the same weights and moments in float32."""

from __future__ import annotations

import pytest
import torch

from coppice.methods.prune import sparsegpt, wanda
from crosscheck import libraries

BUDGETS = {"50%": ({"sparsity": 0.5}, None), "2:4": ({"pattern": "2:4"}, (2, 4))}
BLOCK = 128


@pytest.mark.parametrize("budget", BUDGETS)
def test_wanda(problem, budget, agreement):
    options, pattern = BUDGETS[budget]
    ours = wanda.compress(problem.linear, problem.statistics, wanda.Options(**options))
    theirs = libraries.wanda(problem.weight, problem.moment.clone(), 0.5, pattern)
    assert torch.equal(ours.weight, theirs)
    assert torch.equal(ours.mask, theirs != 0)
    agreement("wanda", budget, "llm-compressor", equal=1)


@pytest.mark.parametrize("budget", BUDGETS)
def test_sparsegpt(problem, budget, agreement):
    options, pattern = BUDGETS[budget]
    ours = sparsegpt.compress(problem.linear, problem.statistics, sparsegpt.Options(**options, block=BLOCK))
    # The library prunes scores up to and with that at index int(s size): half a weight less gives it Coppice's count.
    sparsity = 0.5 - 0.5 / (BLOCK * len(problem.weight))
    theirs = libraries.sparsegpt(problem.weight, problem.moment.clone(), sparsity, pattern, BLOCK)
    assert torch.equal(ours.mask, theirs != 0)
    difference = ((ours.weight - theirs).abs().max() / problem.weight.abs().max()).item()
    assert difference < 1e-5
    ratio = problem.loss(ours.weight) / problem.loss(theirs)
    assert ratio == pytest.approx(1, abs=1e-6)
    agreement("sparsegpt", budget, "llm-compressor", 1, difference, ratio)


def test_the_library_prunes_one_weight_more_in_each_block(problem):
    ours = sparsegpt.compress(problem.linear, problem.statistics, sparsegpt.Options(sparsity=0.5, block=BLOCK))
    theirs = libraries.sparsegpt(problem.weight, problem.moment.clone(), 0.5, block=BLOCK)
    blocks = -(-problem.weight.shape[1] // BLOCK)
    assert (theirs == 0).sum() - (~ours.mask).sum() == blocks
