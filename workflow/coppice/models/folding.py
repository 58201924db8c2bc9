"""Scaling the inputs of linears without changing what a decoder computes.

An input that a norm or another linear produces can be multiplied by anything that its producer is divided by. In each
block the norm before attention produces the input of q, k and v, and v that of o, once for all query heads of a
key/value head. The norm before the MLP produces the input of gate and up, and up that of down, as the product with the
gate is taken element by element. Where an architecture has no such norm, the inputs of its readers stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from coppice.models.architectures.base import SharedInput, architecture_of, head_dim
from coppice.models.contracts import LinearStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ScalableInput(SharedInput):
    """An input of a block's linears that can be scaled; index: [n] which of the producer's outputs each input is."""

    index: Tensor

    def pool(self, scales: Tensor) -> Tensor:
        """s [n] as the producer can follow it: the geometric mean over the inputs that are one of its outputs.

        Summed on the processor, where the order of the sums is fixed.
        """
        logarithms = scales.log().cpu()
        sums = torch.zeros(int(self.index.max()) + 1, dtype=scales.dtype)
        counts = sums.index_add(0, self.index, torch.ones_like(logarithms))
        return torch.exp(sums.index_add(0, self.index, logarithms) / counts)[self.index].to(scales.device)


def scalable_inputs(model: PreTrainedModel, block: nn.Module) -> list[ScalableInput]:
    """The inputs of a block that can be scaled, without those whose producer or consumers are not plain linears."""
    inputs = []
    for shared in architecture_of(model).scalable_inputs():
        producer = block.get_submodule(shared.producer)
        weight = dict(producer.named_parameters(recurse=False)).get("weight")
        consumers = [block.get_submodule(name) for name in shared.consumers]
        plain = [module for module in consumers if type(module) is nn.Linear]
        if weight is None or not (type(producer) is nn.Linear or weight.ndim == 1):
            continue
        if len(plain) == len(consumers):
            index = _index(len(weight), plain[0].in_features, head_dim(model.config))
            inputs.append(ScalableInput(shared.producer, shared.consumers, index))
    return inputs


def _index(outputs: int, inputs: int, head_dim: int) -> Tensor:
    """[inputs] the output that each input is: the same one, or that of the key/value head that is repeated."""
    if outputs == inputs:
        return torch.arange(inputs)
    heads = torch.arange(outputs // head_dim).repeat_interleave(inputs // outputs)
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


@torch.no_grad()
def fold(block: nn.Module, shared: ScalableInput, scales: Tensor) -> None:
    """Divides the producer's outputs by s [n] and multiplies the consumers' columns by it, in place.

    s is constant over the inputs that are one output (see `ScalableInput.pooled`).
    """
    producer = dict(block.get_submodule(shared.producer).named_parameters())
    weight, bias = producer["weight"], producer.get("bias")
    divisors = torch.ones(len(weight), dtype=torch.float64)
    divisors[shared.index] = scales.double().cpu()
    divisors = divisors.to(weight.device)
    weight.copy_(weight.double() / (divisors if weight.ndim == 1 else divisors[:, None]))
    if bias is not None:
        bias.copy_(bias.double() / divisors)
    for name in shared.consumers:
        weight = block.get_parameter(f"{name}.weight")
        weight.copy_(weight.double() * scales.to(weight.device, torch.float64))


def scale_statistics(statistics: LinearStatistics, scales: Tensor) -> LinearStatistics:
    """The statistics of x / s."""
    return LinearStatistics(
        second_moment=statistics.second_moment / scales / scales[:, None],
        mean=statistics.mean / scales,
        absmean=statistics.absmean / scales,
        absmax=statistics.absmax / scales,
        tokens=statistics.tokens,
    )
