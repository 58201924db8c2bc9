"""The built-in world: synthetic biographies, questions about them, and a meter of the knowledge a model holds.

After bioS of "Physics of Language Models: Part 3.3, Knowledge Capacity Scaling Laws" (Allen-Zhu and Li,
arXiv 2404.05405), scaled down: every value is one word of a small vocabulary (a date is three), so that a model of 0.1
million parameters spends most of them on facts and not on embeddings.

A person has a full name (first, middle, last; drawn without replacement) and a pronoun, birth date, birth city,
university, major and employer, all uniform and independent. The working city is a function of the employer and so
carries no information. A biography tells the six attributes in six sentences: a random template for each and a
random order of sentences, drawn anew each time; the first sentence bears the name, the others the pronoun.

Splits are disjoint by construction: a hash of a biography's text decides the one split that may contain it
(`split_of`), and `documents` renders until the text falls into the split asked for. All splits speak of the
same people in the same templates; what differs is the combination of templates and their order.

Every draw is `int(generator.random() * choices)` from a `random.Random` seeded with a string, which Python keeps stable
across versions and independent of hash randomisation: the same seed gives the same bytes. Person i is the same in
every world of more than i people.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, product
from typing import TYPE_CHECKING

from coppice.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def listed(text: str) -> list[str]:
    """The words of `text`."""
    return text.split()


STEMS = ["".join(letters) for letters in product("BDFGHJKLMNPRSTVZ", "aeiou", "dlmnrs")]
STRIDE = 77  # coprime to the 480 stems: neighbours in a list of words begin with different letters
MONTHS = listed("January February March April May June July August September October November December")
MAJORS = listed(
    "Accounting Acoustics Anatomy Archaeology Architecture Astronomy Biology Botany Ceramics Chemistry "
    "Cybernetics Dentistry Drama Ecology Economics Ethics Forestry Genetics Geography Geology Geometry Hydrology "
    "Journalism Law Linguistics Logic Mathematics Medicine Meteorology Music Nursing Optics Painting Philosophy "
    "Physics Robotics Sculpture Sociology Statistics Zoology"
)
FIRST_YEAR = 1900

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
# The attributes of the meter: those that carry information.
KNOWLEDGE = ("pronoun", "birth_date", "birth_city", "university", "major", "employer")

# The share of all possible biographies that belongs to each split, in fortieths.
SPLITS = {"train": 34, "calibration": 2, "recovery": 2, "validation": 1, "evaluation": 1}


def words(count: int, endings: str) -> list[str]:
    """`count` distinct invented words; word lists whose `endings` differ share no word."""
    ends = listed(endings)
    return [STEMS[i * STRIDE % len(STEMS)] + ends[i % len(ends)] for i in range(count)]


def draw(generator: random.Random, choices: int) -> int:
    """A uniform integer in [0, choices)."""
    return int(generator.random() * choices)


def shuffled(generator: random.Random, count: int) -> list[int]:
    """A uniform permutation of range(count), by Fisher and Yates."""
    order = list(range(count))
    for i in range(count - 1, 0, -1):
        j = draw(generator, i + 1)
        order[i], order[j] = order[j], order[i]
    return order


@dataclass(frozen=True)
class Person:
    """One row of the people table: the name and the value of every attribute, as they stand in a text."""

    name: str
    feminine: bool
    values: Mapping[str, str]

    @property
    def subject(self) -> str:
        return "She" if self.feminine else "He"

    @property
    def possessive(self) -> str:
        return "her" if self.feminine else "his"


@dataclass(frozen=True)
class World:
    """A population and the sizes of the sets that its names and values are drawn from.

    Raises UserError where a size lies outside what the word lists offer, or where there are more people than names.
    """

    people: int = 1200
    seed: int = 0
    first_names: int = 64
    middle_names: int = 64
    last_names: int = 128
    months: int = 12
    days: int = 28
    years: int = 64
    cities: int = 64
    universities: int = 64
    majors: int = 32
    employers: int = 64
    templates: int = 8

    def __post_init__(self) -> None:
        limits = {
            "first_names": (1, len(STEMS)),
            "middle_names": (1, len(STEMS)),
            "last_names": (1, len(STEMS)),
            "months": (1, len(MONTHS)),
            "days": (1, 28),
            "years": (1, 200),
            "cities": (4, len(STEMS)),
            "universities": (4, len(STEMS)),
            "majors": (4, len(MAJORS)),
            "employers": (4, len(STEMS)),
            "templates": (2, 8),
            "people": (1, self.names),
        }
        for field, (low, high) in limits.items():
            value = getattr(self, field)
            if not low <= value <= high:
                raise UserError(f"The world's {field} is {value}; choose a value from {low} to {high}.")

    @property
    def names(self) -> int:
        """N0, the number of possible full names."""
        return self.first_names * self.middle_names * self.last_names

    @property
    def choices(self) -> dict[str, int]:
        """The number of possible values of each attribute that carries information; their product is S0."""
        return {
            "pronoun": 2,
            "birth_date": self.months * self.days * self.years,
            "birth_city": self.cities,
            "university": self.universities,
            "major": self.majors,
            "employer": self.employers,
        }

    @cached_property
    def vocabulary(self) -> dict[str, list[str]]:
        """The words of each set; no word is in two of them."""
        return {
            "first_names": words(self.first_names, "ia en eo ine"),
            "middle_names": words(self.middle_names, "ah ix ett"),
            "last_names": words(self.last_names, "son wick man berg"),
            "months": MONTHS[: self.months],
            "days": [str(day + 1) for day in range(self.days)],
            "years": [str(FIRST_YEAR + year) for year in range(self.years)],
            "cities": words(self.cities, "ton ville burg ford"),
            "universities": words(self.universities, "hall court stead"),
            "majors": MAJORS[: self.majors],
            "employers": words(self.employers, "tek dyne soft corp"),
        }

    @cached_property
    def working_cities(self) -> list[str]:
        """The working city of each employer."""
        generator = random.Random(f"working cities {self.seed}")
        return [self.vocabulary["cities"][draw(generator, self.cities)] for _ in range(self.employers)]

    @cached_property
    def table(self) -> list[Person]:
        """All people, in order."""
        taken: set[str] = set()
        people = []
        for i in range(self.people):
            generator = random.Random(f"person {self.seed} {i}")

            def pick(kind: str, generator: random.Random = generator) -> str:
                return self.vocabulary[kind][draw(generator, len(self.vocabulary[kind]))]

            feminine = draw(generator, 2) == 1
            birth_date = f"{pick('days')} {pick('months')} {pick('years')}"
            birth_city, university, major = pick("cities"), pick("universities"), pick("majors")
            employer = draw(generator, self.employers)
            values = {
                "birth_date": birth_date,
                "birth_city": birth_city,
                "university": university,
                "major": major,
                "employer": self.vocabulary["employers"][employer],
                "working_city": self.working_cities[employer],
            }
            while (name := f"{pick('first_names')} {pick('middle_names')} {pick('last_names')}") in taken:
                pass
            taken.add(name)
            people.append(Person(name, feminine, values))
        return people

    def person(self, i: int) -> Person:
        """Person `i`, counted from 0."""
        return self.table[i]


def render(world: World, person: Person, generator: random.Random) -> str:
    """One biography of `person`: six sentences, templates and order drawn from `generator`."""
    sentences = []
    for place, i in enumerate(shuffled(generator, len(ATTRIBUTES))):
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
    """Biographies of `split` without end: everyone once in random order, then everyone anew, and so on.

    Raises UserError for a split that does not exist.
    """
    if split not in SPLITS:
        raise UserError(f"There is no split {split!r} of the biographies; choose one of {', '.join(SPLITS)}.")
    generator = random.Random(f"{split} {world.seed} {seed}")
    while True:
        for i in shuffled(generator, world.people):
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


def questions(world: World, count: int, seed: int = 0) -> list[dict]:
    """`count` distinct multiple-choice items with four choices, uniform over people and attributes.

    An item is {"context": "<name> was born in", "choices": [4 values], "answer": index, "attribute": name}. The
    context holds nothing of the person but the name; wrong choices are other values of the attribute, uniformly drawn.

    Raises UserError where `count` exceeds the facts of the world.
    """
    facts = world.people * len(ATTRIBUTES)
    if count > facts:
        raise UserError(f"{count} questions are asked, but the world has {facts} facts; ask for no more than that.")
    generator = random.Random(f"questions {world.seed} {seed}")
    items = []
    for fact in shuffled(generator, facts)[:count]:
        person, attribute = world.person(fact // len(ATTRIBUTES)), ATTRIBUTES[fact % len(ATTRIBUTES)]
        choices = [person.values[attribute]]
        while len(choices) < 4:
            value = random_value(world, attribute, generator)
            if value not in choices:
                choices.append(value)
        order = shuffled(generator, 4)
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


def knowledge_prompts(world: World, people: Iterable[int]) -> list[dict[str, tuple[str, str]]]:
    """For each person, what the meter asks: {"name" or attribute: (prefix, continuation)}.

    The text is `prefix + continuation`; a prefix holds the name only, and that of the name is empty. The name is
    asked too, as it is what a model must spend bits on to know who exists.
    """
    asked = []
    for i in people:
        person = world.person(i)
        pairs = {"name": ("", person.name)}
        for attribute in KNOWLEDGE:
            value = person.possessive if attribute == "pronoun" else person.values[attribute]
            pairs[attribute] = (prompt(person, attribute), " " + value)
        asked.append(pairs)
    return asked


def knowledge_bits(p1: float, p2: Mapping[str, float], parameters: int, world: World) -> dict:
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
) -> dict:
    """`knowledge_bits` of a model, estimated on `people`, with the standard error of the bits per person.

    `log_likelihood` maps pairs (prefix, continuation) to the natural logarithm of the probability of the continuation
    after `<s>` and the prefix, summed over exactly its tokens.
    """
    asked = knowledge_prompts(world, people)
    scores = iter(log_likelihood([pair for pairs in asked for pair in pairs.values()]))
    losses = [{key: -float(next(scores)) for key in pairs} for pairs in asked]
    means = {key: math.fsum(loss[key] for loss in losses) / len(losses) for key in ("name", *KNOWLEDGE)}
    totals = [math.fsum(loss.values()) / math.log(2) for loss in losses]
    mean = math.fsum(totals) / len(totals)
    variance = math.fsum((total - mean) ** 2 for total in totals) / max(1, len(totals) - 1)
    return {
        "people": len(losses),
        **knowledge_bits(means["name"], means, parameters, world),
        "bits_per_person_stderr": math.sqrt(variance / len(totals)),
    }
