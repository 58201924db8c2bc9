"""compression.json of a checkpoint: what takes the place of each linear, by name, and how keys and values are kept.

An entry has a type, which is the name of a stored form (`coppice.models.replacements`), "Masked" or "Linear", and the
fields that the form needs. `quantized_activations` holds how a module rounds its inputs. Where a block is narrower than
config.json states, the entries of its linears have `in_features` and `out_features`, and a norm across heads has the
type "Norm" and its number of `features`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coppice import storage
from coppice.errors import UserError
from coppice.files import read_json_object

Entry = Mapping[str, Any]
Entries = Mapping[str, Entry]

FILE = "compression.json"
# The name of the entry on how keys and values are kept.
CACHE = "cache"
# Names of older checkpoints and what they are called now.
RENAMED_TYPES = {
    "Coded": "Codebook",
    "Flattened": "FlattenQuant",
    "Skeleton": "CUR",
    "Compensated": "LowRankCorrection",
}
RENAMED_FIELDS = {"rounded_inputs": "quantized_activations"}


def read_compression(folder: Path) -> dict[str, Entry]:
    """The entries of a checkpoint's compression.json, fetched where a store is named; old names as today's.

    Raises UserError, naming the file, where it is missing, damaged, or an entry has no type.
    """
    path = storage.ensure_local(folder / FILE)
    entries = read_json_object(path)
    for name, entry in entries.items():
        if not isinstance(entry, Mapping) or (name != CACHE and not isinstance(entry.get("type"), str)):
            raise UserError(
                f"{path}: the entry {name!r} has no type; it is damaged or was edited by hand: recompute the node."
            )
    return {name: with_current_names(entry) for name, entry in entries.items()}


def with_current_names(entry: Entry) -> Entry:
    renamed = {RENAMED_FIELDS.get(field, field): value for field, value in entry.items()}
    return {field: RENAMED_TYPES.get(value, value) if field == "type" else value for field, value in renamed.items()}


def linear_entries(entries: Entries) -> Entries:
    """The entries of linears: all but the one of keys and values."""
    return {name: entry for name, entry in entries.items() if name != CACHE}
