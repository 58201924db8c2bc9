"""The linears of a model and what takes their places."""

from __future__ import annotations

from tiny import tiny_model
from torch import nn

from coppice.models import modules
from coppice.models.architectures.base import blocks


def test_forms_are_replaceable_modules_and_their_factors_weight_matrices() -> None:
    block = blocks(tiny_model())[0]
    assert len(modules.replaceable_modules(block)) == len(modules.weight_matrices(block)) == 7
    block.self_attn.q_proj = modules.LowRankLinear(32, 32, 4)
    assert len(modules.replaceable_modules(block)) == 7
    assert {"self_attn.q_proj.first", "self_attn.q_proj.second"} <= set(modules.weight_matrices(block))
    assert "self_attn.q_proj" not in modules.weight_matrices(block)


def test_what_is_described_is_installed_again() -> None:
    model = tiny_model()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[1].mlp
    attention.q_proj = modules.LowRankCorrectionLinear(modules.LowRankLinear(32, 32, 4), 2)
    mlp.up_proj = modules.LowRankCorrectionLinear(modules.QuantizedLinear(32, 48, 4, 16, False), 3)
    mlp.gate_proj.masked = True
    last = model.model.layers[2]
    last.self_attn.o_proj = modules.CURLinear(32, 32, 5)
    last.self_attn.q_proj = modules.LowRankCorrectionLinear(modules.TensorTrainLinear((4, 8), (8, 4), (3,)), 2)
    last.self_attn.q_proj.base.sites[1] = modules.CodebookLinear(8, 12, 4, 16, outliers=2)
    last.mlp.up_proj = modules.FlattenQuantLinear(32, 48, 4, 35)
    last.mlp.down_proj = modules.LowRankLinear(48, 32, 4)
    last.mlp.down_proj.second = modules.CodebookLinear(4, 32, 8, 32, outliers=3, transposed=True)
    modules.quantize_activations(last.mlp.gate_proj, {"bits": 8, "symmetric": True, "clip": 1.0})
    modules.quantize_activations(mlp.up_proj.base, {"bits": 4, "symmetric": False, "clip": 0.9})
    entries = modules.describe_replacements(model)
    rebuilt = tiny_model(seed=1)
    modules.install(rebuilt, entries)
    assert modules.describe_replacements(rebuilt) == entries
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in rebuilt.state_dict().items()} == shapes


def test_a_mask_is_where_a_masked_linear_is_not_zero() -> None:
    linear = nn.Linear(4, 4)
    assert modules.mask(linear) is None
    linear.weight.data[0, 0] = 0
    linear.masked = True
    assert modules.mask(linear).sum() == 15
