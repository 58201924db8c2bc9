"""What can stand where a linear stood."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from tiny import tiny_model
from torch import nn

from coppice import layers


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [5, 32, 43, 96])
def test_packing_is_that_of_compressed_tensors_and_inverts(bits: int, columns: int) -> None:
    codes = torch.randint(2**bits, (7, columns), dtype=torch.int32)
    words = layers.pack(codes, bits)
    assert torch.equal(words, pack_to_int32((codes - 2 ** (bits - 1)).to(torch.int8), bits))
    assert torch.equal(layers.unpack(words, bits, columns), codes)
    assert words.shape[1] == layers.packed_words(columns, bits)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, -1])
def test_a_quantized_linear_computes_with_its_grid(symmetric: bool, group_size: int) -> None:
    groups = 1 if group_size == -1 else 3
    low = -4 if symmetric else 0
    codes = torch.randint(low, low + 8, (10, 48), dtype=torch.int32)
    scale = torch.rand(10, groups) + 0.1
    zero = (
        torch.zeros(10, groups, dtype=torch.int32) if symmetric else torch.randint(8, (10, groups), dtype=torch.int32)
    )
    bias = torch.randn(10)
    module = layers.Quantized.from_codes(codes, scale, zero, 3, group_size, symmetric, bias)
    expected = ((codes.view(10, groups, -1) - zero[:, :, None]) * scale[:, :, None]).view(10, 48)
    assert torch.equal(module.weight, expected)
    x = torch.randn(2, 48)
    assert torch.allclose(module(x), x @ expected.T + bias, atol=1e-5)


def test_composites_compute_their_effective_weight() -> None:
    base = layers.LowRank(12, 8, 3, bias=True, dtype=torch.float64)
    module = layers.Compensated(base, 2, dtype=torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64)
    assert torch.allclose(module(x), x @ layers.effective_weight(module).T + module.bias)
    assert torch.allclose(module(torch.zeros(1, 12, dtype=torch.float64))[0], base.second.bias)


def test_linears_count_composites_once_and_leaves_count_factors() -> None:
    block = layers.blocks(tiny_model())[0]
    assert len(layers.linears(block)) == len(layers.leaves(block)) == 7
    block.self_attn.q_proj = layers.LowRank(32, 32, 4)
    assert len(layers.linears(block)) == 7
    assert {"self_attn.q_proj.first", "self_attn.q_proj.second"} <= set(layers.leaves(block))
    assert "self_attn.q_proj" not in layers.leaves(block)


def test_a_plan_installs_what_it_describes() -> None:
    model = tiny_model()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[1].mlp
    attention.q_proj = layers.Compensated(layers.LowRank(32, 32, 4), 2)
    mlp.up_proj = layers.Compensated(layers.Quantized(32, 48, 4, 16, False), 3)
    mlp.gate_proj.masked = True
    planned = layers.plan(model)
    rebuilt = tiny_model(seed=1)
    layers.install(rebuilt, planned)
    assert layers.plan(rebuilt) == planned
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in rebuilt.state_dict().items()} == shapes


def test_a_mask_is_where_a_masked_linear_is_not_zero() -> None:
    linear = nn.Linear(4, 4)
    assert layers.mask(linear) is None
    linear.weight.data[0, 0] = 0
    linear.masked = True
    assert layers.mask(linear).sum() == 15
