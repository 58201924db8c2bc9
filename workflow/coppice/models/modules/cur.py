"""Columns and rows of the weight with a small link between them (CUR): y = columns (link (rows x))."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from .base import Fields, Replaceable, StoredForm, linear_of, wide_weight


class CURLinear(StoredForm):
    """y = columns(link(rows(x))): rows n -> r and columns r -> m hold rows and columns of the weight, link r -> r."""

    rows: nn.Linear
    link: nn.Linear
    columns: nn.Linear

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False, **factory: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.rows = nn.Linear(in_features, rank, bias=False, **factory)
        self.link = nn.Linear(rank, rank, bias=False, **factory)
        self.columns = nn.Linear(rank, out_features, bias=bias, **factory)

    @classmethod
    def from_replacement(cls, replacement: Any, linear: Replaceable, as_stored: Callable[[Tensor], Tensor]) -> Self:
        rows, link = linear_of(replacement.rows, None, as_stored), linear_of(replacement.link, None, as_stored)
        columns = linear_of(replacement.columns, linear.bias, as_stored)
        form = cls(rows.in_features, columns.out_features, link.out_features, linear.bias is not None, device="meta")
        form.rows, form.link, form.columns = rows, link, columns
        return form

    def fields(self) -> Fields:
        return {"rank": self.link.out_features}

    def effective_weight(self) -> Tensor:
        return wide_weight(self.columns) @ wide_weight(self.link) @ wide_weight(self.rows)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]  # that of a part
        return self.columns.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.columns(self.link(self.rows(x)))
