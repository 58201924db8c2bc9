"""Rotation of a decoder's residual stream and of the values within its heads, without changing what it computes.

For Llama, Mistral, Qwen2 and Qwen3. d = hidden_size, h = head_dim. With Q [d, d] and R [h, h] orthogonal, activations
are rows x, and linears compute x W^T + b:

- the weight of each norm goes into the linears that read from it (q, k and v; gate and up; lm_head), and becomes 1: an
  RMS norm without weight commutes with Q;
- embeddings E become E Q, what reads from the residual stream (q, k, v, gate, up, lm_head) W Q, and what writes to it
  (o, down) Q^T W, its bias b Q;
- in each key/value head, v's rows V become R^T V and its biases b R; for each query head, o's columns O become O R. One
  R serves all heads, so that query heads may share values. As the weights of attention add up to 1, biases of v may.

The norms of Qwen3 on queries and keys act within a head, behind what is rotated, and stay. The inputs of down are not
rotated: the product with the gate, element by element, stands before them and commutes with no rotation.
Tied embeddings are untied first, as the norm before lm_head goes into one of the two only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coppice.methods.options import MethodOptions
from coppice.models.modules import blocks

# Rows of a matrix that are in float64 at a time: vocabularies are long.
_ROWS = 8192


@torch.no_grad()
def rotate(
    model: PreTrainedModel, rotation: Callable[[int, MethodOptions], Tensor], options: MethodOptions
) -> PreTrainedModel:
    """Rotates the model in place and returns it; rotation(width, options) gives the matrix, options have `heads`.

    Products are taken in float64 on the weights' device and rounded once to their type.
    """
    decoder, device = model.model, model.lm_head.weight.device
    if model.config.tie_word_embeddings:
        _untie(model)
    q = rotation(model.config.hidden_size, options).to(device, torch.float64)
    r = None
    if options.heads:
        r = rotation(blocks(model)[0].self_attn.head_dim, options).to(device, torch.float64)
    _rotate_columns(decoder.embed_tokens.weight, q)
    for block in blocks(model):
        attention, mlp = block.self_attn, block.mlp
        _rotate_readers(block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), q)
        _rotate_readers(block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), q)
        _rotate_writer(attention.o_proj, q)
        _rotate_writer(mlp.down_proj, q)
        if r is not None:
            _rotate_values(attention, r)
    _rotate_readers(decoder.norm, (model.lm_head,), q)
    return model


def achieved(model: PreTrainedModel, options: MethodOptions) -> dict[str, Any]:
    """What the rotation will do to the model, before it does.

    residual_width: d. head_width: h, or None where heads are not rotated. norms_folded: how many. untied: whether
    lm_head gets weights of its own, and parameters_added how many those are.
    """
    tied = model.config.tie_word_embeddings
    return {
        "residual_width": model.config.hidden_size,
        "head_width": blocks(model)[0].self_attn.head_dim if options.heads else None,
        "norms_folded": 2 * len(blocks(model)) + 1,
        "untied": tied,
        "parameters_added": model.lm_head.weight.numel() if tied else 0,
    }


def _untie(model: PreTrainedModel) -> None:
    model.config.tie_word_embeddings = False
    head = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(head.detach().clone(), requires_grad=head.requires_grad)
    # What transformers ties again and leaves out of a file is read off the configuration once, when a model is built.
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _rotate_readers(norm: nn.Module, readers: tuple[nn.Linear, ...], q: Tensor) -> None:
    """W diag(norm) Q."""
    rotation = norm.weight.double()[:, None] * q
    for linear in readers:
        _rotate_columns(linear.weight, rotation)
    norm.weight.fill_(1)


def _rotate_writer(linear: nn.Linear, q: Tensor) -> None:
    """Q^T W and b Q."""
    _rotate_columns(linear.weight.T, q)
    if linear.bias is not None:
        linear.bias.copy_(linear.bias.double() @ q)


def _rotate_values(attention: nn.Module, r: Tensor) -> None:
    """Each head's rows R^T V and biases b R of v, and its columns O R of o."""
    v, o, h = attention.v_proj, attention.o_proj, len(r)
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
