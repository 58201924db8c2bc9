"""What a method sees of a model: linears with their statistics, and a whole decoder; and what it removes.

What it puts in a linear's place is in `models.replacements`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from coppice.records.base import JsonMapping

if TYPE_CHECKING:
    import torch
    from torch import Tensor


Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
KINDS = ("moments", "blocks", "gradients")
# What a step can read in addition to kinds of statistics of its parent: both come from the calibration windows.
FROM_WINDOWS = frozenset({"sequential_moments", "windows"})


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
    method that needs them as well as the parent's "moments". seed: what a method that draws takes for its generator; it
    follows from the study's seed and the name (`linear_seed`), so that linears draw different numbers, whatever the
    order in which they are compressed.
    """

    weight: Tensor
    mask: Tensor | None = None
    reference: Tensor | None = None
    storage: torch.dtype | None = None
    name: str = ""
    role: Role | None = None
    plan: Any = None
    sequential: LinearStatistics | None = None
    seed: int = 0


def linear_seed(seed: int, name: str) -> int:
    """The seed of a linear: 63 bits of the hash of the study's seed and the linear's full name."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Structure:
    """The units of a decoder that structure methods count: blocks, and the key/value groups and neurons of each block,
    or of the widest one where blocks differ."""

    blocks: int
    kv_groups: int
    neurons: int


class Decoder(Protocol):
    """A whole decoder and the calibration windows, as `plan` of a layer method and `choose` of a structure method see
    them.

    Linears are named in full and come in the model's order, those that the options leave out not among them. Losses are
    means over predicted tokens, in nats, in the dtype of the model, and can be differentiated. paths: how the names of
    linears end by their roles, before the names of their factors. windows: how many there are; 0 for a method whose
    `needs` do not name them. seed: the study's, for a method that draws.
    """

    names: list[str]
    paths: Mapping[Role, str]
    structure: Structure
    windows: int
    head_dim: int
    seed: int

    def linear(self, name: str) -> Linear: ...

    def statistics(self, name: str) -> LinearStatistics:
        """The parent's moments; for a method that needs them."""

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """The tensors of another kind of statistics; for a method that needs it."""

    def logits(self, window: int, outputs: Callable[[str, Tensor], Tensor] | None = None) -> Tensor:
        """[t - 1, vocabulary] of a window. outputs(name, y) -> what takes the place of the output y [t, m]."""

    def loss(
        self,
        windows: Iterable[int] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        outputs: Callable[[str, Tensor], Tensor] | None = None,
        bypass: Collection[int] = (),
    ) -> Tensor:
        """The mean loss of the windows (all when None), with these weights in place of the linears' own.

        bypass: indices of blocks that pass on what enters them, as if they were removed.
        """

    def hidden_states(self, window: int) -> Tensor:
        """[blocks + 1, t, hidden] of a window: what enters each block, and what leaves the last, before the last norm.

        Without gradients.
        """

    def gradients(self, batch: int = 1) -> Iterator[dict[str, Tensor]]:
        """For each `batch` consecutive windows, the gradient of their mean loss by each linear's weight [m, n]."""


@dataclass(frozen=True)
class Removal:
    """Units to remove, and new weights for what stays.

    blocks: indices. kv_groups and neurons: for each block the indices, any number of them that leaves the block a unit.
    Indices count the blocks and units of the model as `choose` sees it. weights: for linears that stay, by the full
    name that they have there, the weight [m, n] in the shape that it has after the removal.
    """

    blocks: tuple[int, ...] = ()
    kv_groups: tuple[tuple[int, ...], ...] = ()
    neurons: tuple[tuple[int, ...], ...] = ()
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    record: JsonMapping = field(default_factory=dict)
