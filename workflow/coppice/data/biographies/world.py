"""The people of the built-in world: their names, and the values of their attributes.

A person has a full name (first, middle, last; drawn without replacement) and a pronoun, birth date, birth city,
university, major and employer, all uniform and independent. The working city is a function of the employer and so
carries no information.

Every draw is `int(generator.random() * choices)` from a `random.Random` seeded with a string, which Python keeps stable
across versions and independent of hash randomisation: the same seed gives the same bytes. Person i is the same in
every world of more than i people.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from coppice.errors import UserError

STEMS = ["".join(letters) for letters in product("BDFGHJKLMNPRSTVZ", "aeiou", "dlmnrs")]
STRIDE = 77  # coprime to the 480 stems: neighbours in a list of words begin with different letters
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
MAJORS = [
    "Accounting",
    "Acoustics",
    "Anatomy",
    "Archaeology",
    "Architecture",
    "Astronomy",
    "Biology",
    "Botany",
    "Ceramics",
    "Chemistry",
    "Cybernetics",
    "Dentistry",
    "Drama",
    "Ecology",
    "Economics",
    "Ethics",
    "Forestry",
    "Genetics",
    "Geography",
    "Geology",
    "Geometry",
    "Hydrology",
    "Journalism",
    "Law",
    "Linguistics",
    "Logic",
    "Mathematics",
    "Medicine",
    "Meteorology",
    "Music",
    "Nursing",
    "Optics",
    "Painting",
    "Philosophy",
    "Physics",
    "Robotics",
    "Sculpture",
    "Sociology",
    "Statistics",
    "Zoology",
]
FIRST_YEAR = 1900


def words(count: int, endings: str) -> list[str]:
    """`count` distinct invented words; word lists whose `endings` differ share no word."""
    ends = endings.split()
    return [STEMS[i * STRIDE % len(STEMS)] + ends[i % len(ends)] for i in range(count)]


def draw(generator: random.Random, choices: int) -> int:
    """A uniform integer in [0, choices)."""
    return int(generator.random() * choices)


def permutation(generator: random.Random, count: int) -> list[int]:
    """A uniform permutation of range(count), by Fisher and Yates."""
    order = list(range(count))
    for i in range(count - 1, 0, -1):
        j = draw(generator, i + 1)
        order[i], order[j] = order[j], order[i]
    return order


@dataclass(frozen=True)
class Person:
    """One row of the people table: the name and the value of every attribute, as they appear in a text."""

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

    Raises UserError where a size lies outside what the word lists offer, or where people outnumber names.
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
