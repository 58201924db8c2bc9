"""`coppice plan`: what a study will take, before it runs: time, memory, GPU hours and disk, and what will not fit.

Neither torch nor pyarrow is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from coppice.errors import UserError, did_you_mean
from coppice.formatting import join_words
from coppice.hardware import DEVICES, GPU_MEMORY
from coppice.planning.contents import ChangedRow, Count, Machine, NodeRow, Pair, Plan, StageRow, Total, UnknownModel
from coppice.planning.jobs import LAYOUT, RUNS_MODELS, STAGES, Job, JobGraph
from coppice.planning.sizes import Size, child_size, node_sizes, size_of_source
from coppice.planning.text import GIGABYTE, format_range, gigabytes, lines
from coppice.planning.times import Range, Record, benchmarks, gpu_memory, makespan, memory_range, seconds_range
from coppice.planning.work import SizedJob, sized_jobs
from coppice.records.layout import ResultsLayout
from coppice.records.manifest import Manifest
from coppice.records.metrics import Metrics
from coppice.study import changes as study_changes
from coppice.study import tree
from coppice.study.loading import effective, load_study, read_yaml
from coppice.study.schema import HubModel, Study

# Stages that gather what all the others made.
GATHER = ("tables", "fit", "report", "track")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", type=Path, default=Path("config/config.yaml"), help="the study, in YAML")
    parser.add_argument("--results", type=Path, help="folder of the study's results (default: results/<study>)")
    parser.add_argument(
        "--cores", type=int, default=os.cpu_count(), help="jobs at once (default: this machine's cores)"
    )
    parser.add_argument("--gpus", type=int, help="GPUs that jobs take turns on (default: 1 if --device is a GPU, or 0)")
    parser.add_argument("--memory", type=float, metavar="GB", help="memory for all jobs (default: this machine's)")
    parser.add_argument("--disk", type=float, metavar="GB", help="disk space for the results (default: what is free)")
    parser.add_argument("--device", help=f"what computes, as the roofline knows it: {', '.join(DEVICES)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(arguments: argparse.Namespace) -> None:
    study = load_study(arguments.file)
    results = arguments.results or Path("results") / study.study
    refuse_options(arguments, results)
    machine: Machine = {
        "cores": arguments.cores,
        "gpus": int(arguments.device in GPU_MEMORY) if arguments.gpus is None else arguments.gpus,
        "device": arguments.device,
        "memory": GIGABYTE * arguments.memory if arguments.memory else installed_memory(),
        "disk": GIGABYTE * arguments.disk if arguments.disk else free_disk(results),
    }
    planned = plan(study, results, machine)
    print(json.dumps(planned, indent=1) if arguments.json else "\n".join(lines(planned)))


def refuse_options(arguments: argparse.Namespace, results: Path) -> None:
    """Raises UserError for an option without meaning."""
    if arguments.device is not None and arguments.device not in DEVICES:
        raise UserError(
            f"--device: {arguments.device!r} is not a known device.{did_you_mean(arguments.device, DEVICES)}"
        )
    for name, least in (("cores", 1), ("gpus", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value} means nothing; pass {least} or more.")
    if arguments.gpus == 0 and arguments.device in GPU_MEMORY:
        raise UserError(f"--gpus 0: {arguments.device} is a GPU; pass the number of GPUs, or leave out --device.")
    for name in ("memory", "disk"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value:g} means nothing; pass gigabytes, more than 0.")
    if results.exists() and not results.is_dir():
        raise UserError(f"--results: {results} is not a folder; name that of the study's results.")


def installed_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_disk(folder: Path) -> int:
    """Bytes free where the folder is, or will be."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def plan(study: Study, results: Path, machine: Machine) -> Plan:
    """The whole plan.

    Raises UserError where GPUs run jobs whose times depend on the device, and no device is named.
    """
    sizes = node_sizes(study, results)
    graph = JobGraph(study)
    changed = changes(study, graph.jobs, results)
    open_outputs = outputs_to_compute(graph.jobs, results, changed)
    sizes = sizes_to_come(study, sizes, open_outputs)
    jobs = sized_jobs(graph, sizes)
    left = [job for job in jobs if job.output in open_outputs]
    records = records_of_last_run(study, results)
    unmeasured = {job.stage for job in left} & set(RUNS_MODELS) - records.keys()
    if machine["gpus"] and not machine["device"] and unmeasured:
        raise UserError(
            f"--gpus {machine['gpus']}: which? Nothing of this study was measured yet, so the times depend on the "
            f"device; pass --device with one of {', '.join(GPU_MEMORY)}, the nearest to yours."
        )
    device = DEVICES[machine["device"]] if machine["device"] else None
    seconds = known_ranges(left, lambda job: seconds_range(job, sizes, records, device))
    memory = known_ranges(left, lambda job: memory_range(job, sizes, records))
    stages = [
        stage_row(
            stage,
            [job for job in jobs if job.stage == stage],
            [job for job in left if job.stage == stage],
            seconds,
            memory,
            records,
            machine,
        )
        for stage in sorted({job.stage for job in jobs}, key=STAGES.index)
    ]
    elapsed = None
    if left and len(seconds) == len(left):
        elapsed = [makespan(left, {key: value[end] for key, value in seconds.items()}, machine) for end in (0, 1)]
    total: Total = {
        "jobs": len(jobs),
        "left": len(left),
        "unknown": sum(row["unknown"] for row in stages),
        "seconds": add_ranges(row["seconds"] for row in stages),
        "elapsed_seconds": elapsed,
        "gpu_hours": add_ranges(row["gpu_hours"] for row in stages),
        "disk_bytes": sum(row["disk_bytes"] for row in stages),
    }
    return {
        "study": study.study,
        "results": str(results),
        "machine": machine,
        "changed": [
            ChangedRow(stage=job.stage, name=job.name, why=changed[job.output]) for job in jobs if job.output in changed
        ],
        "nodes": [node_row(study, name, sizes[name], results, open_outputs) for name in tree.nodes(study)],
        "evaluations": count_jobs(stages, "evaluate"),
        "laws": count_jobs(stages, "fit"),
        "stages": stages,
        "total": total,
        "unknown": [
            UnknownModel(model=name, hub=source.hub, revision=source.revision)
            for name, source in study.models.items()
            if isinstance(source, HubModel) and sizes[name] is None
        ],
        "problems": [
            *memory_problems(left, memory, machine),
            *gpu_problems(left, sizes, machine),
            *disk_problems(total["disk_bytes"], machine),
        ],
    }


# What is left


def known_ranges(jobs: Iterable[SizedJob], range_of: Callable[[SizedJob], Range | None]) -> dict[str, Range]:
    """The ranges of the jobs by output; without those that are unknown."""
    return {job.output: value for job in jobs if (value := range_of(job)) is not None}


def changes(study: Study, jobs: Iterable[Job], results: Path) -> dict[str, str]:
    """The outputs whose records name another study, each with the sentence that says what changed.

    Raises UserError where one of them is damaged.
    """
    nodes = tree.nodes(study)
    complete = [job for job in jobs if (results / job.output).exists()]
    return {job.output: why for job in complete if (why := change(study, nodes, job, results))}


def change(study: Study, nodes: Mapping[str, tree.Node], job: Job, results: Path) -> str | None:
    """How the study differs from the one that a job's output records, as a sentence; None if it does not."""
    path = results / job.output
    if job.stage == "study":
        was, now = read_yaml(path), effective(study)
        differing = [key for key in now if was.get(key) != now[key]]
        return f"The study's {join_words(differing)} differ from those in {path}." if differing else None
    if job.stage not in ("root", "tokenize", "compress", "recover", "evaluate"):
        return None  # Only their inputs and the study change these.
    # A damaged record is an error of its own, and is not recomputed.
    metrics = Metrics.read(path) if job.stage == "evaluate" else None
    manifest = Manifest.read(path) if job.stage in ("root", "compress", "recover") else None
    try:
        if metrics is not None and job.model is not None:
            study_changes.refuse_other_evaluation(study, job.model, job.kind, metrics.options, path)
        elif manifest is not None:
            node = nodes[job.name]
            tokens = ResultsLayout(results).token_sets(node.model)
            study_changes.refuse_other_node(study, node, manifest, path, tokens)
        else:
            study_changes.refuse_other_tokens(study, [job.kind], path.parents[1])
    except UserError as error:
        return str(error)
    return None


def outputs_to_compute(jobs: Iterable[Job], results: Path, changed: Mapping[str, str]) -> set[str]:
    """The outputs that are missing, that changed, that follow from changed ones, or that gather any of these.

    What follows from a missing node is recomputed as if the node had changed: the node may be missing because the study
    changed and its job then failed. Missing statistics cause no recomputation: only outputs yet to come read them.

    jobs: each after the jobs whose outputs it reads.
    """
    recomputed, left = set(changed), set[str]()
    to_gather: set[str] = set()
    for job in jobs:
        missing = not (results / job.output).exists()
        if (missing and job.stage in ("compress", "recover")) or not recomputed.isdisjoint(job.after):
            recomputed.add(job.output)
        if missing or job.output in recomputed or (job.stage in GATHER and not to_gather.isdisjoint(job.after)):
            left.add(job.output)
            if job.stage != "calibrate":
                to_gather.add(job.output)
    return left


def sizes_to_come(study: Study, sizes: Mapping[str, Size | None], left: set[str]) -> dict[str, Size | None]:
    """The sizes; those of nodes that will be recomputed are estimated as if their checkpoints were absent."""
    expected = dict(sizes)
    for name, node in tree.nodes(study).items():
        if str(LAYOUT.manifest(name)) not in left:
            continue
        if node.parent is None:
            expected[name] = size_of_source(study.models[name])
        else:
            parent = expected[node.parent]
            expected[name] = parent and child_size(study, parent, node.step)
    return expected


def records_of_last_run(study: Study, results: Path) -> dict[str, list[Record]]:
    """The benchmarks of the jobs by stage, with the work that they had when they ran.

    That is the work of the study that the results record, where it is still valid; older benchmarks are left out.
    """
    last = study
    if (results / "study.yaml").exists():
        with suppress(UserError):
            last = load_study(results / "study.yaml")
    sizes = node_sizes(last, results)
    jobs = sized_jobs(JobGraph(last), sizes)
    older = changes(last, jobs, results)
    return benchmarks([job for job in jobs if job.output not in older], sizes, results)


# Rows


def add_ranges(ranges: Iterable[Sequence[float]]) -> Pair:
    """[low, high] of the sum."""
    ends = list(ranges)
    return [sum(value[end] for value in ends) for end in (0, 1)]


def count_jobs(stages: list[StageRow], stage: str) -> Count:
    """How many of a stage's jobs are done, and how many the study has."""
    for row in stages:
        if row["stage"] == stage:
            return {"done": row["jobs"] - row["left"], "total": row["jobs"]}
    return {"done": 0, "total": 0}


def stage_row(
    stage: str,
    jobs: list[SizedJob],
    left: list[SizedJob],
    seconds: Mapping[str, Range],
    memory: Mapping[str, Range],
    records: Mapping[str, list[Record]],
    machine: Machine,
) -> StageRow:
    """A stage: its jobs, and what those that are left take. seconds, memory: by output; without unknown ones."""
    known = [job for job in left if job.output in seconds]
    held = [memory[job.output] for job in known]
    hours = ([job.gpus * value / 3600 for value in seconds[job.output]] for job in known if machine["gpus"])
    return {
        "stage": stage,
        "jobs": len(jobs),
        "left": len(left),
        "unknown": len(left) - len(known),
        "seconds": add_ranges(seconds[job.output] for job in known),
        "memory_bytes": [max(value[end] for value in held) for end in (0, 1)] if held else None,
        "gpu_hours": add_ranges(hours),
        "disk_bytes": sum(job.disk for job in left),
        "from": "measured" if stage in records else "predicted",
        "benchmarks": len(records.get(stage, [])),
    }


def node_row(study: Study, name: str, size: Size | None, results: Path, left: set[str]) -> NodeRow:
    """A node; `changed` where it exists and will be recomputed. left: the outputs to compute."""
    outputs = [str(LAYOUT.metrics(name, evaluation)) for evaluation in tree.evaluations(study, name)]
    return {
        "node": name,
        "done": str(LAYOUT.manifest(name)) not in left,
        "changed": str(LAYOUT.manifest(name)) in left and (results / str(LAYOUT.manifest(name))).exists(),
        "parameters": round(size.parameters) if size else None,
        "stored_bytes": round(size.stored) if size else None,
        "size": size.how if size else "unknown",
        "evaluations": len(outputs),
        "evaluations_done": sum(output not in left for output in outputs),
    }


# What will not fit


def memory_problems(left: list[SizedJob], memory: Mapping[str, Range], machine: Machine) -> list[str]:
    """A sentence where jobs hold more than the machine has: one alone, or those that run at once."""
    known = sorted(((memory[job.output], job) for job in left if job.output in memory), key=lambda pair: pair[0])
    installed = gigabytes(machine["memory"])
    too_large = [job for value, job in known if value.low > machine["memory"]]
    if too_large:
        value, job = known[-1]
        return [
            f"Memory: {len(too_large)} of the jobs that are left need more than the {installed} of this machine; "
            f"the largest is {job.stage} {job.name} with {format_range(value, gigabytes)}. Run them on a machine "
            "with more memory, or shorten their batches (micro_batch_size) and windows (length)."
        ]
    perhaps = [job for value, job in known if value.high > machine["memory"]]
    if perhaps:
        return [f"Memory: {perhaps[-1].stage} {perhaps[-1].name} may need more than the {installed} of this machine."]
    at_once = sum(value.high for value, _ in known[-machine["cores"] :])
    if at_once > machine["memory"]:
        return [
            f"Memory: the {min(machine['cores'], len(known))} largest jobs at once may hold {gigabytes(at_once)}, and "
            f"the machine has {installed}; run fewer at once with `--cores`."
        ]
    return []


def gpu_problems(left: list[SizedJob], sizes: Mapping[str, Size | None], machine: Machine) -> list[str]:
    """Sentences where jobs request more GPUs than the machine has, or more memory than one of them has."""
    sentences = []
    widest = max(left, key=lambda job: job.gpus, default=None)
    if widest and machine["gpus"] and widest.gpus > machine["gpus"]:
        sentences.append(
            f"GPUs: {widest.stage} {widest.name} requests {widest.gpus}, and the machine has {machine['gpus']}; lower "
            "its step's `gpus`, or run it on a machine with as many."
        )
    capacity = GPU_MEMORY.get(machine["device"]) if machine["device"] else None
    largest = max(left, key=lambda job: gpu_memory(job, sizes), default=None)
    if capacity and largest and gpu_memory(largest, sizes) > capacity:
        sentences.append(
            f"GPU memory: {largest.stage} {largest.name} may hold up to {gigabytes(gpu_memory(largest, sizes))} on a "
            f"GPU, and {machine['device']} has {gigabytes(capacity)}; it takes less in 16 bits, with a smaller "
            "micro_batch_size, with gradient_checkpointing, or on more `gpus`."
        )
    return sentences


def disk_problems(needed: float, machine: Machine) -> list[str]:
    if needed <= machine["disk"]:
        return []
    return [f"Disk: the results will take about {gigabytes(needed)}; {gigabytes(machine['disk'])} are free."]
