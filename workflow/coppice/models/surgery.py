"""Structural removal of key/value groups, neurons and blocks, so that stock classes load what is left.

For Llama, Mistral, Qwen2 and Qwen3. d = hidden_size, h = head_dim, r = query heads for each key/value head.
Key/value group g is key/value head g with its query heads g r .. g r + r - 1 (`repeat_kv` repeats each key/value head
r times in a row): rows g h .. (g + 1) h of k and v, rows g r h .. (g + 1) r h of q with their biases, and the same
columns of o. q_norm and k_norm of Qwen3 act within a head and stay. Neuron c: row c of gate and up, column c of down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, MistralConfig, MistralForCausalLM, PreTrainedModel

from coppice.errors import UserError
from coppice.methods.contracts import Removal, Structure
from coppice.models.layers import blocks

# Fields of a Llama's configuration that a Mistral's does not have.
_LLAMA_ONLY = ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp")


def structure(model: PreTrainedModel) -> Structure:
    """The units of a model whose blocks are all of one width."""
    config = model.config
    return Structure(config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size)


def remove(model: PreTrainedModel, removal: Removal) -> PreTrainedModel:
    """Removes the units from the model in place and returns it, with its configuration as stock classes need it.

    Indices, and the entries of `kv_groups` and `neurons`, count the blocks of the model as it comes in.
    A Llama whose remaining heads do not divide hidden_size, which LlamaConfig refuses, comes back as a Mistral without
    a window: the same computation on the same weights. New weights are put in place last.
    Raises ValueError when the removal does not fit the model or leaves blocks of different widths, and UserError when a
    Llama with biases would have to come back as a Mistral, which has none, or when a new weight does not fit the linear
    that it is for, which the sentence names.
    """
    units = structure(model)
    _check(removal, units)
    kv_groups, neurons = _per_block(removal.kv_groups), _per_block(removal.neurons)
    becomes_mistral = kv_groups > 0 and _refused_by_llama(model, units.kv_groups - kv_groups)
    if kv_groups:
        _remove_kv_groups(model, removal.kv_groups)
    if neurons:
        _remove_neurons(model, removal.neurons)
    # By the names that linears have before blocks go.
    _put_weights(model, removal)
    if removal.blocks:
        _remove_blocks(model, removal.blocks)
    return _as_mistral(model) if becomes_mistral else model


def achieved(model: PreTrainedModel, removal: Removal) -> dict[str, Any]:
    """What the removal will take from the model, before it does.

    units: of each kind how many are removed of how many (key/value groups and neurons: in each block that stays), and
    the share. parameters: how many are removed, and their share of the blocks' parameters and of the model's (tied
    embeddings counted once).
    """
    units = structure(model)
    removed = {
        "blocks": len(removal.blocks),
        "kv_groups": _per_block(removal.kv_groups),
        "neurons": _per_block(removal.neurons),
    }
    counts = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks(model)]
    parameters = sum(counts[index] for index in removal.blocks)
    for index, block in enumerate(blocks(model)):
        if index in removal.blocks:
            continue
        if removed["kv_groups"]:
            parameters += removed["kv_groups"] * _kv_group_parameters(block.self_attn)
        if removed["neurons"]:
            parameters += removed["neurons"] * _neuron_parameters(block.mlp)
    return {
        "units": {
            kind: {"removed": number, "of": getattr(units, kind), "share": number / getattr(units, kind)}
            for kind, number in removed.items()
        },
        "parameters": {
            "removed": parameters,
            "share_of_blocks": parameters / sum(counts),
            "share_of_model": parameters / sum(parameter.numel() for parameter in model.parameters()),
        },
    }


def _kv_group_parameters(attention: nn.Module) -> int:
    """2 d h (1 + r), and h for each of its heads whose projection has a bias."""
    h, r = attention.head_dim, attention.num_key_value_groups
    rows = _row_parameters(attention.k_proj) + _row_parameters(attention.v_proj)
    return h * rows + r * h * (_row_parameters(attention.q_proj) + attention.o_proj.out_features)


def _neuron_parameters(mlp: nn.Module) -> int:
    """3 d, and one for each of gate and up that has a bias."""
    return _row_parameters(mlp.gate_proj) + _row_parameters(mlp.up_proj) + mlp.down_proj.out_features


def _row_parameters(linear: nn.Linear) -> int:
    return linear.in_features + (linear.bias is not None)


def _per_block(removed: Sequence[Sequence[int]]) -> int:
    return len(removed[0]) if removed else 0


def _check(removal: Removal, units: Structure) -> None:
    _check_indices("blocks", removal.blocks, units.blocks)
    for kind in ("kv_groups", "neurons"):
        rows, count = getattr(removal, kind), getattr(units, kind)
        if not rows:
            continue
        if len(rows) != units.blocks:
            raise ValueError(f"A removal of {kind} names {len(rows)} blocks, but the model has {units.blocks}.")
        numbers = {len(row) for row in rows}
        if len(numbers) > 1:
            raise ValueError(
                f"A removal takes {min(numbers)} {kind} from one block and {max(numbers)} from another; it must take "
                "equally many from each."
            )
        for index, row in enumerate(rows):
            _check_indices(f"{kind} of block {index}", row, count)


def _check_indices(what: str, indices: Sequence[int], count: int) -> None:
    if len(set(indices)) < len(indices):
        raise ValueError(f"A removal names one of the {what} twice.")
    if indices and not 0 <= min(indices) <= max(indices) < count:
        raise ValueError(f"A removal names {what} outside 0..{count - 1}.")
    if len(indices) >= count:
        raise ValueError(f"A removal takes all {count} {what}; at least one must stay.")


def _remove_kv_groups(model: PreTrainedModel, removed: Sequence[Sequence[int]]) -> None:
    for block, groups in zip(blocks(model), removed, strict=True):
        attention = block.self_attn
        h, r = attention.head_dim, attention.num_key_value_groups
        kept = _kept(attention.k_proj.out_features // h, groups, attention.k_proj.weight.device)
        key_value, query = _channels(kept, h), _channels(kept, r * h)
        _keep_rows(attention.k_proj, key_value)
        _keep_rows(attention.v_proj, key_value)
        _keep_rows(attention.q_proj, query)
        _keep_columns(attention.o_proj, query)
    # Stock classes would otherwise take d / num_attention_heads for it.
    model.config.head_dim = h
    model.config.num_key_value_heads = len(kept)
    model.config.num_attention_heads = len(kept) * r


def _remove_neurons(model: PreTrainedModel, removed: Sequence[Sequence[int]]) -> None:
    for block, neurons in zip(blocks(model), removed, strict=True):
        mlp = block.mlp
        kept = _kept(mlp.down_proj.in_features, neurons, mlp.down_proj.weight.device)
        _keep_rows(mlp.gate_proj, kept)
        _keep_rows(mlp.up_proj, kept)
        _keep_columns(mlp.down_proj, kept)
        mlp.intermediate_size = len(kept)
    model.config.intermediate_size = len(kept)


@torch.no_grad()
def _put_weights(model: PreTrainedModel, removal: Removal) -> None:
    modules = dict(model.named_modules())
    removed = {id(module) for index in removal.blocks for module in blocks(model)[index].modules()}
    for name, weight in removal.weights.items():
        linear = modules.get(name)
        if type(linear) is not nn.Linear or id(linear) in removed:
            raise UserError(
                f"{name}: the method returned a new weight for it, and no linear of that name stays whole in the model."
            )
        if weight.shape != linear.weight.shape:
            raise UserError(
                f"{name}: the method returned a new weight of shape {tuple(weight.shape)}, and after the removal the "
                f"linear has {tuple(linear.weight.shape)}."
            )
        linear.weight.copy_(weight)


def _remove_blocks(model: PreTrainedModel, removed: Sequence[int]) -> None:
    config = model.config
    kept = [index for index in range(config.num_hidden_layers) if index not in removed]
    model.model.layers = nn.ModuleList(blocks(model)[index] for index in kept)
    # The cache finds a block's keys and values by this number.
    for index, block in enumerate(blocks(model)):
        block.self_attn.layer_idx = index
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in kept]
    if hasattr(config, "max_window_layers"):
        config.max_window_layers = sum(index < config.max_window_layers for index in kept)


def _kept(count: int, removed: Sequence[int], device: torch.device) -> Tensor:
    gone = set(removed)
    return torch.tensor([index for index in range(count) if index not in gone], device=device)


def _channels(units: Tensor, width: int) -> Tensor:
    """[u] units -> [u width] the channels u width .. u width + width - 1 of each."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _keep_rows(linear: nn.Linear, rows: Tensor) -> None:
    linear.weight = _selected(linear.weight, 0, rows)
    if linear.bias is not None:
        linear.bias = _selected(linear.bias, 0, rows)
    linear.out_features = len(rows)


def _keep_columns(linear: nn.Linear, columns: Tensor) -> None:
    linear.weight = _selected(linear.weight, 1, columns)
    linear.in_features = len(columns)


def _selected(parameter: nn.Parameter, dimension: int, indices: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(dimension, indices), requires_grad=parameter.requires_grad)


def _refused_by_llama(model: PreTrainedModel, kv_groups: int) -> bool:
    """Whether LlamaConfig refuses that many key/value groups: it wants hidden_size % num_attention_heads == 0."""
    config = model.config
    heads = kv_groups * (config.num_attention_heads // config.num_key_value_heads)
    if not isinstance(config, LlamaConfig) or config.hidden_size % heads == 0:
        return False
    if config.attention_bias or config.mlp_bias:
        raise UserError(
            f"{heads} attention heads would be left, but a Llama with biases can only be saved with a number of heads "
            f"that divides its hidden_size of {config.hidden_size}; choose a kv_ratio that leaves such a number."
        )
    return True


def _as_mistral(model: PreTrainedModel) -> MistralForCausalLM:
    fields = {name: value for name, value in model.config.to_dict().items() if name not in _LLAMA_ONLY}
    config = MistralConfig(**fields | {"sliding_window": None})
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        mistral = MistralForCausalLM(config)
    # The modules themselves move, so that what is marked on them, and what is tied between them, stays.
    for name, module in list(model.named_modules()):
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own:
            mistral.set_submodule(name, module)
    mistral.model.rotary_emb.config = config
    mistral.generation_config = model.generation_config
    return mistral.train(model.training)
