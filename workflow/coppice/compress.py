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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coppice import allocate, calibrate, folding, layers
from coppice.checkpoint import (
    computing_dtype,
    load_model,
    read_manifest,
    save_checkpoint,
    stored_dtype,
)
from coppice.decoder import WholeDecoder
from coppice.errors import UserError, about, nearest
from coppice.methods.base import (
    FROM_WINDOWS,
    Codebook,
    Compensation,
    Cores,
    Factors,
    Flattened,
    Linear,
    LinearStatistics,
    Masked,
    Method,
    MethodOptions,
    Quantized,
    Replacement,
    RoundedInputs,
    Skeleton,
    Unchanged,
    method,
)
from coppice.methods.solvers.loss import relative_error
from coppice.text import Windows, check_tokenizer, load_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    needs = used.needs(options)
    wanted = needs - FROM_WINDOWS | ({"tokens"} if needs & FROM_WINDOWS else set())
    if used.family == "compensate":
        wanted |= {"reference"}
    # Moments, where there are any, also tell the output error of a method that does not need them.
    readable = wanted | {"moments"} if used.contract == "layer" and "behind" not in needs else wanted
    sources = {}
    for directory in statistics:
        read = calibrate.read_statistics(directory, parent_manifest["fingerprint"])
        if read["kind"] in readable:
            sources[read["kind"]] = (directory, read)
    given = {name for name, path in (("tokens", tokens), ("reference", reference)) if path is not None}
    require_inputs(step["name"], used, wanted, given | sources.keys())
    read_from = {kind: read["tokens_fingerprint"] for kind, (_, read) in sources.items()}
    windows = None
    if "tokens" in wanted:
        windows = load_windows(tokens)
        check_tokenizer(parent, windows)
        read_from["windows"] = windows.manifest["fingerprint"]
    model = load_model(parent, dtype=computing_dtype(parent, device))
    record = {}
    if used.contract == "structure":
        model, achieved = change_structure(model, used, options, sources)
    elif used.contract == "rotation":
        from coppice import rotation

        achieved = rotation.achieved(model, options)
        model = rotation.rotate(model.to(device), used.module, options)
    elif used.contract == "cache":
        from coppice import kv_cache

        achieved = used.module.cache(options)
        kv_cache.install_cache(model, achieved)
    else:
        original = load_reference(reference, model, device) if "reference" in wanted else None
        walk = Walk(model, original, used, options, Inputs(needs, sources, windows), stored_dtype(parent), seed, device)
        record, achieved = compress_layers(walk)
    manifest = {
        "node": node,
        "parent": parent_manifest["node"],
        "step": {**step, "family": used.family},
        "seed": seed,
        "marks": sorted(used.marks(frozenset(parent_manifest["marks"]), options)),
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


@dataclass(frozen=True)
class Inputs:
    """What a step reads besides checkpoints: what it needs, folders of statistics by kind, calibration windows."""

    needs: frozenset[str]
    sources: dict[str, tuple[Path, dict[str, Any]]]
    windows: Windows | None


@dataclass(frozen=True)
class Walk:
    """A layer method on its way over the blocks of a model.

    original: the model from before compression, for a compensate method. storage: the type of the checkpoint's numbers.
    """

    model: PreTrainedModel
    original: PreTrainedModel | None
    used: Method
    options: MethodOptions
    inputs: Inputs
    storage: torch.dtype
    seed: int
    device: str

    def linears(self, block: nn.Module) -> dict[str, nn.Module]:
        """What the method sees of a block, by the name within it.

        A compensate method sees linears as the architecture names them; every other method each matrix, also the
        factors inside a composite.
        """
        return layers.leaves(block) if self.original is None else layers.linears(block)

    def chosen(self, name: str) -> bool:
        """Whether the options let the method work on the linear of that name."""
        return self.options.linears is None or bool(set(name.split(".")) & set(self.options.linears))

    def linear(self, name: str, module: nn.Module, reference: nn.Module | None = None, **more: Any) -> Linear:
        """What the method sees of one linear."""
        return Linear(
            weight=layers.effective_weight(module).float(),
            mask=layers.mask(module) if isinstance(module, nn.Linear) else None,
            reference=None if reference is None else layers.effective_weight(reference).float(),
            storage=self.storage,
            name=name,
            **more,
        )

    def read(self, index: int) -> dict[str, LinearStatistics]:
        """The parent's moments of a block by linear; empty where there are none."""
        if "moments" not in self.inputs.sources:
            return {}
        directory, manifest = self.inputs.sources["moments"]
        return calibrate.block_statistics(directory, index, manifest, self.device)


class Behind:
    """Moments gathered behind the blocks already compressed."""

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
def compress_layers(walk: Walk) -> tuple[dict[str, Any], dict[str, Any]]:
    """Replaces the linears of every block, in order; returns the record of each by its full name, and what was achieved
    over all of them."""
    require_known_linears(walk)
    planned = plan(walk)
    options_of, allocation = allocated(walk)
    behind = Behind(walk.model, walk.inputs.windows, walk.device) if "behind" in walk.inputs.needs else None
    record = {}
    for index, block in enumerate(layers.blocks(walk.model)):
        original = layers.blocks(walk.original)[index] if walk.original is not None else None
        for module in filter(None, (block, original)):
            module.to(walk.device)
        parents = walk.read(index)
        followed = behind.before(index, block) if behind is not None else {}
        record |= compress_block(walk, index, block, original, parents, followed, planned, options_of)
        del parents, followed  # before the next block's come
        if behind is not None:
            behind.after(index, block)
        for module in filter(None, (block, original)):
            module.to("cpu")
    return record, {**summary(record), **allocation}


def require_known_linears(walk: Walk) -> None:
    """Raises UserError for a name in the option `linears` that no linear has."""
    if walk.options.linears is None:
        return
    known = {part for name in walk.linears(layers.blocks(walk.model)) for part in name.split(".")[1:]}
    for name in walk.options.linears:
        if name not in known:
            raise UserError(f"linears: no linear of this model is named {name!r}.{nearest(name, known)}")


def plan(walk: Walk) -> dict[str, Any]:
    """What the method decides from the whole model, by the linears' full names."""
    if not hasattr(walk.used.module, "plan"):
        return {}
    windows, sources = walk.inputs.windows, walk.inputs.sources
    tokens, kept = (None, None) if windows is None else calibrate.as_tensors(windows)
    kinds = {kind: read_all(source) for kind, source in sources.items() if kind != "moments"}
    for parameter in walk.model.parameters():
        parameter.requires_grad_(False)
    walk.model.to(walk.device)
    decoder = WholeDecoder(walk.model, every_linear(walk), walk.linear, walk.read, kinds, tokens, kept, walk.seed)
    decided = walk.used.module.plan(decoder, walk.options)
    # The walk takes one block at a time to the device.
    walk.model.to("cpu")
    return decided


def allocated(walk: Walk) -> tuple[dict[str, MethodOptions], dict[str, Any]]:
    """The options of each linear where the budget is spread unevenly, by full name, and what that achieves."""
    if not Method.allocates(walk.options):
        return {}, {}
    references = {} if walk.original is None else layers.linears(walk.original.model)

    def entries() -> Iterator[tuple[str, Linear, LinearStatistics]]:
        read = lru_cache(maxsize=1)(walk.read)
        for name, module in every_linear(walk).items():
            _, _, index, inner = name.split(".", 3)
            reference = references.get(name.removeprefix("model."))
            # One linear at a time is on the device.
            for each in filter(None, (module, reference)):
                each.to(walk.device)
            yield name, walk.linear(name, module, reference), read(int(index))[inner]
            for each in filter(None, (module, reference)):
                each.to("cpu")

    options_of, spread = allocate.allocate(entries(), walk.options)
    return options_of, {"allocation": spread}


def every_linear(walk: Walk) -> dict[str, nn.Module]:
    """The linears that the method works on by full name, in the model's order."""
    return {
        f"model.layers.{index}.{name}": module
        for index, block in enumerate(layers.blocks(walk.model))
        for name, module in walk.linears(block).items()
        if walk.chosen(name)
    }


def compress_block(
    walk: Walk,
    index: int,
    block: nn.Module,
    original: nn.Module | None,
    parents: dict[str, LinearStatistics],
    behind: dict[str, LinearStatistics],
    planned: dict[str, Any],
    options_of: dict[str, MethodOptions],
) -> dict[str, Any]:
    """Replaces the linears of one block; returns the record of each by its full name.

    parents, behind: the moments of the parent and those behind the compressed blocks, by the name within the block; the
    latter serve alone where the method propagates.
    """
    propagates = getattr(walk.options, "propagate", False)
    statistics = behind if propagates and behind else parents
    statistics, folded = fold_scales(walk, index, block, statistics)
    before = layers.linears(original) if original is not None else {}
    record = {}
    for name, module in walk.linears(block).items():
        full = f"model.layers.{index}.{name}"
        if not walk.chosen(name):
            continue
        more = {"plan": planned.get(full), "behind": None if propagates else behind.get(name)}
        linear = walk.linear(full, module, before.get(name), **more)
        with about(full):
            replacement = walk.used.module.compress(linear, statistics.get(name), options_of.get(full, walk.options))
            replace(block, name, module, replacement, walk.storage)
            new = layers.effective_weight(block.get_submodule(name)).float()
            found = errors(new, linear, statistics.get(name))
        record[full] = {**folded.get(name, {}), **replacement.record, **found}
    return record


def fold_scales(
    walk: Walk, index: int, block: nn.Module, statistics: dict[str, LinearStatistics]
) -> tuple[dict[str, LinearStatistics], dict[str, dict[str, Any]]]:
    """Scales the inputs of the block's linears as the method asks; returns the statistics of the scaled inputs and, for
    each linear that was scaled, the record of it."""
    if not hasattr(walk.used.module, "scales"):
        return statistics, {}
    found, record = dict(statistics), {}
    for shared in folding.shared_inputs(block, folding.head_dim(walk.model)):
        names = [name for name in shared.consumers if walk.chosen(name)]
        if len(names) < len(shared.consumers):
            continue
        seen = [walk.linear(f"model.layers.{index}.{name}", block.get_submodule(name)) for name in names]
        with about(seen[0].name):
            scales = walk.used.module.scales(seen, found[names[0]], walk.options)
        if scales is None:
            continue
        scales = shared.pooled(scales.double())
        folding.fold(block, shared, scales)
        # Linears that share an input share the statistics.
        changed = folding.scaled(found[names[0]], scales.to(found[names[0]].mean.dtype))
        found |= dict.fromkeys(names, changed)
        record |= {name: {"scale_ratio": (scales.max() / scales.min()).item()} for name in names}
    return found, record


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
        # A copy: what a method returns may be a view of something larger, and would be stored as such.
        return values.to(storage).to(dtype).clone(memory_format=torch.contiguous_format)

    if isinstance(replacement, Unchanged):
        return
    if isinstance(replacement, RoundedInputs):
        settings = {"bits": replacement.bits, "symmetric": replacement.symmetric, "clip": replacement.clip}
        layers.round_inputs(module, settings)
        return
    if isinstance(replacement, Masked):
        module.weight = nn.Parameter(stored(replacement.weight) * replacement.mask)
        module.masked = True
        return
    shape = (module.in_features, module.out_features)
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
    elif isinstance(replacement, Codebook):
        new = coded(replacement, module.bias, stored)
    elif isinstance(replacement, Flattened):
        new = layers.Flattened.from_codes(
            replacement.codes,
            stored(replacement.scale),
            replacement.source,
            replacement.piece,
            stored(torch.tensor([replacement.threshold], device=replacement.codes.device)),
            replacement.bits,
            module.in_features,
            module.bias,
        )
    elif isinstance(replacement, Factors):
        first, second = replacement.first, replacement.second
        rank = len(first) if isinstance(first, Tensor) else len(first.codes)
        new = layers.LowRank(*shape, rank, module.bias is not None, device="meta")
        new.first = matrix(first, None, stored)
        new.second = matrix(second, module.bias, stored)
    elif isinstance(replacement, Skeleton):
        new = layers.Skeleton(*shape, len(replacement.link), module.bias is not None, device="meta")
        new.rows = matrix(replacement.rows, None, stored)
        new.link = matrix(replacement.link, None, stored)
        new.columns = matrix(replacement.columns, module.bias, stored)
    elif isinstance(replacement, Cores):
        cores = replacement.cores
        shapes = [[core.shape[axis] for core in cores] for axis in (2, 1, 3)]
        new = layers.TensorTrain(shapes[0], shapes[1], shapes[2][:-1], device="meta")
        new.sites = nn.ModuleList(matrix(core.flatten(2).flatten(0, 1), None, stored) for core in cores)
        new.bias = module.bias
    elif isinstance(replacement, Compensation):
        new = layers.Compensated(module, len(replacement.first), device="meta")
        new.compensation.first.weight = nn.Parameter(stored(replacement.first))
        new.compensation.second.weight = nn.Parameter(stored(replacement.second))
    if hasattr(module, "rounded_inputs"):
        for part in layers.leaves(new).values():
            if not hasattr(part, "rounded_inputs"):
                layers.round_inputs(part, module.rounded_inputs)
    block.set_submodule(name, new)


def matrix(values: Tensor | Codebook, bias: nn.Parameter | None, stored: Callable[[Tensor], Tensor]) -> nn.Linear:
    """A linear that holds a matrix [m, n], plain or in codes."""
    if isinstance(values, Codebook):
        return coded(values, bias, stored)
    linear = nn.Linear(values.shape[1], values.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(stored(values))
    linear.bias = bias
    return linear


def coded(book: Codebook, bias: nn.Parameter | None, stored: Callable[[Tensor], Tensor]) -> layers.Coded:
    """A linear that holds the matrix of a codebook."""
    return layers.Coded.from_codes(
        book.codes,
        book.table,
        stored(book.absmax),
        book.block,
        book.bits,
        book.outliers,
        None if book.outlier_weight is None else stored(book.outlier_weight),
        book.transposed,
        bias,
    )


def change_structure(
    model: PreTrainedModel, used: Method, options: MethodOptions, sources: dict[str, tuple[Path, dict[str, Any]]]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Removes the units that a structure method chooses; returns the model and what was achieved."""
    from coppice import surgery

    tensors: dict[str, Tensor] = {}
    for source in sources.values():
        tensors |= read_all(source)
    removal = used.module.choose(surgery.structure(model), tensors, options)
    achieved = {**removal.record, **surgery.achieved(model, removal)}
    return surgery.remove(model, removal), achieved


def read_all(source: tuple[Path, dict[str, Any]]) -> dict[str, Tensor]:
    """Every tensor of one folder of statistics."""
    directory, read = source
    tensors: dict[str, Tensor] = {}
    for name in read["files"]:
        tensors |= calibrate.read_statistics_file(directory, name, read)
    return tensors


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
