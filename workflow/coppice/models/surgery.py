"""Structural removal of key/value groups, neurons and blocks, so that stock classes load what is left.

d = hidden_size, h = head_dim, r = query heads for each key/value head. Key/value group g is key/value head g with its
query heads g r .. g r + r - 1 (`repeat_kv` repeats each key/value head r times in a row): rows g h .. (g + 1) h of k
and v, rows g r h .. (g + 1) r h of q with their biases, and the same columns of o. Norms of queries and keys that act
within a head stay. Norms across heads lose the channels of the removed heads, and then take the root mean square of
those that stay. Neuron c: row c of gate and up, column c of down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coppice.errors import UserError
from coppice.models.architectures.base import Architecture, Substitute, architecture, architecture_of, blocks, head_dim
from coppice.models.contracts import Removal, Structure
from coppice.records.base import Json


def structure(model: PreTrainedModel) -> Structure:
    """The units of a model whose blocks are all of one width."""
    config = model.config
    return Structure(config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size)


def remove(model: PreTrainedModel, removal: Removal) -> PreTrainedModel:
    """Removes the units from the model in place and returns it, with its configuration as stock classes need it.

    Indices, and the entries of `kv_groups` and `neurons`, count the blocks of the model as it comes in. A model whose
    remaining heads do not divide hidden_size comes back as its architecture's substitute, where there is one: the same
    computation on the same weights. New weights are put in place before blocks go. Raises ValueError when the removal
    does not fit the model or leaves blocks of different widths. Raises UserError when a model with biases would need a
    substitute that has none, or when a new weight does not fit its linear, which the sentence names.
    """
    units = structure(model)
    _check(removal, units)
    kv_groups, neurons = _per_block(removal.kv_groups), _per_block(removal.neurons)
    substitute = _substitute(model, units.kv_groups - kv_groups) if kv_groups else None
    if kv_groups:
        _remove_kv_groups(model, removal.kv_groups)
    if neurons:
        _remove_neurons(model, removal.neurons)
    # By the names that linears have before blocks go.
    _put_weights(model, removal)
    if removal.blocks:
        _remove_blocks(model, removal.blocks)
    return model if substitute is None else _build_substitute(model, substitute)


def describe_removal(model: PreTrainedModel, removal: Removal) -> Json:
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
            parameters += removed["kv_groups"] * _kv_group_parameters(model, block)
        if removed["neurons"]:
            parameters += removed["neurons"] * _neuron_parameters(architecture_of(model), block)
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


def _kv_group_parameters(model: PreTrainedModel, block: nn.Module) -> int:
    """2 d h (1 + r), and h for each of its heads whose projection has a bias or a norm across heads."""
    family, h, r = architecture_of(model), head_dim(model.config), _queries_per_group(model)
    q, k, v, o = family.modules(block, ("q", "k", "v", "o"))
    norms = h * (1 + r) if family.norms.across_heads else 0
    return h * (_row_parameters(k) + _row_parameters(v)) + r * h * (_row_parameters(q) + o.out_features) + norms


def _neuron_parameters(family: Architecture, block: nn.Module) -> int:
    """3 d, and one for each of gate and up that has a bias."""
    gate, up, down = family.modules(block, ("gate", "up", "down"))
    return _row_parameters(gate) + _row_parameters(up) + down.out_features


def _queries_per_group(model: PreTrainedModel) -> int:
    """r."""
    return model.config.num_attention_heads // model.config.num_key_value_heads


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
    family, h, r = architecture_of(model), head_dim(model.config), _queries_per_group(model)
    for block, groups in zip(blocks(model), removed, strict=True):
        q, k, v, o = family.modules(block, ("q", "k", "v", "o"))
        kept = _remaining(k.out_features // h, groups, k.weight.device)
        keys, queries = _channels(kept, h), _channels(kept, r * h)
        _keep_rows(k, keys)
        _keep_rows(v, keys)
        _keep_rows(q, queries)
        _keep_columns(o, queries)
        if (norms := family.norms.across_heads) is not None:
            _keep_weights(block.get_submodule(norms.query), queries)
            _keep_weights(block.get_submodule(norms.key), keys)
    # Stock classes would otherwise take d / num_attention_heads for it.
    model.config.head_dim = h
    model.config.num_key_value_heads = len(kept)
    model.config.num_attention_heads = len(kept) * r


def _remove_neurons(model: PreTrainedModel, removed: Sequence[Sequence[int]]) -> None:
    family = architecture_of(model)
    for block, neurons in zip(blocks(model), removed, strict=True):
        gate, up, down = family.modules(block, ("gate", "up", "down"))
        kept = _remaining(down.in_features, neurons, down.weight.device)
        _keep_rows(gate, kept)
        _keep_rows(up, kept)
        _keep_columns(down, kept)
        mlp: Any = block.get_submodule(family.mlp)
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
    config, family = model.config, architecture_of(model)
    kept = [index for index in range(config.num_hidden_layers) if index not in removed]
    model.set_submodule(family.blocks, nn.ModuleList(blocks(model)[index] for index in kept))
    # The cache finds a block's keys and values by this number.
    for index, block in enumerate(blocks(model)):
        attention: Any = block.get_submodule(family.attention)
        attention.layer_idx = index
    config.num_hidden_layers = len(kept)
    for name in family.per_block:
        if (entries := getattr(config, name, None)) is not None:
            setattr(config, name, [entries[index] for index in kept])
    for name in family.leading_blocks:
        setattr(config, name, sum(index < getattr(config, name) for index in kept))


def _remaining(count: int, removed: Sequence[int], device: torch.device) -> Tensor:
    gone = set(removed)
    return torch.tensor([index for index in range(count) if index not in gone], device=device)


def _channels(units: Tensor, width: int) -> Tensor:
    """[u] units -> [u width] the channels u width .. u width + width - 1 of each."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _keep_weights(norm: nn.Module, channels: Tensor) -> None:
    norm.weight = _select(norm.get_parameter("weight"), 0, channels)


def _keep_rows(linear: nn.Linear, rows: Tensor) -> None:
    linear.weight = _select(linear.weight, 0, rows)
    if linear.bias is not None:
        linear.bias = _select(linear.bias, 0, rows)
    linear.out_features = len(rows)


def _keep_columns(linear: nn.Linear, columns: Tensor) -> None:
    linear.weight = _select(linear.weight, 1, columns)
    linear.in_features = len(columns)


def _select(parameter: Tensor, dimension: int, indices: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(dimension, indices), requires_grad=parameter.requires_grad)


def _substitute(model: PreTrainedModel, kv_groups: int) -> Substitute | None:
    """What a model with so many key/value groups comes back as; None where it stays what it is."""
    config, substitute = model.config, architecture_of(model).substitute
    heads = kv_groups * _queries_per_group(model)
    if substitute is None or config.hidden_size % heads == 0:
        return None
    if any(getattr(config, name) for name in substitute.biases):
        raise UserError(
            f"{heads} attention heads would be left, but a {config.model_type} model with biases can only be saved "
            f"with a number of heads that divides its hidden_size of {config.hidden_size}; choose a kv_ratio that "
            "leaves such a number."
        )
    return substitute


def _build_substitute(model: PreTrainedModel, substitute: Substitute) -> PreTrainedModel:
    config_class, model_class = architecture(substitute.model_type).classes()
    fields = {name: value for name, value in model.config.to_dict().items() if name not in substitute.dropped}
    config = config_class(**fields | dict(substitute.changed))
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        new = model_class(config)
    # The modules themselves move, so that what is set on them, and what is tied between them, stays.
    for name, module in list(model.named_modules()):
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own:
            new.set_submodule(name, module)
    rotary: Any = new.get_submodule(architecture_of(new).rotary)
    rotary.config = config
    new.generation_config = model.generation_config
    return new.train(model.training)
