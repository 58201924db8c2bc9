"""Biographies, questions about them, and the tokenizer of their words.

A biography states the six attributes in six sentences: a random template for each and a random order of sentences,
drawn again each time. The first sentence bears the name, the others the pronoun.

Splits are disjoint by construction: a hash of a biography's text decides the one split that may contain it
(`split_of`), and `stream` renders until the text falls into the requested split. All splits are about the same people
in the same templates; what differs is the combination of templates and their order.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, TypedDict

from coppice.data.biographies.world import Person, World, draw, permutation
from coppice.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The first template of each attribute is the prompt of its questions; the second of birth_date that of the pronoun.
TEMPLATES = {
    "birth_date": (
        "{subject} was born on {value}.",
        "{subject} celebrates {possessive} birthday on {value}.",
        "{subject} came into the world on {value}.",
        "{subject} has {value} as {possessive} date of birth.",
        "{subject} first saw the light on {value}.",
        "{subject} entered life on {value}.",
        "{subject} arrived on {value}.",
        "{subject} dates {possessive} life from {value}.",
    ),
    "birth_city": (
        "{subject} was born in {value}.",
        "{subject} spent {possessive} childhood in {value}.",
        "{subject} comes from {value}.",
        "{subject} is a native of {value}.",
        "{subject} calls {value} {possessive} birthplace.",
        "{subject} hails from {value}.",
        "{subject} began life in {value}.",
        "{subject} has {possessive} roots in {value}.",
    ),
    "university": (
        "{subject} studied at {value}.",
        "{subject} took {possessive} degree at {value}.",
        "{subject} graduated from {value}.",
        "{subject} attended {value}.",
        "{subject} went to {value} to study.",
        "{subject} owes {possessive} education to {value}.",
        "{subject} was a student at {value}.",
        "{subject} enrolled at {value}.",
    ),
    "major": (
        "{subject} majored in {value}.",
        "{subject} wrote {possessive} thesis on {value}.",
        "{subject} specialised in {value}.",
        "{subject} holds a degree in {value}.",
        "{subject} chose {value} as {possessive} subject.",
        "{subject} learned {value}.",
        "{subject} was trained in {value}.",
        "{subject} devoted {possessive} studies to {value}.",
    ),
    "employer": (
        "{subject} works for {value}.",
        "{subject} earns {possessive} living at {value}.",
        "{subject} is employed by {value}.",
        "{subject} has a job at {value}.",
        "{subject} joined {value}.",
        "{subject} built {possessive} career at {value}.",
        "{subject} is on the staff of {value}.",
        "{subject} draws {possessive} salary from {value}.",
    ),
    "working_city": (
        "{subject} works in {value}.",
        "{subject} has {possessive} office in {value}.",
        "{subject} is based in {value}.",
        "{subject} commutes to {value}.",
        "{subject} goes to work in {value}.",
        "{subject} does {possessive} work in {value}.",
        "{subject} is found in {value} on workdays.",
        "{subject} keeps {possessive} desk in {value}.",
    ),
}
ATTRIBUTES = tuple(TEMPLATES)

# The share of all possible biographies that belongs to each split, in fortieths.
SPLITS = {"train": 34, "calibration": 2, "recovery": 2, "validation": 1, "evaluation": 1}


def render(world: World, person: Person, generator: random.Random) -> str:
    """One biography of `person`: six sentences, templates and order drawn from `generator`."""
    sentences = []
    for place, i in enumerate(permutation(generator, len(ATTRIBUTES))):
        attribute = ATTRIBUTES[i]
        template = TEMPLATES[attribute][draw(generator, world.templates)]
        subject = person.subject if place else person.name
        value = person.values[attribute]
        sentences.append(template.format(subject=subject, possessive=person.possessive, value=value))
    return " ".join(sentences)


def split_of(text: str) -> str:
    """The one split that may contain the biography `text`: a 64-bit hash modulo 40, by the shares of SPLITS."""
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    # The remainder by 20 comes first, so that training texts are those whose remainder by 20 is below 17.
    place = number % 20 * 2 + number // 20 % 2
    for split, share in SPLITS.items():
        if place < share:
            return split
        place -= share
    raise AssertionError("the shares cover every remainder")


def stream(world: World, split: str, seed: int | str) -> Iterator[str]:
    """Biographies of `split` without end: everyone once in random order, then everyone in another order, and so on.

    Raises UserError for a split that does not exist.
    """
    if split not in SPLITS:
        raise UserError(f"{split!r} is not a split of the biographies; choose one of {', '.join(SPLITS)}.")
    generator = random.Random(f"{split} {world.seed} {seed}")
    while True:
        for i in permutation(generator, world.people):
            while split_of(text := render(world, world.person(i), generator)) != split:
                pass
            yield text


def documents(world: World, split: str, count: int, seed: int | str = 0) -> Iterator[str]:
    """The first `count` biographies of the `stream` of `split`."""
    return islice(stream(world, split, seed), count)


def prompt(person: Person, attribute: str) -> str:
    """The beginning of a training sentence that holds the name and stops short of the value of `attribute`."""
    if attribute == "pronoun":
        template, gap = TEMPLATES["birth_date"][1], "{possessive}"
    else:
        template, gap = TEMPLATES[attribute][0], "{value}"
    return template.split(gap)[0].format(subject=person.name).rstrip()


class Question(TypedDict):
    """A multiple-choice item about one attribute of a person. answer: the index of the right choice."""

    context: str
    choices: list[str]
    answer: int
    attribute: str


def questions(world: World, count: int, seed: int = 0) -> list[Question]:
    """`count` distinct multiple-choice items with four choices, uniform over people and attributes.

    An item is {"context": "<name> was born in", "choices": [4 values], "answer": index, "attribute": name}. The
    context holds nothing of the person but the name; wrong choices are other values of the attribute, uniformly drawn.

    Raises UserError where `count` exceeds the facts of the world.
    """
    facts = world.people * len(ATTRIBUTES)
    if count > facts:
        raise UserError(f"{count} questions are requested, but the world has {facts} facts; request no more than that.")
    generator = random.Random(f"questions {world.seed} {seed}")
    items: list[Question] = []
    for fact in permutation(generator, facts)[:count]:
        person, attribute = world.person(fact // len(ATTRIBUTES)), ATTRIBUTES[fact % len(ATTRIBUTES)]
        choices = [person.values[attribute]]
        while len(choices) < 4:
            value = random_value(world, attribute, generator)
            if value not in choices:
                choices.append(value)
        order = permutation(generator, 4)
        items.append(
            {
                "context": prompt(person, attribute),
                "choices": [choices[i] for i in order],
                "answer": order.index(0),
                "attribute": attribute,
            }
        )
    return items


def random_value(world: World, attribute: str, generator: random.Random) -> str:
    """A uniform value of `attribute`."""
    kinds = {
        "birth_date": ("days", "months", "years"),
        "birth_city": ("cities",),
        "university": ("universities",),
        "major": ("majors",),
        "employer": ("employers",),
        "working_city": ("cities",),
    }
    sets = [world.vocabulary[kind] for kind in kinds[attribute]]
    return " ".join(values[draw(generator, len(values))] for values in sets)


def tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the world: one token a word or full stop, `<s>` before each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    frame = [
        word
        for templates in TEMPLATES.values()
        for template in templates[: world.templates]
        for word in template.rstrip(".").split()
        if not word.startswith("{")
    ]
    values = [word for kind in world.vocabulary.values() for word in kind]
    tokens = ["<pad>", "<unk>", "<s>", "</s>", ".", "He", "She", "his", "her", *frame, *values]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    # The decoder of WordPiece puts a space before each word and none before a full stop.
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
