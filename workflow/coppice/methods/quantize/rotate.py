"""QuaRot: the residual stream, and the values within each head, are rotated so that no channel stands out.

Ashkboos et al., QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs (arXiv 2404.00456), section 4, in so far as it can
be folded into the weights; OBR (arXiv 2509.11177) builds on it. An RMS norm without weights commutes with every
orthogonal Q, so that the residual stream may be multiplied by Q where it is written and by Q^T where it is read;
`coppice.rotation` folds both in. The matrix is `solvers.hadamard`'s.
Differs from the paper: nothing is multiplied while the model runs, so the inputs of down_proj, the queries and the keys
stay as they are, and o_proj's inputs are rotated within each head, not across heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from coppice.methods.contracts import Source
from coppice.methods.declaration import RotationMethod
from coppice.methods.options import MethodOptions
from coppice.methods.solvers.hadamard import hadamard_like

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Source(
    "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
    "arXiv 2404.00456",
    "section 4: residual stream and values times Q, a Hadamard matrix of random signs",
    "The abstract reports that LLaMA-2-70B with weights, activations and key/value cache in 4 bits loses at most 0.47 "
    "of perplexity on WikiText-2; that includes the rotations while the model runs.",
)


class Options(MethodOptions):
    seed: int | None = Field(
        default=0, ge=0, description="Of the random signs of the matrix's rows; null for the matrix without them."
    )
    heads: bool = Field(
        default=True, description="Rotate the values within each head too, which are the inputs of o_proj."
    )


def rotation(width: int, options: Options) -> Tensor:
    """Q [width, width] float64, orthogonal up to rounding."""
    return hadamard_like(width, options.seed)


METHOD = RotationMethod(
    source=SOURCE,
    options=Options,
    adds_traits=frozenset({"rotated"}),
    incompatible_with={
        "factorized": "norms and rotations are folded into whole linears; rotate before decomposing",
        "quantized": "rotated weights do not lie on the grid that their codes stand for; rotate before quantizing",
        "quantized-activations": "inputs are rounded with what was chosen for them as they are; rotate before that",
        "compensated": "the compensation was fitted to the weights as they are; rotate before compensating",
        "masked": "a rotation fills the pruned places again; rotate before pruning",
        "rotated": "its residual stream is rotated already, and another rotation can undo the first; rotate once",
    },
    rotation=rotation,
)
