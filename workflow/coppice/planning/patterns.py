"""Regular expressions for the names of a study's nodes, steps and evaluations, as Snakemake constrains wildcards."""

from __future__ import annotations

import re
from collections.abc import Iterable

from coppice.study import tree
from coppice.study.schema import Study


def alternation(names: Iterable[str]) -> str:
    """A pattern that matches one of the names, and nothing where no names are given."""
    escaped = [re.escape(name) for name in names]
    return f"(?:{'|'.join(escaped)})" if escaped else "(?!)"


def node(study: Study) -> str:
    """A node: a model and its steps."""
    return rf"{alternation(study.models)}(?:/{alternation(study.steps)}(?:@\d+)?)*"


def compressing_part(study: Study) -> str:
    """A part of a node's name: a step that does not train, with the seed that may follow."""
    return _part(step for step in study.steps if not tree.trains(study, step))


def training_part(study: Study) -> str:
    """A part of a node's name: a step that trains, with the seed that may follow."""
    return _part(step for step in study.steps if tree.trains(study, step))


def _part(steps: Iterable[str]) -> str:
    return alternation(steps) + r"(?:@\d+)?"


def evaluation(study: Study, kind: str) -> str:
    """The evaluations of a kind."""
    return alternation(name for name, body in study.evaluations.items() if body.kind == kind)
