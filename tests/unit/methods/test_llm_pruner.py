from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from tiny import ARCHITECTURES, NORMS_ACROSS_HEADS, logits, tiny_model, tiny_tokens

from coppice.calibration.gradients import IMPORTANCES, unit_scores
from coppice.errors import UserError
from coppice.methods.prune.llm_pruner import Options, choose
from coppice.methods.registry import method
from coppice.models.contracts import Structure
from coppice.models.surgery import describe_removal, remove, structure

# Read by tests/rows.py.
ROWS = [{"ratio": 0.25}]

TOKENS = tiny_tokens()
MASK = torch.ones_like(TOKENS, dtype=torch.bool)
TWO_BLOCKS = SimpleNamespace(structure=Structure(blocks=2, kv_groups=4, neurons=100))


def decoder(model):
    return SimpleNamespace(structure=structure(model))


def scores(importance="first"):
    generator = torch.Generator().manual_seed(0)
    return {
        f"kv_groups.{importance}": torch.rand(2, 4, generator=generator),
        f"neurons.{importance}": torch.rand(2, 100, generator=generator),
    }


def pruned(model, options):
    removal = choose(decoder(model), unit_scores(model, TOKENS, MASK, batch=4), options)
    return remove(model, removal), removal


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_each_block_loses_its_own_lowest(importance):
    given = scores(importance)
    removal = choose(TWO_BLOCKS, given, Options(ratio=0.5, importance=importance))
    for kind, number in (("kv_groups", 2), ("neurons", 50)):
        for block, removed in enumerate(getattr(removal, kind)):
            row = given[f"{kind}.{importance}"][block]
            assert len(removed) == number
            assert row[list(removed)].max() < row[[unit for unit in range(len(row)) if unit not in removed]].min()
    assert removal.blocks == () and removal.record["importance"] == importance


@pytest.mark.parametrize(
    ("options", "kv_groups", "neurons"),
    [
        ({"ratio": 0.0}, 0, 0),
        ({"ratio": 0.2}, 0, 20),
        ({"ratio": 0.25}, 1, 25),
        ({"ratio": 0.29}, 1, 29),
        ({"ratio": 0.999}, 3, 99),
        ({"ratio": 0.2, "kv_ratio": 0.5}, 2, 20),
        ({"ratio": 0.5, "kv_ratio": 0.0}, 0, 50),
        ({"ratio": 0.5, "round": 32}, 2, 36),
        ({"ratio": 0.3, "round": 32}, 1, 4),
        ({"ratio": 0.01, "round": 32}, 0, 0),
        ({"ratio": 0.99, "round": 32}, 3, 68),
        ({"ratio": 0.0, "round": 32}, 0, 0),
    ],
)
def test_how_many_go(options, kv_groups, neurons):
    removal = choose(TWO_BLOCKS, scores(), Options(**options))
    assert [len(row) for row in removal.kv_groups] == ([kv_groups] * 2 if kv_groups else [])
    assert [len(row) for row in removal.neurons] == ([neurons] * 2 if neurons else [])
    assert removal.record["achieved"] == {
        "kv_groups_per_block": kv_groups,
        "kv_ratio": kv_groups / 4,
        "neurons_per_block": neurons,
        "neuron_ratio": neurons / 100,
    }
    assert removal.record["asked"]["kv_ratio"] == options.get("kv_ratio", options["ratio"])


@pytest.mark.parametrize(
    "options", [{}, {"ratio": 1.0}, {"ratio": -0.1}, {"ratio": 0.5, "round": 0}, {"ratio": 0.5, "importance": "third"}]
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValidationError):
        Options(**options)


def test_a_score_that_is_not_finite_is_named():
    broken = scores()
    broken["neurons.first"][1, 7] = torch.nan
    with pytest.raises(UserError, match="neurons of block 1"):
        choose(TWO_BLOCKS, broken, Options(ratio=0.5))


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_planted_redundancy_goes_first_and_is_not_missed(architecture, importance):
    model = tiny_model(architecture, dtype=torch.float64)
    groups = model.config.num_key_value_heads
    # Under a norm across heads, a group without an output still changes the others.
    kv_ratio = 0.0 if architecture in NORMS_ACROSS_HEADS else 1.2 / groups
    planted_groups, planted_neurons = [block % groups for block in range(3)], [7, 40, 0]
    with torch.no_grad():
        for block, group, neuron in zip(model.model.layers, planted_groups, planted_neurons, strict=True):
            width = block.self_attn.num_key_value_groups * block.self_attn.head_dim
            block.self_attn.o_proj.weight[:, group * width : (group + 1) * width] = 0
            block.mlp.down_proj.weight[:, neuron] = 0
    expected = logits(model, TOKENS)
    smaller, removal = pruned(model, Options(ratio=1.5 / 48, kv_ratio=kv_ratio, importance=importance))
    assert removal.kv_groups == (tuple((group,) for group in planted_groups) if kv_ratio else ())
    assert removal.neurons == tuple((neuron,) for neuron in planted_neurons)
    torch.testing.assert_close(logits(smaller, TOKENS), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_permuted_units_are_chosen_permuted(architecture):
    model, shuffled = (tiny_model(architecture, dtype=torch.float64) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    groups = model.config.num_key_value_heads
    orders = []
    with torch.no_grad():
        for block in shuffled.model.layers:
            group_order = torch.randperm(groups, generator=generator)
            neuron_order = torch.randperm(48, generator=generator)
            orders.append((group_order.tolist(), neuron_order.tolist()))
            attention, mlp = block.self_attn, block.mlp
            for name in ("q_proj", "k_proj", "v_proj"):
                linear = getattr(attention, name)
                tensors = [linear.weight, linear.bias]
                if architecture in NORMS_ACROSS_HEADS and name != "v_proj":
                    tensors.append(getattr(attention, name.replace("proj", "norm")).weight)
                for tensor in tensors:
                    if tensor is not None:
                        tensor.copy_(tensor.unflatten(0, (groups, -1))[group_order].flatten(0, 1))
            columns = attention.o_proj.weight
            columns.copy_(columns.unflatten(1, (groups, -1))[:, group_order].flatten(1))
            mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[neuron_order])
            mlp.up_proj.weight.copy_(mlp.up_proj.weight[neuron_order])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, neuron_order])
    torch.testing.assert_close(logits(shuffled, TOKENS), logits(model, TOKENS), rtol=0, atol=1e-10)
    options = Options(ratio=0.5)
    (smaller, removal), (smaller_shuffled, removal_shuffled) = pruned(model, options), pruned(shuffled, options)
    for block, (group_order, neuron_order) in enumerate(orders):
        assert {group_order[group] for group in removal_shuffled.kv_groups[block]} == set(removal.kv_groups[block])
        assert {neuron_order[neuron] for neuron in removal_shuffled.neurons[block]} == set(removal.neurons[block])
    torch.testing.assert_close(logits(smaller_shuffled, TOKENS), logits(smaller, TOKENS), rtol=0, atol=1e-10)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ratio_zero_is_the_dense_model(architecture):
    model, dense = tiny_model(architecture), tiny_model(architecture)
    smaller, _ = pruned(model, Options(ratio=0.0))
    assert dense.config.to_dict() == smaller.config.to_dict()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, smaller.state_dict()[name])
    assert torch.equal(logits(smaller, TOKENS), logits(dense, TOKENS))


def test_the_same_calibration_gives_the_same_choice():
    first, second = (pruned(tiny_model("qwen2"), Options(ratio=0.5))[1] for _ in range(2))
    assert first == second


def test_the_taylor_choice_hurts_less_than_its_opposite():
    def loss(model):
        with torch.no_grad():
            return model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.item()

    model, opposite = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    dense, statistics = loss(model), unit_scores(model, TOKENS, MASK, batch=4)
    options = Options(ratio=0.25, kv_ratio=0.0)
    lowest = choose(decoder(model), statistics, options)
    highest = choose(decoder(model), {name: -score for name, score in statistics.items()}, options)
    assert abs(loss(remove(model, lowest)) - dense) < abs(loss(remove(opposite, highest)) - dense)


def test_what_was_achieved_in_parameters():
    model = tiny_model("qwen2")
    removal = choose(decoder(model), unit_scores(model, TOKENS, MASK, batch=4), Options(ratio=0.5))
    dense = sum(parameter.numel() for parameter in model.parameters())
    removed = describe_removal(model, removal)["parameters"]["removed"]
    # One of two groups: 2 d h (1 + r) + h (2 + r) with d = 32, h = 8, r = 2; 24 of 48 neurons: 3 d each.
    assert removed == 3 * (2 * 32 * 8 * 3 + 8 * 4 + 24 * 3 * 32)
    assert dense - sum(parameter.numel() for parameter in remove(model, removal).parameters()) == removed


def test_it_is_registered():
    registered = method("llm-pruner")
    assert (registered.family, registered.contract) == ("prune", "structure")
    assert registered.needs() == {"gradients"} and registered.adds_traits == {"smaller"}
    assert registered.incompatible_with.keys() == {"factorized", "quantized", "compensated"}
