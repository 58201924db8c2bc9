"""ShortGPT: removes the blocks that change the residual stream the least.

Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect (arXiv 2403.03853), equation 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from coppice.errors import UserError
from coppice.lazy import torch
from coppice.methods.declaration import Resources, Source, StructureMethod
from coppice.methods.options import MethodOptions
from coppice.methods.solvers.selection import lowest, whole_units
from coppice.models.contracts import Decoder, Removal

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Source(
    title="ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
    identifier="arXiv 2403.03853",
    equation="1",
)


class Options(MethodOptions):
    """Exactly one of `blocks` and `ratio`."""

    blocks: int | None = Field(default=None, ge=0, description="How many blocks to delete.")
    ratio: float | None = Field(default=None, ge=0, lt=1, description="Share of the blocks to delete, rounded down.")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.blocks is None) == (self.ratio is None):
            raise ValueError("give exactly one of blocks and ratio")
        return self

    def number_of(self, blocks: int) -> int:
        """How many of so many blocks to delete."""
        if self.blocks is not None:
            return self.blocks
        assert self.ratio is not None  # exactly one of both is given
        return whole_units(self.ratio, blocks)


def choose(decoder: Decoder, statistics: Mapping[str, Tensor], options: Options) -> Removal:
    """The blocks of lowest influence, ranked once on the model as it comes in.

    statistics["similarity"]: [L] E_t cos(h_i,t, h_i+1,t) of block i's input and output over the calibration tokens.

        BI_i = 1 - E_t cos(h_i,t, h_i+1,t)    in [0, 2]

    Raises UserError when no block would remain, and when a similarity is not finite.
    """
    blocks = decoder.structure.blocks
    number = options.number_of(blocks)
    if number >= blocks:
        raise UserError(
            f"shortgpt is to delete {number} blocks of a model that has {blocks}; at least one must remain, so lower "
            "blocks."
        )
    influence = 1 - statistics["similarity"].double()
    if not torch.isfinite(influence).all():
        index = int((~torch.isfinite(influence)).nonzero()[0])
        raise UserError(
            f"The similarity of block {index}'s input and output is not finite; check the model's weights, or "
            "calibrate in a wider dtype."
        )
    removed = lowest(influence, number)
    return Removal(
        blocks=removed,
        record={
            "block_influence": influence.tolist(),
            "removed_blocks": list(removed),
            "asked": {"blocks": options.blocks, "block_ratio": options.ratio},
            "achieved": {"blocks": number, "block_ratio": number / blocks},
        },
    )


METHOD = StructureMethod(
    source=SOURCE,
    options=Options,
    needs=frozenset({"blocks"}),
    adds_traits=frozenset({"smaller"}),
    # Nothing is incompatible: a block goes with all that is in it, whatever its linears have become.
    choose=choose,
    resources=Resources(reach="block"),
)
