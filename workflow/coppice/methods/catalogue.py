"""`coppice methods`: what is registered."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TypedDict

from coppice.methods.registry import methods


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="with sources, options, needs and resources, as JSON")


def run(arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(catalogue(), indent=1))
        return
    entries = catalogue()
    name_width = max(len(name) for name in entries)
    family_width = max(len(entry["family"]) for entry in entries.values())
    for name, entry in entries.items():
        print(f"{name:<{name_width}} {entry['family']:<{family_width}} {entry['source']['title']}")


class Entry(TypedDict):
    """A method for programs. options: a JSON schema. needs: at least, whatever the options."""

    family: str
    contract: str
    source: dict[str, str]
    options: Mapping[str, object]
    needs: list[str]
    adds_traits: list[str]
    incompatible_with: dict[str, str]
    draws: bool
    resources: Mapping[str, object]


def catalogue() -> dict[str, Entry]:
    """Every registered method by name."""
    return {
        name: {
            "family": method.family,
            "contract": method.contract,
            "source": asdict(method.source),
            "options": method.options.model_json_schema(),
            "needs": sorted(method.needs()),
            "adds_traits": sorted(method.adds_traits),
            "incompatible_with": dict(method.incompatible_with),
            "draws": method.declaration.draws,
            "resources": asdict(method.resources),
        }
        for name, method in methods().items()
    }
