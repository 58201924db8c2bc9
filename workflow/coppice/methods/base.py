"""The contracts of methods, and the registry that finds them.

A method is a module (one file under `methods/<family>/`, or one named by another package's entry point
`coppice.methods`). Its name is its file's name with dashes. It defines

- `SOURCE`: a `Source`, the paper it follows;
- `Options(MethodOptions)`: its options, validated when the study is loaded;
- `NEEDS`: what it reads besides the parent, empty when it needs nothing: statistics gathered on the parent ("moments",
  "blocks", "gradients"), moments gathered behind the blocks already compressed ("behind"), or the calibration windows
  themselves ("windows"); options whose `needs` names more add to it;
- `MAKES`: the marks that it leaves on a node ("masked", "factorized", "quantized", "compensated", "smaller",
  "rotated", "quantized-inputs", "quantized-cache"); where they depend on the parent's or on the options, a function
  `marks(parent, options) -> marks` beside it says how;
- `REFUSES`: for each mark of the parent that it cannot work on, the reason as half a sentence;

and the functions of one of these contracts:

- layer method: `compress(linear: Linear, statistics: LinearStatistics | None, options) -> Replacement`, pure, one
  linear at a time, in the dtype and on the device of `linear.weight`. Two functions may stand beside it:
  `plan(decoder: Decoder, options) -> dict[name, Any]` decides from the whole model before the walk, and what it returns
  for a linear reaches `compress` as `linear.plan`;
  `scales(linears: list[Linear], statistics: LinearStatistics, options) -> Tensor | None` gives factors s [n] for an
  input that several linears share: their columns are multiplied by s, and whatever makes the input is divided by it,
  before any of them is compressed;
- structure method: `choose(structure: Structure, statistics: dict[str, Tensor], options) -> Removal`;
- rotation: `rotation(width: int, options) -> Tensor`, an orthogonal [width, width] for a space of that width;
- cache method: `cache(options) -> dict`, how keys and values are kept, as `kv_cache` reads it;
- training method: `prepare(model, options) -> model` and `finish(model) -> model`; a function
  `loss(model, tokens, labels, teacher, options) -> Tensor` beside them takes the place of the cross entropy, with the
  dense root as teacher; a function `tokens(options, parent) -> int` says, from the parent's manifest, on how many
  tokens to train in the place of `options.tokens`. Under `gpus` the parameters are made anew when the model is divided,
  without hooks that `prepare` put on them; zeros of masked linears are kept there by the trainer.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from coppice.errors import UserError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FAMILIES = ("prune", "decompose", "quantize", "compensate", "recover")
KINDS = ("moments", "blocks", "gradients")
# What a step can read besides kinds of statistics, both made from the calibration windows.
FROM_WINDOWS = frozenset({"behind", "windows"})


@dataclass(frozen=True)
class Source:
    """Where a method comes from: the paper's title, its arXiv id (or another identifier) and the equation used.

    claim: what its authors, or others in public, report, with model, data and unit; empty where none is attested.
    """

    title: str
    identifier: str
    equation: str
    claim: str = ""


class MethodOptions(BaseModel):
    """Options that a method's own class extends; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def needs(self) -> frozenset[str]:
        """What these options read besides the method's NEEDS."""
        return frozenset()


class LayerOptions(MethodOptions):
    """Options that every layer method has."""

    linears: list[str] | None = Field(
        default=None,
        description="Only the linears with one of these names, as in [q_proj, k_proj]; the others stay as they are. "
        "All of them when left out.",
    )

    propagate: bool = Field(
        default=False,
        description="Gather statistics block by block behind the blocks already compressed, instead of reading the "
        "parent's.",
    )

    @field_validator("linears")
    @classmethod
    def _names_some(cls, linears: list[str] | None) -> list[str] | None:
        if linears is not None and not linears:
            raise ValueError("an empty list names no linear: name some, or leave it out for all of them")
        return linears


class Allocation(BaseModel):
    """How a budget is spread over the linears; what it comes to over all of them stays as asked (see `allocate`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: Literal["uniform", "sensitivity", "owl", "mosaic", "svd-llm-v2", "water-filling", "knapsack"] = Field(
        default="uniform",
        description="The rule. uniform: every linear gets the same; sensitivity: more where the relative error of the "
        "outputs at the uniform budget is larger; owl, mosaic: more where weights times inputs have more outliers, by "
        "block or by projection; svd-llm-v2: less is removed where truncation loses more, within each kind of linear; "
        "water-filling: the largest singular values of all linears; knapsack: the least summed loss over `levels`.",
    )
    floor: float = Field(
        default=0.5, ge=0, le=1, description="Least share of the uniform budget that any linear gets; 1 is uniform."
    )
    spread: float = Field(
        default=0.08, ge=0, le=0.5, description="owl, mosaic: half the distance of the largest and smallest share."
    )
    outlier_factor: float = Field(
        default=5.0, gt=0, description="owl, mosaic: an outlier is more than this many times the mean."
    )
    levels: list[float] | None = Field(
        default=None,
        description="knapsack: the budgets to choose from, as the method's own option takes them; when left out, for "
        "bits the integers from 2 to 8, otherwise 17 around the asked one, down to the floor.",
    )
    relative: bool = Field(
        default=False,
        description="water-filling, knapsack: count a linear's loss relative to the power of its outputs.",
    )

    @model_validator(mode="after")
    def _levels_to_choose_from(self) -> Allocation:
        if self.levels is None:
            return self
        if self.by != "knapsack":
            raise ValueError(f"'levels' are what a knapsack chooses from, and {self.by!r} does not: leave them out")
        if not self.levels or len(set(self.levels)) < len(self.levels):
            raise ValueError(f"the levels {self.levels} are not one or more different budgets")
        return self

    @model_validator(mode="after")
    def _relative_losses(self) -> Allocation:
        if self.relative and self.by not in ("water-filling", "knapsack"):
            raise ValueError(f"'relative' goes with water-filling and knapsack, not with {self.by!r}: leave it out")
        return self


class BudgetOptions(LayerOptions):
    """Options of a method that takes a budget: a share of weights to prune or to keep, or bits."""

    # The field that holds the budget ("sparsity", "keep", "bits" or "rank"), and the rules that can spread it.
    BUDGET: ClassVar[str]
    RULES: ClassVar[frozenset[str]] = frozenset({"uniform"})

    allocation: Allocation = Field(default=Allocation(), description="How the budget is spread over the linears.")

    @model_validator(mode="after")
    def _a_rule_for_this_budget(self) -> BudgetOptions:
        if self.allocation.by not in self.RULES:
            raise ValueError(
                f"the allocation {self.allocation.by!r} does not go with this method: choose one of "
                f"{', '.join(sorted(self.RULES))}"
            )
        return self

    @model_validator(mode="after")
    def _levels_of_this_budget(self) -> BudgetOptions:
        for level in self.allocation.levels or ():
            wrong = _LEVELS[self.BUDGET](level)
            if wrong:
                raise ValueError(f"the level {level:g} of the allocation is no budget of this method: {wrong}")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | (frozenset() if self.allocation.by == "uniform" else frozenset({"moments"}))


# What is wrong with a level of each budget, or None.
_LEVELS: dict[str, Callable[[float], str | None]] = {
    "sparsity": lambda level: None if 0 <= level < 1 else "a sparsity is at least 0 and less than 1",
    "keep": lambda level: None if 0 < level <= 1 else "a share to keep is more than 0 and at most 1",
    "bits": lambda level: None if level in range(2, 9) else "bits are an integer from 2 to 8",
    "rank": lambda level: "a rank is spread by water-filling, which has no levels",
}


class RecoverOptions(MethodOptions):
    """Options that every training method of the family recover has. Tokens, not steps, are the axis of training."""

    text: str = Field(description="The text (by name) whose role recovery is trained on.")
    validation: str = Field(description="The text (by name) whose role validation gives the held-out loss.")
    tokens: int = Field(ge=1, description="Tokens to train on; the last step is taken whole.")
    length: int = Field(default=512, ge=2, description="Tokens in a window, of training and of validation.")
    pack: bool = Field(
        default=True, description="Fill windows with several documents; false gives each its own, cut or padded."
    )
    validation_windows: int = Field(default=64, ge=1, description="Windows that the held-out loss is measured on.")
    batch_size: int = Field(default=32, ge=1, description="Windows a step.")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Windows on the device at once, where a step does not fit; a divisor of batch_size.",
    )
    gpus: int = Field(
        default=1,
        ge=1,
        description="GPUs of one machine that train together: the model and the windows of a step are divided among "
        "them, and the result is the same up to rounding. batch_size is a multiple of gpus times micro_batch_size.",
    )
    learning_rate: float = Field(default=1e-4, gt=0, description="After warm-up.")
    schedule: Literal["constant", "cosine"] = Field(
        default="constant",
        description="Learning rate after warm-up. Under `constant` the loss at a budget of the ladder does not depend "
        "on how long the run goes on after it; `cosine` falls to zero at the last step.",
    )
    warmup: float = Field(
        default=10, ge=0, description="Linear warm-up: below 1 a share of the steps, otherwise a number of steps."
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's decay rates of the two moments.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decay of matrices; vectors have none.")
    gradient_clip: float = Field(default=1.0, ge=0, description="Largest norm of the gradient; 0 leaves it alone.")
    gradient_checkpointing: bool = Field(
        default=False, description="Compute activations twice instead of keeping them: less memory, a third more time."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Of the products; weights are trained in float32. `auto`: bfloat16 where the GPU has it.",
    )
    stop_gain: float | None = Field(
        default=None,
        gt=0,
        description="Nats per token: stop at a budget of the study's ladder where the power law of the held-out losses "
        "so far says that the rest of the tokens gains at most this. It takes five budgets or more to tell. Null: "
        "train to the end.",
    )

    @model_validator(mode="after")
    def _micro_batches_fill_a_step(self) -> RecoverOptions:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}; "
                "make it one."
            )
        if self.batch_size % (self.gpus * (self.micro_batch_size or 1)):
            at_once = f" times micro_batch_size {self.micro_batch_size}" if self.micro_batch_size else ""
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of gpus {self.gpus}{at_once}; make it one."
            )
        return self

    @model_validator(mode="after")
    def _betas_are_decay_rates(self) -> RecoverOptions:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; both must be at least 0 and less than 1.")
        return self

    @model_validator(mode="after")
    def _losses_that_tell_the_end(self) -> RecoverOptions:
        if self.stop_gain is not None and self.schedule == "cosine":
            raise ValueError(
                "stop_gain is set with the schedule 'cosine', along which losses say nothing about the end, where the "
                "learning rate has fallen; take the schedule 'constant', or leave stop_gain out."
            )
        return self


@dataclass(frozen=True)
class LinearStatistics:
    """Inputs x of one linear over the calibration tokens (n = in_features).

    second_moment: [n, n] E[x x^T], uncentred; mean, absmean, absmax: [n]; tokens: how many x were seen.
    """

    second_moment: Tensor
    mean: Tensor
    absmean: Tensor
    absmax: Tensor
    tokens: int


@dataclass(frozen=True)
class Linear:
    """What a layer method sees of a linear (m = out_features, n = in_features).

    weight: [m, n] what the layer computes now. mask: [m, n] bool, True where a weight is kept, or None for a layer that
    is not masked: a method keeps what is pruned at zero. reference: [m, n] what the layer computed before it was
    compressed; given to compensate methods only. storage: the type in which the checkpoint stores the layer's floating
    point numbers, None for the weight's own: codes are computed against scales as they will be read back. name: in
    full, as `model.layers.0.mlp.up_proj`. plan: what the method's `plan` returned for it. behind: its statistics behind
    the blocks already compressed, for a method that NEEDS them beside the parent's "moments".
    """

    weight: Tensor
    mask: Tensor | None = None
    reference: Tensor | None = None
    storage: torch.dtype | None = None
    name: str = ""
    plan: Any = None
    behind: LinearStatistics | None = None


class Decoder(Protocol):
    """A whole decoder and the calibration windows, as the `plan` of a method sees them.

    Linears are named in full and come in the model's order, those that the options leave out not among them. Losses are
    means over predicted tokens, in nats, in the dtype of the model, and can be differentiated.
    """

    names: list[str]
    windows: int
    head_dim: int
    seed: int

    def linear(self, name: str) -> Linear: ...

    def statistics(self, name: str) -> LinearStatistics:
        """The parent's moments; for a method that NEEDS them."""

    def gathered(self, kind: str) -> dict[str, Tensor]:
        """The tensors of another kind of statistics; for a method that NEEDS it."""

    def logits(self, window: int, outputs: Callable[[str, Tensor], Tensor] | None = None) -> Tensor:
        """[t - 1, vocabulary] of a window. outputs(name, y) -> what takes the place of the output y [t, m]."""

    def loss(
        self,
        windows: Iterable[int] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        outputs: Callable[[str, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The mean loss of the windows (all when None), with these weights in place of the linears' own."""

    def gradients(self, batch: int = 1) -> Iterator[dict[str, Tensor]]:
        """For each `batch` consecutive windows, the gradient of their mean loss by each linear's weight [m, n]."""


@dataclass(frozen=True)
class Replacement:
    """What a layer method puts in a linear's place, and the record of how (numbers that go into the manifest)."""

    record: dict[str, Any] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class Unchanged(Replacement):
    """The linear stays as it is; record["unchanged"] is a sentence that says why."""


@dataclass(frozen=True)
class Masked(Replacement):
    """weight: [m, n] with exact zeros where mask ([m, n] bool, True = kept) is False."""

    weight: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Codebook(Replacement):
    """w = absmax[block] table[code], over the weights of the inputs that are not outliers, row after row in blocks.

    codes: [m, n - p] int32 in 0 .. 2^bits - 1; table: [2^bits] values in [-1, 1]; absmax: one for each `block`
    consecutive codes of the flattened matrix (the last block may be shorter); outliers: [p] int64 inputs, in increasing
    order, whose columns `outlier_weight` [m, p] are stored as they are. transposed: what is described is W^T.
    """

    codes: Tensor
    table: Tensor
    absmax: Tensor
    block: int
    bits: int
    outliers: Tensor | None = None
    outlier_weight: Tensor | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Factors(Replacement):
    """y = second (first x): first [k, n], second [m, k]. The bias stays on the output."""

    first: Tensor | Codebook
    second: Tensor | Codebook


@dataclass(frozen=True)
class Skeleton(Replacement):
    """y = columns (link (rows x)): rows [r, n] and columns [m, r] of the weight, link [r, r]."""

    rows: Tensor
    link: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Cores(Replacement):
    """A matrix product operator of K sites: cores[k] is [bond k-1, o_k, i_k, bond k], the outer bonds are 1.

    w[(o_1 .. o_K), (i_1 .. i_K)] = cores[0][0, o_1, i_1, :] cores[1][:, o_2, i_2, :] .. cores[K-1][:, o_K, i_K, 0].
    """

    cores: tuple[Tensor, ...]


@dataclass(frozen=True)
class Quantized(Replacement):
    """w[i, j] = scale[i, g] * (codes[i, j] - zero_point[i, g]) with g = group_index[j].

    codes: [m, n] int32; symmetric: -2^(bits-1) .. 2^(bits-1)-1 with zero_point 0; asymmetric: 0 .. 2^bits-1.
    scale, zero_point: [m, groups] (zero_point int32); group_index: [n] int32, j // group_size unless activation order
    with dynamic groups permuted it.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    group_index: Tensor
    bits: int
    group_size: int
    symmetric: bool


@dataclass(frozen=True)
class Flattened(Replacement):
    """Weights and inputs on one symmetric grid each for the whole tensor, their large channels split into pieces.

    Expanded column c comes from input source[c] (int64 [n']), of which it sees piece piece[c] = 0, 1, ..:
    clip(|x| - piece T, 0, T) with the sign of x, the last piece of an input without its upper bound; piece -1 sees x
    whole. w[i, j] = scale * sum of codes[i, c] over the columns of a piece. codes: [m, n'] int32 in -(2^(bits-1) - 1)
    .. 2^(bits-1) - 1; scale: [1]; threshold T. Inputs are rounded to T / (2^(bits-1) - 1) and saturate at T.
    """

    codes: Tensor
    scale: Tensor
    source: Tensor
    piece: Tensor
    threshold: float
    bits: int


@dataclass(frozen=True)
class RoundedInputs(Replacement):
    """The linear stays; its inputs are rounded token by token to `bits` (`layers.round_tokens`)."""

    bits: int
    symmetric: bool
    clip: float


@dataclass(frozen=True)
class Compensation(Replacement):
    """Added to what the layer computes: y += second (first x): first [r, n], second [m, r]."""

    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class Structure:
    """The units of a decoder that structure methods count: blocks, key/value groups and neurons in each block."""

    blocks: int
    kv_groups: int
    neurons: int


@dataclass(frozen=True)
class Removal:
    """Units to remove. blocks: indices. kv_groups and neurons: for each block the indices, equally many in each."""

    blocks: tuple[int, ...] = ()
    kv_groups: tuple[tuple[int, ...], ...] = ()
    neurons: tuple[tuple[int, ...], ...] = ()
    record: dict[str, Any] = field(default_factory=dict)


# The function that tells each contract.
CONTRACTS = {
    "layer": "compress",
    "structure": "choose",
    "rotation": "rotation",
    "cache": "cache",
    "training": "prepare",
}


@dataclass(frozen=True)
class Method:
    """A registered method: its module and what the registry reads off it."""

    name: str
    family: str
    module: ModuleType

    @property
    def contract(self) -> str:
        """layer, structure, rotation, cache or training: which functions the module defines."""
        for contract, function in CONTRACTS.items():
            if hasattr(self.module, function):
                return contract
        raise TypeError(f"Method {self.name!r} ({self.file}) defines none of {', '.join(CONTRACTS.values())}.")

    @property
    def file(self) -> Path:
        return Path(self.module.__file__)

    @property
    def files(self) -> list[Path]:
        """The method's file and those of the solvers that it rests on: with one of them changed, nodes are outdated."""
        return [self.file, *solver_files(self.file)]

    @property
    def source(self) -> Source:
        return self.module.SOURCE

    @property
    def options(self) -> type[MethodOptions]:
        return self.module.Options

    @property
    def makes(self) -> frozenset[str]:
        return self.module.MAKES

    @property
    def refuses(self) -> Mapping[str, str]:
        return self.module.REFUSES

    def needs(self, options: MethodOptions | None = None) -> frozenset[str]:
        """What the method reads besides the parent, under these options (None: at least)."""
        if options is None:
            return self.module.NEEDS
        found = self.module.NEEDS | options.needs
        if getattr(options, "propagate", False) and "moments" in found:
            # What is allocated or planned for the whole model is read from the parent.
            behind = found | {"behind"}
            return behind if self.allocates(options) or hasattr(self.module, "plan") else behind - {"moments"}
        return found

    @staticmethod
    def allocates(options: MethodOptions) -> bool:
        """Whether a budget is spread unevenly over the linears."""
        return getattr(options, "allocation", None) is not None and options.allocation.by != "uniform"

    def marks(self, parent: frozenset[str], options: MethodOptions) -> frozenset[str]:
        """The marks of a node that this method makes: the parent's and MAKES, or what the module's `marks` says."""
        own = getattr(self.module, "marks", None)
        return frozenset(own(parent, options)) if own else parent | self.makes

    def validated(self, options: Mapping[str, Any]) -> MethodOptions:
        """The options, checked. Raises UserError with every problem in one sentence."""
        try:
            return self.options.model_validate(options)
        except ValidationError as error:
            found = [f"{'.'.join(map(str, each['loc'])) or 'options'}: {each['msg']}" for each in error.errors()]
            raise UserError(f"The options of method {self.name!r} are not valid: {'; '.join(found)}.") from None


@cache
def solver_files(file: Path) -> list[Path]:
    """The files under `methods/solvers` that a file imports, and those that they import, sorted."""
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        text = waiting.pop().read_text(encoding="utf-8")
        for name in re.findall(r"^\s*from coppice\.methods\.solvers\.(\w+) import", text, re.MULTILINE):
            solver = Path(__file__).parent / "solvers" / f"{name}.py"
            if solver not in found:
                found.add(solver)
                waiting.append(solver)
    return sorted(found)


@cache
def methods() -> dict[str, Method]:
    """Every registered method by name: the package's own, then those of other packages.

    Raises UserError when two methods share a name.
    """
    found: dict[str, Method] = {}
    for family in FAMILIES:
        package = import_module(f"coppice.methods.{family}")
        for entry in pkgutil.iter_modules(package.__path__):
            module = import_module(f"{package.__name__}.{entry.name}")
            _register(found, Method(entry.name.replace("_", "-"), family, module))
    for entry_point in entry_points(group="coppice.methods"):
        module = entry_point.load()
        _register(found, Method(entry_point.name, module.FAMILY, module))
    return found


def _register(found: dict[str, Method], method: Method) -> None:
    if method.name in found:
        raise UserError(f"Two methods are named {method.name!r}: {found[method.name].file} and {method.file}.")
    found[method.name] = method


def method(name: str) -> Method:
    """The method of that name. Raises UserError, with the nearest known name, when there is none."""
    known = methods()
    if name not in known:
        raise UserError(f"There is no method {name!r}.{nearest(name, known)}")
    return known[name]
