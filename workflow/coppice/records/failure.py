"""A job that failed: what `failures.parquet` has a row of."""

from __future__ import annotations

from typing import Annotated, TypedDict

from coppice.records.base import Column

SILENT = "no error message; the process was probably killed (out of memory?)"


class Failure(TypedDict):
    """An output of the study that is missing because its job failed, or that is damaged."""

    node: Annotated[str | None, Column("The node it belongs to; null for a law.")]
    stage: Annotated[str, Column("Command that failed; `tables` where it could not read its output.")]
    error: Annotated[str, Column(f"The error's sentence, or `{SILENT}`.")]
    log: Annotated[str, Column("The job's log, or the damaged file, relative to the results folder.")]
