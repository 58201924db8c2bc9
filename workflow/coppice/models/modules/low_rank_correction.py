"""A compressed linear with a low-rank correction added to its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from .base import Fields, Replaceable, StoredForm, factory_of, linear_of, wide_weight
from .low_rank import LowRankLinear


class LowRankCorrectionLinear(StoredForm):
    """y = base(x) + compensation(x): a compressed linear with a low-rank correction.

    The correction's tensors are stored under `compensation`, in checkpoints as in statistics.
    """

    def __init__(self, base: Replaceable, rank: int, **factory: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base = base
        self.compensation = LowRankLinear(self.in_features, self.out_features, rank, **factory)

    @classmethod
    def from_replacement(cls, replacement: Any, linear: Replaceable, as_stored: Callable[[Tensor], Tensor]) -> Self:
        form = cls(linear, len(replacement.first), device="meta")
        form.compensation.first = linear_of(replacement.first, None, as_stored)
        form.compensation.second = linear_of(replacement.second, None, as_stored)
        return form

    @classmethod
    def build(cls, linear: nn.Linear, fields: Fields) -> Self:
        return cls(linear, **fields, **factory_of(linear))

    def fields(self) -> Fields:
        return {"rank": self.compensation.first.out_features}

    def effective_weight(self) -> Tensor:
        return wide_weight(self.base) + wide_weight(self.compensation)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]  # that of a part
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.compensation(x)
