"""Makes a node from its parent with a prune, decompose, quantize or compensate method.

`inputs` reads what the method needs. `layer_pass` runs a layer method over the blocks, `structure` a method that
removes units, and `models.rotation` and `models.modules.kv_cache` do what the two other contracts ask for.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coppice.compression.inputs import load_reference, read_inputs
from coppice.compression.layer_pass import LayerPass, compress_layers
from coppice.errors import UserError
from coppice.methods import registry
from coppice.methods.options import LayerOptions
from coppice.methods.registry import Method
from coppice.methods.step_argument import parse_step
from coppice.models.adapter import write_adapter
from coppice.models.checkpoint import computing_dtype, load_model, read_manifest, save_checkpoint, stored_dtype
from coppice.records.base import Json
from coppice.records.manifest import Manifest, Provenance, StepRecord


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--node", required=True, help="the node's name in the study")
    parser.add_argument("--parent", required=True, type=Path, help="folder of the parent's checkpoint")
    parser.add_argument("--statistics", type=Path, action="append", default=[], help="folder of one kind (repeatable)")
    parser.add_argument("--tokens", type=Path, help="folder of the calibration windows, for steps that read them")
    parser.add_argument("--reference", type=Path, help="checkpoint from before compression; for compensate methods")
    parser.add_argument("--step", required=True, type=parse_step, help='JSON: {"name", "method", "options"}')
    parser.add_argument("--seed", type=int, default=0, help="the study's seed")
    parser.add_argument("--output", required=True, type=Path, help="folder of the checkpoint")


def run(arguments: argparse.Namespace) -> None:
    compress(
        arguments.node,
        arguments.parent,
        arguments.step,
        arguments.output,
        statistics=arguments.statistics,
        tokens=arguments.tokens,
        reference=arguments.reference,
        seed=arguments.seed,
        device=arguments.device,
    )


def compress(
    node: str,
    parent: Path,
    step: Mapping[str, Any],
    output: Path,
    statistics: list[Path],
    tokens: Path | None = None,
    reference: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Manifest:
    """Writes the node's checkpoint and returns its manifest.

    Raises:
        UserError: when an input of the method is missing or does not fit the parent, or when the method cannot work on
            a layer, which the sentence names.
    """
    started = time.monotonic()
    method = registry.method(step["method"])
    if method.contract == "training":
        raise UserError(
            f"Step {step['name']!r} ({method.name}) trains its parent; make the node with `coppice recover`."
        )
    options = method.validate_options(step["options"])
    parent_manifest = read_manifest(parent)
    refuse_impossible(step["name"], method, parent_manifest.traits)
    inputs = read_inputs(
        step["name"], method, options, parent, parent_manifest.fingerprint, statistics, tokens, reference
    )
    model = load_model(parent, dtype=computing_dtype(parent, device))
    record: dict[str, Json] = {}
    if method.contract == "structure":
        from coppice.compression.structure import change_structure

        model, achieved = change_structure(model, method, options, inputs, stored_dtype(parent), seed, device)
    elif method.contract == "rotation":
        from coppice.models import rotation

        assert isinstance(options, rotation.RotationOptions)  # as every RotationMethod declares
        achieved = rotation.describe_rotation(model, options)
        model = rotation.rotate(model.to(device), method.rotation.rotation, options)
    elif method.contract == "cache":
        from coppice.models.modules import kv_cache

        achieved = method.cache.cache(options)
        kv_cache.install_cache(model, achieved)
    else:
        original = None if inputs.reference is None else load_reference(inputs.reference, model, device)
        assert isinstance(options, LayerOptions)  # as every LayerMethod declares
        layer_pass = LayerPass(model, original, method, options, inputs, stored_dtype(parent), seed, device)
        record, achieved = compress_layers(layer_pass)
    provenance = Provenance(
        node=node,
        parent=parent_manifest.node,
        step=StepRecord(name=step["name"], method=method.name, family=method.family, options=step["options"]),
        seed=seed,
        traits=sorted(method.traits(frozenset(parent_manifest.traits), options)),
        source=parent_manifest.source,
        requested=options.model_dump(mode="json"),
        achieved=achieved,
        layers=record,
        calibration=inputs.fingerprints() or None,
        recovery=parent_manifest.recovery,
        wall_seconds=time.monotonic() - started,
    )
    with tempfile.TemporaryDirectory() as scratch:
        extra = write_adapter(model, Path(scratch)) if method.family == "compensate" else {}
        return save_checkpoint(
            model, output, parent, provenance, stored_dtype(parent), parent_manifest.dense, extra_files=extra
        )


def refuse_impossible(name: str, method: Method, traits: list[str]) -> None:
    """Raises UserError when the method cannot work on a parent with these traits."""
    if problem := method.incompatibility(frozenset(traits)):
        trait, reason = problem
        raise UserError(f"Step {name!r} ({method.name}) cannot work on a {trait} node, because {reason}.")
