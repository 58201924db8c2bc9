"""Two factors: y = second (first x)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from .base import Fields, Replaceable, StoredForm, linear_of, wide_weight


class LowRankLinear(StoredForm):
    """y = second(first(x)): first n -> k without bias, second k -> m with the linear's bias."""

    first: nn.Linear
    second: nn.Linear

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False, **factory: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.first = nn.Linear(in_features, rank, bias=False, **factory)
        self.second = nn.Linear(rank, out_features, bias=bias, **factory)

    @classmethod
    def from_replacement(cls, replacement: Any, linear: Replaceable, as_stored: Callable[[Tensor], Tensor]) -> Self:
        first = linear_of(replacement.first, None, as_stored)
        second = linear_of(replacement.second, linear.bias, as_stored)
        form = cls(first.in_features, second.out_features, first.out_features, linear.bias is not None, device="meta")
        form.first, form.second = first, second
        return form

    def fields(self) -> Fields:
        return {"rank": self.first.out_features}

    def effective_weight(self) -> Tensor:
        return wide_weight(self.second) @ wide_weight(self.first)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]  # that of a part
        return self.second.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))
