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

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

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
