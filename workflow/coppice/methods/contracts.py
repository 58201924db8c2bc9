"""What methods see and return: linears with their statistics, a whole decoder, replacements and removals.

How a method declares itself is in `methods.declaration`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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
    full, as `model.layers.0.mlp.up_proj`. plan: what the method's `plan` returned for it. sequential: its statistics
    gathered after the blocks already compressed, for a method that needs them as well as the parent's "moments". seed:
    what a method that draws takes for its generator; it follows from the study's seed and the name (`linear_seed`), so
    that linears draw different numbers, whatever the order in which they are compressed.
    """

    weight: Tensor
    mask: Tensor | None = None
    reference: Tensor | None = None
    storage: torch.dtype | None = None
    name: str = ""
    plan: Any = None
    sequential: LinearStatistics | None = None
    seed: int = 0


def linear_seed(seed: int, name: str) -> int:
    """The seed of a linear: 63 bits of the hash of the study's seed and the linear's full name."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Structure:
    """The units of a decoder that structure methods count: blocks, key/value groups and neurons in each block."""

    blocks: int
    kv_groups: int
    neurons: int


class Decoder(Protocol):
    """A whole decoder and the calibration windows, as `plan` of a layer method and `choose` of a structure method see
    them.

    Linears are named in full and come in the model's order, those that the options leave out not among them. Losses are
    means over predicted tokens, in nats, in the dtype of the model, and can be differentiated. windows: how many there
    are; 0 for a method whose `needs` do not name them. seed: the study's, for a method that draws.
    """

    names: list[str]
    structure: Structure
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
class LowRank(Replacement):
    """y = second (first x): first [k, n], second [m, k]. The bias stays on the output."""

    first: Tensor | Codebook
    second: Tensor | Codebook


@dataclass(frozen=True)
class CUR(Replacement):
    """y = columns (link (rows x)): rows [r, n] and columns [m, r] of the weight, link [r, r]."""

    rows: Tensor
    link: Tensor
    columns: Tensor


@dataclass(frozen=True)
class TensorTrain(Replacement):
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
class FlattenQuant(Replacement):
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
class QuantizedActivations(Replacement):
    """The linear stays; its inputs are rounded token by token to `bits` (`layers.round_tokens`)."""

    bits: int
    symmetric: bool
    clip: float


@dataclass(frozen=True)
class LowRankCorrection(Replacement):
    """Added to what the layer computes: y += second (first x): first [r, n], second [m, r]."""

    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class Removal:
    """Units to remove, and new weights for what stays.

    blocks: indices. kv_groups and neurons: for each block the indices, equally many in each. Indices count the blocks
    and units of the model as `choose` sees it. weights: for linears that stay, by the full name that they have there,
    the weight [m, n] in the shape that it has after the removal.
    """

    blocks: tuple[int, ...] = ()
    kv_groups: tuple[tuple[int, ...], ...] = ()
    neurons: tuple[tuple[int, ...], ...] = ()
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
