from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from coppice.data import biographies, sources
from coppice.evaluation import knowledge
from coppice.models.checkpoint import read_manifest
from coppice.uncertainty import bootstrap_means, percentile_interval

from .conftest import WORLD


def test_the_likelihood_of_a_continuation_is_the_sum_over_its_tokens(model, tokenizer, checkpoint):
    person = sources.world(WORLD).person(0)
    pairs = [("", person.name), (f"{person.name} was born on", f" {person.values['birth_date']}")]
    for (prefix, continuation), score in zip(pairs, knowledge.log_likelihood(model, checkpoint)(pairs), strict=True):
        tokens = tokenizer(prefix + continuation, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_probabilities = model(tokens).logits[0].double().log_softmax(-1)
        count = len(continuation.split())
        places = range(tokens.shape[1] - count, tokens.shape[1])
        assert score == pytest.approx(sum(log_probabilities[t - 1, tokens[0, t]].item() for t in places), rel=1e-5)


def test_bits_by_person_by_parameter_and_by_stored_bit(model, checkpoint):
    world, manifest = sources.world(WORLD), read_manifest(checkpoint)
    metrics, items = knowledge.measure(model, checkpoint, manifest, world)
    found = {metric["metric"]: metric for metric in metrics}
    people = [
        -sum(item["log_likelihood"] for item in items if item["item"] == str(i)) / math.log(2)
        for i in range(world.people)
    ]
    most = math.log2(world.names) + sum(map(math.log2, world.choices.values()))
    bits = most - sum(people) / world.people
    person = found["knowledge_bits_per_person"]
    assert person["value"] == pytest.approx(bits)
    assert person["stderr"] == pytest.approx(torch.tensor(people).std().item() / world.people**0.5, rel=1e-4)
    assert person["n"] == world.people
    low, high = percentile_interval(bootstrap_means(most - np.array(people)))
    assert (person["low"], person["high"]) == pytest.approx((low, high))
    assert low < bits < high
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert found["knowledge_bits_per_parameter"]["value"] == pytest.approx(bits * world.people / parameters)
    stored = found["knowledge_bits_per_stored_bit"]
    assert stored["value"] == pytest.approx(bits * world.people / parameters / 32)
    assert stored["low"] == pytest.approx(low * world.people / parameters / 32)
    assert found["knowledge_bits_per_person_max"]["value"] == pytest.approx(most - math.log2(world.people))
    assert "low" not in found["knowledge_bits_per_person_max"]


def test_bits_of_an_attribute_have_the_interval_of_what_people_know_of_it():
    world = biographies.World(people=20)
    losses = np.random.default_rng(0).random((20, 7))
    losses[:, 0] += 100
    found = knowledge.known_intervals(losses, world)
    assert found["name"] == {"low": 0, "high": 0}
    low, high = percentile_interval(bootstrap_means(math.log2(world.choices["major"]) - losses[:, 5]))
    assert (found["major"]["low"], found["major"]["high"]) == pytest.approx((low, high))


def test_items_are_the_name_and_the_attributes_of_each_person(model, checkpoint):
    world = biographies.World(people=3)
    _, items = knowledge.measure(model, checkpoint, read_manifest(checkpoint), world)
    asked = biographies.knowledge_prompts(world, range(3))
    lengths = [len(continuation.strip()) for pairs in asked for _, continuation in pairs.values()]
    assert [item["length"] for item in items] == lengths
    assert [(item["item"], item["choice"]) for item in items] == [(str(i), j) for i in range(3) for j in range(7)]
