"""How long jobs take and how much they hold: by the benchmarks of a study's jobs, or else by their operations.

A job takes the seconds of its start, and its operations over a rate. Both come from a line through the benchmarks
(`measured`) or, without any (`predicted`), are a constant and a share of a device's roofline (`evaluation.roofline`).
Ranges are those of the benchmarks about the line, 30% at least, or a factor of two. Memory is that of
`planning.resources`, times the share of it that the benchmarks held.
"""

from __future__ import annotations

import heapq
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import NamedTuple

from coppice.evaluation import roofline
from coppice.hardware import Device
from coppice.planning import resources
from coppice.planning.contents import Machine
from coppice.planning.jobs import RUNS_MODELS
from coppice.planning.sizes import Size
from coppice.planning.work import SizedJob
from coppice.records.layout import ResultsLayout
from coppice.records.node_name import NodeName

# One thread of a CPU as these jobs use it: what the demo's recoveries reached, operations/s and bytes/s.
THREAD = Device(bandwidth=1e10, float16=1.5e10, int8=1.5e10, source="measured on the demo")
EFFICIENCY = 0.35  # share of a GPU's roofline that training and evaluation usually reach
START = {"study": 1.0, "tokenize": 1.0, "tables": 3.0, "fit": 13.0, "report": 3.0, "track": 12.0}
START_OF_MODELS = 11.0  # seconds until torch, transformers and a small model are loaded
SURE = 1.3  # what the same job's time differs by from day to day


class Range(NamedTuple):
    low: float
    high: float


class Record(NamedTuple):
    """A benchmark: operations of its job, seconds, resident bytes at most, and those that were expected."""

    kind: str
    operations: float
    seconds: float
    memory: float
    expected: float


class EstimatedCounts(NamedTuple):
    """Parameters of a model; its blocks are taken to hold nothing but linears."""

    total: float
    blocks: float
    decoder_linears: float


class EstimatedSize(NamedTuple):
    """The size of a node as its manifest would record it."""

    parameters: EstimatedCounts
    dense: EstimatedCounts
    stored_bytes: float


def benchmarks(jobs: list[SizedJob], sizes: Mapping[str, Size | None], results: Path) -> dict[str, list[Record]]:
    """The benchmarks of the jobs by stage; of a job that ran twice, the last."""
    records: dict[str, list[Record]] = {}
    for job in jobs:
        path = ResultsLayout(results).benchmark(job.stage, job.name)
        if not path.exists() or job.operations is None:
            continue
        rows = path.read_text(encoding="utf-8").splitlines()
        if not rows:
            continue
        row = json.loads(rows[-1])
        # A job of less than a second may end before its memory is sampled.
        memory = float(row["max_rss"]) * 2**20 if isinstance(row["max_rss"], int | float) else 0.0
        records.setdefault(job.stage, []).append(
            Record(job.kind, job.operations, float(row["s"]), memory, expected_memory(job, sizes))
        )
    return records


def similar_benchmarks(job: SizedJob, records: Mapping[str, list[Record]]) -> list[Record]:
    """The benchmarks nearest to a job: three of its own kind, or all of the stage."""
    stage = records.get(job.stage, [])
    own = [record for record in stage if record.kind == job.kind]
    return own if len(own) >= 3 else stage


def line(records: list[Record]) -> tuple[float, float]:
    """(seconds at the start, seconds an operation) through the benchmarks, neither negative: least squares."""
    works, seconds = [record.operations for record in records], [record.seconds for record in records]
    middle, mean = fmean(works), fmean(seconds)
    spread = sum((work - middle) ** 2 for work in works)
    slope = sum((work - middle) * (s - mean) for work, s in zip(works, seconds, strict=True)) / spread if spread else 0
    if slope <= 0:
        return median(seconds), 0.0
    if mean < slope * middle:
        return 0.0, mean / middle
    return mean - slope * middle, slope


def seconds_range(
    job: SizedJob, sizes: Mapping[str, Size | None], records: Mapping[str, list[Record]], device: Device | None
) -> Range | None:
    """Seconds of a job; None where its model's size is unknown."""
    if job.operations is None:
        return None
    pool = similar_benchmarks(job, records)
    if not pool:
        start = START.get(job.stage, START_OF_MODELS)
        size = sizes[job.model] if job.model else None
        rate = operations_per_second(size, device) if size else THREAD.float16
        # On a CPU, several processes share its cores.
        seconds = start + job.operations / (rate * (max(job.gpus, 1) if device else 1))
        return Range(seconds / 2, seconds * 2)
    start, slope = line(pool)
    seconds = start + slope * job.operations
    ratios = [record.seconds / (start + slope * record.operations) for record in pool]
    low, high = min(ratios), max(ratios)
    if len(ratios) >= 10:
        low, *_, high = quantiles(ratios, n=20)
    low, high = min(low, 1 / SURE), max(high, SURE)
    # Beyond what was measured, and from a few jobs, a line is less certain.
    far = job.operations > 4 * max(record.operations for record in pool) or len(pool) < 3
    return Range(seconds * low / (2 if far else 1), seconds * high * (2 if far else 1))


def operations_per_second(size: Size, device: Device | None) -> float:
    """The rate at which a device runs a model on 16 sequences of 512 tokens: its roofline, times the efficiency."""
    used = device or THREAD
    seconds = roofline.latency(roofline.prefill(roofline.uniform(size.shape), 16, 512), used)
    return 2 * size.parameters * 16 * 512 / seconds * (EFFICIENCY if device else 1)


def expected_memory(job: SizedJob, sizes: Mapping[str, Size | None]) -> float:
    """Bytes by `planning.resources`; of a stage that loads no model, its libraries'."""
    size = likely_size(job.model, sizes)
    if size is None:
        return resources.LIBRARIES[job.stage]
    return resources.expected_bytes(job.stage, size, job.options)


def likely_size(node: str | None, sizes: Mapping[str, Size | None]) -> EstimatedSize | None:
    """What `planning.resources` reads of a node's manifest, by its size; None where that is unknown."""
    if node is None:
        return None
    size, dense = sizes[node], sizes[NodeName(node).model]
    if size is None or dense is None:
        return None
    return EstimatedSize(
        EstimatedCounts(size.parameters, size.linears, size.linears),
        EstimatedCounts(dense.parameters, dense.linears, dense.linears),
        size.stored,
    )


def memory_range(job: SizedJob, sizes: Mapping[str, Size | None], records: Mapping[str, list[Record]]) -> Range | None:
    """Bytes that a job holds at most; None where its model's size is unknown."""
    if job.operations is None:
        return None
    expected = expected_memory(job, sizes)
    ratios = [record.memory / record.expected for record in similar_benchmarks(job, records) if record.memory]
    if not ratios:
        return Range(expected, expected * resources.HEADROOM)
    return Range(expected * min(ratios) / 1.1, expected * max(ratios) * 1.1)


def gpu_memory(job: SizedJob, sizes: Mapping[str, Size | None]) -> float:
    """Bytes that a job holds on each of its GPUs at most, were all in float32; 0 where its model's size is unknown."""
    size = likely_size(job.model, sizes)
    if size is None or job.stage not in RUNS_MODELS:
        return 0.0
    return resources.device_bytes(job.stage, size, job.options) / max(job.gpus, 1)


def makespan(left: list[SizedJob], seconds: Mapping[str, float], machine: Machine) -> float:
    """Seconds until the last job ends, where each begins as soon as its inputs exist and a core, or GPU, is free.

    A job that takes the whole machine waits for all the others that have begun.
    """
    jobs = {job.output: job for job in left}
    before = {job.output: len({name for name in job.after if name in jobs}) for job in left}
    after = defaultdict(list)
    for job in left:
        for name in set(job.after):
            after[name].append(job.output)
    ready = [name for name, count in before.items() if not count]
    running: list[tuple[float, str]] = []
    clock, cores, gpus = 0.0, machine["cores"], machine["gpus"]

    def resources_of(name: str) -> tuple[int, int]:
        return machine["cores"] if jobs[name].alone else 1, min(jobs[name].gpus, machine["gpus"])

    while ready or running:
        for name in ready:
            needed_cores, needed_gpus = resources_of(name)
            if not cores:
                break
            if needed_cores <= cores and needed_gpus <= gpus:
                cores, gpus = cores - needed_cores, gpus - needed_gpus
                heapq.heappush(running, (clock + seconds[name], name))
        begun = {name for _, name in running}
        ready = [name for name in ready if name not in begun]
        clock, ended = heapq.heappop(running)
        freed_cores, freed_gpus = resources_of(ended)
        cores, gpus = cores + freed_cores, gpus + freed_gpus
        for name in after[ended]:
            before[name] -= 1
            if not before[name]:
                ready.append(name)
    return clock
