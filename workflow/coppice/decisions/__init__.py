"""Decisions: what a study's tables and fitted laws advise to do, and how far that can be trusted; a file a question.

`budget`: how many recovery tokens to buy for a node, and what loss to expect at a budget that was not run; `next_run`:
which run would be most informative. Both rest on a law of recoveries (`fitted`). They show its held-out error, and
refuse it where it fails its own test. `recipe`: the best node within limits, with the probability that it is the best,
from measurements alone. `stage` is the command.
"""

from __future__ import annotations

from typing import Any, Required, TypedDict

from coppice.laws.contracts import Recommendation
from coppice.records.base import Json


class Basis(TypedDict):
    """The law that an answer rests on, whether it fails its own test, and its held-out errors."""

    law: str
    refused: bool
    held_out: dict[str, Json]


class Answer(TypedDict, total=False):
    """An answer: sentences, perhaps a table (titles, then rows), and their numbers.

    law, refused, held_out: of an answer that rests on a law, its name, whether it fails its own test, and its errors;
    recommendation: what the law itself recommends. node, tokens: what to buy for a node. at_tokens, value, low,
    high, extrapolation: an expected loss. at_tokens, deviation, runs: next runs. nodes, compared, tied, unmeasured,
    unknown: nodes in order, how many were compared, and which were not.
    """

    title: Required[str]
    sentences: Required[list[str]]
    table: list[list[str]]
    law: str
    refused: bool
    held_out: dict[str, Json]
    recommendation: list[Json]
    node: str
    tokens: list[Recommendation]
    at_tokens: float
    value: float
    low: float | None
    high: float | None
    extrapolation: bool
    deviation: float
    runs: list[Any]
    nodes: list[Any]
    compared: int
    tied: int
    unmeasured: list[str]
    unknown: list[str]
