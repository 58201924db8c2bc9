"""Matrix product operators: a matrix as a train of small tensors.

Oseledets, Tensor-Train Decomposition (doi 10.1137/090752286), algorithm 1, on the matrix w[(o_1 .. o_K), (i_1 .. i_K)]
with its indices paired as (o_1 i_1) .. (o_K i_K). Core k is [chi_k-1, o_k, i_k, chi_k], the outer bonds chi_0 and chi_K
are 1. All cores but the last have orthonormal columns, so that the squared error is exactly the sum of the squares of
all singular values left out at all cuts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

from coppice.lazy import torch
from coppice.methods.solvers.truncation import require_finite

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sites:
    """How K sites share a matrix [m, n]: outputs o_1 .. o_K with product m, inputs i_1 .. i_K with product n."""

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]

    @property
    def weights(self) -> int:
        """m n."""
        return prod(self.outputs) * prod(self.inputs)

    def bonds(self, largest: int) -> tuple[int, ...]:
        """chi_1 .. chi_K-1: `largest`, or less where the unfolding at a cut has fewer rows or columns."""
        sizes = [rows * columns for rows, columns in zip(self.outputs, self.inputs, strict=True)]
        return tuple(min(largest, prod(sizes[:cut]), prod(sizes[cut:])) for cut in range(1, len(sizes)))

    def parameters(self, largest: int) -> int:
        """sum_k chi_k-1 o_k i_k chi_k."""
        ends = pairwise((1, *self.bonds(largest), 1))
        return sum(
            before * rows * columns * after
            for (before, after), rows, columns in zip(ends, self.outputs, self.inputs, strict=True)
        )

    def multiply_adds(self, largest: int) -> int:
        """Of one product with a vector, the sites contracted from the last to the first."""
        ends = (1, *self.bonds(largest), 1)
        return sum(
            prod(self.inputs[: site + 1]) * ends[site + 1] * ends[site] * prod(self.outputs[site:])
            for site in range(len(self.outputs))
        )

    def largest_bond(self, budget: int) -> int:
        """The largest bond with at most `budget` parameters, at least 1, at most what the unfoldings can have."""
        low, high = 1, max(self.bonds(self.weights), default=1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.parameters(middle) <= budget else (low, middle - 1)
        return low


@dataclass(frozen=True)
class Approximation:
    """cores: K of [chi_k-1, o_k, i_k, chi_k]. error: |W - W_chi|_F^2 / |W|_F^2, 0 for W = 0."""

    cores: tuple[Tensor, ...]
    error: float


def factors_of(width: int, sites: int) -> tuple[int, ...]:
    """The `sites` whole numbers with product `width` that are most alike: those of the least sum, in increasing order.

    A width with fewer prime factors than sites has ones among them.
    """
    return min(_factorizations(width, sites, 1), key=lambda factors: (sum(factors), max(factors)))


def _factorizations(width: int, sites: int, least: int) -> Iterator[tuple[int, ...]]:
    """Every increasing sequence of that length and product whose numbers are at least `least`."""
    if sites == 1:
        yield (width,)
        return
    factor = least
    while factor**sites <= width:
        if width % factor == 0:
            yield from ((factor, *rest) for rest in _factorizations(width // factor, sites - 1, factor))
        factor += 1


def split(rows: int, columns: int, sites: int) -> Sites:
    """Factors of m in increasing order and of n in decreasing order, which makes the sites o_k i_k most alike."""
    return Sites(factors_of(rows, sites), factors_of(columns, sites)[::-1])


def decompose(matrix: Tensor, sites: Sites, bond: int) -> Approximation:
    """The cores of M [m, n] by singular value decompositions from the first site to the last, in M's type.

    Each cut keeps min(bond, what its unfolding has). Raises UserError when M holds values that are not finite.
    """
    require_finite(matrix)
    count = len(sites.outputs)
    pairs = [axis for site in range(count) for axis in (site, count + site)]
    rest = matrix.reshape(*sites.outputs, *sites.inputs).permute(pairs).reshape(1, -1)
    total, lost = matrix.double().square().sum().item(), 0.0
    cores = []
    for rows, columns in list(zip(sites.outputs, sites.inputs, strict=True))[:-1]:
        before = len(rest)
        left, values, right = torch.linalg.svd(rest.reshape(before * rows * columns, -1), full_matrices=False)
        cores.append(left[:, :bond].reshape(before, rows, columns, -1))
        rest = values[:bond, None] * right[:bond]
        lost += values[bond:].double().square().sum().item()
    cores.append(rest.reshape(-1, sites.outputs[-1], sites.inputs[-1], 1))
    return Approximation(tuple(cores), lost / total if total > 0 else 0.0)


def contract(cores: Sequence[Tensor]) -> Tensor:
    """[m, n] the matrix that the cores represent."""
    product = cores[0][0]
    for core in cores[1:]:
        product = torch.einsum("xyb,boic->xoyic", product, core).flatten(0, 1).flatten(1, 2)
    return product[..., 0]


def product_scaling(scale: Tensor, inputs: Sequence[int]) -> tuple[list[Tensor], float]:
    """The scaling s_1(i_1) .. s_K(i_K) nearest to one of the inputs [n], which is positive, by squares of logarithms.

    Only such a product can be divided out of the cores. With f = log s on the grid of the indices, its main effects are
    the least squares: log s_k(i_k) = mean of f over the other indices - mean of f, the overall mean being added to the
    first. Returns the K vectors [i_k] and the share of the variance of f that they explain (1 for a constant f).
    """
    logarithm = scale.double().log().reshape(*inputs)
    mean = logarithm.mean()
    effects = []
    for site in range(len(inputs)):
        others = [axis for axis in range(len(inputs)) if axis != site]
        effects.append((logarithm.mean(others) if others else logarithm) - mean)
    centred = (logarithm - mean).square().sum().item()
    explained = sum(
        effect.square().sum().item() * logarithm.numel() / width for effect, width in zip(effects, inputs, strict=True)
    )
    effects[0] = effects[0] + mean
    return [effect.exp() for effect in effects], explained / centred if centred > 0 else 1.0


def outer(vectors: Sequence[Tensor]) -> Tensor:
    """[n] s_1(i_1) .. s_K(i_K), the last index fastest."""
    product = vectors[0]
    for vector in vectors[1:]:
        product = (product[:, None] * vector).flatten()
    return product


def unscale(cores: Sequence[Tensor], vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The cores of W from those of W diag(s): input i_k of core k is divided by s_k(i_k)."""
    return tuple(core / vector.to(core.dtype)[:, None] for core, vector in zip(cores, vectors, strict=True))
