"""Moments of every distinct input of the blocks' linears, block by block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from coppice.calibration.reading import MOMENT_FIELDS, block_file
from coppice.calibration.walk import Batch, embed, require_finite, run_block
from coppice.models import modules
from coppice.models.architectures.base import architecture_of, blocks
from coppice.models.contracts import LinearStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Moments:
    """Sums over tokens of one linear's inputs x [tokens, n], in float64 whatever the activations' dtype."""

    def __init__(self) -> None:
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        x = x.float()
        parts = ((x.T @ x).double(), x.sum(0).double(), x.abs().sum(0).double(), x.abs().amax(0))
        if self.tokens == 0:
            self.square, self.sum, self.absolute, self.largest = parts
        else:
            self.square += parts[0]
            self.sum += parts[1]
            self.absolute += parts[2]
            self.largest = torch.maximum(self.largest, parts[3])
        self.tokens += len(x)

    def statistics(self) -> LinearStatistics:
        return LinearStatistics(
            second_moment=(self.square / self.tokens).float(),
            mean=(self.sum / self.tokens).float(),
            absmean=(self.absolute / self.tokens).float(),
            absmax=self.largest,
            tokens=self.tokens,
        )


def gather_block(
    model: PreTrainedModel, index: int, batches: list[Batch], device: str
) -> tuple[dict[str, LinearStatistics], dict[str, str], list[Tensor]]:
    """Moments of every distinct input of a block's linears, who shares whose, and the block's outputs by batch.

    Returns:
        statistics by the name of the first linear that sees an input; aliases: every linear's name -> that name.
    """
    block, family = blocks(model)[index], architecture_of(model)
    targets = {**modules.replaceable_modules(block), **modules.weight_matrices(block)}
    moments: dict[str, Moments] = {}
    aliases: dict[str, str] = {}
    seen: dict[int, tuple[str, Tensor]] = {}
    kept: Tensor | None = None

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if id(x) not in seen:
                # The tensor is held until the batch ends, so that its id stays its own.
                seen[id(x)] = (name, x)
                # A site of a tensor train sees several vectors of each token.
                used = x[kept].flatten(0, -2)
                require_finite(used, family.full_name(index, name), "input")
                moments.setdefault(name, Moments()).add(used)
            aliases[name] = seen[id(x)][0]

        return hook

    hooks = [module.register_forward_pre_hook(observe(name)) for name, module in targets.items()]
    outputs = []
    try:
        for batch in batches:
            kept = batch.kept.to(device)
            outputs.append(run_block(model, index, batch, device))
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    # Each sum in float64 goes as its statistics come, so that not all of both are held at once.
    return {name: moments.pop(name).statistics() for name in list(moments)}, aliases, outputs


def gather(
    model: PreTrainedModel, tokens: Tensor, kept: Tensor, device: str, output: Path
) -> dict[str, dict[str, str]]:
    """Writes block-NNN.safetensors with `<linear>.<field>`; returns each block's aliases."""
    batches = embed(model, tokens, kept)
    aliases = {}
    for index, block in enumerate(blocks(model)):
        block.to(device)
        aliases[str(index)] = _write_block(model, index, batches, device, output / block_file(index))
        block.to("cpu")
    return aliases


def _write_block(model: PreTrainedModel, index: int, batches: list[Batch], device: str, path: Path) -> dict[str, str]:
    """One block's part of `gather`; the batches go on to the block's outputs."""
    statistics, aliases, outputs = gather_block(model, index, batches, device)
    tensors = {
        f"{name}.{field}": getattr(entry, field).cpu().contiguous()
        for name, entry in statistics.items()
        for field in MOMENT_FIELDS
    }
    save_file(tensors, path)
    for batch, hidden in zip(batches, outputs, strict=True):
        batch.hidden = hidden
    return aliases
