"""A meter of the knowledge that a model holds about the built-in world, in bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypedDict

from coppice.data.biographies.text import prompt
from coppice.data.biographies.world import World

# The attributes that carry information; the working city follows from the employer.
KNOWLEDGE = ("pronoun", "birth_date", "birth_city", "university", "major", "employer")


class KnowledgeBits(TypedDict):
    """What a model holds of the world, and the most that it could hold; attribute_bits by attribute, per person."""

    bits_per_person: float
    bits_per_person_max: float
    bits_per_parameter: float
    bits_per_parameter_max: float
    attribute_bits: dict[str, float]
    attribute_bits_max: dict[str, float]


class MeasuredKnowledge(KnowledgeBits):
    """The same, estimated on `people` people, with the standard error of the bits per person."""

    people: int
    bits_per_person_stderr: float


def knowledge_prompts(world: World, people: Iterable[int]) -> list[dict[str, tuple[str, str]]]:
    """For each person, the pairs that the meter scores: {"name" or attribute: (prefix, continuation)}.

    The text is `prefix + continuation`. A prefix holds the name only, and the prefix of the name is empty. The name
    counts too, because a model must spend bits on knowing who exists.
    """
    prompts = []
    for i in people:
        person = world.person(i)
        pairs = {"name": ("", person.name)}
        for attribute in KNOWLEDGE:
            value = person.possessive if attribute == "pronoun" else person.values[attribute]
            pairs[attribute] = (prompt(person, attribute), " " + value)
        prompts.append(pairs)
    return prompts


def knowledge_bits(p1: float, p2: Mapping[str, float], parameters: int, world: World) -> KnowledgeBits:
    """The capacity ratio of bioS in arXiv 2404.05405.

    `p1` is the mean over people of -ln Pr(name), `p2` that of -ln Pr(value | name) for each attribute of KNOWLEDGE;
    both are sums over the tokens of the name or value, in nats. With N people, N0 names, S0 the product of the choices:

        R     = N (log2(N0 / e^p1) + log2(S0 / e^p2)) / parameters
        R_max = N (log2(N0 / N)    + log2 S0)         / parameters

    `attribute_bits` clips what is worse than chance at 0; R does not.
    """
    name_bits = math.log2(world.names) - p1 / math.log(2)
    bits = {key: math.log2(choices) - p2[key] / math.log(2) for key, choices in world.choices.items()}
    bits_per_person = name_bits + sum(bits.values())
    most = math.log2(world.names / world.people) + sum(map(math.log2, world.choices.values()))
    return {
        "bits_per_person": bits_per_person,
        "bits_per_person_max": most,
        "bits_per_parameter": world.people * bits_per_person / parameters,
        "bits_per_parameter_max": world.people * most / parameters,
        "attribute_bits": {key: max(0.0, value) for key, value in {"name": name_bits, **bits}.items()},
        "attribute_bits_max": {
            "name": math.log2(world.names / world.people),
            **{key: math.log2(choices) for key, choices in world.choices.items()},
        },
    }


def measure_knowledge(
    log_likelihood: Callable[[list[tuple[str, str]]], Sequence[float]],
    world: World,
    people: Iterable[int],
    parameters: int,
) -> MeasuredKnowledge:
    """`knowledge_bits` of a model, estimated on `people`, with the standard error of the bits per person.

    `log_likelihood` maps pairs (prefix, continuation) to the natural logarithm of the probability of the continuation
    after `<s>` and the prefix, summed over exactly its tokens.
    """
    prompts = knowledge_prompts(world, people)
    scores = iter(log_likelihood([pair for pairs in prompts for pair in pairs.values()]))
    losses = [{key: -float(next(scores)) for key in pairs} for pairs in prompts]
    means = {key: math.fsum(loss[key] for loss in losses) / len(losses) for key in ("name", *KNOWLEDGE)}
    totals = [math.fsum(loss.values()) / math.log(2) for loss in losses]
    mean = math.fsum(totals) / len(totals)
    variance = math.fsum((total - mean) ** 2 for total in totals) / max(1, len(totals) - 1)
    return {
        "people": len(losses),
        **knowledge_bits(means["name"], means, parameters, world),
        "bits_per_person_stderr": math.sqrt(variance / len(totals)),
    }
