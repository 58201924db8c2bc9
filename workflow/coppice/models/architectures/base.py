"""What a decoder architecture is, as data: where its blocks, linears and norms are, and what may be done to them.

One file next to this one describes one architecture: it is named after the `model_type` of transformers' config and
defines `ARCHITECTURE`. Nothing else in the package spells a module's path. Reading a description imports neither torch
nor transformers.

A block has grouped-query attention (q, k, v, o) and a gated MLP (gate, up, down), each of which adds to the residual
stream. Shapes: d = hidden_size, h = head_dim, r = query heads of each key/value head.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from coppice.errors import UserError
from coppice.models.contracts import Role

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

Unit = Literal["kv_groups", "neurons"]

# The roles that read one input together; servers fuse each of the two sets into one matrix.
ATTENTION_READERS: tuple[Role, ...] = ("q", "k", "v")
MLP_READERS: tuple[Role, ...] = ("gate", "up")

# The removable unit that a role's weight [outputs, inputs] belongs to, and the dimension that the units index.
UNITS: dict[Role, tuple[Unit, int]] = {
    "q": ("kv_groups", 0),
    "k": ("kv_groups", 0),
    "v": ("kv_groups", 0),
    "o": ("kv_groups", 1),
    "gate": ("neurons", 0),
    "up": ("neurons", 0),
    "down": ("neurons", 1),
}


class Shape(NamedTuple):
    """The sizes of a decoder with gated feed-forward layers."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def linears(self) -> dict[Role, tuple[int, int]]:
        """(inputs, outputs) of the linears of a block by role."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (self.hidden, queries),
            "k": (self.hidden, keys),
            "v": (self.hidden, keys),
            "o": (queries, self.hidden),
            "gate": (self.hidden, self.intermediate),
            "up": (self.hidden, self.intermediate),
            "down": (self.intermediate, self.hidden),
        }


class QueryKeyNorms(NamedTuple):
    """The norms on the outputs of q and of k by their paths within a block."""

    query: str
    key: str


@dataclass(frozen=True)
class Norms:
    """The RMS norms of a block by their paths within it, None for one that the architecture does not have.

    before_attention, before_mlp: produce what q, k, v and gate, up read from the residual stream. after_attention,
    after_mlp: normalise what o and down compute before it is added to the stream. within_heads: act on the queries and
    keys of one head; across_heads: on those of all heads together.
    """

    before_attention: str | None = None
    after_attention: str | None = None
    before_mlp: str | None = None
    after_mlp: str | None = None
    within_heads: QueryKeyNorms | None = None
    across_heads: QueryKeyNorms | None = None


@dataclass(frozen=True)
class SharedInput:
    """consumers: the linears of a block that read one input; producer: the norm or linear whose output it is."""

    producer: str
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Substitute:
    """The architecture that a model is saved as when its heads do not divide hidden_size, which its config refuses.

    It computes the same with the same weights. dropped: config fields that it does not have; biases: those of the
    dropped fields that must be off; changed: fields that get another value.
    """

    model_type: str
    dropped: tuple[str, ...]
    biases: tuple[str, ...]
    changed: Mapping[str, Any]


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp holds the architecture, where transformers can read that back.

    name: of the architecture in the file. adjacent_rotary: rotary embeddings rotate neighbouring channels there, not
    halves of a head. reads_biases: whether transformers reads biases of its linears. heads_divide: whether transformers
    needs a number of heads that divides hidden_size.
    """

    name: str
    adjacent_rotary: bool = False
    reads_biases: bool = True
    heads_divide: bool = False


@dataclass(frozen=True)
class Architecture:
    """A decoder of transformers.

    model_type, class_prefix: "qwen2", "Qwen2" for `transformers.models.qwen2` and `Qwen2ForCausalLM`. Paths of modules:
    decoder, rotary, embeddings, blocks, final_norm and head within the model; attention, mlp, linears and norms within
    a block. Fields of the config to change when blocks are removed: per_block, lists with an entry for each block;
    leading_blocks, numbers of blocks counted from the first.
    """

    model_type: str
    class_prefix: str
    linears: Mapping[Role, str]
    norms: Norms
    attention: str
    mlp: str
    decoder: str
    rotary: str
    embeddings: str
    blocks: str
    final_norm: str
    head: str
    per_block: tuple[str, ...] = ()
    leading_blocks: tuple[str, ...] = ()
    substitute: Substitute | None = None
    gguf: Gguf | None = None

    @property
    def head_weight(self) -> str:
        """The name of the head's weight, which a checkpoint with tied embeddings leaves out."""
        return f"{self.head}.weight"

    def classes(self) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
        """The config and model classes.

        Their modules are imported rather than transformers' Auto classes, which cost a second more at every start.
        """
        package = f"transformers.models.{self.model_type}"
        configuration = importlib.import_module(f"{package}.configuration_{self.model_type}")
        modeling = importlib.import_module(f"{package}.modeling_{self.model_type}")
        return (
            getattr(configuration, f"{self.class_prefix}Config"),
            getattr(modeling, f"{self.class_prefix}ForCausalLM"),
        )

    def paths(self, roles: tuple[Role, ...]) -> tuple[str, ...]:
        """The paths within a block of the linears with these roles."""
        return tuple(self.linears[role] for role in roles)

    def role(self, path: str) -> Role | None:
        """What the linear at that path within a block is; None for a factor of a linear."""
        return next((role for role, own in self.linears.items() if own == path), None)

    def modules(self, block: nn.Module, roles: tuple[Role, ...]) -> list[nn.Linear]:
        """The linears of a dense block with these roles."""
        return [cast("nn.Linear", block.get_submodule(path)) for path in self.paths(roles)]

    def block_name(self, index: int) -> str:
        """The name within the model of block `index`."""
        return f"{self.blocks}.{index}"

    def full_name(self, index: int, path: str) -> str:
        """The name within the model of a module of block `index`."""
        return f"{self.block_name(index)}.{path}"

    def place(self, name: str) -> tuple[int, str]:
        """The inverse of `full_name`: the index of the block and the path within it."""
        index, _, path = name.removeprefix(f"{self.blocks}.").partition(".")
        return int(index), path

    def scalable_inputs(self) -> tuple[SharedInput, ...]:
        """The inputs within a block that can be scaled by any factors, because what produces them can be divided.

        Not among them: what linears read from the residual stream without a norm of their own.
        """
        linears, norms = self.linears, self.norms
        candidates = (
            (norms.before_attention, self.paths(ATTENTION_READERS)),
            (linears["v"], (linears["o"],)),
            (norms.before_mlp, self.paths(MLP_READERS)),
            (linears["up"], (linears["down"],)),
        )
        return tuple(SharedInput(producer, consumers) for producer, consumers in candidates if producer is not None)


def resembling(other: Architecture, **changes: Any) -> Architecture:
    """Another architecture with changes; its `substitute` and `gguf`, true of that one alone, are not inherited."""
    return replace(other, **({"substitute": None, "gguf": None} | changes))


def model_types() -> tuple[str, ...]:
    """The supported architectures, by the files next to this one."""
    files = pkgutil.iter_modules([str(Path(__file__).parent)])
    return tuple(sorted(file.name for file in files if file.name != "base"))


@cache
def architecture(model_type: str) -> Architecture:
    """The architecture of that `model_type`. Raises UserError for one that is not supported."""
    if model_type not in model_types():
        supported = ", ".join(model_types())
        raise UserError(f"Architecture {model_type!r} is not supported; supported are {supported}.")
    return importlib.import_module(f"{__package__}.{model_type}").ARCHITECTURE


def architecture_of(model: PreTrainedModel) -> Architecture:
    """The architecture of a model."""
    return architecture(model.config.model_type)


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's blocks, in order."""
    return cast("nn.ModuleList", model.get_submodule(architecture_of(model).blocks))


def head_dim(config: PretrainedConfig) -> int:
    """h, which some configs name only where it is not hidden_size / num_attention_heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The sizes that a config.json states."""
    return Shape(
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        vocabulary=config["vocab_size"],
    )
