"""A tensor train (matrix product operator) over factorized inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn

from .base import Fields, Replaceable, StoredForm, factory_of, linear_of, wide_weight


class TensorTrainLinear(StoredForm):
    """A matrix product operator: site k maps (i_k, bond k) to (bond k-1, o_k), from the last site to the first.

    in_shape: i_1 .. i_K with product n; out_shape: o_1 .. o_K with product m; bonds: the K - 1 inner ones.
    sites[k].weight: [bond k-1 o_k, i_k bond k]. Many vectors at once are multiplied by the matrix that the sites stand
    for, where putting it together and using it takes fewer multiplications.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        bonds: Sequence[int],
        bias: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.in_shape, self.out_shape, self.bonds = tuple(in_shape), tuple(out_shape), tuple(bonds)
        self.in_features, self.out_features = prod(in_shape), prod(out_shape)
        ends = (1, *bonds, 1)
        self.sites = nn.ModuleList(
            nn.Linear(inputs * ends[k + 1], ends[k] * outputs, bias=False, **factory)
            for k, (inputs, outputs) in enumerate(zip(in_shape, out_shape, strict=True))
        )
        self.bias = nn.Parameter(torch.zeros(self.out_features, **factory)) if bias else None

    @classmethod
    def from_replacement(cls, replacement: Any, linear: Replaceable, as_stored: Callable[[Tensor], Tensor]) -> Self:
        cores = replacement.cores
        in_shape, out_shape, bonds = ([core.shape[axis] for core in cores] for axis in (2, 1, 3))
        form = cls(in_shape, out_shape, bonds[:-1], device="meta")
        form.sites = nn.ModuleList(linear_of(core.flatten(2).flatten(0, 1), None, as_stored) for core in cores)
        form.bias = linear.bias
        return form

    @classmethod
    def build(cls, linear: nn.Linear, fields: Fields) -> Self:
        return cls(**fields, bias=linear.bias is not None, **factory_of(linear))

    def fields(self) -> Fields:
        return {"in_shape": list(self.in_shape), "out_shape": list(self.out_shape), "bonds": list(self.bonds)}

    def effective_weight(self) -> Tensor:
        return self.matrix([wide_weight(site) for site in self.linears()])

    def linears(self) -> list[nn.Linear]:
        """The sites in order."""
        return [site for site in self.sites if isinstance(site, nn.Linear)]

    def product(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., m] without the bias, site after site."""
        ends = (1, *self.bonds, 1)
        before, done = x.shape[:-1], 1
        for k in reversed(range(len(self.sites))):
            # [.., i_1 .. i_k-1, (i_k bond), o_k+1 .. o_K], with the middle moved last for the site's product.
            left = prod(self.in_shape[:k])
            x = x.reshape(*before, left, self.in_shape[k] * ends[k + 1], done).transpose(-1, -2)
            x = self.sites[k](x).unflatten(-1, (ends[k], self.out_shape[k])).movedim(-3, -1)
            done *= self.out_shape[k]
        return x.reshape(*before, self.out_features)

    def matrix(self, weights: Sequence[Tensor]) -> Tensor:
        """[m, n]: the weights of the sites, in whatever dtype, contracted with each other."""
        ends = (1, *self.bonds, 1)
        whole = weights[0].new_ones(1, 1, 1)  # [outputs, inputs, bond] so far
        for k, weight in enumerate(weights):
            core = weight.view(ends[k], self.out_shape[k], self.in_shape[k], ends[k + 1])
            whole = torch.einsum("oib,bpjc->opijc", whole, core).flatten(2, 3).flatten(0, 1)
        return whole[:, :, 0]

    def multiplications(self) -> tuple[int, int]:
        """Those of `product` for one vector, and those of `matrix`."""
        ends = (1, *self.bonds, 1)
        product = matrix = 0
        for k in range(len(self.sites)):
            pair = self.in_shape[k] * self.out_shape[k] * ends[k] * ends[k + 1]
            product += prod(self.in_shape[:k]) * prod(self.out_shape[k + 1 :]) * pair
            matrix += prod(self.in_shape[:k]) * prod(self.out_shape[:k]) * pair
        return product, matrix

    def forward(self, x: Tensor) -> Tensor:
        product, matrix = self.multiplications()
        vectors = x.numel() // self.in_features
        # Whoever watches or rounds the inputs of the sites wants them computed.
        watched = any(site._forward_pre_hooks or site._forward_hooks for site in self.sites)
        if not watched and vectors * (product - self.in_features * self.out_features) > matrix:
            return nn.functional.linear(x, self.matrix([site.weight for site in self.linears()]), self.bias)
        y = self.product(x)
        return y if self.bias is None else y + self.bias
