from __future__ import annotations

import pytest
import torch
from manifests import manifest
from recoveries import half_masked, train_by_hand
from tiny import ARCHITECTURES, tiny_model

from coppice.methods.recover import scratch
from coppice.methods.registry import method
from coppice.models.architectures.base import blocks
from coppice.records.manifest import Manifest

FIELDS = {"text": "a", "validation": "b", "tokens": 1000}
OPTIONS = scratch.Options(**FIELDS)


def prepared(seed=0, architecture="llama-gqa", model=None, **changes):
    model = model or tiny_model(architecture, **changes)
    torch.manual_seed(seed)
    return scratch.prepare(model.requires_grad_(False), OPTIONS)


def test_registered():
    found = method("scratch")
    assert (found.family, found.contract) == ("recover", "training")
    assert found.incompatible_with.keys() == {"quantized", "factorized", "compensated", "quantized-cache"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_weight_is_drawn_again_at_the_initializers_size_and_norms_begin_at_one(architecture):
    parent = tiny_model(architecture)
    model = prepared(architecture=architecture, initializer_range=0.05)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert not torch.equal(parameter, parent.get_parameter(name))
        if "norm" in name:
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.1)


def test_a_seed_gives_its_weights_whatever_the_parents_were():
    first, again, other = prepared(3), prepared(3, model=tiny_model(seed=9)), prepared(4)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        assert torch.equal(parameter, other.get_parameter(name)) == ("norm" in name)


def test_masks_hold_bit_for_bit_through_training_and_kept_weights_train():
    model = prepared(model=half_masked(tiny_model()))
    weights = [blocks(model)[0].self_attn.q_proj.weight, blocks(model)[0].mlp.down_proj.weight]
    before = [weight.detach().clone() for weight in weights]
    train_by_hand(model, 3)
    for weight, drawn in zip(weights, before, strict=True):
        assert not weight[:, ::2].view(torch.int32).any()
        assert drawn[:, 1::2].all()
        assert not (weight[:, 1::2] == drawn[:, 1::2]).any()
    assert blocks(model)[0].mlp.up_proj.weight.all()
    assert scratch.finish(model, OPTIONS) is model


def test_tied_embeddings_stay_tied():
    model = prepared(model=tiny_model(tie_word_embeddings=True))
    train_by_hand(model, 3)
    assert model.lm_head.weight is model.model.embed_tokens.weight


# A step costs about 6 N FLOPs a token: D_B N = D_E N_dense.
def test_equal_flops_gives_a_smaller_node_as_many_more_tokens():
    assert scratch.tokens(OPTIONS, of_sizes(1_000_000, 400_000)) == 1000
    by_flops = scratch.Options(**FIELDS, equal="flops")
    assert scratch.tokens(by_flops, of_sizes(1_000_000, 400_000)) == 2500
    assert scratch.tokens(by_flops, of_sizes(1_000_000, 1_000_000)) == 1000
    # Rounded up, and exact where floats are not.
    assert scratch.tokens(by_flops, of_sizes(1_000_000, 300_000)) == 3334
    large = scratch.Options(**FIELDS | {"tokens": 3 * 10**17 + 1}, equal="flops")
    assert scratch.tokens(large, of_sizes(3, 1)) == 9 * 10**17 + 3


def of_sizes(dense: int, nonzero: int) -> Manifest:
    """The manifest of a node with so many parameters that are not zero."""
    parameters = {"total": dense, "blocks": dense, "decoder_linears": dense, "nonzero": nonzero}
    return manifest(dense_parameters=dense, parameters=parameters)
