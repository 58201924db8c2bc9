"""What a model knows of the built-in world that it is pretrained on: held-out loss, questions, bits of knowledge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, TypedDict, TypeVar

from coppice.data import biographies
from coppice.data.biographies import MeasuredKnowledge, Question, World

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Item = TypeVar("Item")


class Measurement(TypedDict):
    """held_out_loss: nats per token; question_accuracy: share of right choices; knowledge: of everyone."""

    parameters: int
    held_out_loss: float
    question_accuracy: float
    knowledge: MeasuredKnowledge


def batch_items(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def windows(texts: Iterator[str], tokenizer: PreTrainedTokenizerFast, window: int) -> Iterator[list[int]]:
    """Windows of `window` tokens: whole documents, each `<s> text </s>`, and the beginning of one more.

    The rest of that one is dropped, so that no sentence is read without the name it speaks of.
    """
    filled: list[int] = []
    for chunk in batch_items(texts, 256):
        for tokens in tokenizer(chunk)["input_ids"]:
            filled += [*tokens, tokenizer.eos_token_id]
            if len(filled) >= window:
                yield filled[:window]
                filled = []


def next_token_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats of the tokens [batch, window] after the first of each window."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=tokens, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def log_likelihood(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch: int = 256
) -> Callable[[list[tuple[str, str]]], list[float]]:
    """A function from pairs (prefix, continuation) to ln Pr(continuation | `<s>` prefix), summed over its tokens."""
    from coppice.evaluation.knowledge import continuation_scores

    def score(pairs: list[tuple[str, str]]) -> list[float]:
        scores: list[float] = []
        for part in batch_items(pairs, batch):
            starts = [len(tokens) for tokens in tokenizer([prefix for prefix, _ in part])["input_ids"]]
            sequences = tokenizer([prefix + rest for prefix, rest in part])["input_ids"]
            scores += continuation_scores(model, sequences, starts)
        return scores

    return score


def accuracy(score: Callable[[list[tuple[str, str]]], Sequence[float]], items: list[Question]) -> float:
    """The share of questions whose right choice has the highest log-likelihood."""
    scores = iter(score([(item["context"], " " + choice) for item in items for choice in item["choices"]]))
    right = 0
    for item in items:
        choices = [next(scores) for _ in item["choices"]]
        right += choices.index(max(choices)) == item["answer"]
    return right / len(items)


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World, window: int) -> Measurement:
    """Held-out loss (nats per token, 200 windows), accuracy on 1,000 questions, and knowledge of everyone."""
    import torch

    model.eval()
    held_out = islice(windows(biographies.stream(world, "evaluation", 0), tokenizer, window), 200)
    with torch.no_grad():
        loss = next_token_loss(model, torch.tensor(list(held_out))).item()
    score = log_likelihood(model, tokenizer)
    items = biographies.questions(world, min(1000, world.people))
    parameters = model.num_parameters()
    return {
        "parameters": parameters,
        "held_out_loss": loss,
        "question_accuracy": accuracy(score, items),
        "knowledge": biographies.measure_knowledge(score, world, range(world.people), parameters),
    }
