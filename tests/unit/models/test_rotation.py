from __future__ import annotations

import copy

import pytest
import torch
from tiny import ARCHITECTURES, NORMS_AFTER, exact_norms, logits, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

from coppice.errors import UserError
from coppice.methods.quantize import rotate as method
from coppice.models.rotation import describe_rotation, rotate

TOKENS = tiny_tokens()
ROTATABLE = [name for name in ARCHITECTURES if name not in NORMS_AFTER]


def assert_same_function(model, options):
    before = copy.deepcopy(model)
    rotated = rotate(model, method.rotation, options)
    torch.testing.assert_close(logits(rotated, TOKENS), logits(before, TOKENS), rtol=1e-10, atol=1e-10)
    return before, rotated


@pytest.mark.parametrize("architecture", ROTATABLE)
@pytest.mark.parametrize("heads", [True, False])
def test_logits_stay(architecture, heads):
    model = tiny_model(architecture, dtype=torch.float64)
    before, rotated = assert_same_function(model, method.Options(heads=heads))
    for old, new in zip(before.model.layers, rotated.model.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert not torch.allclose(getattr(old.self_attn, name).weight, getattr(new.self_attn, name).weight)
        assert (new.input_layernorm.weight == 1).all() and (new.post_attention_layernorm.weight == 1).all()
        if architecture == "qwen3":
            assert torch.equal(old.self_attn.q_norm.weight, new.self_attn.q_norm.weight)
            assert torch.equal(old.self_attn.k_norm.weight, new.self_attn.k_norm.weight)
    assert (rotated.model.norm.weight == 1).all()


def test_norms_on_what_blocks_add_refuse_a_rotation_before_anything_changes():
    model = tiny_model("olmo2", tie_word_embeddings=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="post_attention_layernorm and post_feedforward_layernorm act on what is added"):
        rotate(model, method, method.Options())
    assert model.config.tie_word_embeddings
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_biases_of_every_linear_follow():
    model = tiny_model("llama-gqa", dtype=torch.float64, attention_bias=True, mlp_bias=True)
    attention = model.model.layers[0].self_attn
    assert attention.v_proj.bias.abs().min() > 0 and attention.o_proj.bias.abs().min() > 0
    assert_same_function(model, method.Options())


@pytest.mark.parametrize("changes", [{"hidden_size": 36}, {"hidden_size": 40, "head_dim": 10, "intermediate_size": 43}])
def test_widths_that_are_no_powers_of_two(changes):
    assert_same_function(tiny_model("qwen3", dtype=torch.float64, **changes), method.Options())


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_tied_embeddings_are_untied(architecture, tmp_path):
    model = tiny_model(architecture, dtype=torch.float64, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    record = describe_rotation(model, method.Options())
    assert record["untied"] and record["parameters_added"] == 61 * 32
    before, rotated = assert_same_function(model, method.Options())
    assert not rotated.config.tie_word_embeddings
    assert rotated.lm_head.weight is not rotated.model.embed_tokens.weight
    rotated.tie_weights()
    rotated.save_pretrained(tmp_path)
    loaded = exact_norms(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval())
    torch.testing.assert_close(logits(loaded, TOKENS), logits(before, TOKENS), rtol=1e-10, atol=1e-10)


def test_the_record_tells_what_is_rotated():
    model = tiny_model("qwen3")
    assert describe_rotation(model, method.Options()) == {
        "residual_width": 32,
        "head_width": 12,
        "norms_folded": 7,
        "untied": False,
        "parameters_added": 0,
    }
    assert describe_rotation(model, method.Options(heads=False))["head_width"] is None


def test_values_are_rotated_within_their_heads_only():
    with_heads, without = (
        rotate(tiny_model("mistral", dtype=torch.float64), method.rotation, method.Options(heads=heads))
        for heads in (True, False)
    )
    r = method.rotation(8, method.Options())
    for one, other in zip(with_heads.model.layers, without.model.layers, strict=True):
        v, o = other.self_attn.v_proj.weight, other.self_attn.o_proj.weight
        expected = torch.cat([r.T @ head for head in v.split(8)])
        torch.testing.assert_close(one.self_attn.v_proj.weight, expected, rtol=1e-12, atol=1e-12)
        expected = torch.cat([head @ r for head in o.split(8, dim=1)], dim=1)
        torch.testing.assert_close(one.self_attn.o_proj.weight, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(one.self_attn.q_proj.weight, other.self_attn.q_proj.weight)


def test_an_outlying_channel_is_spread():
    model = tiny_model("llama", dtype=torch.float64)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] *= 100

    def peak(model):
        hidden = model.model.embed_tokens.weight
        return (hidden.abs().amax(1) / hidden.square().mean(1).sqrt()).mean()

    before, rotated = assert_same_function(model, method.Options())
    assert peak(before) > 4 and peak(rotated) < 2


def test_types_and_gradients_stay():
    model = tiny_model("qwen2").to(torch.bfloat16)
    model.lm_head.weight.requires_grad_(False)
    rotated = rotate(model, method.rotation, method.Options())
    assert {parameter.dtype for parameter in rotated.parameters()} == {torch.bfloat16}
    assert not rotated.lm_head.weight.requires_grad and rotated.model.embed_tokens.weight.requires_grad
    model = tiny_model("qwen2")
    before = logits(model, TOKENS)
    rotated = rotate(model, method.rotation, method.Options())
    torch.testing.assert_close(logits(rotated, TOKENS), before, rtol=1e-4, atol=1e-4)
