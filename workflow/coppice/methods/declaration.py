"""How a method declares itself: `METHOD = LayerMethod(...)` at the end of its file, or another of these contracts.

Every field is checked when the method is registered, so that a plug-in with a missing or mistyped part is refused by
name before a study runs. Nothing is read off a module by the names of its functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from coppice.errors import did_you_mean
from coppice.methods.options import LayerOptions, MethodOptions, RecoverOptions
from coppice.methods.training import Clock, OptimizerGroup, ParameterGroup, adamw, matrices_and_vectors
from coppice.models.contracts import FROM_WINDOWS, KINDS

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from coppice.models.contracts import Decoder, Linear, LinearStatistics, Removal
    from coppice.models.replacements import Replacement
    from coppice.records.base import Json
    from coppice.records.manifest import Manifest

# What a node is; the accounting, the exports and other methods go by these.
TRAITS = (
    "masked",
    "factorized",
    "quantized",
    "compensated",
    "smaller",
    "rotated",
    "quantized-activations",
    "quantized-cache",
)


Reach = Literal["linear", "block", "model"]


@dataclass(frozen=True)
class Source:
    """Where a method comes from: the paper's title, its arXiv id (or another identifier) and the equation used.

    claim: what its authors, or others in public, report, with model, data and unit; empty where none is attested.
    """

    title: str
    identifier: str
    equation: str
    claim: str = ""


@dataclass(frozen=True)
class Resources:
    """What a method holds in addition to the model, for the plan and for a cluster's requests.

    reach: how much of the model it must see at once; what reaches a `linear` or a `block` can be streamed. teacher: it
    trains against the dense root. frozen_base: most weights do not train. redraws: it initializes all weights again.
    small_state: what it trains, and so the state of an interrupted run, is small next to the model.
    """

    reach: Reach = "linear"
    teacher: bool = False
    frozen_base: bool = False
    redraws: bool = False
    small_state: bool = False


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What every method declares.

    source: the paper. options: validated when the study is loaded. needs: what it reads in addition to the parent:
    kinds of statistics gathered on the parent, `sequential_moments` (gathered after the blocks already compressed) or
    `windows` (the calibration windows themselves); options whose `needs` names more add to it. adds_traits: what it
    makes of a node; where that depends on the parent or the options, `traits(parent, options)` gives all traits of the
    node. incompatible_with: for each trait of a parent that it cannot work on, the reason as half a sentence after
    "because" (`methods.incompatible` has those that methods share). draws: whether the study's seed changes what it
    makes; training methods, whose batches follow the seed, need not declare it.
    """

    source: Source
    options: type[MethodOptions]
    needs: frozenset[str] = frozenset()
    adds_traits: frozenset[str] = frozenset()
    incompatible_with: Mapping[str, str] = field(default_factory=dict)
    traits: Callable[[frozenset[str], Any], frozenset[str]] | None = None
    draws: bool = False
    resources: Resources = Resources()

    contract: ClassVar[str]
    # Fields that hold functions, with the number of arguments each is called with.
    functions: ClassVar[Mapping[str, int]] = {"traits": 2}
    options_base: ClassVar[type[MethodOptions]] = MethodOptions

    def __post_init__(self) -> None:
        """Raises TypeError with a sentence for the first field that is not what it must be."""
        if not isinstance(self.source, Source):
            raise TypeError(f"`source` is {self.source!r}, not a Source")
        if not all(isinstance(text, str) for text in vars(self.source).values()):
            raise TypeError(f"`source` is {self.source!r}, whose fields are not all texts")
        if not (isinstance(self.options, type) and issubclass(self.options, self.options_base)):
            raise TypeError(f"`options` is {self.options!r}, not a class that extends {self.options_base.__name__}")
        if not isinstance(self.draws, bool):
            raise TypeError(f"`draws` is {self.draws!r}, not True or False")
        if not isinstance(self.resources, Resources):
            raise TypeError(f"`resources` is {self.resources!r}, not Resources")
        _require_known("resources.reach", (self.resources.reach,), get_args(Reach))
        known = {"needs": (*KINDS, *FROM_WINDOWS), "adds_traits": TRAITS}
        for name, names in known.items():
            value = getattr(self, name)
            if not isinstance(value, frozenset):
                raise TypeError(f"`{name}` is {value!r}, not a frozenset")
            _require_known(name, value, names)
        _require_reasons(self.incompatible_with)
        for name, count in self.functions.items():
            _require_function(name, getattr(self, name), count, optional=_has_default(type(self), name))


@dataclass(frozen=True, kw_only=True)
class LayerMethod(Declaration):
    """Replaces linears one at a time, in the dtype and on the device of `linear.weight`; pure.

    compress(linear, statistics, options) -> Replacement. statistics: LinearStatistics, or None where the method needs
    none.
    plan(decoder, options) -> {name of a linear: anything} decides from the whole model before the pass; what it returns
    for a linear reaches `compress` as `linear.plan`.
    scales(linears, statistics, options) -> Tensor [n] | None gives factors of an input that several linears share:
    their columns are multiplied by them, and whatever produces the input is divided, before any of them is compressed.
    A method that draws takes its random numbers from generators seeded with `linear.seed` (in `compress`) and
    `decoder.seed` (in `plan`), and declares `draws`. One with a `plan` has reach "model".
    """

    compress: Callable[[Linear, Any, Any], Replacement]
    plan: Callable[[Decoder, Any], Mapping[str, object]] | None = None
    scales: Callable[[list[Linear], LinearStatistics, Any], Tensor | None] | None = None

    contract: ClassVar[str] = "layer"
    functions: ClassVar[Mapping[str, int]] = {"compress": 3, "plan": 2, "scales": 3, "traits": 2}
    options_base: ClassVar[type[MethodOptions]] = LayerOptions

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plan is not None:
            _require_model_reach(self, "it has a `plan`")


@dataclass(frozen=True, kw_only=True)
class StructureMethod(Declaration):
    """Removes units of the whole model: choose(decoder, statistics, options) -> Removal.

    decoder: the counts of its units (`structure`), its weights, and for a method that needs `windows`, which has reach
    "model", the hidden states and losses, also with blocks bypassed. statistics: the tensors of the kinds in `needs`.
    The removal may hold new weights for linears that stay. Random numbers come from a generator seeded with
    `decoder.seed`.
    """

    choose: Callable[[Decoder, Mapping[str, Tensor], Any], Removal]

    contract: ClassVar[str] = "structure"
    functions: ClassVar[Mapping[str, int]] = {"choose": 3, "traits": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        if "windows" in self.needs:
            _require_model_reach(self, "it needs `windows`")


@dataclass(frozen=True, kw_only=True)
class RotationMethod(Declaration):
    """rotation(width, options) -> Tensor, an orthogonal [width, width] for a space of that width.

    Its options have the field `heads`: whether the values within heads are rotated too.
    """

    rotation: Callable[[int, Any], Tensor]

    contract: ClassVar[str] = "rotation"
    functions: ClassVar[Mapping[str, int]] = {"rotation": 2, "traits": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        if "heads" not in self.options.model_fields:
            raise TypeError("`options` has no field `heads`; declare whether the values within heads are rotated too")


@dataclass(frozen=True, kw_only=True)
class CacheMethod(Declaration):
    """cache(options) -> settings of the compressed cache of keys and values, as `kv_cache.CacheSettings` has them."""

    cache: Callable[[Any], Json]

    contract: ClassVar[str] = "cache"
    functions: ClassVar[Mapping[str, int]] = {"cache": 1, "traits": 2}


@dataclass(frozen=True, kw_only=True)
class TrainingMethod(Declaration):
    """Trains its parent: prepare(model, options) -> model, and finish(model, options) -> model after training.

    What requires a gradient after `prepare` is trained; torch's seed is set before it. The other parts are optional.

    loss(model, tokens, labels, teacher, options) -> Tensor replaces the cross entropy; it is summed over the targets.
    teacher: the dense root if `resources.teacher` is set, otherwise None. Where the model is divided among GPUs, the
    loss may use parameters only through the model's forward.

    tokens(options, parent) -> int: how many tokens to train on instead of `options.tokens`, from the parent's manifest.

    parameter_groups(model, options) -> list[ParameterGroup]: each trained parameter in one of them.

    optimizer(groups, options) -> torch.optim.Optimizer, from groups as torch takes them. What changes in it must be in
    its state per parameter, as tensors or plain values. Tensors of another shape than their parameter's must be equal
    in every process.

    before_step(model, clock), after_step(model, clock): called in every step, with gradients disabled, before its
    forward passes and after the optimizer's update, when the parameters still have their gradients.

    state(model) -> dict[str, Tensor]: what an interrupted run needs in addition to the trained parameters and the
    optimizer's state, such as buffers and attributes that hooks change. restore(model, tensors) receives it, whole and
    on the CPU, for a model from `prepare` that is not yet divided among GPUs.

    Dividing a model among GPUs creates its parameters again, without hooks that `prepare` put on their gradients; the
    trainer keeps the zeros of linears that `prepare` leaves masked. `methods.training` has the types, the defaults, and
    functions for divided tensors.
    """

    prepare: Callable[[PreTrainedModel, Any], PreTrainedModel]
    finish: Callable[[PreTrainedModel, Any], PreTrainedModel]
    loss: Callable[..., Tensor] | None = None
    tokens: Callable[[Any, Manifest], int] | None = None
    parameter_groups: Callable[[PreTrainedModel, Any], list[ParameterGroup]] = matrices_and_vectors
    optimizer: Callable[[list[OptimizerGroup], Any], Optimizer] = adamw
    before_step: Callable[[PreTrainedModel, Clock], None] | None = None
    after_step: Callable[[PreTrainedModel, Clock], None] | None = None
    state: Callable[[PreTrainedModel], dict[str, Tensor]] | None = None
    restore: Callable[[PreTrainedModel, dict[str, Tensor]], None] | None = None

    contract: ClassVar[str] = "training"
    functions: ClassVar[Mapping[str, int]] = {
        "prepare": 2,
        "finish": 2,
        "loss": 5,
        "tokens": 2,
        "parameter_groups": 2,
        "optimizer": 2,
        "before_step": 2,
        "after_step": 2,
        "state": 1,
        "restore": 2,
        "traits": 2,
    }
    options_base: ClassVar[type[MethodOptions]] = RecoverOptions

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.state is None) != (self.restore is None):
            raise TypeError("`state` and `restore` belong together; declare both or neither")
        if self.resources.teacher and self.loss is None:
            raise TypeError("`resources` names a teacher, but no `loss` learns from it; declare one")


def _require_known(field_name: str, values: Any, known: tuple[str, ...]) -> None:
    for value in values:
        if value not in known:
            raise TypeError(f"`{field_name}` names {value!r}, which is not known.{did_you_mean(str(value), known)}")


def _require_reasons(reasons: Any) -> None:
    if not isinstance(reasons, Mapping):
        raise TypeError(f"`incompatible_with` is {reasons!r}, not a mapping of traits to reasons")
    _require_known("incompatible_with", reasons, TRAITS)
    for trait, reason in reasons.items():
        if not isinstance(reason, str) or not reason or reason.startswith("because"):
            raise TypeError(
                f"`incompatible_with` has {reason!r} for {trait!r}; it must be half a sentence, to be read after "
                "'because' and without that word"
            )


def _require_model_reach(declaration: Declaration, cause: str) -> None:
    if declaration.resources.reach != "model":
        raise TypeError(f'{cause}, so declare resources=Resources(reach="model")')


def _has_default(declaration: type[Declaration], name: str) -> bool:
    return declaration.__dataclass_fields__[name].default is None


def _require_function(name: str, value: Any, arguments: int, optional: bool) -> None:
    if value is None and optional:
        return
    if not callable(value):
        raise TypeError(f"`{name}` is {value!r}, not a function")
    try:
        inspect.signature(value).bind(*range(arguments))
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` does not take the {arguments} arguments that it is called with") from None
