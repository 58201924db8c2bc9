"""What can stand where a linear stood."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from tiny import tiny_model
from torch import nn

from coppice.models import layers


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
    module = layers.QuantizedLinear.from_codes(codes, scale, zero, 3, group_size, symmetric, bias)
    expected = ((codes.view(10, groups, -1) - zero[:, :, None]) * scale[:, :, None]).view(10, 48)
    assert torch.equal(module.weight, expected)
    x = torch.randn(2, 48)
    assert torch.allclose(module(x), x @ expected.T + bias, atol=1e-5)


def test_composites_compute_their_effective_weight() -> None:
    base = layers.LowRankLinear(12, 8, 3, bias=True, dtype=torch.float64)
    module = layers.LowRankCorrectedLinear(base, 2, dtype=torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64)
    assert torch.allclose(module(x), x @ layers.effective_weight(module).T + module.bias)
    assert torch.allclose(module(torch.zeros(1, 12, dtype=torch.float64))[0], base.second.bias)


def test_a_skeleton_computes_its_effective_weight() -> None:
    module = layers.CURLinear(12, 8, 3, bias=True, dtype=torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64)
    assert torch.allclose(module(x), x @ layers.effective_weight(module).T + module.bias)
    assert layers.effective_weight(module).shape == (8, 12)


@pytest.mark.parametrize(
    ("in_shape", "out_shape", "bonds"), [((12,), (10,), ()), ((4, 3), (2, 5), (6,)), ((2, 3, 4), (5, 1, 2), (3, 7))]
)
def test_a_tensor_train_contracts_its_cores(in_shape, out_shape, bonds) -> None:
    module = layers.TensorTrainLinear(in_shape, out_shape, bonds, bias=True, dtype=torch.float64)
    torch.nn.init.normal_(module.bias)
    ends = (1, *bonds, 1)
    whole = torch.ones(1, 1, 1, dtype=torch.float64)  # [outputs, inputs, bond]
    for k, site in enumerate(module.sites):
        core = site.weight.view(ends[k], out_shape[k], in_shape[k], ends[k + 1])
        whole = torch.einsum("oib,bpjc->opijc", whole, core).flatten(2, 3).flatten(0, 1)
    weight = whole[:, :, 0]
    torch.testing.assert_close(layers.effective_weight(module), weight)
    # Few vectors go through the sites, many through the matrix; watched sites are always gone through.
    for vectors in (1, 1000):
        x = torch.randn(2, vectors, module.in_features, dtype=torch.float64)
        torch.testing.assert_close(module(x), x @ weight.T + module.bias)
        torch.testing.assert_close(module.product(x), x @ weight.T)
    seen = []
    module.sites[0].register_forward_hook(lambda *parts: seen.append(parts))
    torch.testing.assert_close(module(x), x @ weight.T + module.bias)
    assert len(seen) == 1
    assert len(layers.weight_matrices(module)) == len(in_shape)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("outliers", [None, [1, 4]])
@pytest.mark.parametrize("block", [7, 16, 1000])
def test_a_coded_linear_decodes_its_blocks(transposed: bool, outliers: list[int] | None, block: int) -> None:
    rows, columns, bits = 6, 9, 3
    kept = [j for j in range(columns) if j not in (outliers or [])]
    codes = torch.randint(2**bits, (rows, len(kept)), dtype=torch.int32)
    table = torch.linspace(-1, 1, 2**bits, dtype=torch.float64)
    absmax = torch.rand(-(-codes.numel() // block))
    index = None if outliers is None else torch.tensor(outliers)
    values = None if outliers is None else torch.randn(rows, len(outliers))
    bias = torch.randn(columns if transposed else rows)
    module = layers.CodebookLinear.from_codes(codes, table, absmax, block, bits, index, values, transposed, bias)
    expected = torch.empty(rows, columns)
    if outliers is not None:
        expected[:, outliers] = values
    for place, code in enumerate(codes.flatten().tolist()):
        expected[place // len(kept), kept[place % len(kept)]] = table[code].float() * absmax[place // block]
    expected = expected.T if transposed else expected
    torch.testing.assert_close(module.weight, expected)
    x = torch.randn(3, expected.shape[1])
    torch.testing.assert_close(module(x), x @ expected.T + bias)


def test_a_table_survives_storage_in_bfloat16() -> None:
    table = torch.linspace(-1, 1, 256, dtype=torch.float64)
    module = layers.CodebookLinear.from_codes(
        torch.arange(256, dtype=torch.int32).view(1, -1), table, torch.ones(1), 256, 8, None, None, False, None
    )
    module.weight_absmax = module.weight_absmax.to(torch.bfloat16).float()
    torch.testing.assert_close(module.weight[0].double(), table, rtol=0, atol=1e-7)


def test_flattened_inputs_add_up_and_stay_within_the_threshold() -> None:
    x = torch.tensor([[3.0, -0.4, -7.5, 0.0]], dtype=torch.float64)
    source, piece = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3]), torch.tensor([0, 1, 2, -1, 0, 1, 2, 3, 0])
    flat = layers.flatten_inputs(x, source, piece, torch.tensor([2.0], dtype=torch.float64))
    assert flat.tolist() == [[2.0, 1.0, 0.0, -0.4, -2.0, -2.0, -2.0, -1.5, 0.0]]
    assert torch.equal(torch.zeros_like(x).index_add(1, source, flat), x)


def test_a_flattened_linear_is_its_weight_on_grid_inputs() -> None:
    """Input 1 is split into two pieces, the column of input 2 into two parts; inputs on the grid are not rounded."""
    source, piece = torch.tensor([0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, -1, -1])
    parts = torch.randint(-7, 8, (4, 5), dtype=torch.int32)
    parts[:, 2] = parts[:, 1]
    module = layers.FlattenQuantLinear.from_codes(
        parts, torch.tensor([0.5]), source, piece, torch.tensor([7.0]), 4, 3, torch.ones(4)
    )
    expected = 0.5 * torch.stack([parts[:, 0], parts[:, 1], parts[:, 3] + parts[:, 4]], dim=1)
    torch.testing.assert_close(module.weight, expected)
    x = torch.tensor([[3.0, -12.0, 5.0], [-7.0, 14.0, 0.0]])
    torch.testing.assert_close(module(x), x @ expected.T + 1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounded_tokens_stay_within_half_a_step_and_pass_gradients(symmetric: bool) -> None:
    x = torch.randn(3, 40, requires_grad=True)
    rounded = layers.round_tokens(x, 6, symmetric, 1.0)
    span = 2 * x.abs().amax(1) / 62 if symmetric else (x.amax(1) - x.amin(1)) / 63
    assert ((rounded - x).abs().amax(1) <= span / 2 * 1.001).all()
    assert all(len(row.unique()) <= 64 for row in rounded)
    rounded.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(layers.round_tokens(torch.zeros(1, 4), 4, symmetric, 1.0), torch.zeros(1, 4))


def test_linears_count_composites_once_and_leaves_count_factors() -> None:
    block = layers.blocks(tiny_model())[0]
    assert len(layers.replaceable_modules(block)) == len(layers.weight_matrices(block)) == 7
    block.self_attn.q_proj = layers.LowRankLinear(32, 32, 4)
    assert len(layers.replaceable_modules(block)) == 7
    assert {"self_attn.q_proj.first", "self_attn.q_proj.second"} <= set(layers.weight_matrices(block))
    assert "self_attn.q_proj" not in layers.weight_matrices(block)


def test_a_plan_installs_what_it_describes() -> None:
    model = tiny_model()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[1].mlp
    attention.q_proj = layers.LowRankCorrectedLinear(layers.LowRankLinear(32, 32, 4), 2)
    mlp.up_proj = layers.LowRankCorrectedLinear(layers.QuantizedLinear(32, 48, 4, 16, False), 3)
    mlp.gate_proj.masked = True
    last = model.model.layers[2]
    last.self_attn.o_proj = layers.CURLinear(32, 32, 5)
    last.self_attn.q_proj = layers.LowRankCorrectedLinear(layers.TensorTrainLinear((4, 8), (8, 4), (3,)), 2)
    last.self_attn.q_proj.base.sites[1] = layers.CodebookLinear(8, 12, 4, 16, outliers=2)
    last.mlp.up_proj = layers.FlattenQuantLinear(32, 48, 4, 35)
    last.mlp.down_proj = layers.LowRankLinear(48, 32, 4)
    last.mlp.down_proj.second = layers.CodebookLinear(4, 32, 8, 32, outliers=3, transposed=True)
    layers.quantize_activations(last.mlp.gate_proj, {"bits": 8, "symmetric": True, "clip": 1.0})
    layers.quantize_activations(mlp.up_proj.base, {"bits": 4, "symmetric": False, "clip": 0.9})
    planned = layers.describe_replacements(model)
    rebuilt = tiny_model(seed=1)
    layers.install(rebuilt, planned)
    assert layers.describe_replacements(rebuilt) == planned
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in rebuilt.state_dict().items()} == shapes


def test_a_mask_is_where_a_masked_linear_is_not_zero() -> None:
    linear = nn.Linear(4, 4)
    assert layers.mask(linear) is None
    linear.weight.data[0, 0] = 0
    linear.masked = True
    assert layers.mask(linear).sum() == 15
