"""QuaRot: the residual stream, and the values within each head, are rotated so that no channel is an outlier.

Ashkboos et al., QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs (arXiv 2404.00456), section 4, in so far as it can
be folded into the weights; OBR (arXiv 2509.11177) builds on it. An RMS norm without weights commutes with every
orthogonal Q, so that the residual stream may be multiplied by Q where it is written and by Q^T where it is read;
`models.rotation` folds both in.
Differs from the paper: nothing is multiplied while the model runs, so the inputs of down_proj, the queries and the keys
stay as they are, and o_proj's inputs are rotated within each head, not across heads.

The matrix exists for every width = 2^p q with q odd: the Kronecker product of the Hadamard matrix of Sylvester, H_1 = 1
and H_2k = [[H_k, H_k], [H_k, -H_k]], divided by sqrt(2^p), and the orthonormal basis of the discrete cosine transform
(DCT-II) of size q. For q = 1 it is the normalized Hadamard matrix. No entry is larger than sqrt(2 / width), so that a
product with it spreads a large channel over all of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from coppice.lazy import torch
from coppice.methods.declaration import RotationMethod, Source
from coppice.methods.incompatible import ROTATE
from coppice.methods.options import MethodOptions

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


def hadamard_like(width: int, seed: int | None = None) -> Tensor:
    """Q [width, width] float64 with Q^T Q = I; its rows have random signs if a seed is given."""
    power = width & -width
    matrix = torch.kron(_hadamard(power), _cosines(width // power))
    if seed is None:
        return matrix
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (width, 1), generator=generator) * 2 - 1
    return matrix * signs


def _hadamard(size: int) -> Tensor:
    """[size, size] with entries of +-1 / sqrt(size); size is a power of 2."""
    matrix = torch.ones((1, 1), dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def _cosines(size: int) -> Tensor:
    """[size, size] C_jk = sqrt(2 / size) cos(pi (2 j + 1) k / (2 size)), its column k = 0 divided by sqrt(2)."""
    # The angle is a whole number of steps of pi / (2 size), of which 4 size make a turn.
    steps = (2 * torch.arange(size)[:, None] + 1) * torch.arange(size) % (4 * size)
    matrix = torch.cos(steps.double() * (math.pi / (2 * size))) * math.sqrt(2 / size)
    matrix[:, 0] = 1 / math.sqrt(size)
    return matrix


METHOD = RotationMethod(
    source=SOURCE,
    options=Options,
    adds_traits=frozenset({"rotated"}),
    incompatible_with=ROTATE,
    rotation=rotation,
)
