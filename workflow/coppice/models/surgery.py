"""Structural removal of key/value groups, neurons and blocks.

Where all blocks end equally wide, stock classes load what is left. Where they do not, the configuration states the
largest widths that remain, as for caches that must hold every block, and compression.json the shapes that differ.

d = hidden_size, h = head_dim, r = query heads for each key/value head. Key/value group g is key/value head g with its
query heads g r .. g r + r - 1 (`repeat_kv` repeats each key/value head r times in a row): rows g h .. (g + 1) h of k
and v, rows g r h .. (g + 1) r h of q with their biases, and the same columns of o. Norms of queries and keys that act
within a head stay. Norms across heads lose the channels of the removed heads, and then take the root mean square of
those that stay. Neuron c: row c of gate and up, column c of down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coppice.errors import UserError
from coppice.models.architectures.base import Architecture, Substitute, architecture, architecture_of, blocks, head_dim
from coppice.models.contracts import Removal, Structure
from coppice.records.base import Json


class Widths(NamedTuple):
    """The key/value groups and neurons of one block."""

    kv_groups: int
    neurons: int


def structure(model: PreTrainedModel) -> Structure:
    """The units of a model: its blocks, and those of the widest block of each kind."""
    config = model.config
    return Structure(config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size)


def block_widths(model: PreTrainedModel) -> list[Widths]:
    """The widths of the blocks, in order."""
    family, h = architecture_of(model), head_dim(model.config)
    linears = (family.modules(block, ("k", "down")) for block in blocks(model))
    return [Widths(k.out_features // h, down.in_features) for k, down in linears]


def remove(model: PreTrainedModel, removal: Removal) -> PreTrainedModel:
    """Removes the units from the model in place and returns it, with its configuration as stock classes need it.

    Indices, and the entries of `kv_groups` and `neurons`, count the blocks of the model as it comes in. A model whose
    remaining heads do not divide hidden_size comes back as its architecture's substitute, where there is one: the same
    computation on the same weights. New weights are put in place before blocks go. Raises UserError when the removal
    does not fit the model, when a model with biases would need a substitute that has none, or when a new weight does
    not fit its linear or is not finite there, which the sentence names.
    """
    widths = block_widths(model)
    _check(removal, widths)
    removed = _removed_widths(removal, len(widths))
    left = [
        Widths(width.kv_groups - fewer.kv_groups, width.neurons - fewer.neurons)
        for index, (width, fewer) in enumerate(zip(widths, removed, strict=True))
        if index not in removal.blocks
    ]
    largest = Widths(max(width.kv_groups for width in left), max(width.neurons for width in left))
    substitute = _substitute(model, largest.kv_groups)
    if any(removal.kv_groups):
        _remove_kv_groups(model, removal.kv_groups)
    if any(removal.neurons):
        _remove_neurons(model, removal.neurons)
    # By the names that linears have before blocks go.
    _put_weights(model, removal)
    if removal.blocks:
        _remove_blocks(model, removal.blocks)
    _set_widths(model, largest)
    return model if substitute is None else _build_substitute(model, substitute)


def describe_removal(model: PreTrainedModel, removal: Removal) -> Json:
    """What the removal will take from the model, before it does.

    units: of each kind how many are removed of how many, and the share. Key/value groups and neurons: in each block
    that stays, where these blocks are alike; else lists over all blocks, of which removed ones lose all, and the share
    is that of the blocks that stay together. parameters: how many are removed, and their share of the blocks'
    parameters and of the model's (tied embeddings counted once). Raises UserError when the removal does not fit the
    model.
    """
    widths, family = block_widths(model), architecture_of(model)
    _check(removal, widths)
    removed = _removed_widths(removal, len(widths))
    kept = [index for index in range(len(widths)) if index not in removal.blocks]
    counts = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks(model)]
    parameters = sum(counts[index] for index in removal.blocks)
    for index in kept:
        block = blocks(model)[index]
        parameters += removed[index].kv_groups * _kv_group_parameters(model, block)
        parameters += removed[index].neurons * _neuron_parameters(family, block)
    return {
        "units": {
            "blocks": {
                "removed": len(removal.blocks),
                "of": len(widths),
                "share": len(removal.blocks) / len(widths),
            },
            "kv_groups": _units([each.kv_groups for each in removed], [each.kv_groups for each in widths], kept),
            "neurons": _units([each.neurons for each in removed], [each.neurons for each in widths], kept),
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


def _removed_widths(removal: Removal, count: int) -> list[Widths]:
    """How many units go from each of the `count` blocks."""
    nothing: tuple[tuple[int, ...], ...] = ((),) * count
    rows = zip(removal.kv_groups or nothing, removal.neurons or nothing, strict=True)
    return [Widths(len(groups), len(neurons)) for groups, neurons in rows]


def _units(removed: list[int], of: list[int], kept: list[int]) -> dict[str, Any]:
    """The record of one kind of units, from those of each block and the indices of the blocks that stay."""
    pairs = [(removed[index], of[index]) for index in kept]
    if len(set(pairs)) == 1:
        number, whole = pairs[0]
        return {"removed": number, "of": whole, "share": number / whole}
    gone = [removed[index] if index in kept else of[index] for index in range(len(of))]
    return {"removed": gone, "of": of, "share": sum(number for number, _ in pairs) / sum(whole for _, whole in pairs)}


def _check(removal: Removal, widths: Sequence[Widths]) -> None:
    _check_indices("blocks", removal.blocks, len(widths))
    for kind in ("kv_groups", "neurons"):
        rows = getattr(removal, kind)
        if not rows:
            continue
        if len(rows) != len(widths):
            raise UserError(f"A removal of {kind} names {len(rows)} blocks, but the model has {len(widths)}.")
        for index, (row, width) in enumerate(zip(rows, widths, strict=True)):
            _check_indices(f"{kind} of block {index}", row, getattr(width, kind))


def _check_indices(what: str, indices: Sequence[int], count: int) -> None:
    if len(set(indices)) < len(indices):
        raise UserError(f"A removal names one of the {what} twice.")
    if not all(isinstance(index, int) for index in indices):
        raise UserError(f"A removal names {what} that are not whole numbers.")
    if indices and not 0 <= min(indices) <= max(indices) < count:
        raise UserError(f"A removal names {what} outside 0..{count - 1}.")
    if len(indices) >= count:
        raise UserError(f"A removal takes all {count} {what}; at least one must stay.")


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


def _set_widths(model: PreTrainedModel, largest: Widths) -> None:
    """The configuration of a model whose widest block of each kind is `largest`."""
    config = model.config
    config.intermediate_size = largest.neurons
    if largest.kv_groups != config.num_key_value_heads:
        h, r = head_dim(config), _queries_per_group(model)
        # Stock classes would otherwise take d / num_attention_heads for it.
        config.head_dim = h
        config.num_key_value_heads = largest.kv_groups
        config.num_attention_heads = largest.kv_groups * r


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
        if not isinstance(weight, Tensor):
            raise UserError(f"{name}: the method returned {type(weight).__name__} as its new weight, not a tensor.")
        if weight.shape != linear.weight.shape:
            raise UserError(
                f"{name}: the method returned a new weight of shape {tuple(weight.shape)}, and after the removal the "
                f"linear has {tuple(linear.weight.shape)}."
            )
        linear.weight.copy_(weight)
        if not torch.isfinite(linear.weight).all():
            raise UserError(
                f"{name}: the method returned a new weight with NaN or infinite values, as {linear.weight.dtype}."
            )


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
    """What a model comes back as whose widest block has so many key/value groups; None where it stays what it is."""
    config, substitute = model.config, architecture_of(model).substitute
    heads = kv_groups * _queries_per_group(model)
    unchanged = heads == config.num_attention_heads
    if substitute is None or unchanged or config.hidden_size % heads == 0:
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
