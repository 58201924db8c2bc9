"""Names that older versions wrote, and what they are called now: the one table that readers of old files use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

OPTIONS = {"propagate": "sequential", "linears": "target_modules"}
METHODS = {"round-inputs": "activation-quant"}
TRAITS = {"quantized-inputs": "quantized-activations"}
COLUMNS = {"marks": "traits", "asked": "requested"}  # of the table of nodes


def rename_keys(mapping: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    """The mapping under the names of this version, in the same order."""
    return {names.get(key, key): value for key, value in mapping.items()}
