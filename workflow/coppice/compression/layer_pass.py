"""A layer method's pass over the blocks of a model: statistics, the method, the replacement, the record.

The way of a weight, in the order of this file: `compress_layers` decides for the whole model and takes the blocks one
by one to the device. `compress_block` scales shared inputs and takes the linears one by one. `compress_linear` calls
the method, puts its replacement in place and measures the error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coppice.calibration import moments as calibration
from coppice.calibration import walk
from coppice.compression.allocation import allocate
from coppice.compression.inputs import Inputs
from coppice.compression.replacement import replace
from coppice.compression.views import decoder_view, linear_view
from coppice.data.windows import Windows
from coppice.errors import UserError, did_you_mean, error_context
from coppice.methods.options import LayerOptions, TargetOptions
from coppice.methods.registry import Method
from coppice.methods.solvers.loss import relative_error
from coppice.models import folding, modules
from coppice.models.architectures.base import Architecture, architecture_of, blocks
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.modules import Replaceable
from coppice.records.base import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Record = Json  # of one linear, or of what a step achieved


@dataclass(frozen=True)
class LayerPass:
    """A layer method, its options, and the model whose blocks it passes over.

    original: the model from before compression, for a compensate method. storage: the type of the checkpoint's numbers.
    """

    model: PreTrainedModel
    original: PreTrainedModel | None
    method: Method
    options: LayerOptions
    inputs: Inputs
    storage: torch.dtype
    seed: int
    device: str

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.model)

    def linears(self, block: nn.Module) -> dict[str, Replaceable]:
        """What the method could work on in a block, by the name within it.

        A compensate method sees linears as the architecture names them; every other method each matrix, also the
        factors inside a composite.
        """
        return {**(modules.weight_matrices(block) if self.original is None else modules.replaceable_modules(block))}

    def targets(self, block: nn.Module) -> dict[str, Replaceable]:
        """The linears of a block that the method works on, by the name within it."""
        return {name: linear for name, linear in self.linears(block).items() if self.is_target(name)}

    def is_target(self, name: str) -> bool:
        """Whether the options let the method work on the linear of that name."""
        targets = self.options.target_modules
        return targets is None or bool(set(name.split(".")) & set(targets))

    def all_targets(self) -> dict[str, Replaceable]:
        """The linears that the method works on by full name, in the model's order."""
        return {
            self.architecture.full_name(index, name): linear
            for index, block in enumerate(blocks(self.model))
            for name, linear in self.targets(block).items()
        }

    def view(self, name: str, module: Replaceable, reference: Replaceable | None = None, **more: Any) -> Linear:
        """What the method sees of one linear (see `linear_view`)."""
        role = self.architecture.role(self.architecture.place(name)[1])
        return linear_view(name, module, self.storage, self.seed, reference, role=role, **more)

    def moments(self, index: int) -> dict[str, LinearStatistics]:
        """The parent's moments of a block by the linear's name within it; empty where there are none."""
        return self.inputs.moments(index, self.device)


@dataclass(frozen=True)
class Decisions:
    """What is decided from the whole model before the pass, by the linears' full names.

    plans: what the method's `plan` returns. options: those of linears with a target of their own. achieved: what the
    allocation of the target comes to, for the record.
    """

    plans: Mapping[str, object] = field(default_factory=dict)
    options: Mapping[str, LayerOptions] = field(default_factory=dict)
    achieved: Record = field(default_factory=dict)


@dataclass(frozen=True)
class BlockMoments:
    """Moments of a block's linears by the name within it: the parent's, and those gathered after the blocks already
    compressed."""

    parent: dict[str, LinearStatistics]
    sequential: dict[str, LinearStatistics]


@torch.no_grad()
def compress_layers(layer_pass: LayerPass) -> tuple[dict[str, Record], Record]:
    """Replaces the linears of every block, in order; returns the record of each by its full name, and what was achieved
    over all of them."""
    require_known_targets(layer_pass)
    decisions = decide(layer_pass)
    sequential = SequentialStatistics.of(layer_pass)
    records: dict[str, Record] = {}
    for index, block in enumerate(blocks(layer_pass.model)):
        original = None if layer_pass.original is None else blocks(layer_pass.original)[index]
        for module in filter(None, (block, original)):
            module.to(layer_pass.device)
        moments = BlockMoments(layer_pass.moments(index), {} if sequential is None else sequential.before(index))
        records |= compress_block(layer_pass, index, block, original, moments, decisions)
        del moments  # before those of the next block are read
        if sequential is not None:
            sequential.advance(index)
        for module in filter(None, (block, original)):
            module.to("cpu")
    return records, {**mean_record(records), **decisions.achieved}


def require_known_targets(layer_pass: LayerPass) -> None:
    """Raises UserError for a name in the option `target_modules` that no linear has."""
    known = {part for name in layer_pass.linears(blocks(layer_pass.model)) for part in name.split(".")[1:]}
    for name in layer_pass.options.target_modules or ():
        if name not in known:
            raise UserError(f"target_modules: no linear of this model is named {name!r}.{did_you_mean(name, known)}")


def decide(layer_pass: LayerPass) -> Decisions:
    """What the method plans and how its target is allocated, from the whole model."""
    plans = plan(layer_pass)
    options, achieved = allocate_target(layer_pass)
    return Decisions(plans, options, achieved)


def plan(layer_pass: LayerPass) -> Mapping[str, object]:
    """What the method decides from the whole model, by the linears' full names."""
    method_plan = layer_pass.method.layer.plan
    if method_plan is None:
        return {}
    model = layer_pass.model.requires_grad_(False).to(layer_pass.device)
    decoder = decoder_view(
        model, layer_pass.all_targets(), layer_pass.view, layer_pass.inputs, layer_pass.seed, layer_pass.device
    )
    plans = method_plan(decoder, layer_pass.options)
    model.to("cpu")  # the pass takes one block at a time to the device
    return plans


def allocate_target(layer_pass: LayerPass) -> tuple[dict[str, TargetOptions], Record]:
    """The options of each linear where the target is spread unevenly, by full name, and what that achieves."""
    if not Method.allocates(layer_pass.options):
        return {}, {}
    assert isinstance(layer_pass.options, TargetOptions)
    references = {} if layer_pass.original is None else modules.replaceable_modules(layer_pass.original)

    def linears() -> Iterator[tuple[str, Linear, LinearStatistics]]:
        moments = lru_cache(maxsize=1)(layer_pass.moments)
        for name, module in layer_pass.all_targets().items():
            index, inner = layer_pass.architecture.place(name)
            reference = references.get(name)
            # One linear at a time is on the device.
            for each in filter(None, (module, reference)):
                each.to(layer_pass.device)
            yield name, layer_pass.view(name, module, reference), moments(index)[inner]
            for each in filter(None, (module, reference)):
                each.to("cpu")

    options, allocation = allocate(linears(), layer_pass.options)
    return options, {"allocation": allocation}


class SequentialStatistics:
    """Moments gathered after the blocks already compressed: hidden states of all windows, on their way through."""

    def __init__(self, model: PreTrainedModel, windows: Windows, device: str) -> None:
        self.model, self.device = model, device
        self.batches = walk.embed(model, *walk.as_tensors(windows))

    @classmethod
    def of(cls, layer_pass: LayerPass) -> SequentialStatistics | None:
        """Those that the method needs, before the first block; None where it needs none."""
        windows = layer_pass.inputs.windows
        if windows is None or "sequential_moments" not in layer_pass.inputs.needs:
            return None
        return cls(layer_pass.model, windows, layer_pass.device)

    def before(self, index: int) -> dict[str, LinearStatistics]:
        """The moments of a block that is not compressed yet."""
        moments, aliases, _ = calibration.gather_block(self.model, index, self.batches, self.device)
        return {name: moments[first] for name, first in aliases.items()}

    def advance(self, index: int) -> None:
        """Takes the hidden states through the block, now that it is compressed."""
        for batch in self.batches:
            batch.hidden = walk.run_block(self.model, index, batch, self.device)


def compress_block(
    layer_pass: LayerPass,
    index: int,
    block: nn.Module,
    original: nn.Module | None,
    moments: BlockMoments,
    decisions: Decisions,
) -> dict[str, Record]:
    """Replaces the linears of one block; returns the record of each by its full name.

    A sequential method reads the sequential moments alone; others read the parent's, and find the sequential ones that
    they need in `Linear.sequential`.
    """
    sequential = getattr(layer_pass.options, "sequential", False)
    statistics = moments.sequential if sequential and moments.sequential else moments.parent
    statistics, scale_records = scale_inputs(layer_pass, index, block, statistics)
    references = {} if original is None else modules.replaceable_modules(original)
    records = {}
    for inner, module in layer_pass.targets(block).items():
        name = layer_pass.architecture.full_name(index, inner)
        linear = layer_pass.view(
            name,
            module,
            references.get(inner),
            plan=decisions.plans.get(name),
            sequential=None if sequential else moments.sequential.get(inner),
        )
        options = decisions.options.get(name, layer_pass.options)
        with error_context(name):
            record = compress_linear(layer_pass, block, inner, linear, statistics.get(inner), options)
        records[name] = {**scale_records.get(inner, {}), **record}
    return records


def scale_inputs(
    layer_pass: LayerPass, index: int, block: nn.Module, statistics: dict[str, LinearStatistics]
) -> tuple[dict[str, LinearStatistics], dict[str, Record]]:
    """Scales the inputs of the block's linears by the method's factors; returns the statistics of the scaled inputs
    and, for each linear that was scaled, the record of it."""
    method_scales = layer_pass.method.layer.scales
    if method_scales is None:
        return statistics, {}
    statistics = dict(statistics)
    records: dict[str, Record] = {}
    for shared in folding.scalable_inputs(layer_pass.model, block):
        names = shared.consumers
        if not all(layer_pass.is_target(name) for name in names):
            continue
        full_name = partial(layer_pass.architecture.full_name, index)
        linears = [layer_pass.view(full_name(name), modules.replaceable_module(block, name)) for name in names]
        with error_context(linears[0].name):
            scales = method_scales(linears, statistics[names[0]], layer_pass.options)
        if scales is None:
            continue
        scales = shared.pool(scales.double())
        folding.fold(block, shared, scales)
        # Linears that share an input share its statistics.
        scaled = folding.scale_statistics(statistics[names[0]], scales.to(statistics[names[0]].mean.dtype))
        statistics |= dict.fromkeys(names, scaled)
        records |= {name: {"scale_ratio": (scales.max() / scales.min()).item()} for name in names}
    return statistics, records


def compress_linear(
    layer_pass: LayerPass,
    block: nn.Module,
    inner: str,
    linear: Linear,
    statistics: LinearStatistics | None,
    options: LayerOptions,
) -> Record:
    """Calls the method on one linear and puts what it returns in the linear's place; returns the record.

    inner: the linear's name within the block.
    """
    replacement = layer_pass.method.layer.compress(linear, statistics, options)
    replace(block, inner, modules.replaceable_module(block, inner), replacement, layer_pass.storage)
    # As it will be read back: what the checkpoint rounds is part of the error.
    weight = modules.effective_weight(modules.replaceable_module(block, inner)).float()
    return {**replacement.record, **errors(weight, linear, statistics)}


def errors(weight: Tensor, linear: Linear, statistics: LinearStatistics | None) -> dict[str, float]:
    """The layer's relative squared error: weight_error of its new weight [m, n] and, with statistics, error of its
    outputs.

    Against the reference where there is one. Raises UserError when a weight, old or new, is not finite.
    """
    target = linear.weight if linear.reference is None else linear.reference
    difference = weight - target
    record = {"weight_error": relative_error(difference, target, None)}
    if statistics is not None:
        record["error"] = relative_error(difference, target, statistics.second_moment)
    return record


def mean_record(records: Mapping[str, Record]) -> Record:
    """The means over linears of every number in their records."""
    numbers: dict[str, list[float]] = {}
    for record in records.values():
        for key, value in record.items():
            if isinstance(value, int | float):
                numbers.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in sorted(numbers.items())}
