"""A layer method's pass over the blocks of a model: statistics, the method, the replacement, the record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coppice.calibration import moments, reading
from coppice.calibration import walk as activations
from coppice.compression import allocation
from coppice.data.windows import Windows
from coppice.errors import UserError, did_you_mean, error_context
from coppice.methods.contracts import Linear, LinearStatistics
from coppice.methods.options import MethodOptions
from coppice.methods.registry import Method
from coppice.methods.solvers.loss import relative_error
from coppice.models import folding, modules
from coppice.models.architectures.base import architecture_of, blocks
from coppice.models.checkpoint import computing_dtype, load_model
from coppice.models.decoder import WholeDecoder
from coppice.records.statistics import Statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from coppice.compression.replacement import replace


def load_reference(directory: Path, model: PreTrainedModel, device: str) -> PreTrainedModel:
    """The model from before compression. Raises UserError when its linears are not those of the parent's model."""
    reference = load_model(directory, dtype=computing_dtype(directory, device))
    own, before = (
        {
            name: (linear.out_features, linear.in_features)
            for name, linear in modules.replaceable_modules(blocks(each)).items()
        }
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
    sources: dict[str, tuple[Path, Statistics]]
    windows: Windows | None


@dataclass(frozen=True)
class LayerPass:
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
        return modules.weight_matrices(block) if self.original is None else modules.replaceable_modules(block)

    def chosen(self, name: str) -> bool:
        """Whether the options let the method work on the linear of that name."""
        return self.options.target_modules is None or bool(set(name.split(".")) & set(self.options.target_modules))

    def linear(self, name: str, module: nn.Module, reference: nn.Module | None = None, **more: Any) -> Linear:
        """What the method sees of one linear."""
        family = architecture_of(self.model)
        return Linear(
            weight=modules.effective_weight(module).float(),
            mask=modules.mask(module) if isinstance(module, nn.Linear) else None,
            reference=None if reference is None else modules.effective_weight(reference).float(),
            storage=self.storage,
            name=name,
            role=family.role(family.place(name)[1]),
            **more,
        )

    def read(self, index: int) -> dict[str, LinearStatistics]:
        """The parent's moments of a block by linear; empty where there are none."""
        if "moments" not in self.inputs.sources:
            return {}
        directory, manifest = self.inputs.sources["moments"]
        return reading.block_statistics(directory, index, manifest, self.device)


class SequentialStatistics:
    """Moments gathered behind the blocks already compressed."""

    def __init__(self, model: PreTrainedModel, windows: Windows, device: str) -> None:
        self.model, self.device = model, device
        self.batches = activations.embed(model, *activations.as_tensors(windows))

    def before(self, index: int) -> dict[str, LinearStatistics]:
        statistics, aliases, _ = moments.gather_block(self.model, index, self.batches, self.device)
        return {name: statistics[first] for name, first in aliases.items()}

    def after(self, index: int) -> None:
        for batch in self.batches:
            batch.hidden = activations.run_block(self.model, index, batch, self.device)


@torch.no_grad()
def compress_layers(walk: LayerPass) -> tuple[dict[str, Any], dict[str, Any]]:
    """Replaces the linears of every block, in order; returns the record of each by its full name, and what was achieved
    over all of them."""
    require_known_linears(walk)
    planned = plan(walk)
    options_of, allocation = allocated(walk)
    behind = None
    if "sequential_moments" in walk.inputs.needs:
        behind = SequentialStatistics(walk.model, walk.inputs.windows, walk.device)
    record = {}
    for index, block in enumerate(blocks(walk.model)):
        original = blocks(walk.original)[index] if walk.original is not None else None
        for module in filter(None, (block, original)):
            module.to(walk.device)
        parents = walk.read(index)
        followed = behind.before(index) if behind is not None else {}
        record |= compress_block(walk, index, block, original, parents, followed, planned, options_of)
        del parents, followed  # before the next block's come
        if behind is not None:
            behind.after(index)
        for module in filter(None, (block, original)):
            module.to("cpu")
    return record, {**summary(record), **allocation}


def require_known_linears(walk: LayerPass) -> None:
    """Raises UserError for a name in the option `target_modules` that no linear has."""
    if walk.options.target_modules is None:
        return
    known = {part for name in walk.linears(blocks(walk.model)) for part in name.split(".")[1:]}
    for name in walk.options.target_modules:
        if name not in known:
            raise UserError(f"target_modules: no linear of this model is named {name!r}.{did_you_mean(name, known)}")


def plan(walk: LayerPass) -> dict[str, Any]:
    """What the method decides from the whole model, by the linears' full names."""
    decide = walk.used.layer.plan
    if decide is None:
        return {}
    windows, sources = walk.inputs.windows, walk.inputs.sources
    tokens, kept = (None, None) if windows is None else activations.as_tensors(windows)
    kinds = {kind: read_all(source) for kind, source in sources.items() if kind != "moments"}
    for parameter in walk.model.parameters():
        parameter.requires_grad_(False)
    walk.model.to(walk.device)
    decoder = WholeDecoder(walk.model, every_linear(walk), walk.linear, walk.read, kinds, tokens, kept, walk.seed)
    decided = decide(decoder, walk.options)
    # The walk takes one block at a time to the device.
    walk.model.to("cpu")
    return decided


def allocated(walk: LayerPass) -> tuple[dict[str, MethodOptions], dict[str, Any]]:
    """The options of each linear where the budget is spread unevenly, by full name, and what that achieves."""
    if not Method.allocates(walk.options):
        return {}, {}
    references = {} if walk.original is None else modules.replaceable_modules(walk.original)
    family = architecture_of(walk.model)

    def entries() -> Iterator[tuple[str, Linear, LinearStatistics]]:
        read = lru_cache(maxsize=1)(walk.read)
        for name, module in every_linear(walk).items():
            index, path = family.place(name)
            reference = references.get(name)
            # One linear at a time is on the device.
            for each in filter(None, (module, reference)):
                each.to(walk.device)
            yield name, walk.linear(name, module, reference), read(index)[path]
            for each in filter(None, (module, reference)):
                each.to("cpu")

    options_of, spread = allocation.allocate(entries(), walk.options)
    return options_of, {"allocation": spread}


def every_linear(walk: LayerPass) -> dict[str, nn.Module]:
    """The linears that the method works on by full name, in the model's order."""
    return {
        architecture_of(walk.model).full_name(index, name): module
        for index, block in enumerate(blocks(walk.model))
        for name, module in walk.linears(block).items()
        if walk.chosen(name)
    }


def compress_block(
    walk: LayerPass,
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
    propagates = getattr(walk.options, "sequential", False)
    statistics = behind if propagates and behind else parents
    statistics, folded = fold_scales(walk, index, block, statistics)
    before = modules.replaceable_modules(original) if original is not None else {}
    record = {}
    for name, module in walk.linears(block).items():
        full = architecture_of(walk.model).full_name(index, name)
        if not walk.chosen(name):
            continue
        more = {"plan": planned.get(full), "sequential": None if propagates else behind.get(name)}
        linear = walk.linear(full, module, before.get(name), **more)
        with error_context(full):
            replacement = walk.used.layer.compress(linear, statistics.get(name), options_of.get(full, walk.options))
            replace(block, name, module, replacement, walk.storage)
            new = modules.effective_weight(block.get_submodule(name)).float()
            found = errors(new, linear, statistics.get(name))
        record[full] = {**folded.get(name, {}), **replacement.record, **found}
    return record


def fold_scales(
    walk: LayerPass, index: int, block: nn.Module, statistics: dict[str, LinearStatistics]
) -> tuple[dict[str, LinearStatistics], dict[str, dict[str, Any]]]:
    """Scales the inputs of the block's linears as the method asks; returns the statistics of the scaled inputs and, for
    each linear that was scaled, the record of it."""
    scale = walk.used.layer.scales
    if scale is None:
        return statistics, {}
    found, record = dict(statistics), {}
    full_name = partial(architecture_of(walk.model).full_name, index)
    for shared in folding.scalable_inputs(walk.model, block):
        names = [name for name in shared.consumers if walk.chosen(name)]
        if len(names) < len(shared.consumers):
            continue
        seen = [walk.linear(full_name(name), block.get_submodule(name)) for name in names]
        with error_context(seen[0].name):
            scales = scale(seen, found[names[0]], walk.options)
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


def read_all(source: tuple[Path, Statistics]) -> dict[str, Tensor]:
    """Every tensor of one folder of statistics."""
    directory, read = source
    tensors: dict[str, Tensor] = {}
    for name in read.files:
        tensors |= reading.read_statistics_file(directory, name, read)
    return tensors


def summary(record: dict[str, Any]) -> dict[str, float]:
    """The means over layers of every number in their records."""
    names = {key for entry in record.values() for key, value in entry.items() if isinstance(value, int | float)}
    return {
        key: sum(values) / len(values)
        for key in sorted(names)
        if (values := [entry[key] for entry in record.values() if isinstance(entry.get(key), int | float)])
    }
