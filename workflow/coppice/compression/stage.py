"""Makes a node from its parent with a prune, decompose, quantize or compensate method.

A layer method sees one linear at a time; this module owns the walk over the blocks, the statistics (read, or gathered
behind the blocks already compressed), the replacement and the record. A structure method names units; `surgery` removes
them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from coppice.calibration.reading import read_statistics
from coppice.data.tokenizer import check_tokenizer
from coppice.data.windows import load_windows
from coppice.errors import UserError
from coppice.methods.contracts import FROM_WINDOWS
from coppice.methods.options import MethodOptions
from coppice.methods.registry import Method, method
from coppice.models.checkpoint import computing_dtype, load_model, read_manifest, save_checkpoint, stored_dtype
from coppice.records.manifest import Json, Manifest, Provenance, StepRecord
from coppice.records.statistics import Statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from coppice.compression.adapter import write_adapter
from coppice.compression.layer_pass import Inputs, LayerPass, compress_layers, load_reference, read_all

MISSING = {
    "tokens": "the calibration windows themselves; pass their folder with --tokens",
    "reference": "the checkpoint from before the compression that it makes up for; pass its folder with --reference",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--node", required=True, help="the node's name in the study")
    parser.add_argument("--parent", required=True, type=Path, help="folder of the parent's checkpoint")
    parser.add_argument("--statistics", type=Path, action="append", default=[], help="folder of one kind (repeatable)")
    parser.add_argument("--tokens", type=Path, help="folder of the calibration windows, for steps that read them")
    parser.add_argument("--reference", type=Path, help="checkpoint from before compression; for compensate methods")
    parser.add_argument("--step", required=True, type=json.loads, help='JSON: {"name", "method", "options"}')
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
    step: dict[str, Any],
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
    used = method(step["method"])
    if used.contract == "training":
        raise UserError(f"Step {step['name']!r} ({used.name}) trains its parent; make the node with `coppice recover`.")
    options = used.validated(step["options"])
    parent_manifest = read_manifest(parent)
    refuse_impossible(step["name"], used, parent_manifest.traits)
    needs = used.needs(options)
    wanted = needs - FROM_WINDOWS | ({"tokens"} if needs & FROM_WINDOWS else set())
    if used.family == "compensate":
        wanted |= {"reference"}
    # Moments, where there are any, also tell the output error of a method that does not need them.
    readable = wanted | {"moments"} if used.contract == "layer" and "sequential_moments" not in needs else wanted
    sources: dict[str, tuple[Path, Statistics]] = {}
    for directory in statistics:
        read = read_statistics(directory, parent_manifest.fingerprint)
        if read.kind in readable:
            sources[read.kind] = (directory, read)
    given = {name for name, path in (("tokens", tokens), ("reference", reference)) if path is not None}
    require_inputs(step["name"], used, wanted, given | sources.keys())
    read_from = {kind: read.tokens_fingerprint for kind, (_, read) in sources.items()}
    windows = None
    if "tokens" in wanted:
        windows = load_windows(tokens)
        check_tokenizer(parent, windows)
        read_from["windows"] = windows.manifest.fingerprint
    model = load_model(parent, dtype=computing_dtype(parent, device))
    record: dict[str, Json] = {}
    if used.contract == "structure":
        model, achieved = change_structure(model, used, options, sources)
    elif used.contract == "rotation":
        from coppice.models import rotation

        achieved = rotation.achieved(model, options)
        model = rotation.rotate(model.to(device), used.rotation.rotation, options)
    elif used.contract == "cache":
        from coppice.models.modules import kv_cache

        achieved = used.cache.cache(options)
        kv_cache.install_cache(model, achieved)
    else:
        original = load_reference(reference, model, device) if "reference" in wanted else None
        walk = LayerPass(
            model, original, used, options, Inputs(needs, sources, windows), stored_dtype(parent), seed, device
        )
        record, achieved = compress_layers(walk)
    provenance = Provenance(
        node=node,
        parent=parent_manifest.node,
        step=StepRecord(name=step["name"], method=used.name, family=used.family, options=step["options"]),
        seed=seed,
        traits=sorted(used.traits(frozenset(parent_manifest.traits), options)),
        source=parent_manifest.source,
        requested=options.model_dump(mode="json"),
        achieved=achieved,
        layers=record,
        calibration=read_from or None,
        recovery=parent_manifest.recovery,
        wall_seconds=time.monotonic() - started,
    )
    with tempfile.TemporaryDirectory() as scratch:
        extra = write_adapter(model, Path(scratch)) if used.family == "compensate" else {}
        return save_checkpoint(
            model, output, parent, provenance, stored_dtype(parent), parent_manifest.dense, extra_files=extra
        )


def refuse_impossible(name: str, used: Method, traits: list[str]) -> None:
    """Raises UserError when the method cannot work on a parent with these traits."""
    if problem := used.incompatibility(frozenset(traits)):
        trait, reason = problem
        raise UserError(f"Step {name!r} ({used.name}) cannot work on a {trait} node, because {reason}.")


def require_inputs(name: str, used: Method, needs: frozenset[str], given: set[str]) -> None:
    """Raises UserError for an input of the method that was not given: a kind of statistics, tokens or the reference."""
    for missing in sorted(needs - given):
        how = MISSING.get(missing) or (
            f"statistics of the kind {missing!r}, gathered on its parent; make them with "
            f"`coppice calibrate --kind {missing}` and pass their folder with --statistics"
        )
        raise UserError(f"Step {name!r} ({used.name}) needs {how}.")


def change_structure(
    model: PreTrainedModel, used: Method, options: MethodOptions, sources: dict[str, tuple[Path, Statistics]]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Removes the units that a structure method chooses; returns the model and what was achieved."""
    from coppice.models import surgery

    tensors: dict[str, Tensor] = {}
    for source in sources.values():
        tensors |= read_all(source)
    removal = used.structure.choose(surgery.structure(model), tensors, options)
    achieved = {**removal.record, **surgery.achieved(model, removal)}
    return surgery.remove(model, removal), achieved
