"""The world of biographies: its statistics, its splits, its tokenizer, and the oracles of the knowledge meter."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
from scipy.stats import chisquare

from coppice.data import biographies
from coppice.data.biographies import ATTRIBUTES, KNOWLEDGE, TEMPLATES, Person, World
from coppice.errors import UserError

SOURCE = Path(biographies.__file__).parents[3]


@pytest.fixture(scope="module")
def world() -> World:
    return World(people=3000, seed=1)


def test_values_are_uniform_and_names_distinct(world: World) -> None:
    people = world.table
    assert len({person.name for person in people}) == world.people
    kinds = {"birth_city": "cities", "university": "universities", "major": "majors", "employer": "employers"}
    columns = {kind: [person.values[attribute] for person in people] for attribute, kind in kinds.items()}
    for place, kind in enumerate(("days", "months", "years")):
        columns[kind] = [person.values["birth_date"].split()[place] for person in people]
    for place, kind in enumerate(("first_names", "middle_names", "last_names")):
        columns[kind] = [person.name.split()[place] for person in people]
    for kind, column in columns.items():
        assert chisquare([column.count(value) for value in world.vocabulary[kind]]).pvalue > 1e-4, kind
    assert abs(sum(person.feminine for person in people) / world.people - 0.5) < 0.05


def test_the_working_city_is_a_function_of_the_employer(world: World) -> None:
    pairs = {(person.values["employer"], person.values["working_city"]) for person in world.table}
    assert len(pairs) == world.employers


def test_people_stay_the_same_in_a_larger_world(world: World) -> None:
    assert World(people=50, seed=1).table == world.table[:50]
    assert World(people=50, seed=2).table != world.table[:50]


def test_no_word_has_two_meanings() -> None:
    sizes = {"first_names": 480, "middle_names": 480, "last_names": 480, "cities": 480, "universities": 480}
    values = [word for kind in World(**sizes, employers=480, majors=40).vocabulary.values() for word in kind]
    assert len(set(values)) == len(values)


def test_the_same_seed_gives_the_same_bytes_under_any_hash_seed() -> None:
    program = (
        "from coppice.data.biographies import World, documents, questions\n"
        "world = World(people=30)\n"
        "print(*documents(world, 'train', 40, seed=7), *questions(world, 20), sep='\\n')"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert outputs != {b""}


def test_all_orders_and_templates_occur() -> None:
    # Names and values that are words of no template, so that a sentence tells its attribute and template.
    person = Person("NAME", True, {attribute: attribute for attribute in ATTRIBUTES})
    generator = random.Random(0)
    orders, templates = set(), set()
    for _ in range(6000):
        sentences = [sentence + "." for sentence in biographies.render(World(), person, generator)[:-1].split(". ")]
        assert sentences[0].startswith("NAME ")
        assert all(sentence.startswith("She ") for sentence in sentences[1:])
        order = tuple(a for s in sentences for a in ATTRIBUTES if a in s.rstrip(".").split())
        orders.add(order)
        templates |= {sentence.split(" ", 1)[1] for sentence in sentences}
    assert orders == set(permutations(ATTRIBUTES))
    assert len(templates) == sum(len(written) for written in TEMPLATES.values())


def test_everyone_comes_up_once_before_anyone_comes_up_again() -> None:
    world = World(people=20)
    texts = list(biographies.documents(world, "train", 40))
    for texts_of_round in (texts[:20], texts[20:]):
        names = {" ".join(text.split()[:3]) for text in texts_of_round}
        assert names == {person.name for person in world.table}
    assert len(set(texts)) == 40


def test_splits_are_disjoint_by_construction() -> None:
    # One person in two templates has 720 * 2**6 biographies: few enough that streams would meet if they could.
    world = World(people=1, templates=2)
    seen = {split: set(biographies.documents(world, split, 500)) for split in biographies.SPLITS}
    for split, texts in seen.items():
        assert {biographies.split_of(text) for text in texts} == {split}
    assert sum(map(len, seen.values())) == len(set().union(*seen.values()))


def test_shares_of_the_splits(world: World) -> None:
    generator = random.Random(0)
    drawn = [biographies.split_of(biographies.render(world, world.person(0), generator)) for _ in range(4000)]
    counts = [drawn.count(split) for split in biographies.SPLITS]
    shares = list(biographies.SPLITS.values())
    assert chisquare(counts, [4000 * share / sum(shares) for share in shares]).pvalue > 1e-4


def test_a_split_that_does_not_exist_is_named() -> None:
    with pytest.raises(UserError, match=r"'test' is not a split.*evaluation"):
        next(biographies.documents(World(people=1), "test", 1))


def test_sizes_out_of_range_are_named() -> None:
    with pytest.raises(UserError, match=r"majors is 99.*from 4 to 40"):
        World(majors=99)
    with pytest.raises(UserError, match=r"people is 9.*from 1 to 8"):
        World(people=9, first_names=2, middle_names=2, last_names=2)


def test_questions_have_one_right_answer_and_do_not_leak(world: World) -> None:
    items = biographies.questions(world, 600)
    facts = {(person.name, attribute): value for person in world.table for attribute, value in person.values.items()}
    for item in items:
        name = " ".join(item["context"].split()[:3])
        assert item["choices"][item["answer"]] == facts[name, item["attribute"]]
        assert len(set(item["choices"])) == 4
        template = TEMPLATES[item["attribute"]][0]
        assert template.format(subject=name, value="").startswith(item["context"])
    assert len({item["context"] for item in items}) == 600
    assert chisquare([[item["answer"] for item in items].count(i) for i in range(4)]).pvalue > 1e-4


def test_more_questions_than_facts_are_refused() -> None:
    with pytest.raises(UserError, match="the world has 12 facts"):
        biographies.questions(World(people=2), 13)


def test_the_tokenizer_is_lossless_and_survives_saving(world: World, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = biographies.tokenizer(world)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) < 800
    for text in biographies.documents(world, "evaluation", 50):
        tokens = tokenizer(text)["input_ids"]
        assert tokens[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in tokens
        assert len(tokens) == 1 + len(text.replace(".", " .").split())
        assert tokenizer.decode(tokens, skip_special_tokens=True) == text
        assert loaded(text)["input_ids"] == tokens
        assert loaded.decode(tokens, skip_special_tokens=True) == text


def test_prompts_continue_to_sentences_of_the_training(world: World) -> None:
    for i, pairs in enumerate(biographies.knowledge_prompts(world, range(5))):
        person = world.person(i)
        sentences = [
            template.format(subject=person.name, possessive=person.possessive, value=person.values[attribute])
            for attribute, templates in TEMPLATES.items()
            for template in templates
        ]
        for prefix, continuation in pairs.values():
            assert any(sentence.startswith(prefix + continuation) for sentence in sentences)
            assert not any(value in prefix for value in person.values.values())


def uniform(world: World) -> dict[str, float]:
    return {key: math.log(choices) for key, choices in world.choices.items()}


def test_the_paper_s_numbers() -> None:
    """T-E1: a model that knows all values, and names up to who comes next, holds R_max."""

    class Paper(World):
        names = 400 * 400 * 1000
        choices = {  # noqa: RUF012
            "pronoun": 2,
            "birth_date": 12 * 28 * 200,
            "birth_city": 200,
            "university": 300,
            "major": 100,
            "employer": 263,
        }

    for people, bits in ((10_000, 6.156e5), (100_000, 5.824e6), (1_000_000, 5.491e7)):
        world = Paper(people=people)
        known = biographies.knowledge_bits(math.log(people), dict.fromkeys(KNOWLEDGE, 0.0), 1, world)
        exact = people * (math.log2(1.6e8 / people) + math.log2(2 * 12 * 28 * 200 * 200 * 300 * 100 * 263))
        assert known["bits_per_parameter"] == pytest.approx(exact, rel=1e-12)
        assert known["bits_per_parameter"] == pytest.approx(known["bits_per_parameter_max"], rel=1e-12)
        assert known["bits_per_parameter"] == pytest.approx(bits, rel=1e-4)


def test_a_uniform_model_knows_nothing(world: World) -> None:
    """T-E2."""
    chance = biographies.knowledge_bits(math.log(world.names), uniform(world), 1000, world)
    assert chance["bits_per_parameter"] == pytest.approx(0, abs=1e-9)
    assert chance["bits_per_person"] == pytest.approx(0, abs=1e-12)


def test_a_model_that_is_worse_than_chance_is_clipped_by_attribute_only(world: World) -> None:
    losses = uniform(world) | {"major": math.log(world.majors) + 1}
    worse = biographies.knowledge_bits(math.log(world.names), losses, 1000, world)
    assert worse["attribute_bits"]["major"] == 0
    assert worse["bits_per_person"] == pytest.approx(-1 / math.log(2))


def test_a_mixture_has_the_bits_of_its_formula() -> None:
    """T-E3: right with probability 1 - e (else uniform) on a share f of the people, uniform on the others."""
    world, share, error = World(people=400), 0.25, 0.1
    knows = {world.person(i).name for i in range(100)}

    def score(pairs: list[tuple[str, str]]) -> list[float]:
        scores = []
        for asked, (prefix, _) in zip(["name", *KNOWLEDGE] * 400, pairs, strict=True):
            if asked == "name":
                scores.append(-math.log(world.people))
                continue
            chance = 1 / world.choices[asked]
            known = " ".join(prefix.split()[:3]) in knows
            scores.append(math.log(1 - error + error * chance if known else chance))
        return scores

    measured = biographies.measure_knowledge(score, world, range(400), parameters=1000)
    name = math.log2(world.names / world.people)
    expected = {a: share * math.log2((1 - error) * choices + error) for a, choices in world.choices.items()}
    assert measured["attribute_bits"] == pytest.approx({"name": name, **expected}, abs=1e-6)
    assert measured["bits_per_person"] == pytest.approx(name + sum(expected.values()), abs=1e-6)
    per_person = sum(expected.values()) / share
    deviation = per_person * math.sqrt(share * (1 - share) * 400 / 399)
    assert measured["bits_per_person_stderr"] == pytest.approx(deviation / math.sqrt(400), abs=1e-9)


def test_no_model_exceeds_the_maximum(world: World) -> None:
    """T-E5: R <= R_max for every model whose names cost at least ln N."""
    generator = random.Random(0)
    for _ in range(100):
        names = math.log(world.people) + generator.expovariate(1)
        bits = biographies.knowledge_bits(names, {a: generator.expovariate(1) for a in KNOWLEDGE}, 1000, world)
        assert bits["bits_per_parameter"] <= bits["bits_per_parameter_max"]
