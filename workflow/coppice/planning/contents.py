"""What a plan holds, as `coppice plan --json` prints it. Pairs of numbers are [low, high]; what is unknown is null."""

from __future__ import annotations

from typing import TypedDict

Pair = list[float]


class Machine(TypedDict):
    """What runs the study. device: of those that the roofline knows; memory, disk: bytes."""

    cores: int
    gpus: int
    device: str | None
    memory: float
    disk: float


class ChangedRow(TypedDict):
    """An output of another study, with the sentence that says what changed."""

    stage: str
    name: str
    why: str


class NodeRow(TypedDict):
    """A node. size: measured, estimated, at most or unknown."""

    node: str
    done: bool
    changed: bool
    parameters: int | None
    stored_bytes: int | None
    size: str
    evaluations: int
    evaluations_done: int


class Count(TypedDict):
    """How many jobs of a stage are done, and how many the study has."""

    done: int
    total: int


# A key of a stage is a word of Python.
StageRow = TypedDict(
    "StageRow",
    {
        "stage": str,
        "jobs": int,
        "left": int,
        "unknown": int,
        "seconds": Pair,
        "memory_bytes": Pair | None,
        "gpu_hours": Pair,
        "disk_bytes": float,
        "from": str,
        "benchmarks": int,
    },
)


class Total(TypedDict):
    """Sums over the stages. elapsed_seconds: until the last job ends."""

    jobs: int
    left: int
    unknown: int
    seconds: Pair
    elapsed_seconds: Pair | None
    gpu_hours: Pair
    disk_bytes: float


class UnknownModel(TypedDict):
    """A model of the hub of which nothing is on this machine."""

    model: str
    hub: str
    revision: str


class Plan(TypedDict):
    """The whole plan. problems: sentences on what will not fit."""

    study: str
    results: str
    machine: Machine
    changed: list[ChangedRow]
    nodes: list[NodeRow]
    evaluations: Count
    laws: Count
    stages: list[StageRow]
    total: Total
    unknown: list[UnknownModel]
    problems: list[str]
