"""Rotation of a decoder's residual stream and of the values within its heads, without changing what it computes.

d = hidden_size, h = head_dim. With Q [d, d] and R [h, h] orthogonal, activations are rows x, and linears compute
x W^T + b:

- the weight of each norm goes into the linears that read from it (q, k and v; gate and up; the head), and becomes 1: an
  RMS norm without weight commutes with Q;
- embeddings E become E Q, what reads from the residual stream (q, k, v, gate, up, the head) W Q, and what writes to it
  (o, down) Q^T W, its bias b Q;
- in each key/value head, v's rows V become R^T V and its biases b R; for each query head, o's columns O become O R. One
  R serves all heads, so that query heads may share values. As the weights of attention add up to 1, biases of v may.

Norms of queries and keys act after what is rotated, and stay. The inputs of down are not rotated: the product with the
gate, element by element, comes before them and commutes with no rotation. Where a norm comes between what o or down
computes and the residual stream, no linear can take its weight, and no rotation of the stream is exact.
Tied embeddings are untied first, as the norm before the head goes into one of the two only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coppice.errors import UserError
from coppice.models.architectures.base import (
    ATTENTION_READERS,
    MLP_READERS,
    Architecture,
    architecture_of,
    blocks,
    head_dim,
)
from coppice.records.base import Json


@runtime_checkable
class RotationOptions(Protocol):
    """What is read of a rotation method's options: whether the values within heads are rotated too."""

    @property
    def heads(self) -> bool: ...


# Rows of a matrix that are in float64 at a time: vocabularies are long.
_ROWS = 8192


@torch.no_grad()
def rotate(model: PreTrainedModel, rotation: Callable[[int, Any], Tensor], options: RotationOptions) -> PreTrainedModel:
    """Rotates the model in place and returns it; rotation(width, options) gives the matrix, options have `heads`.

    Products are taken in float64 on the weights' device and rounded once to their type.
    Raises UserError when the architecture has norms between what its blocks compute and the residual stream.
    """
    family = architecture_of(model)
    _require_exact(family)
    if model.config.tie_word_embeddings:
        _untie(model, family)
    head = cast(nn.Linear, model.get_submodule(family.head))
    device = head.weight.device
    q = rotation(model.config.hidden_size, options).to(device, torch.float64)
    r = None
    if options.heads:
        r = rotation(head_dim(model.config), options).to(device, torch.float64)
    _rotate_columns(model.get_parameter(f"{family.embeddings}.weight"), q)
    for block in blocks(model):
        for norm, roles in ((family.norms.before_attention, ATTENTION_READERS), (family.norms.before_mlp, MLP_READERS)):
            weight = None if norm is None else block.get_parameter(f"{norm}.weight")
            _rotate_readers(weight, family.modules(block, roles), q)
        v, o, down = family.modules(block, ("v", "o", "down"))
        _rotate_writer(o, q)
        _rotate_writer(down, q)
        if r is not None:
            _rotate_values(v, o, r)
    _rotate_readers(model.get_parameter(f"{family.final_norm}.weight"), [head], q)
    return model


def describe_rotation(model: PreTrainedModel, options: RotationOptions) -> Json:
    """What the rotation will do to the model, before it does.

    residual_width: d. head_width: h, or None where heads are not rotated. norms_folded: how many. untied: whether
    the head gets weights of its own, and parameters_added how many those are.
    """
    family, tied = architecture_of(model), model.config.tie_word_embeddings
    folded = sum(norm is not None for norm in (family.norms.before_attention, family.norms.before_mlp))
    return {
        "residual_width": model.config.hidden_size,
        "head_width": head_dim(model.config) if options.heads else None,
        "norms_folded": folded * len(blocks(model)) + 1,
        "untied": tied,
        "parameters_added": model.get_parameter(family.head_weight).numel() if tied else 0,
    }


def _require_exact(family: Architecture) -> None:
    after = [norm for norm in (family.norms.after_attention, family.norms.after_mlp) if norm is not None]
    if after:
        raise UserError(
            f"The residual stream of a {family.model_type} model cannot be rotated: the weights of "
            f"{' and '.join(after)} act on what is added to it and commute with no rotation. "
            "Leave the step out for this model."
        )


def _untie(model: PreTrainedModel, family: Architecture) -> None:
    model.config.tie_word_embeddings = False
    head = cast(nn.Linear, model.get_submodule(family.head))
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    # What transformers ties again and leaves out of a file is read off the configuration once, when a model is built.
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _rotate_readers(norm: Tensor | None, readers: list[nn.Linear], q: Tensor) -> None:
    """W diag(norm) Q, or W Q where they read the stream itself."""
    rotation = q if norm is None else norm.double()[:, None] * q
    for linear in readers:
        _rotate_columns(linear.weight, rotation)
    if norm is not None:
        norm.fill_(1)


def _rotate_writer(linear: nn.Linear, q: Tensor) -> None:
    """Q^T W and b Q."""
    _rotate_columns(linear.weight.T, q)
    if linear.bias is not None:
        linear.bias.copy_(linear.bias.double() @ q)


def _rotate_values(v: nn.Linear, o: nn.Linear, r: Tensor) -> None:
    """Each head's rows R^T V and biases b R of v, and its columns O R of o."""
    h = len(r)
    for row in v.weight.split(h):
        _rotate_columns(row.T, r)
    if v.bias is not None:
        v.bias.copy_((v.bias.double().view(-1, h) @ r).flatten())
    for column in o.weight.split(h, dim=1):
        _rotate_columns(column, r)


def _rotate_columns(matrix: Tensor, rotation: Tensor) -> None:
    """M <- M rotation, in place, a part of the rows at a time."""
    for rows in matrix.split(_ROWS):
        rows.copy_(rows.double() @ rotation)
