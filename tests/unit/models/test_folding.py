"""Scaling inputs without changing what a model computes."""

from __future__ import annotations

import pytest
import torch
from tiny import ARCHITECTURES, NORMS_AFTER, logits, tiny_model, tiny_tokens

from coppice.calibration.moments import gather_block
from coppice.calibration.walk import embed
from coppice.models import folding, modules
from coppice.models.architectures.base import blocks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folded_scales_leave_the_logits_alone(architecture: str) -> None:
    model = tiny_model(architecture, dtype=torch.float64)
    tokens = tiny_tokens()
    before = logits(model, tokens)
    generator = torch.Generator().manual_seed(0)
    for block in blocks(model):
        shared = folding.scalable_inputs(model, block)
        norms = ["input_layernorm", "post_attention_layernorm"]
        linears = ["self_attn.v_proj", "mlp.up_proj"]
        producers = [entry.producer for entry in shared]
        assert sorted(producers) == sorted(linears if architecture in NORMS_AFTER else linears + norms)
        for entry in shared:
            scales = torch.rand(len(entry.index), generator=generator, dtype=torch.float64) + 0.5
            old = block.get_submodule(entry.consumers[0]).weight.clone()
            folding.fold(block, entry, entry.pool(scales))
            assert not torch.equal(block.get_submodule(entry.consumers[0]).weight, old)
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-9, atol=1e-9)


def test_pooled_scales_are_the_same_for_what_one_output_makes() -> None:
    model = tiny_model("llama-gqa")
    shared = folding.scalable_inputs(model, blocks(model)[0])[1]
    assert shared.consumers == ("self_attn.o_proj",) and len(shared.index) == 32
    scales = torch.rand(32, dtype=torch.float64) + 0.5
    pooled = shared.pool(scales)
    # Key/value head 0 serves query heads 0 and 1, four inputs each.
    assert torch.equal(pooled[:4], pooled[4:8])
    torch.testing.assert_close(pooled[:4], (scales[:4] * scales[4:8]).sqrt())


def test_inputs_of_composites_are_left_out() -> None:
    model = tiny_model()
    block = blocks(model)[0]
    block.mlp.down_proj = modules.LowRankLinear(48, 32, 4)
    block.self_attn.v_proj = modules.QuantizedLinear(32, 16, 4, -1, True)
    assert [entry.producer for entry in folding.scalable_inputs(model, block)] == ["post_attention_layernorm"]


def test_scaled_statistics_are_those_of_the_scaled_inputs() -> None:
    model, tokens = tiny_model(dtype=torch.float64), tiny_tokens()
    block = blocks(model)[0]
    kept = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        before, _, _ = gather_block(model, 0, embed(model, tokens, kept), "cpu")
        shared = folding.scalable_inputs(model, block)[2]
        scales = torch.linspace(0.5, 2, 32)
        folding.fold(block, shared, scales)
        after, _, _ = gather_block(model, 0, embed(model, tokens, kept), "cpu")
    expected = folding.scale_statistics(before["mlp.gate_proj"], scales)
    for field in ("second_moment", "mean", "absmean", "absmax"):
        torch.testing.assert_close(getattr(after["mlp.gate_proj"], field), getattr(expected, field))
