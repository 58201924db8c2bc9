"""The losses along a recovery: `curve.parquet`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, TypedDict, cast

from coppice.records.arrow import read_parquet, schema_of, write_parquet
from coppice.records.base import Column


class CurvePoint(TypedDict):
    """A row: the losses that were measured at one step."""

    step: Annotated[int, Column("Optimizer steps so far.", unit="steps")]
    tokens: Annotated[int, Column("Tokens trained on so far.", unit="tokens")]
    train_loss: Annotated[float | None, Column("The method's own loss, mean since the row before.", unit="nats/token")]
    validation_loss: Annotated[float | None, Column("Held-out cross-entropy.", unit="nats/token")]
    lr: Annotated[float | None, Column("Learning rate at that point.")]
    seconds: Annotated[float, Column("Training time so far.", unit="s")]
    budget: Annotated[bool, Column("Whether the row lies on the study's ladder of budgets.")]
    dense_loss: Annotated[float, Column("The dense model's loss on the same validation tokens.", unit="nats/token")]


def write_curve(path: Path, points: Iterable[CurvePoint]) -> None:
    write_parquet(path, list(points), schema_of(CurvePoint))


def read_curve(path: Path) -> list[CurvePoint]:
    """The points in the order of the file. Raises UserError where it is missing, damaged, or lacks a column."""
    return cast(list[CurvePoint], read_parquet(path, schema_of(CurvePoint).names).to_pylist())
