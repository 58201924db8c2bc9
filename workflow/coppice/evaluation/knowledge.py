"""Bits of knowledge that a model holds of the built-in world.

"Physics of Language Models: Part 3.3, Knowledge Capacity Scaling Laws" (Allen-Zhu and Li, arXiv 2404.05405, section
2.2); the formula is `biographies.knowledge_bits`. The ratio is given by the parameters of the node and by its stored
bits: what is quantized keeps its parameters, and holds more by the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from coppice.data import biographies
from coppice.data.tokenizer import beginning_token, load_tokenizer
from coppice.evaluation import intervals
from coppice.evaluation.batching import sequences_at_once
from coppice.lazy import torch
from coppice.records.base import Json
from coppice.records.metrics import Item

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from coppice.records.manifest import Manifest

Pair = tuple[str, str]

PEOPLE = 1000  # the questions are about the first so many; people are independent, so these are a sample of all
BATCH = 256  # sequences at once: fixed, as sums of floats depend on it
TASK = "knowledge"


def measure(
    model: PreTrainedModel, directory: Path, manifest: Manifest, world: biographies.World
) -> tuple[list[Json], list[Item]]:
    """Knowledge of `world` in the checkpoint `directory`: rows of metrics and of items.

    An item is a person; its choices are the name and the attributes, in the order of `biographies.knowledge_prompts`.
    """
    scores = log_likelihood(model, directory)
    recorded: list[tuple[Pair, float]] = []

    def recording(pairs: list[Pair]) -> Sequence[float]:
        values = scores(pairs)
        recorded.extend(zip(pairs, values, strict=True))
        return values

    people = range(min(world.people, PEOPLE))
    parameters = manifest.parameters.total
    result = biographies.measure_knowledge(recording, world, people, parameters)
    bits = -np.array([score for _, score in recorded]).reshape(len(people), -1) / math.log(2)
    rows = metric_rows(result, bits, world, parameters, manifest.stored_bits.total)
    return rows, item_rows(recorded, len(people))


def metric_rows(
    result: biographies.MeasuredKnowledge,
    losses: np.ndarray,
    world: biographies.World,
    parameters: int,
    stored_bits: int,
) -> list[Json]:
    """Bits by person, by parameter and by stored bit, each next to what the world holds; and bits by attribute.

    losses: -log2 Pr of the name and of each attribute of the people, [people, 7] bits.
    """
    intervals_of = known_intervals(losses, world)
    per_person, stderr = result["bits_per_person"], result["bits_per_person_stderr"]
    scales = {
        "person": (1, "bits/person"),
        "parameter": (world.people / parameters, "bits/parameter"),
        "stored_bit": (world.people / stored_bits, "bits/bit"),
    }
    shared: Json = {"n": result["people"], "task": TASK, "world": {"people": world.people, "seed": world.seed}}
    rows: list[Json] = []
    for name, (scale, unit) in scales.items():
        metric = f"knowledge_bits_per_{name}"
        most = scale * result["bits_per_person_max"]
        ends = {end: scale * bits for end, bits in intervals_of["person"].items()}
        values: Json = {"value": scale * per_person, "stderr": scale * stderr, **ends}
        rows.append({"metric": metric, **values, "unit": unit, **shared})
        rows.append({"metric": f"{metric}_max", "value": most, "stderr": None, "unit": unit, **shared})
    rows += [
        {
            "metric": f"knowledge_bits_{attribute}",
            "value": bits,
            "stderr": None,
            **intervals_of[attribute],
            "unit": "bits/person",
            **shared,
        }
        for attribute, bits in result["attribute_bits"].items()
    ]
    return rows


def known_intervals(losses: np.ndarray, world: biographies.World) -> dict[str, dict[str, float]]:
    """`low` and `high`, in bits a person, of all bits (`person`) and of those of the name and of each attribute.

    Known are the bits of a choice less its loss; those of one attribute are clipped at 0, as their values are.
    """
    choices = {"name": world.names} | {key: world.choices[key] for key in biographies.KNOWLEDGE}
    known = np.log2(list(choices.values())) - losses
    person, *each = intervals.of_means(np.column_stack([known.sum(axis=1), known]))
    clipped = [{end: max(0.0, bits) for end, bits in ends.items()} for ends in each]
    return {"person": person, **dict(zip(choices, clipped, strict=True))}


def item_rows(recorded: list[tuple[Pair, float]], people: int) -> list[Item]:
    """One row for each name or value, in order of people."""
    each = len(recorded) // people
    return [
        {
            "task": TASK,
            "item": str(i // each),
            "choice": i % each,
            "log_likelihood": score,
            "length": len(continuation.lstrip()),
            "correct": None,
        }
        for i, ((_, continuation), score) in enumerate(recorded)
    ]


def log_likelihood(model: PreTrainedModel, directory: Path) -> Callable[[list[Pair]], list[float]]:
    """A function from pairs (prefix, continuation) to ln Pr(continuation | BOS prefix), summed over its tokens (nats).

    A pair is cut into tokens as one text; the continuation's are those past as many as the prefix has alone.
    """
    tokenizer = load_tokenizer(directory)
    first = beginning_token(directory, tokenizer)

    def encode(texts: list[str]) -> list[list[int]]:
        return [[first, *encoding.ids] for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def score(pairs: list[Pair]) -> list[float]:
        scores: list[float] = []
        at_once = sequences_at_once(model, BATCH)
        for start in range(0, len(pairs), at_once):
            batch = pairs[start : start + at_once]
            prefixes = encode([prefix for prefix, _ in batch])
            scores += continuation_scores(model, encode([a + b for a, b in batch]), [len(ids) for ids in prefixes])
        return scores

    return score


def continuation_scores(model: PreTrainedModel, sequences: list[list[int]], starts: list[int]) -> list[float]:
    """sum_{t >= start} ln p(x_t | x_<t) of each sequence, in nats."""
    longest = max(map(len, sequences))
    # Padding is on the right, where no token that counts can see it.
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences], device=model.device)
    places = torch.arange(1, longest, device=model.device)
    ends = torch.tensor([len(ids) for ids in sequences], device=model.device)
    scored = (places >= torch.tensor(starts, device=model.device)[:, None]) & (places < ends[:, None])
    with torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        log_probabilities = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return (log_probabilities.double() * scored).sum(1).tolist()
