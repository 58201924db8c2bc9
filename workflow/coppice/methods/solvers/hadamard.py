"""Orthogonal matrices without large entries, for every width.

width = 2^p q with q odd: the Kronecker product of the Hadamard matrix of Sylvester, H_1 = 1 and
H_2k = [[H_k, H_k], [H_k, -H_k]], divided by sqrt(2^p), and the orthonormal basis of the discrete cosine transform
(DCT-II) of size q. For q = 1 it is the normalized Hadamard matrix. No entry is larger than sqrt(2 / width), so that a
product with it spreads a large channel over all of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from coppice.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def hadamard_like(width: int, seed: int | None = None) -> Tensor:
    """Q [width, width] float64 with Q^T Q = I; its rows have random signs when there is a seed."""
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
