"""LLM-Pruner: removes the key/value groups and neurons of lowest Taylor importance, of first or second order.

Ma et al., LLM-Pruner: On the Structural Pruning of Large Language Models (arXiv 2305.11627), section 3.2, equations 3
to 5.
Differs from the paper: every block loses equally many units, so that stock classes load the result, and the scores of
a key/value group are those of its own query heads (the authors' code adds those of others to it).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from coppice.errors import UserError
from coppice.lazy import torch
from coppice.methods.declaration import Resources, Source, StructureMethod
from coppice.methods.incompatible import REMOVE_UNITS
from coppice.methods.options import MethodOptions
from coppice.methods.solvers.selection import lowest, whole_units
from coppice.models.contracts import Decoder, Removal

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Source(
    title="LLM-Pruner: On the Structural Pruning of Large Language Models",
    identifier="arXiv 2305.11627",
    equation="3 to 5",
)


class Options(MethodOptions):
    """Shares of the units of each block, and how they are ranked."""

    ratio: float = Field(ge=0, lt=1, description="Share of each block's neurons to remove, rounded down.")
    kv_ratio: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Share of each block's key/value groups to remove, rounded down; ratio when left out.",
    )
    importance: Literal["vector", "first", "second", "mixed"] = Field(
        default="first",
        description="Taylor importance: vector |sum w g|, first sum |w g|, second sum w^2 a, mixed "
        "sum |w g - w^2 a / 2|, with g the gradient and a the diagonal of the Fisher matrix.",
    )
    round: int = Field(
        default=1,
        ge=1,
        description="The neurons that stay are a multiple of this, so that groups of quantizers divide them; "
        "fewer are removed where needed.",
    )


def choose(decoder: Decoder, statistics: Mapping[str, Tensor], options: Options) -> Removal:
    """In each block the units of lowest importance: as many key/value groups, and as many neurons, in every block.

    statistics["kv_groups.<importance>"]: [blocks, kv_groups] and statistics["neurons.<importance>"]: [blocks, neurons]
    as `gradients.unit_scores` defines them.
    Raises UserError when a score is not finite.
    """
    structure = decoder.structure
    kv_ratio = options.ratio if options.kv_ratio is None else options.kv_ratio
    kv_groups = whole_units(kv_ratio, structure.kv_groups)
    neurons = _count_removed_neurons(structure.neurons, options.ratio, options.round)
    return Removal(
        kv_groups=_lowest_of_each(statistics, "kv_groups", options.importance, kv_groups),
        neurons=_lowest_of_each(statistics, "neurons", options.importance, neurons),
        record={
            "importance": options.importance,
            "asked": {"kv_ratio": kv_ratio, "neuron_ratio": options.ratio},
            "achieved": {
                "kv_groups_per_block": kv_groups,
                "kv_ratio": kv_groups / structure.kv_groups,
                "neurons_per_block": neurons,
                "neuron_ratio": neurons / structure.neurons,
            },
        },
    )


def _count_removed_neurons(neurons: int, ratio: float, multiple: int) -> int:
    """At most floor(ratio * neurons), fewer so that what stays is a multiple; none where that is impossible."""
    kept = neurons - whole_units(ratio, neurons)
    kept += -kept % multiple
    return max(neurons - kept, 0)


def _lowest_of_each(
    statistics: Mapping[str, Tensor], unit: str, importance: str, number: int
) -> tuple[tuple[int, ...], ...]:
    if number == 0:
        return ()
    scores = statistics[f"{unit}.{importance}"]
    finite = torch.isfinite(scores).all(1)
    if not finite.all():
        index = int((~finite).nonzero()[0])
        raise UserError(f"A Taylor score of the {unit} of block {index} is not finite; calibrate in a wider dtype.")
    return tuple(lowest(row, number) for row in scores)


METHOD = StructureMethod(
    source=SOURCE,
    options=Options,
    needs=frozenset({"gradients"}),
    adds_traits=frozenset({"smaller"}),
    incompatible_with=REMOVE_UNITS,
    choose=choose,
    resources=Resources(reach="block"),
)
