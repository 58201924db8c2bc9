from __future__ import annotations

import pytest
import torch
from forms import quantized_linear
from recoveries import train_by_hand
from tiny import logits, tiny_model, tiny_tokens

from coppice.methods.recover import lora
from coppice.methods.registry import method
from coppice.models.architectures.base import blocks
from coppice.models.modules import (
    LowRankCorrectionLinear,
    LowRankLinear,
    QuantizedLinear,
    describe_replacements,
    weight_matrices,
)

OPTIONS = lora.Options(text="a", validation="b", tokens=1, rank=3, alpha=12)
TOKENS = tiny_tokens(4, 12)


def quantized(linear):
    """A random symmetric 4-bit layer of the linear's shape."""
    codes = torch.randint(-8, 8, linear.weight.shape, dtype=torch.int32)
    scale = torch.full((len(codes), 1), 0.05)
    bias = linear.bias.detach() if linear.bias is not None else None
    return quantized_linear(codes, scale, torch.zeros_like(scale, dtype=torch.int32), 4, -1, True, bias)


def test_registered():
    assert (method("lora").family, method("lora").contract) == ("recover", "training")
    assert "compensated" in method("lora").incompatible_with


@pytest.mark.parametrize(
    ("parent", "marks"),
    [
        (set(), set()),
        ({"factorized", "smaller"}, {"factorized", "smaller"}),
        ({"masked"}, {"masked", "compensated"}),
        ({"quantized", "factorized"}, {"quantized", "factorized", "compensated"}),
    ],
)
def test_marks(parent, marks):
    assert lora.traits(frozenset(parent), lora.Options(text="a", validation="a", tokens=1)) == marks


@pytest.mark.parametrize("architecture", ["llama-gqa", "qwen2"])
def test_untrained_update_is_none(architecture):
    model = tiny_model(architecture)
    before = logits(model, TOKENS)
    torch.testing.assert_close(logits(lora.prepare(model, OPTIONS), TOKENS), before, rtol=0, atol=0)


def test_updates_alone_train_and_every_linear_of_the_blocks_has_one():
    model = lora.prepare(tiny_model(), OPTIONS)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    train_by_hand(model, 3, weight_decay=0.01)
    assert len(trained) == 3 * 7 * 2
    assert all(".lora_" in name and name.startswith("model.layers.") for name in trained)
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in model.named_parameters() if name in frozen)


def test_merged_model_computes_what_the_adapted_one_did_in_its_old_shape():
    model = tiny_model("qwen2")
    names = set(model.state_dict())
    lora.prepare(model, OPTIONS)
    train_by_hand(model, 3, weight_decay=0.01)
    with torch.no_grad():
        adapted = logits(model, TOKENS)
    model = lora.finish(model, OPTIONS)
    torch.testing.assert_close(logits(model, TOKENS), adapted, rtol=1e-5, atol=1e-5)
    assert set(model.state_dict()) == names
    assert describe_replacements(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_update_is_scaled_by_alpha_over_rank():
    model = tiny_model()
    linear = blocks(model)[1].mlp.up_proj
    before = linear.weight.detach().clone()
    lora.prepare(model, OPTIONS)
    adapted = blocks(model)[1].mlp.up_proj
    with torch.no_grad():
        adapted.lora_B["default"].weight.normal_()
        update = 4 * adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight
    lora.finish(model, OPTIONS)
    torch.testing.assert_close(linear.weight - before, update, rtol=1e-4, atol=1e-5)


def test_update_stays_beside_masked_and_quantized_linears():
    model = tiny_model("qwen2")
    attention, feedforward = blocks(model)[0].self_attn, blocks(model)[0].mlp
    with torch.no_grad():
        feedforward.up_proj.weight[:, ::2] = 0
    feedforward.up_proj.masked = True
    attention.q_proj = quantized(attention.q_proj)
    mask_before = feedforward.up_proj.weight.detach().clone()
    grid_before = {name: value.clone() for name, value in attention.q_proj.state_dict().items()}

    lora.prepare(model, OPTIONS)
    train_by_hand(model, 3, weight_decay=0.01)
    adapted = logits(model, TOKENS)
    lora.finish(model, OPTIONS)

    torch.testing.assert_close(logits(model, TOKENS), adapted, rtol=1e-5, atol=1e-5)
    for composite in (feedforward.up_proj, attention.q_proj):
        assert isinstance(composite, LowRankCorrectionLinear)
        assert composite.compensation.second.weight.any()
    assert torch.equal(feedforward.up_proj.base.weight, mask_before)
    assert feedforward.up_proj.base.masked
    assert all(torch.equal(value, grid_before[name]) for name, value in attention.q_proj.base.state_dict().items())
    assert type(feedforward.gate_proj) is torch.nn.Linear


def test_factors_have_updates_and_take_them_in():
    model = tiny_model()
    factors = LowRankLinear(32, 32, 5)
    blocks(model)[0].self_attn.o_proj = factors
    before = {name: value.clone() for name, value in factors.state_dict().items()}
    lora.prepare(model, OPTIONS)
    train_by_hand(model, 3, weight_decay=0.01)
    adapted = logits(model, TOKENS)
    lora.finish(model, OPTIONS)
    assert type(factors.first) is type(factors.second) is torch.nn.Linear
    assert not torch.equal(factors.first.weight, before["first.weight"])
    assert not torch.equal(factors.second.weight, before["second.weight"])
    torch.testing.assert_close(logits(model, TOKENS), adapted, rtol=1e-5, atol=1e-5)


def test_quantized_factors_keep_their_grid():
    model = tiny_model()
    factors = LowRankLinear(32, 32, 5)
    factors.first = quantized(factors.first)
    blocks(model)[0].self_attn.o_proj = factors
    lora.prepare(model, OPTIONS)
    train_by_hand(model, 3, weight_decay=0.01)
    lora.finish(model, OPTIONS)
    assert isinstance(factors.first, LowRankCorrectionLinear)
    assert isinstance(factors.first.base, QuantizedLinear)
    assert len(weight_matrices(factors)) == 4


def test_new_weights_follow_torchs_seed():
    def first(seed):
        torch.manual_seed(seed)
        model = lora.prepare(tiny_model(), OPTIONS)
        return blocks(model)[0].mlp.up_proj.lora_A["default"].weight

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
