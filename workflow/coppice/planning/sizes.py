"""The sizes of a study's nodes, before they are computed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from coppice import storage
from coppice.evaluation import roofline
from coppice.files import read_json_object
from coppice.models.architectures.base import UNITS, Shape, Unit, shape_of
from coppice.records.manifest import Manifest
from coppice.study import tree
from coppice.study.schema import SHIPPED, LocalModel, ShippedModel, Study
from coppice.study.schema.models import Model


class Size(NamedTuple):
    """The size of a node. how: `measured`, `estimated`, or `at most` where only the parent's size is known.

    linears: parameters in the blocks' linears; linear_bytes: stored bytes of them; layers: blocks.
    """

    shape: Shape
    layers: int
    parameters: float
    linears: float
    linear_bytes: float
    stored: float
    how: str


def node_sizes(study: Study, results: Path) -> dict[str, Size | None]:
    """Of every node: of its checkpoint where that exists, otherwise estimated from its parent's; None where unknown."""
    sizes: dict[str, Size | None] = {}
    for name, node in tree.nodes(study).items():
        folder = results / "models" / name
        if (folder / "manifest.json").exists():
            sizes[name] = size_of_checkpoint(folder)
        elif node.parent is None:
            sizes[name] = size_of_source(study.models[name])
        else:
            parent = sizes[node.parent]
            sizes[name] = None if parent is None else child_size(study, parent, node.step)
    return sizes


def size_of_checkpoint(folder: Path) -> Size:
    """From a node's manifest and config."""
    manifest = Manifest.read(folder / "manifest.json")
    config = read_json_object(storage.ensure_local(folder / "config.json"))
    return Size(
        shape_of(config),
        config["num_hidden_layers"],
        manifest.parameters.total,
        manifest.parameters.decoder_linears,
        manifest.stored_bits.decoder_linears / 8,
        manifest.stored_bytes,
        "measured",
    )


def size_of_source(source: Model) -> Size | None:
    """Of a dense model, from its config and the headers of its weights; None for one that is not on this machine."""
    if isinstance(source, ShippedModel):
        folder = SHIPPED / source.shipped
    elif isinstance(source, LocalModel):
        folder = Path(source.path)
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source.hub, "config.json", revision=source.revision)
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    config = read_json_object(folder / "config.json")
    shape, bits = shape_of(config), number_bits(config)
    weights = sum(inputs * outputs for inputs, outputs in shape.linears().values()) * shape.layers
    if files := list(folder.glob("*.safetensors")):
        parameters = sum(map(count_numbers, files))
        stored: float = sum(path.stat().st_size for path in files)
    else:
        tables = 1 if config.get("tie_word_embeddings") else 2
        parameters = weights + tables * shape.vocabulary * shape.hidden
        stored = parameters * bits / 8
    return Size(shape, shape.layers, parameters, weights, weights * bits / 8, stored, "measured")


def count_numbers(path: Path) -> int:
    """Numbers in all tensors of a safetensors file: its first eight bytes give the length of the JSON header."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def number_bits(config: Mapping[str, Any]) -> int:
    """Bits of a stored floating number."""
    return roofline.BITS[config.get("dtype") or config.get("torch_dtype") or "float32"]


def child_size(study: Study, parent: Size, step: str) -> Size:
    """The size after a step, from the step's options: exact for a grid or a removal, approximate for ranks."""
    method, options = tree.method_of(study, step), study.steps[step].options.model_dump()
    linears, stored = parent.linears, parent.linear_bytes
    # Of a floating number: only linears of blocks are ever packed.
    bits = 8 * (parent.stored - parent.linear_bytes) / (parent.parameters - parent.linears)
    layers, how = parent.layers, "estimated"
    if options.get("target_modules") or options.get("exclude"):
        return parent._replace(how="at most")
    if method.contract == "structure":
        layers, share = kept_structure(parent, options)
        linears, stored = linears * share, stored * share
    elif method.family == "decompose" and options.get("keep") is not None:
        linears, stored = linears * options["keep"], stored * options["keep"]
    elif method.family in ("decompose", "compensate") and options.get("rank") is not None:
        factors = options["rank"] * sum(map(sum, parent.shape.linears().values())) * layers
        added = factors if method.family == "compensate" else min(factors, linears) - linears
        linears, stored = linears + added, stored + added * bits / 8
    elif method.family == "quantize" and method.contract == "layer" and isinstance(options.get("bits"), int):
        group = options.get("group_size") or options.get("block") or -1
        scales = 0 if group == -1 else (bits + (0 if options.get("symmetric") else options["bits"])) / group
        stored = linears * (options["bits"] + scales) / 8
    elif method.family in ("decompose", "quantize") and method.contract == "layer":
        how = "at most"
    return parent._replace(
        layers=layers,
        parameters=parent.parameters + linears - parent.linears,
        linears=linears,
        linear_bytes=stored,
        stored=parent.stored + stored - parent.linear_bytes,
        how=how if parent.how != "at most" else "at most",
    )


def kept_structure(parent: Size, options: Mapping[str, Any]) -> tuple[int, float]:
    """Blocks that are left, and the share of the linears' weights: of whole blocks, or of neurons and heads."""
    if "kv_ratio" not in options:
        removed = options.get("blocks")
        removed = int((options.get("ratio") or 0) * parent.layers) if removed is None else removed
        return parent.layers - removed, 1 - removed / parent.layers
    sizes: dict[Unit, int] = {"kv_groups": 0, "neurons": 0}
    for role, (inputs, outputs) in parent.shape.linears().items():
        sizes[UNITS[role][0]] += inputs * outputs
    heads, neurons = sizes["kv_groups"], sizes["neurons"]
    of_heads = options["ratio"] if options["kv_ratio"] is None else options["kv_ratio"]
    # Whole groups are removed, rounded down.
    of_heads = int(parent.shape.kv_heads * of_heads) / parent.shape.kv_heads
    return parent.layers, (neurons * (1 - options["ratio"]) + heads * (1 - of_heads)) / (neurons + heads)
