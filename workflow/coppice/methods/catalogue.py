"""`coppice methods`: what is registered."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from coppice.methods.registry import methods


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="with sources, options and needs, as JSON")


def run(arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(catalogue(), indent=1))
        return
    entries = catalogue()
    name_width = max(len(name) for name in entries)
    family_width = max(len(entry["family"]) for entry in entries.values())
    for name, entry in entries.items():
        print(f"{name:<{name_width}} {entry['family']:<{family_width}} {entry['source']['title']}")


def catalogue() -> dict[str, dict]:
    """Every registered method: family, contract, source, options (JSON schema), needs, what it makes and refuses."""
    return {
        name: {
            "family": method.family,
            "contract": method.contract,
            "source": asdict(method.source),
            "options": method.options.model_json_schema(),
            "needs": sorted(method.needs()),
            "adds_traits": sorted(method.adds_traits),
            "incompatible_with": dict(method.incompatible_with),
        }
        for name, method in methods().items()
    }
