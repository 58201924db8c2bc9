"""What each layer of a node is after the steps of its path: rank, sparsity, bits, error, units kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from coppice.records.base import Json
from coppice.records.layout import ResultsLayout
from coppice.records.manifest import Manifest
from coppice.results.schemas import Row

Picture = dict[str, dict[str, float]]  # module -> title of a column -> value


class LayerTable(TypedDict):
    """Names of modules, and under the title of each column a number, or None, of each of them."""

    modules: list[str]
    columns: dict[str, list[float | None]]


# Of a linear's record: what remains true after later steps, and the error of the step itself.
_LASTING = {
    "rank": "rank",
    "bond": "bond dimension",
    "keep": "part kept",
    "sparsity": "sparsity",
    "bits": "bits",
    "input_bits": "input bits",
}
_ERRORS = {"error": "error", "weight_error": "weight error"}
_OF_LINEARS = _LASTING | _ERRORS
_OF_BLOCKS = ("blocks kept", "key/value groups kept", "neurons kept", "block influence")


def layer_records(rows: Iterable[Row], layout: ResultsLayout) -> dict[str, LayerTable]:
    """The table of each node whose path compressed layers.

    rows: of the table nodes. A step on linears gives each of them a row, which keeps the results of earlier steps
    except their errors. A step that removes units of the model gives each block a row.
    """
    pictures: dict[str, Picture] = {}
    for row in sorted(rows, key=lambda row: row["depth"]):
        manifest = Manifest.read(layout.manifest(row["node"]))
        pictures[row["node"]] = _picture(manifest, pictures.get(row["parent"], {}))
    return {node: _columns(picture) for node, picture in pictures.items() if any(picture.values())}


def _picture(manifest: Manifest, parent: Picture) -> Picture:
    """The picture of a node from its manifest and the picture of its parent."""
    if "units" in manifest.achieved:
        return _blocks(manifest.achieved)
    own = {name.removeprefix("model."): _columns_of_record(record) for name, record in manifest.layers.items()}
    before = {
        name: {title: row[title] for title in row if title not in _ERRORS.values()} for name, row in parent.items()
    }
    if any(own.values()) and any(title in _OF_BLOCKS for row in before.values() for title in row):
        return own
    return before | {name: before.get(name, {}) | row for name, row in own.items()}


def _columns_of_record(record: Json) -> dict[str, float]:
    values = {title: record.get(name) for name, title in _OF_LINEARS.items()}
    return {title: value for title, value in values.items() if isinstance(value, int | float)}


def _blocks(achieved: Mapping[str, Any]) -> Picture:
    """What a removal of units kept of each block of the parent."""
    units, gone = achieved["units"], achieved.get("removed_blocks", [])
    influence = achieved.get("block_influence")
    picture: Picture = {}
    for index in range(units["blocks"]["of"]):
        row: dict[str, float] = {"blocks kept": int(index not in gone)} if gone else {}
        for kind, title in (("kv_groups", "key/value groups kept"), ("neurons", "neurons kept")):
            if units[kind]["removed"]:
                row[title] = 0 if index in gone else _kept(units[kind], index)
        if influence is not None:
            row["block influence"] = influence[index]
        picture[f"layers.{index}"] = row
    return picture


def _kept(units: dict[str, Any], index: int) -> int:
    """How many units of a kind a block keeps; the record holds lists where blocks differ."""
    if isinstance(units["removed"], list):
        return units["of"][index] - units["removed"][index]
    return units["of"] - units["removed"]


def _columns(picture: Picture) -> LayerTable:
    titles = [*_OF_LINEARS.values(), *_OF_BLOCKS]
    present = {title for row in picture.values() for title in row}
    return {
        "modules": list(picture),
        "columns": {title: [row.get(title) for row in picture.values()] for title in titles if title in present},
    }
