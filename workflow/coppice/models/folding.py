"""Scaling the inputs of linears without changing what a decoder computes.

An input that a norm or another linear makes can be multiplied by anything that its maker is divided by. For Llama,
Mistral, Qwen2 and Qwen3, in each block: the norm before attention makes the input of q, k and v; v that of o, once for
all query heads of a key/value head; the norm before the MLP that of gate and up; up that of down, as the product with
the gate is taken element by element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from coppice.methods.contracts import LinearStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MADE_BY = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)


@dataclass(frozen=True)
class SharedInput:
    """consumers: names within the block of the linears that share an input; producer: of the module that makes it.

    index: [n] which of the producer's outputs makes each input.
    """

    producer: str
    consumers: tuple[str, ...]
    index: Tensor

    def pooled(self, scales: Tensor) -> Tensor:
        """s [n] as the producer can follow it: the geometric mean over the inputs that one of its outputs makes.

        Summed on the processor, where the order of the sums is fixed.
        """
        logarithms = scales.log().cpu()
        sums = torch.zeros(int(self.index.max()) + 1, dtype=scales.dtype)
        counts = sums.index_add(0, self.index, torch.ones_like(logarithms))
        return torch.exp(sums.index_add(0, self.index, logarithms) / counts)[self.index].to(scales.device)


def head_dim(model: PreTrainedModel) -> int:
    """The width of an attention head."""
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def shared_inputs(block: nn.Module, head_dim: int) -> list[SharedInput]:
    """The inputs of a block that can be scaled; those whose maker or consumers are no plain linears are left out."""
    found = []
    for producer, consumers in _MADE_BY:
        maker, takers = block.get_submodule(producer), [block.get_submodule(name) for name in consumers]
        plain = all(type(module) is nn.Linear for module in takers) and (
            type(maker) is nn.Linear or (not isinstance(maker, nn.Linear) and maker.weight.ndim == 1)
        )
        if plain:
            found.append(SharedInput(producer, consumers, _index(len(maker.weight), takers[0].in_features, head_dim)))
    return found


def _index(made: int, taken: int, head_dim: int) -> Tensor:
    """[taken] the output that makes each input: the same one, or that of the key/value head that is repeated."""
    if made == taken:
        return torch.arange(taken)
    heads = torch.arange(made // head_dim).repeat_interleave(taken // made)
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


@torch.no_grad()
def fold(block: nn.Module, shared: SharedInput, scales: Tensor) -> None:
    """Divides what makes the input by s [n] and multiplies the columns of what takes it, in place.

    s is constant over the inputs that one output makes (see `SharedInput.pooled`).
    """
    producer = block.get_submodule(shared.producer)
    made = torch.ones(len(producer.weight), dtype=torch.float64)
    made[shared.index] = scales.double().cpu()
    made = made.to(producer.weight.device)
    rows = made if producer.weight.ndim == 1 else made[:, None]
    producer.weight.copy_(producer.weight.double() / rows)
    if getattr(producer, "bias", None) is not None:
        producer.bias.copy_(producer.bias.double() / made)
    for name in shared.consumers:
        weight = block.get_submodule(name).weight
        weight.copy_(weight.double() * scales.to(weight.device, torch.float64))


def scaled(statistics: LinearStatistics, scales: Tensor) -> LinearStatistics:
    """The statistics of x / s."""
    return LinearStatistics(
        second_moment=statistics.second_moment / scales / scales[:, None],
        mean=statistics.mean / scales,
        absmean=statistics.absmean / scales,
        absmax=statistics.absmax / scales,
        tokens=statistics.tokens,
    )
