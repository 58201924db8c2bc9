"""The walk over a model's blocks: hidden states of all windows wait on the CPU, and one block is on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coppice.data.windows import Windows
from coppice.errors import UserError
from coppice.models.architectures.base import architecture_of, blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS_IN_A_BATCH = 8192


def as_tensors(windows: Windows) -> tuple[Tensor, Tensor]:
    """tokens [w, t] int64 and kept [w, t] bool, True where a position is a token and not padding."""
    return torch.as_tensor(windows.tokens).long(), torch.as_tensor(windows.documents) >= 0


def windows_in_a_batch(tokens: Tensor) -> int:
    """How many of the windows [w, t] go through the model at once."""
    return max(1, TOKENS_IN_A_BATCH // tokens.shape[1])


@dataclass
class Batch:
    """Hidden states [b, t, hidden] on their way through the blocks, and the other arguments of each block's forward."""

    hidden: Tensor
    kept: Tensor
    arguments: list[Mapping[str, object]]


@torch.no_grad()
def embed(model: PreTrainedModel, tokens: Tensor, kept: Tensor) -> list[Batch]:
    """The inputs of the first block, in batches, with every block's own masks and positions.

    The model's own forward computes them: it runs once with each block replaced by the identity, and what it hands to
    the blocks is recorded. So sliding windows and padding are treated as the architecture treats them.
    """
    family = architecture_of(model)
    decoder, rows = model.get_submodule(family.decoder), windows_in_a_batch(tokens)
    batches = []
    for first in range(0, len(tokens), rows):
        part, part_kept = tokens[first : first + rows], kept[first : first + rows]
        arguments: list[Mapping[str, object]] = []
        with _identity_blocks(model, arguments):
            attention_mask = None if part_kept.all() else part_kept.long()
            embedded = model.get_submodule(family.embeddings)(part)
            decoder(inputs_embeds=embedded, attention_mask=attention_mask, use_cache=False)
        batches.append(Batch(embedded, part_kept, arguments))
    return batches


@contextmanager
def _identity_blocks(model: PreTrainedModel, arguments: list[Mapping[str, object]]) -> Iterator[None]:
    def record(module: nn.Module, positional: tuple, keywords: Mapping[str, object]) -> None:
        arguments.append(keywords)

    def identity(hidden_states: Tensor, **keywords: Any) -> Tensor:
        return hidden_states

    hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks(model)]
    for block in blocks(model):
        block.forward = identity
    try:
        yield
    finally:
        for block, hook in zip(blocks(model), hooks, strict=True):
            hook.remove()
            del block.forward


@torch.no_grad()
def run_block(model: PreTrainedModel, index: int, batch: Batch, device: str) -> Tensor:
    """The output [b, t, hidden] of one block, which is on the device, on the CPU.

    Raises UserError when it is not finite.
    """
    output = blocks(model)[index](batch.hidden.to(device), **_to(batch.arguments[index], device))
    output = (output[0] if isinstance(output, tuple) else output).cpu()
    require_finite(output[batch.kept], architecture_of(model).block_name(index), "output")
    return output


def _to(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(entry, device) for key, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(_to(entry, device) for entry in value)
    return value


def require_finite(values: Tensor, module: str, what: str) -> None:
    """Raises UserError, naming the module, when an activation is NaN or infinite."""
    if not torch.isfinite(values).all():
        raise UserError(
            f"The {what} of {module} holds NaN or infinite values on the calibration text; check the node's weights."
        )
