"""The names of things in the config: which are possible, which are reserved, and who has one already."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from coppice.models.contracts import KINDS

# Names become folders next to these.
RESERVED = {"adapter", "models", "tokens", "statistics", "evaluations", "tables", "laws", "report", "tracking"} | {
    *("logs", "benchmarks", "state"),
    *KINDS,
}
SECTIONS = ("models", "steps", "calibrations", "evaluations", "texts", "laws")
# Sections whose names do not become folders next to those of the others.
SEPARATE = ("texts", "laws")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_EXPONENT = re.compile(r"[-+]?\d{1,8}(\.\d{0,8})?[eE][-+]?\d{1,3}")


def parse_exponents(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string, because it expects 1.0e-3. Here both are numbers, and 1e6 is an integer."""
    if isinstance(value, Mapping):
        return {key: parse_exponents(item) for key, item in value.items()}
    if isinstance(value, list):
        return [parse_exponents(item) for item in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def problems(value: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each name that cannot be a folder, or that two things share. value: the config, not validated."""
    if isinstance(value.get("study"), str) and not _NAME.fullmatch(value["study"]):
        yield _rule("study", value["study"])
    owners: dict[str, str] = {}
    for section in SECTIONS:
        names = value.get(section)
        for name in names if isinstance(names, Mapping) else ():
            yield from _name_problems(f"{section}.{name}", name, None if section in SEPARATE else owners)
    evaluations = value.get("evaluations")
    for evaluation, body in evaluations.items() if isinstance(evaluations, Mapping) else ():
        protocols = body.get("perplexity") if isinstance(body, Mapping) else None
        for protocol in protocols if isinstance(protocols, Mapping) else ():
            if not isinstance(protocol, str) or not _NAME.fullmatch(protocol):
                yield _rule(f"evaluations.{evaluation}.perplexity.{protocol}", str(protocol))


def _name_problems(place: str, name: Any, owners: dict[str, str] | None) -> Iterator[str]:
    """owners: the places of the names so far, in lower case, where names must differ; the name is added."""
    if not isinstance(name, str) or _EXPONENT.fullmatch(name):
        yield f"{place}: this name is a number to YAML; choose one with more letters, or put it in quotes."
    elif not _NAME.fullmatch(name):
        yield _rule(place, name)
    elif owners is not None and name in RESERVED:
        yield f"{place}: the name {name!r} is reserved for a folder of the results; choose another."
    elif owners is not None:
        # Some file systems do not distinguish upper from lower case.
        owner = owners.setdefault(name.casefold(), place)
        if owner != place:
            yield f"{place}: the name is taken by {owner}; a name must be unique."


def _rule(place: str, name: str) -> str:
    return f"{place}: {name!r} is not a name; names are letters, digits, - and _, and begin with a letter or digit."
