"""What one evaluation measured of a node: `metrics.json`, and the rows of `items.parquet`."""

from __future__ import annotations

from typing import Annotated, NotRequired, TypedDict

from pydantic import ConfigDict, Field, JsonValue

from coppice.files import FileEntry
from coppice.records.base import Column, Json, Part, Record

Number = int | float


class Metric(Part):
    """One measurement. Further keys describe what was measured: protocol, task, shots, text."""

    model_config = ConfigDict(extra="allow")

    metric: Annotated[str, Column("What was measured, protocol or task included, so that a name is one scale.")]
    value: Annotated[Number | None, Column("The measurement.", unit="see unit")]
    stderr: Annotated[Number | None, Column("Its standard error; null if it has none.", unit="see unit")] = None
    low: Annotated[
        Number | None,
        Column("Lower end of the 95% interval: Wilson's of a share, bootstrap of other means.", unit="see unit"),
    ] = None
    high: Annotated[
        Number | None,
        Column("Its upper end; null without items, or where they are too few for a bootstrap.", unit="see unit"),
    ] = None
    n: Annotated[
        int | None, Column("Number of items (tokens, questions) that the value is taken over.", unit="items")
    ] = None
    unit: Annotated[str, Column("Unit of value, stderr, low and high.")]
    spread: Annotated[
        Number | None, Column("Costs: spread over repeats; null where nothing was repeated.", unit="see unit")
    ] = None
    device: Annotated[str | None, Column("Costs: the device, where it is not that of the evaluation.")] = None
    simulated: Annotated[
        bool, Column("Costs: whether the number is computed for a device or format that did not run here.")
    ] = False
    settings: Annotated[Json | None, Column("Costs: sequences and tokens of the measurement.")] = None

    @property
    def details(self) -> dict[str, JsonValue]:
        """The further keys that are not null."""
        return {key: value for key, value in (self.model_extra or {}).items() if value is not None}


class Metrics(Record):
    """`metrics.json` of an evaluation."""

    fingerprint: Annotated[str, Column("Fingerprint of the evaluation, its options, device, checkpoint and tokens.")]
    node: Annotated[str, Column("The node measured.")]
    evaluation: Annotated[str, Column("Name of the evaluation in the study.")]
    kind: Annotated[str, Column("Kind of the evaluation: quality, cost or connectivity.")]
    model_fingerprint: Annotated[str, Column("Fingerprint of the checkpoint's weights.")]
    other_fingerprint: Annotated[
        str | None, Column("Connectivity: fingerprint of the checkpoint that it was compared with.")
    ] = None
    tokens_fingerprints: Annotated[dict[str, str], Column("Fingerprint of the token set of each protocol.")]
    options: Annotated[Json, Column("All options of the evaluation.")]
    device: Annotated[str, Column("What the node ran on: cpu, or the accelerator's name.")]
    metrics: list[Metric]
    versions: Annotated[dict[str, str], Column("Versions of the software that measured.")]
    wall_seconds: Annotated[float, Column("Time that the evaluation took.", unit="s")]
    peak_memory_bytes: Annotated[int, Column("Largest memory that the evaluation held.", unit="bytes")]
    files: Annotated[dict[str, FileEntry], Column("Size and SHA-256 of each other file of the folder.")] = Field(
        default_factory=dict
    )


class Item(TypedDict):
    """A row of `items.parquet`: an answer choice of a benchmark item, or a document of a perplexity."""

    node: Annotated[NotRequired[str], Column("The node measured.")]
    task: Annotated[str, Column("Benchmark task, or protocol of perplexity.")]
    item: Annotated[str, Column("The item's identity within the task.")]
    choice: Annotated[int, Column("Index of the answer choice; 0 for a document.")]
    log_likelihood: Annotated[
        float,
        Column("Sum of log probabilities of the choice's, or the document's scored, tokens.", unit="nats"),
    ]
    length: Annotated[int, Column("Characters of the choice; tokens scored of a document.", unit="see meaning")]
    correct: Annotated[
        bool | None,
        Column("Whether the item was answered rightly, the same in all its rows; null for a document."),
    ]
    answer: Annotated[NotRequired[bool | None], Column("Whether the choice is the right one; null where `correct` is.")]
