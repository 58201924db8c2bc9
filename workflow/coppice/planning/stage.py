"""`coppice plan`: what a study will take, before it runs: time, memory, GPU hours and disk, and what will not fit.

Neither torch nor pyarrow is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from coppice.errors import UserError, did_you_mean
from coppice.formatting import join_words
from coppice.hardware import DEVICES, GPU_MEMORY
from coppice.planning.jobs import LAYOUT, RUNS_MODELS, STAGES, Job, JobGraph
from coppice.planning.sizes import Size, child_size, node_sizes, size_of_source
from coppice.planning.text import GIGABYTE, between, gigabytes, lines
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
    parser.add_argument("--disk", type=float, metavar="GB", help="space for the results (default: what is free)")
    parser.add_argument("--device", help=f"what computes, as the roofline knows it: {', '.join(DEVICES)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(arguments: argparse.Namespace) -> None:
    study = load_study(arguments.file)
    results = arguments.results or Path("results") / study.study
    refuse(arguments, results)
    machine = {
        "cores": arguments.cores,
        "gpus": int(arguments.device in GPU_MEMORY) if arguments.gpus is None else arguments.gpus,
        "device": arguments.device,
        "memory": GIGABYTE * arguments.memory if arguments.memory else installed_memory(),
        "disk": GIGABYTE * arguments.disk if arguments.disk else free_disk(results),
    }
    made = plan(study, results, machine)
    print(json.dumps(made, indent=1) if arguments.json else "\n".join(lines(made)))


def refuse(arguments: argparse.Namespace, results: Path) -> None:
    """Raises UserError for an option that means nothing."""
    if arguments.device is not None and arguments.device not in DEVICES:
        raise UserError(f"--device: there is no {arguments.device!r}.{did_you_mean(arguments.device, DEVICES)}")
    for name, least in (("cores", 1), ("gpus", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value} means nothing; pass {least} or more.")
    if arguments.gpus == 0 and arguments.device in GPU_MEMORY:
        raise UserError(
            f"--gpus 0: {arguments.device} is a GPU; pass how many of them there are, or leave out --device."
        )
    for name in ("memory", "disk"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value:g} means nothing; pass gigabytes, more than 0.")
    if results.exists() and not results.is_dir():
        raise UserError(f"--results: {results} is no folder; name that of the study's results.")


def installed_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_disk(folder: Path) -> int:
    """Bytes free where the folder is, or will be."""
    there = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    return shutil.disk_usage(there).free


def plan(study: Study, results: Path, machine: Mapping[str, Any]) -> dict[str, Any]:
    """The whole plan as JSON has it. machine: cores, gpus, device (of the roofline's, or None), memory, disk [bytes].

    Raises UserError where GPUs are to run jobs whose times depend on which they are, and none is named.
    """
    sizes = node_sizes(study, results)
    graph = JobGraph(study)
    changed = changes(study, graph.jobs, results)
    open_outputs = to_make(graph.jobs, results, changed)
    sizes = sizes_to_come(study, sizes, open_outputs)
    found = sized_jobs(graph, sizes)
    left = [job for job in found if job.output in open_outputs]
    records = records_of_last_run(study, results)
    unmeasured = {job.stage for job in left} & set(RUNS_MODELS) - records.keys()
    if machine["gpus"] and not machine["device"] and unmeasured:
        raise UserError(
            f"--gpus {machine['gpus']}: which? Nothing of this study was measured yet, so that the times depend on it; "
            f"pass --device with one of {', '.join(GPU_MEMORY)}, the nearest to yours."
        )
    device = DEVICES[machine["device"]] if machine["device"] else None
    seconds = {job.output: seconds_range(job, sizes, records, device) for job in left}
    memory = {job.output: memory_range(job, sizes, records) for job in left}
    stages = [
        stage_row(stage, [job for job in found if job.stage == stage], seconds, memory, records, machine)
        for stage in sorted({job.stage for job in found}, key=STAGES.index)
    ]
    elapsed = None
    if left and all(seconds.values()):
        elapsed = [makespan(left, {key: value[end] for key, value in seconds.items()}, machine) for end in (0, 1)]
    total = {
        "jobs": len(found),
        "left": len(left),
        "unknown": sum(row["unknown"] for row in stages),
        "seconds": summed(row["seconds"] for row in stages),
        "elapsed_seconds": elapsed,
        "gpu_hours": summed(row["gpu_hours"] for row in stages),
        "disk_bytes": sum(row["disk_bytes"] for row in stages),
    }
    return {
        "study": study.study,
        "results": str(results),
        "machine": dict(machine),
        "changed": [
            {"stage": job.stage, "name": job.name, "why": changed[job.output]} for job in found if job.output in changed
        ],
        "nodes": [node_row(study, name, sizes[name], results, open_outputs) for name in tree.nodes(study)],
        **{name: counts(stages, stage) for name, stage in (("evaluations", "evaluate"), ("laws", "fit"))},
        "stages": stages,
        "total": total,
        "unknown": [hub_model(study, model) for model in study.models if sizes[model] is None],
        "problems": [
            *memory_problems(left, memory, machine),
            *gpu_problems(left, sizes, machine),
            *disk_problems(total["disk_bytes"], machine),
        ],
    }


# What is left


def changes(study: Study, found: Iterable[Job], results: Path) -> dict[str, str]:
    """The outputs that say that they were made of another study, with the sentence that says what changed.

    Raises UserError where one of them is broken.
    """
    nodes = tree.nodes(study)
    there = [job for job in found if (results / job.output).exists()]
    return {job.output: why for job in there if (why := change(study, nodes, job, results))}


def change(study: Study, nodes: Mapping[str, tree.Node], job: Job, results: Path) -> str | None:
    """What the study changed of how a job's output was made, by what the output says; None if nothing."""
    path = results / job.output
    if job.stage == "study":
        was, now = read_yaml(path), effective(study)
        differing = [key for key in now if was.get(key) != now[key]]
        return f"The study's {join_words(differing)} are others than in {path}." if differing else None
    if job.stage not in ("root", "tokenize", "compress", "recover", "evaluate"):
        return None  # Nothing but what they read, and the study, changes these.
    # A damaged record is an error of its own, and is not recomputed.
    metrics = Metrics.read(path) if job.stage == "evaluate" else None
    manifest = Manifest.read(path) if job.stage in ("root", "compress", "recover") else None
    try:
        if metrics is not None:
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


def to_make(found: Iterable[Job], results: Path, changed: Mapping[str, str]) -> set[str]:
    """The outputs that are missing, that changed, that follow from changed ones, or that gather any of these.

    What follows from a missing node follows from a changed one: a node is missing where it was made of another study
    and could not be made again. Statistics that are missing make nothing anew: they are read by what is yet to be made.

    found: what a job reads before the job.
    """
    anew, left, to_gather = set(changed), set(), set()
    for job in found:
        missing = not (results / job.output).exists()
        if (missing and job.stage in ("compress", "recover")) or not anew.isdisjoint(job.after):
            anew.add(job.output)
        if missing or job.output in anew or (job.stage in GATHER and not to_gather.isdisjoint(job.after)):
            left.add(job.output)
            if job.stage != "calibrate":
                to_gather.add(job.output)
    return left


def sizes_to_come(study: Study, sizes: Mapping[str, Size | None], left: set[str]) -> dict[str, Size | None]:
    """The sizes, where those of nodes that are made again are what they would be if the nodes were not there."""
    found = dict(sizes)
    for name, node in tree.nodes(study).items():
        if str(LAYOUT.manifest(name)) not in left:
            continue
        if node.parent is None:
            found[name] = size_of_source(study.models[name])
        else:
            parent = found[node.parent]
            found[name] = parent and child_size(study, parent, node.step)
    return found


def records_of_last_run(study: Study, results: Path) -> dict[str, list[Record]]:
    """The benchmarks of the jobs by stage, with the work that they had when they ran.

    That is the work of the study in the results, if there is one that still holds; what is older than it is left out.
    """
    last = study
    if (results / "study.yaml").exists():
        with suppress(UserError):
            last = load_study(results / "study.yaml")
    sizes = node_sizes(last, results)
    found = sized_jobs(JobGraph(last), sizes)
    older = changes(last, found, results)
    return benchmarks([job for job in found if job.output not in older], sizes, results)


def hub_model(study: Study, name: str) -> dict[str, str]:
    """What there is to know of a model of the hub that is not on this machine."""
    source: HubModel = study.models[name]
    return {"model": name, "hub": source.hub, "revision": source.revision}


# Rows


def summed(ranges: Iterable[Any]) -> list[float]:
    """[low, high] of the sum; what is unknown is left out."""
    known = [value for value in ranges if value]
    return [sum(value[end] for value in known) for end in (0, 1)]


def counts(stages: list[Mapping[str, Any]], stage: str) -> dict[str, int]:
    """How many of a stage's jobs are done, and there are."""
    [row] = [row for row in stages if row["stage"] == stage] or [{"jobs": 0, "left": 0}]
    return {"done": row["jobs"] - row["left"], "total": row["jobs"]}


def stage_row(
    stage: str,
    found: list[SizedJob],
    seconds: Mapping[str, Range | None],
    memory: Mapping[str, Range | None],
    records: Mapping[str, list[Record]],
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """A stage: its jobs, and what those that are left take, which `seconds` and `memory` hold by output."""
    left = [job for job in found if job.output in seconds]
    known = [job for job in left if seconds[job.output]]
    held = [memory[job.output] for job in known]
    hours = ([job.gpus * value / 3600 for value in seconds[job.output]] for job in known if machine["gpus"])
    return {
        "stage": stage,
        "jobs": len(found),
        "left": len(left),
        "unknown": len(left) - len(known),
        "seconds": summed(seconds[job.output] for job in known),
        "memory_bytes": [max(value[end] for value in held) for end in (0, 1)] if held else None,
        "gpu_hours": summed(hours),
        "disk_bytes": sum(job.disk for job in left),
        "from": "measured" if stage in records else "predicted",
        "benchmarks": len(records.get(stage, [])),
    }


def node_row(study: Study, name: str, size: Size | None, results: Path, left: set[str]) -> dict[str, Any]:
    """A node; `changed` where it is there and is made again. left: the outputs that are to be made."""
    asked = [str(LAYOUT.metrics(name, evaluation)) for evaluation in tree.evaluations(study, name)]
    return {
        "node": name,
        "done": str(LAYOUT.manifest(name)) not in left,
        "changed": str(LAYOUT.manifest(name)) in left and (results / str(LAYOUT.manifest(name))).exists(),
        "parameters": size and round(size.parameters),
        "stored_bytes": size and round(size.stored),
        "size": size.how if size else "unknown",
        "evaluations": len(asked),
        "evaluations_done": sum(output not in left for output in asked),
    }


# What will not fit


def memory_problems(left: list[SizedJob], memory: Mapping[str, Range | None], machine: Mapping[str, Any]) -> list[str]:
    """A sentence where jobs hold more than the machine has: one alone, or those that run at once."""
    known = sorted(((memory[job.output], job) for job in left if memory[job.output]), key=lambda pair: pair[0])
    room = gigabytes(machine["memory"])
    too_large = [job for value, job in known if value.low > machine["memory"]]
    if too_large:
        value, job = known[-1]
        return [
            f"Memory: {len(too_large)} of the jobs that are left need more than the {room} that there are; the largest "
            f"is {job.stage} {job.name} with {between(value, gigabytes)}. Run them where there is more memory, or "
            "shorten their batches (micro_batch_size) and windows (length)."
        ]
    perhaps = [job for value, job in known if value.high > machine["memory"]]
    if perhaps:
        return [f"Memory: {perhaps[-1].stage} {perhaps[-1].name} may need more than the {room} that there are."]
    at_once = sum(value.high for value, _ in known[-machine["cores"] :])
    if at_once > machine["memory"]:
        return [
            f"Memory: the {min(machine['cores'], len(known))} largest jobs at once may hold {gigabytes(at_once)}, and "
            f"there are {room}; run fewer at once with `--cores`."
        ]
    return []


def gpu_problems(left: list[SizedJob], sizes: Mapping[str, Size | None], machine: Mapping[str, Any]) -> list[str]:
    """Sentences where jobs ask for more GPUs than there are, or for more than one of them holds."""
    sentences = []
    asked = max(left, key=lambda job: job.gpus, default=None)
    if asked and machine["gpus"] and asked.gpus > machine["gpus"]:
        sentences.append(
            f"GPUs: {asked.stage} {asked.name} asks for {asked.gpus}, and there are {machine['gpus']}; lower its "
            "step's `gpus`, or run it where there are as many."
        )
    room = GPU_MEMORY.get(machine["device"])
    largest = max(left, key=lambda job: gpu_memory(job, sizes), default=None)
    if room and largest and gpu_memory(largest, sizes) > room:
        sentences.append(
            f"GPU memory: {largest.stage} {largest.name} may hold up to {gigabytes(gpu_memory(largest, sizes))} on a "
            f"GPU, and {machine['device']} has {gigabytes(room)}; it takes less in 16 bits, with a smaller "
            "micro_batch_size, with gradient_checkpointing, or on more `gpus`."
        )
    return sentences


def disk_problems(needed: float, machine: Mapping[str, Any]) -> list[str]:
    if needed <= machine["disk"]:
        return []
    return [f"Disk: the results will take about {gigabytes(needed)}; {gigabytes(machine['disk'])} are free."]
