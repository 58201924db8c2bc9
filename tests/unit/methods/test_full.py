from __future__ import annotations

import torch
from recoveries import half_masked, train_by_hand
from tiny import tiny_model, tiny_tokens

from coppice.methods.recover import full
from coppice.methods.registry import method
from coppice.models.architectures.base import blocks
from coppice.models.modules import LowRankLinear

OPTIONS = full.Options(text="a", validation="b", tokens=1)


def test_registered():
    found = method("full")
    assert (found.family, found.contract) == ("recover", "training")
    assert "lora" in found.incompatible_with["quantized"]


def test_every_parameter_trains():
    model = full.prepare(tiny_model("qwen2").requires_grad_(False), OPTIONS)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_by_hand(model)
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []
    assert full.finish(model, OPTIONS) is model


def test_pruned_weights_stay_zero_bit_for_bit_and_kept_ones_train():
    model = full.prepare(half_masked(tiny_model()), OPTIONS)
    weight = blocks(model)[0].mlp.down_proj.weight
    before = weight.detach().clone()
    train_by_hand(model)
    assert torch.equal(weight[:, ::2].view(torch.int32), before[:, ::2].view(torch.int32))
    assert not (weight[:, 1::2] == before[:, 1::2]).any()


def test_zeros_of_linears_that_are_not_masked_train():
    model = tiny_model()
    with torch.no_grad():
        blocks(model)[0].mlp.up_proj.weight[:, ::2] = 0
    full.prepare(model, OPTIONS)
    train_by_hand(model)
    assert not (blocks(model)[0].mlp.up_proj.weight == 0).any()


def test_clipping_sees_the_kept_gradient_alone():
    model, whole = full.prepare(half_masked(tiny_model()), OPTIONS), half_masked(tiny_model())
    tokens = tiny_tokens(4, 12)
    for each in (model, whole):
        each(input_ids=tokens, labels=tokens).loss.backward()
    gradient, reference = (blocks(each)[0].mlp.down_proj.weight.grad for each in (model, whole))
    assert torch.equal(gradient[:, 1::2], reference[:, 1::2])
    assert not gradient[:, ::2].any()
    assert reference[:, ::2].all()


def test_factors_train():
    model = tiny_model()
    factors = LowRankLinear(32, 32, 4)
    blocks(model)[0].self_attn.o_proj = factors
    before = factors.first.weight.detach().clone(), factors.second.weight.detach().clone()
    train_by_hand(full.prepare(model, OPTIONS))
    assert not torch.equal(factors.first.weight, before[0])
    assert not torch.equal(factors.second.weight, before[1])
