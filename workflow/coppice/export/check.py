"""Whether a model gives the logits of another: the largest difference of log-probabilities, and the divergence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coppice.models.checkpoint import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTHS = (1, 9, 64)  # tokens of a sequence, where the model's context holds so many
SEQUENCES = 3  # of each length


@dataclass(frozen=True)
class Tolerance:
    """The most that an export may differ by; the fields are those of `Difference`."""

    largest: float
    divergence: float


# Sums taken in another order differ in the last bits of float32.
SAME_NUMBERS = Tolerance(1e-3, 1e-6)
# Weights rounded to nearest differ by up to 2^-9 of their size in bfloat16, 2^-12 in float16. Improbable tokens show
# most of it: hence the wide first number, and the second, which an export that is wrong does not keep.
ROUNDED = {
    torch.float32: SAME_NUMBERS,
    torch.float16: Tolerance(0.125, 1e-4),
    torch.bfloat16: Tolerance(1.0, 5e-3),
}


@dataclass(frozen=True)
class Difference:
    """largest: of |log p - log q| over all tokens of the vocabulary [nats]; divergence: the mean of sum p log(p / q)
    [nats a token]; p: the node's probabilities of the next token, q: the export's; tokens: how many were predicted."""

    largest: float
    divergence: float
    tokens: int


def batches(vocabulary: int, context: int) -> list[Tensor]:
    """Random tokens, the same ones each time: [SEQUENCES, length] for each of `LENGTHS` that the context holds."""
    generator = torch.Generator().manual_seed(0)
    lengths = sorted({min(length, context) for length in LENGTHS})
    return [torch.randint(vocabulary, (SEQUENCES, length), generator=generator) for length in lengths]


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, inputs: list[Tensor]) -> Tensor:
    """[tokens, vocabulary] of the next token, after every token of every sequence."""
    logits = [model.eval()(input_ids=tokens, use_cache=False).logits.flatten(0, 1) for tokens in inputs]
    return torch.log_softmax(torch.cat(logits).double(), dim=-1)


def of_node(folder: Path) -> tuple[list[Tensor], Tensor]:
    """The inputs of the check, and the node's own log-probabilities, computed in float32 on the CPU."""
    model = load_model(folder, dtype=torch.float32)
    inputs = batches(model.config.vocab_size, model.config.max_position_embeddings)
    return inputs, log_probabilities(model, inputs)


def compute_difference(ours: Tensor, theirs: Tensor) -> Difference:
    """Of two tensors of `log_probabilities`."""
    largest = (ours - theirs).abs().max()
    divergence = (ours.exp() * (ours - theirs)).sum(-1).mean()
    return Difference(largest.item(), divergence.item(), len(ours))


def tolerance(rounded: bool, dtype: torch.dtype) -> Tolerance:
    """What an export may differ by; rounded: whether its reader multiplies by weights rounded to `dtype` again."""
    return ROUNDED[dtype] if rounded else SAME_NUMBERS


def within(difference: Difference, limit: Tolerance) -> bool:
    """Whether a difference is within the tolerance; NaN is not."""
    return difference.largest <= limit.largest and difference.divergence <= limit.divergence
