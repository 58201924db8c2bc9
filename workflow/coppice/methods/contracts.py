"""What methods see and return: linears with their statistics, a whole decoder, replacements and removals.

How a method declares itself is in `methods.declaration`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from coppice.methods.replacements import (
    CUR,
    Codebook,
    FlattenQuant,
    LowRank,
    LowRankCorrection,
    Masked,
    Quantized,
    QuantizedActivations,
    Replacement,
    TensorTrain,
    Unchanged,
)

__all__ = [
    "CUR",
    "Codebook",
    "Decoder",
    "FlattenQuant",
    "Linear",
    "LinearStatistics",
    "LowRank",
    "LowRankCorrection",
    "Masked",
    "Quantized",
    "QuantizedActivations",
    "Removal",
    "Replacement",
    "Source",
    "Structure",
    "TensorTrain",
    "Unchanged",
]

if TYPE_CHECKING:
    import torch
    from torch import Tensor


Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
KINDS = ("moments", "blocks", "gradients")
# What a step can read besides kinds of statistics of its parent: both come from the calibration windows.
FROM_WINDOWS = frozenset({"sequential_moments", "windows"})


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
    full, as `model.layers.0.mlp.up_proj`. role: what it does in its block, None for a factor of a linear. plan: what
    the method's `plan` returned for it. sequential: its statistics gathered after the blocks already compressed, for a
    method that needs them as well as the parent's "moments".
    """

    weight: Tensor
    mask: Tensor | None = None
    reference: Tensor | None = None
    storage: torch.dtype | None = None
    name: str = ""
    role: Role | None = None
    plan: Any = None
    sequential: LinearStatistics | None = None


class Decoder(Protocol):
    """A whole decoder and the calibration windows, as the `plan` of a method sees them.

    Linears are named in full and come in the model's order, those that the options leave out not among them. Losses are
    means over predicted tokens, in nats, in the dtype of the model, and can be differentiated. paths: how the names of
    linears end by their roles, before the names of their factors.
    """

    names: list[str]
    paths: Mapping[Role, str]
    windows: int
    head_dim: int
    seed: int

    def linear(self, name: str) -> Linear: ...

    def statistics(self, name: str) -> LinearStatistics:
        """The parent's moments; for a method that needs them."""

    def gathered(self, kind: str) -> dict[str, Tensor]:
        """The tensors of another kind of statistics; for a method that needs it."""

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
