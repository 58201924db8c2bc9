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

import torch
from torch import Tensor, nn

from coppice import calibrate, layers
from coppice.checkpoint import (
    computing_dtype,
    load_model,
    read_manifest,
    save_checkpoint,
    stored_dtype,
)
from coppice.errors import UserError
from coppice.methods.base import (
    Compensation,
    Factors,
    Linear,
    LinearStatistics,
    Masked,
    Method,
    MethodOptions,
    Quantized,
    Replacement,
    Unchanged,
    method,
)
from coppice.methods.solvers.loss import relative_error
from coppice.text import Windows, check_tokenizer, load_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MISSING = {
    "tokens": "the calibration windows for propagate: true; pass their folder with --tokens",
    "reference": "the checkpoint from before the compression that it makes up for; pass its folder with --reference",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--node", required=True, help="the node's name in the study")
    parser.add_argument("--parent", required=True, type=Path, help="folder of the parent's checkpoint")
    parser.add_argument("--statistics", type=Path, action="append", default=[], help="folder of one kind (repeatable)")
    parser.add_argument("--tokens", type=Path, help="folder of the calibration windows; for propagate: true")
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
) -> dict[str, Any]:
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
    refuse_impossible(step["name"], used, parent_manifest["marks"])
    propagates = used.propagates(options)
    needs = used.needs - {"moments"} | {"tokens"} if propagates else used.needs
    if used.family == "compensate":
        needs |= {"reference"}
    # Moments, where there are any, also tell the output error of a method that does not need them.
    readable = needs | {"moments"} if used.contract == "layer" and not propagates else needs
    sources = {}
    for directory in statistics:
        read = calibrate.read_statistics(directory, parent_manifest["fingerprint"])
        if read["kind"] in readable:
            sources[read["kind"]] = (directory, read)
    given = {name for name, path in (("tokens", tokens), ("reference", reference)) if path is not None}
    require_inputs(step["name"], used, needs, given | sources.keys())
    read_from = {kind: read["tokens_fingerprint"] for kind, (_, read) in sources.items()}
    model = load_model(parent, dtype=computing_dtype(parent, device))
    if used.contract == "structure":
        record = {}
        model, achieved = change_structure(model, used, options, sources)
    else:
        if propagates:
            windows = load_windows(tokens)
            check_tokenizer(parent, windows)
            read_from["propagated"] = windows.manifest["fingerprint"]
            moments: Static | Propagated = Propagated(model, windows, device)
        else:
            moments = Static(sources.get("moments"), device)
        original = load_reference(reference, model, device) if "reference" in needs else None
        record = compress_layers(model, original, used, options, moments, stored_dtype(parent), device)
        achieved = summary(record)
    manifest = {
        "node": node,
        "parent": parent_manifest["node"],
        "step": {**step, "family": used.family},
        "seed": seed,
        "marks": sorted(used.marks(frozenset(parent_manifest["marks"]))),
        "source": parent_manifest["source"],
        "dense": parent_manifest["dense"],
        "asked": options.model_dump(mode="json"),
        "achieved": achieved,
        "layers": record,
        "calibration": read_from or None,
        "recovery": parent_manifest["recovery"],
        "wall_seconds": time.monotonic() - started,
    }
    with tempfile.TemporaryDirectory() as scratch:
        extra = write_adapter(model, Path(scratch)) if used.family == "compensate" else {}
        return save_checkpoint(model, output, parent, manifest, stored_dtype(parent), extra)


def refuse_impossible(name: str, used: Method, marks: list[str]) -> None:
    """Raises UserError when the method cannot work on a parent with these marks."""
    for mark in marks:
        if mark in used.refuses:
            reason = used.refuses[mark].removeprefix("because ").rstrip(".")
            raise UserError(f"Step {name!r} ({used.name}) cannot work on a {mark} node, because {reason}.")


def require_inputs(name: str, used: Method, needs: frozenset[str], given: set[str]) -> None:
    """Raises UserError for an input of the method that was not given: a kind of statistics, tokens or the reference."""
    for missing in sorted(needs - given):
        how = MISSING.get(missing) or (
            f"statistics of the kind {missing!r}, gathered on its parent; make them with "
            f"`coppice calibrate --kind {missing}` and pass their folder with --statistics"
        )
        raise UserError(f"Step {name!r} ({used.name}) needs {how}.")


def load_reference(directory: Path, model: PreTrainedModel, device: str) -> PreTrainedModel:
    """The model from before compression. Raises UserError when its linears are not those of the parent's model."""
    reference = load_model(directory, dtype=computing_dtype(directory, device))
    own, before = (
        {name: (linear.out_features, linear.in_features) for name, linear in layers.linears(each.model.layers).items()}
        for each in (model, reference)
    )
    if own != before:
        raise UserError(
            f"The reference {directory} has linears of other shapes than the parent; pass the checkpoint that the "
            "parent's linears were compressed from."
        )
    return reference


class Static:
    """The parent's statistics, read one block at a time; none for a method that needs none."""

    def __init__(self, source: tuple[Path, dict[str, Any]] | None, device: str) -> None:
        self.source, self.device = source, device

    def before(self, index: int, block: nn.Module) -> dict[str, LinearStatistics]:
        if self.source is None:
            return {}
        directory, manifest = self.source
        return calibrate.block_statistics(directory, index, manifest, self.device)

    def after(self, index: int, block: nn.Module) -> None:
        """Static statistics do not follow the compressed blocks."""


class Propagated:
    """Statistics gathered behind the blocks already compressed."""

    def __init__(self, model: PreTrainedModel, windows: Windows, device: str) -> None:
        self.device = device
        self.batches = calibrate.embed(model, *calibrate.as_tensors(windows))

    def before(self, index: int, block: nn.Module) -> dict[str, LinearStatistics]:
        moments, aliases, _ = calibrate.gather_block(block, index, self.batches, self.device)
        return {name: moments[first] for name, first in aliases.items()}

    def after(self, index: int, block: nn.Module) -> None:
        for batch in self.batches:
            batch.hidden = calibrate.run_block(block, index, batch, self.device)


@torch.no_grad()
def compress_layers(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    used: Method,
    options: MethodOptions,
    moments: Static | Propagated,
    storage: torch.dtype,
    device: str,
) -> dict[str, Any]:
    """Replaces the linears of every block, in order; returns the record of each by its full name."""
    record = {}
    for index, block in enumerate(layers.blocks(model)):
        original = layers.blocks(reference)[index] if reference is not None else None
        for module in filter(None, (block, original)):
            module.to(device)
        statistics = moments.before(index, block)
        record |= compress_block(f"model.layers.{index}", block, original, used, options, statistics, storage)
        del statistics  # before the next block's come
        moments.after(index, block)
        for module in filter(None, (block, original)):
            module.to("cpu")
    return record


def compress_block(
    place: str,
    block: nn.Module,
    original: nn.Module | None,
    used: Method,
    options: MethodOptions,
    statistics: dict[str, LinearStatistics],
    storage: torch.dtype,
) -> dict[str, Any]:
    """Replaces the linears of the block at `place` in the model; returns the record of each by its full name.

    A compensate method sees linears as the architecture names them, with their reference in the block `original`; every
    other method sees each matrix, also the factors inside a composite.
    """
    record = {}
    before = layers.linears(original) if original is not None else {}
    for name, module in (layers.leaves(block) if original is None else layers.linears(block)).items():
        linear = Linear(
            weight=layers.effective_weight(module).float(),
            mask=layers.mask(module) if isinstance(module, nn.Linear) else None,
            reference=None if original is None else layers.effective_weight(before[name]).float(),
            storage=storage,
        )
        try:
            replacement = used.module.compress(linear, statistics.get(name), options)
            replace(block, name, module, replacement, storage)
            new = layers.effective_weight(block.get_submodule(name)).float()
            record[f"{place}.{name}"] = {**replacement.record, **errors(new, linear, statistics.get(name))}
        except UserError as error:
            raise UserError(f"{place}.{name}: {error}") from error
    return record


def errors(new: Tensor, linear: Linear, statistics: LinearStatistics | None) -> dict[str, float]:
    """The layer's relative squared error: weight_error of its weights and, with statistics, error of its outputs.

    Against the reference where there is one. Raises UserError when a weight, old or new, is not finite.
    """
    wanted = linear.weight if linear.reference is None else linear.reference
    found = {"weight_error": relative_error(new - wanted, wanted, None)}
    if statistics is not None:
        found["error"] = relative_error(new - wanted, wanted, statistics.second_moment)
    return found


def replace(block: nn.Module, name: str, module: nn.Module, replacement: Replacement, storage: torch.dtype) -> None:
    """Puts what a method returned in the linear's place: values as they will be read back from the checkpoint, in the
    dtype that the model computes in."""
    dtype = next(tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point())

    def stored(values: Tensor) -> Tensor:
        return values.to(storage).to(dtype)

    if isinstance(replacement, Unchanged):
        return
    if isinstance(replacement, Masked):
        module.weight = nn.Parameter(stored(replacement.weight) * replacement.mask)
        module.masked = True
        return
    if isinstance(replacement, Quantized):
        new: nn.Module = layers.Quantized.from_codes(
            replacement.codes,
            stored(replacement.scale),
            replacement.zero_point,
            replacement.bits,
            replacement.group_size,
            replacement.symmetric,
            module.bias,
        )
    elif isinstance(replacement, Factors):
        rank = len(replacement.first)
        new = layers.LowRank(module.in_features, module.out_features, rank, module.bias is not None, device="meta")
        new.first.weight = nn.Parameter(stored(replacement.first))
        new.second.weight = nn.Parameter(stored(replacement.second))
        new.second.bias = module.bias
    elif isinstance(replacement, Compensation):
        new = layers.Compensated(module, len(replacement.first), device="meta")
        new.compensation.first.weight = nn.Parameter(stored(replacement.first))
        new.compensation.second.weight = nn.Parameter(stored(replacement.second))
    block.set_submodule(name, new)


def change_structure(
    model: PreTrainedModel, used: Method, options: MethodOptions, sources: dict[str, tuple[Path, dict[str, Any]]]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Removes the units that a structure method chooses; returns the model and what was achieved."""
    from coppice import surgery

    tensors: dict[str, Tensor] = {}
    for directory, read in sources.values():
        for name in read["files"]:
            tensors |= calibrate.read_statistics_file(directory, name, read)
    removal = used.module.choose(surgery.structure(model), tensors, options)
    achieved = {**removal.record, **surgery.achieved(model, removal)}
    return surgery.remove(model, removal), achieved


def summary(record: dict[str, Any]) -> dict[str, float]:
    """The means over layers of every number in their records."""
    names = {key for entry in record.values() for key, value in entry.items() if isinstance(value, int | float)}
    return {
        key: sum(values) / len(values)
        for key in sorted(names)
        if (values := [entry[key] for entry in record.values() if isinstance(entry.get(key), int | float)])
    }


def write_adapter(model: PreTrainedModel, folder: Path) -> dict[str, Path]:
    """Writes the compensations as a PEFT adapter of the parent's checkpoint; returns the files by name in the node.

    PEFT scales a module by alpha / rank of that module; alpha equal to the rank, module by module, makes it 1.
    """
    from safetensors.torch import save_file

    tensors, ranks = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, layers.Compensated):
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = module.compensation.first.weight.float().contiguous()
            tensors[f"{prefix}.lora_B.weight"] = module.compensation.second.weight.float().contiguous()
            ranks[name] = module.compensation.first.out_features
    rank = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted(ranks),
        "bias": "none",
        "inference_mode": True,
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return {f"adapter/{path.name}": path for path in folder.iterdir()}
