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
from coppice.text import check_tokenizer, load_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        UserError: when the parent or the statistics do not fit each other, or the method cannot work on a layer, which
            the sentence names.
    """
    started = time.monotonic()
    used = method(step["method"])
    options = used.validated(step["options"])
    parent_manifest = read_manifest(parent)
    refuse_impossible(step["name"], used, parent_manifest["marks"])
    sources = {}
    for directory in statistics:
        read = calibrate.read_statistics(directory, parent_manifest["fingerprint"])
        sources[read["kind"]] = (directory, read)
    model = load_model(parent, dtype=computing_dtype(parent, device))
    if used.contract == "structure":
        record = {}
        model, achieved = change_structure(model, used, options, sources)
    else:
        moments = Propagated(model, parent, tokens, device) if options.propagate else Static(sources.get("moments"))
        references = load_model(reference, dtype=computing_dtype(reference, device)) if reference else None
        storage = stored_dtype(parent)
        record = compress_layers(model, references, used, options, moments, storage, device)
        achieved = summary(record)
    read_from = {kind: read["tokens_fingerprint"] for kind, (_, read) in sources.items()}
    if tokens is not None:
        read_from["propagated"] = load_windows(tokens).manifest["fingerprint"]
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
            raise UserError(f"Step {name!r} ({used.name}) cannot work on a {mark} node, {used.refuses[mark]}.")


class Static:
    """The parent's statistics, read one block at a time; none for a method that needs none."""

    def __init__(self, source: tuple[Path, dict[str, Any]] | None) -> None:
        self.source = source

    def before(self, index: int, block: nn.Module) -> dict[str, LinearStatistics]:
        return calibrate.block_statistics(self.source[0], index, self.source[1]) if self.source else {}

    def after(self, index: int, block: nn.Module) -> None:
        """Static statistics do not follow the compressed blocks."""


class Propagated:
    """Statistics gathered behind the blocks already compressed."""

    def __init__(self, model: PreTrainedModel, parent: Path, tokens: Path | None, device: str) -> None:
        if tokens is None:
            raise UserError("propagate: true needs the calibration windows; pass --tokens.")
        windows = load_windows(tokens)
        check_tokenizer(parent, windows)
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
    """Replaces the linears of every block, in order; returns the record of each.

    A compensate method sees linears as the architecture names them, with their reference; every other method sees each
    matrix, also the factors inside a composite.
    """
    record = {}
    for index, block in enumerate(layers.blocks(model)):
        block.to(device)
        statistics = moments.before(index, block)
        before = layers.linears(layers.blocks(reference)[index].to(device)) if reference else {}
        for name, module in (layers.linears(block) if reference else layers.leaves(block)).items():
            linear = Linear(
                weight=layers.effective_weight(module).float(),
                mask=layers.mask(module) if isinstance(module, nn.Linear) else None,
                reference=layers.effective_weight(before[name]).float() if reference else None,
                storage=storage,
            )
            full_name = f"model.layers.{index}.{name}"
            try:
                replacement = used.module.compress(linear, statistics.get(name), options)
            except UserError as error:
                raise UserError(f"{full_name}: {error}") from error
            replace(block, name, module, replacement)
            wanted = linear.weight if linear.reference is None else linear.reference
            new = layers.effective_weight(block.get_submodule(name)).float()
            if not torch.isfinite(new).all():
                raise UserError(f"{full_name}: {used.name} made NaN or infinite weights; check its statistics.")
            record[full_name] = {**replacement.record, **errors(new - wanted, wanted, statistics.get(name))}
        moments.after(index, block)
        block.to("cpu")
    return record


def errors(difference: Tensor, wanted: Tensor, statistics: LinearStatistics | None) -> dict[str, float]:
    """The layer's relative squared error: weight_error of its weights and, with statistics, error of its outputs."""
    found = {"weight_error": relative_error(difference, wanted, None)}
    if statistics is not None:
        found["error"] = relative_error(difference, wanted, statistics.second_moment.to(wanted))
    return found


def replace(block: nn.Module, name: str, module: nn.Module, replacement: Replacement) -> None:
    """Puts what a method returned in the linear's place, in the dtype that the model computes in."""
    dtype = next(tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point())
    if isinstance(replacement, Unchanged):
        return
    if isinstance(replacement, Masked):
        module.weight = nn.Parameter(replacement.weight.to(dtype) * replacement.mask)
        module.masked = True
        return
    if isinstance(replacement, Quantized):
        new: nn.Module = layers.Quantized.from_codes(
            replacement.codes,
            replacement.scale.to(dtype),
            replacement.zero_point,
            replacement.bits,
            replacement.group_size,
            replacement.symmetric,
            module.bias,
        )
    elif isinstance(replacement, Factors):
        rank = len(replacement.first)
        new = layers.LowRank(module.in_features, module.out_features, rank, module.bias is not None, device="meta")
        new.first.weight = nn.Parameter(replacement.first.to(dtype))
        new.second.weight = nn.Parameter(replacement.second.to(dtype))
        new.second.bias = module.bias
    elif isinstance(replacement, Compensation):
        new = layers.Compensated(module, len(replacement.first), device="meta")
        new.compensation.first.weight = nn.Parameter(replacement.first.to(dtype))
        new.compensation.second.weight = nn.Parameter(replacement.second.to(dtype))
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
