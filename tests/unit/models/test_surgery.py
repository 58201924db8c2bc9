from __future__ import annotations

import copy

import pytest
import torch
from tiny import ARCHITECTURES, NORMS_ACROSS_HEADS, exact_norms, logits, tiny_model, tiny_tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from coppice.errors import UserError
from coppice.models.architectures.base import architecture_of
from coppice.models.contracts import Removal, Structure
from coppice.models.surgery import describe_removal, remove, structure

TOKENS = tiny_tokens()

WIDTHS = Removal(kv_groups=((1,), (0,), (1,)), neurons=((0, 5, 47), (3, 4, 5), (20, 21, 40)))
DEPTH = Removal(blocks=(1,))
UNEQUAL = Removal(kv_groups=((1,), (), ()), neurons=((0, 5, 6, 46, 47), (), (3, 4)))
BOTH = Removal(blocks=(1,), kv_groups=WIDTHS.kv_groups, neurons=WIDTHS.neurons)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def zeroed(model, removal):
    """The dense model with what the removal takes switched off: columns of o and down, and whole blocks.

    Norms across heads take the root mean square of the channels of the heads that stay.
    """
    model = copy.deepcopy(model)
    family = architecture_of(model)
    r = model.config.num_attention_heads // model.config.num_key_value_heads
    with torch.no_grad():
        for index, block in enumerate(model.model.layers):
            width = r * block.self_attn.head_dim
            for group in removal.kv_groups[index] if removal.kv_groups else ():
                block.self_attn.o_proj.weight[:, group * width : (group + 1) * width] = 0
            if family.norms.across_heads and removal.kv_groups:
                for path, heads in zip(family.norms.across_heads, (r, 1), strict=True):
                    restrict_norm(block.get_submodule(path), heads * block.self_attn.head_dim, removal.kv_groups[index])
            for neuron in removal.neurons[index] if removal.neurons else ():
                block.mlp.down_proj.weight[:, neuron] = 0
            if index in removal.blocks:
                block.self_attn.o_proj.weight.zero_()
                block.mlp.down_proj.weight.zero_()
    return model


def restrict_norm(norm, width, groups):
    """Makes a norm take the mean square of the groups, each `width` channels, that are not among `groups`."""
    kept = torch.ones(len(norm.weight), dtype=torch.bool)
    for group in groups:
        kept[group * width : (group + 1) * width] = False

    def forward(x):
        return norm.weight * x * torch.rsqrt(x[..., kept].pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)

    norm.forward = forward


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_structure_counts_the_units(architecture):
    model = tiny_model(architecture)
    assert structure(model) == Structure(3, model.config.num_key_value_heads, 48)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_removing_nothing_changes_nothing(architecture):
    model = tiny_model(architecture)
    before = copy.deepcopy(model.state_dict())
    config = model.config.to_dict()
    pruned = remove(model, Removal(kv_groups=((), (), ()), neurons=((), (), ())))
    assert pruned.config.to_dict() == config
    assert before.keys() == pruned.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in pruned.state_dict().items())


@pytest.mark.parametrize("removal", [WIDTHS, DEPTH, BOTH, UNEQUAL], ids=["widths", "depth", "both", "unequal"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_removal_is_switching_off(architecture, removal):
    model = tiny_model(architecture, dtype=torch.float64)
    expected, dense = logits(zeroed(model, removal), TOKENS), logits(model, TOKENS)
    pruned = logits(remove(model, removal), TOKENS)
    assert (pruned - dense).abs().max() > 1e-2
    torch.testing.assert_close(pruned, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stock_classes_load_what_is_left(architecture, tied, tmp_path):
    model = remove(tiny_model(architecture, tie_word_embeddings=tied), BOTH)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert type(loaded) is type(model)
    named = {"architectures": [type(model).__name__], "_name_or_path": str(tmp_path)}
    assert loaded.config.to_dict() == model.config.to_dict() | named
    assert parameters(loaded) == parameters(model)
    assert torch.equal(logits(loaded, TOKENS), logits(model, TOKENS))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_with_a_cache_is_generation_without(architecture):
    model = remove(tiny_model(architecture, dtype=torch.float64), BOTH)
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached, uncached = (
        model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), use_cache=use_cache, **arguments)
        for use_cache in (True, False)
    )
    assert cached.shape == (4, 18) and torch.equal(cached, uncached)


@pytest.mark.parametrize("removal", [Removal(), WIDTHS, DEPTH, BOTH], ids=["nothing", "widths", "depth", "both"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_achieved_counts_the_parameters(architecture, removal):
    model = tiny_model(architecture, tie_word_embeddings=True)
    dense, dense_blocks = parameters(model), parameters(model.model.layers)
    record = describe_removal(model, removal)
    removed = dense - parameters(remove(model, removal))
    assert record["parameters"] == {
        "removed": removed,
        "share_of_blocks": removed / dense_blocks,
        "share_of_model": removed / dense,
    }
    assert record["units"]["neurons"]["removed"] == (3 if removal.neurons else 0)
    assert record["units"]["blocks"] == {
        "removed": len(removal.blocks),
        "of": 3,
        "share": len(removal.blocks) / 3,
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_modules_say_what_they_are(architecture):
    model = tiny_model(architecture)
    r = model.config.num_attention_heads // model.config.num_key_value_heads
    model = remove(model, BOTH)
    assert model.config.num_hidden_layers == 2 and model.config.intermediate_size == 45
    assert model.config.num_attention_heads == r * model.config.num_key_value_heads
    for index, block in enumerate(model.model.layers):
        assert block.self_attn.layer_idx == index and block.self_attn.num_key_value_groups == r
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                assert module.weight.shape == (module.out_features, module.in_features)
                assert module.weight.requires_grad and module.weight.is_contiguous()
                assert module.bias is None or module.bias.shape == (module.out_features,)
        assert block.mlp.intermediate_size == 45


def test_a_block_keeps_its_kind_of_attention():
    windowed = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "num_hidden_layers": 4}
    model = tiny_model("qwen3", dtype=torch.float64, **windowed)
    removal = Removal(blocks=(0, 3))
    expected = logits(zeroed(model, removal), TOKENS)
    pruned = remove(model, removal)
    assert pruned.config.layer_types == ["full_attention", "sliding_attention"]
    assert pruned.config.max_window_layers == 1
    torch.testing.assert_close(logits(pruned, TOKENS), expected, rtol=0, atol=1e-10)


def test_a_block_keeps_whether_it_has_rotary_embeddings(tmp_path):
    model = tiny_model("smollm3", dtype=torch.float64, no_rope_layers=[1, 0, 1, 0], num_hidden_layers=4)
    removal = Removal(blocks=(0, 3))
    expected = logits(zeroed(model, removal), TOKENS)
    pruned = remove(model, removal)
    assert pruned.config.no_rope_layers == [0, 1] and len(pruned.config.layer_types) == 2
    torch.testing.assert_close(logits(pruned, TOKENS), expected, rtol=0, atol=1e-10)
    pruned.save_pretrained(tmp_path)
    loaded = exact_norms(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64))
    assert torch.equal(logits(loaded, TOKENS), logits(pruned, TOKENS))


@pytest.mark.parametrize("architecture", NORMS_ACROSS_HEADS)
def test_norms_across_heads_lose_the_channels_of_removed_heads(architecture):
    model = tiny_model(architecture)
    r = model.config.num_attention_heads // model.config.num_key_value_heads
    before = [block.self_attn.q_norm.weight.detach().clone() for block in model.model.layers]
    pruned = remove(model, WIDTHS)
    for block, weight, groups in zip(pruned.model.layers, before, WIDTHS.kv_groups, strict=True):
        width = r * block.self_attn.head_dim
        kept = torch.cat([part for group, part in enumerate(weight.split(width)) if group not in groups])
        assert torch.equal(block.self_attn.q_norm.weight, kept)
        assert len(block.self_attn.k_norm.weight) == block.self_attn.k_proj.out_features


def test_mistral_keeps_its_window():
    model = tiny_model("mistral", dtype=torch.float64, sliding_window=4)
    expected = logits(zeroed(model, WIDTHS), TOKENS)
    torch.testing.assert_close(logits(remove(model, WIDTHS), TOKENS), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rope", ["default", "llama3"])
def test_a_llama_that_llama_refuses_comes_back_as_a_mistral(rope, tmp_path):
    parameters_of_rope = {
        "default": {"rope_type": "default", "rope_theta": 500.0},
        "llama3": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    }[rope]
    # Four heads divide 32 channels, three do not.
    model = tiny_model("llama", dtype=torch.float64, rope_parameters=parameters_of_rope, tie_word_embeddings=True)
    model.model.layers[0].mlp.up_proj.masked = True
    expected = logits(zeroed(model, WIDTHS), TOKENS)
    pruned = remove(model, WIDTHS)
    assert isinstance(pruned, MistralForCausalLM) and pruned.config.sliding_window is None
    assert pruned.model.layers[0].mlp.up_proj.masked
    assert all(getattr(module, "config", pruned.config) is pruned.config for module in pruned.modules())
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    torch.testing.assert_close(logits(pruned, TOKENS), expected, rtol=0, atol=1e-10)
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(logits(exact_norms(loaded), TOKENS), logits(pruned, TOKENS))


def test_its_tokenizer_still_loads(tmp_path):
    remove(tiny_model("llama"), WIDTHS).save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(61)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("w7")["input_ids"] == [7]


def test_a_llama_stays_one_where_its_heads_divide():
    model = remove(tiny_model("llama-gqa"), Removal(kv_groups=((0, 2), (1, 3), (0, 1))))
    assert isinstance(model, LlamaForCausalLM) and model.config.num_attention_heads == 4


def test_a_llama_with_biases_is_refused_before_anything_is_removed():
    model = tiny_model("llama", attention_bias=True)
    before = logits(model, TOKENS)
    with pytest.raises(UserError, match="3 attention heads would be left"):
        remove(model, WIDTHS)
    assert torch.equal(logits(model, TOKENS), before)


def test_biases_of_every_linear():
    model = tiny_model("llama-gqa", dtype=torch.float64, attention_bias=True, mlp_bias=True)
    removal = Removal(kv_groups=((0, 2), (1, 3), (0, 1)), neurons=WIDTHS.neurons)
    expected, record, dense = (
        logits(zeroed(model, removal), TOKENS),
        describe_removal(model, removal),
        parameters(model),
    )
    pruned = remove(model, removal)
    assert record["parameters"]["removed"] == dense - parameters(pruned)
    torch.testing.assert_close(logits(pruned, TOKENS), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("removal", "sentence"),
    [
        (Removal(neurons=((0,), (0,))), "names 2 blocks, but the model has 3"),
        (Removal(neurons=((0,), (48,), (0,))), "neurons of block 1 outside 0..47"),
        (Removal(kv_groups=((0, 0), (0, 1), (0, 1))), "kv_groups of block 0 twice"),
        (Removal(kv_groups=((0, 1, 2, 3),) * 3), "takes all 4 kv_groups of block 0"),
        (Removal(blocks=(0, 1, 2)), "takes all 3 blocks"),
        (Removal(blocks=(3,)), "blocks outside 0..2"),
        (Removal(blocks=(1.5,)), "blocks that are not whole numbers"),
    ],
)
def test_a_removal_that_does_not_fit_is_refused(removal, sentence):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    for use in (describe_removal, remove):
        with pytest.raises(UserError, match=sentence):
            use(model, removal)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("weight", "sentence"),
    [
        ([0.0], "the method returned list as its new weight, not a tensor"),
        (float("nan"), "the method returned a new weight with NaN or infinite values, as torch"),
        (1e39, "the method returned a new weight with NaN or infinite values, as torch.float32"),
    ],
)
def test_a_new_weight_that_is_not_a_finite_tensor_is_refused(weight, sentence):
    model = tiny_model().float()
    name = "model.layers.0.self_attn.q_proj"
    if isinstance(weight, float):
        weight = torch.full(model.get_submodule(name).weight.shape, weight, dtype=torch.float64)
    with pytest.raises(UserError, match=f"^{name}: {sentence}"):
        remove(model, Removal(blocks=(1,), weights={name: weight}))


LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINY_LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}


def on_paper(fields):
    """A model without storage: its shapes are real, its values are not."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**fields))


@pytest.mark.parametrize(
    ("fields", "cut", "dense", "pruned"),
    [
        (LLAMA_3_8B, 26, 8_030_261_248, 6_612_586_496),
        (TINY_LLAMA, 14, 1_100_048_384, 945_907_712),
        (LLAMA_7B, 26, 6_738_415_616, 5_422_977_024),
    ],
    ids=["Llama-3-8B", "TinyLlama-1.1B", "LLaMA-7B"],
)
def test_published_sizes_of_llm_pruner(fields, cut, dense, pruned):
    """LLM-Pruner cuts a quarter of the units of some blocks; here all blocks of a model of only those are cut."""
    whole = on_paper(fields)
    assert parameters(whole) == dense
    part = remove(whole, Removal(blocks=tuple(range(cut, fields["num_hidden_layers"]))))
    before = parameters(part)
    quarter = Removal(
        kv_groups=(tuple(range(fields["num_key_value_heads"] // 4)),) * cut,
        neurons=(tuple(range(fields["intermediate_size"] // 4)),) * cut,
    )
    assert dense - before + parameters(remove(part, quarter)) == pruned


@pytest.mark.parametrize(("removed", "billions"), [(6, 5.5), (15, 3.7), (20, 2.7), (26, 1.5)])
def test_published_sizes_of_shortened_llama(removed, billions):
    model = on_paper(LLAMA_7B)
    left = parameters(remove(model, Removal(blocks=tuple(range(removed)))))
    assert left == 6_738_415_616 - removed * 202_383_360
    assert round(left / 1e9, 1) == billions
