"""`coppice plan`: what a study will take, before it runs: time, memory, GPU hours and disk, and what will not fit.

A job takes the seconds of its start, and its operations over a rate. For P parameters, T tokens and a linear [m, n],

    recovery      6 P T, 2 D T more for a teacher of D parameters, and 2 P T for each held-out loss
    evaluation    2 P T
    calibration   2 P T, twice that for second moments, four times for gradients
    compression   20 m n min(m, n) of every linear where a method solves for it, otherwise 20 m n; and the calibration
                  again where it is gathered behind the compressed blocks

Both numbers come from the benchmarks of this study's jobs where there are any (`measured`), by a line through them.
Where there are none (`predicted`), the start is a constant, and the rate a share of what the roofline model says of a
device (`evaluation.roofline`). Ranges are those of the benchmarks about the line, 30% at least, or a factor of two.
Memory is that of `needs`, times what the benchmarks held of it. Neither torch nor pyarrow is imported.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any, NamedTuple

from coppice import needs, store, tree
from coppice.errors import UserError, nearest
from coppice.evaluation import roofline
from coppice.files import read_json
from coppice.study import SHIPPED, LocalModel, ShippedModel, Study, load_study, read_yaml
from coppice.wording import aligned, counted, duration, number, wrapped

# One thread of a CPU as these jobs use it: what the demo's recoveries reached, operations/s and bytes/s.
THREAD = roofline.Device(bandwidth=1e10, float16=1.5e10, int8=1.5e10, source="measured on the demo")
EFFICIENCY = 0.35  # share of a GPU's roofline that training and evaluation usually reach
START = {"study": 1.0, "tokenize": 1.0, "tables": 3.0, "fit": 13.0, "report": 3.0, "track": 12.0}
START_OF_MODELS = 11.0  # seconds until torch, transformers and a small model are loaded
GPU_STAGES = ("calibrate", "compress", "recover", "evaluate")
SURE = 1.3  # what the same job's time differs by from day to day
USUAL_WINDOWS = 256  # of a protocol that reads its whole text
USUAL_QUESTIONS, QUESTION_TOKENS = 1000, 4 * 32  # of a task, over its choices
GIGABYTE = 1e9


class Size(NamedTuple):
    """What a node weighs. how: `measured`, `estimated`, or `at most` where only the parent's size is known.

    linears: parameters in the blocks' linears; linear_bytes: stored bytes of them; layers: blocks.
    """

    shape: roofline.Shape
    layers: int
    parameters: float
    linears: float
    linear_bytes: float
    stored: float
    how: str


class Job(NamedTuple):
    """A job of the workflow.

    name: as its log and benchmark are named; output: its file in the results; after: outputs that it reads; model: the
    node that it loads, or None; kind: which of the stage's jobs are alike; options: as `needs` reads them; operations:
    None where the model's size is unknown; disk: bytes that it leaves; alone: whether it takes the whole machine.
    """

    stage: str
    name: str
    output: str
    after: tuple[str, ...] = ()
    model: str | None = None
    kind: str = ""
    options: Mapping[str, Any] = {}
    operations: float | None = 0.0
    disk: float = 0.0
    alone: bool = False


class Range(NamedTuple):
    low: float
    high: float

    def plus(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)


class Record(NamedTuple):
    """A benchmark: operations of its job, seconds, resident bytes at most, and those that were expected."""

    kind: str
    operations: float
    seconds: float
    memory: float
    expected: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", type=Path, default=Path("config/config.yaml"), help="the study, in YAML")
    parser.add_argument("--results", type=Path, help="folder of the study's results (default: results/<study>)")
    parser.add_argument(
        "--cores", type=int, default=os.cpu_count(), help="jobs at once (default: this machine's cores)"
    )
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that jobs take turns on (default: 0)")
    parser.add_argument("--memory", type=float, metavar="GB", help="memory for all jobs (default: this machine's)")
    parser.add_argument("--disk", type=float, metavar="GB", help="space for the results (default: what is free)")
    parser.add_argument("--device", help=f"what computes, as the roofline knows it: {', '.join(roofline.DEVICES)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(arguments: argparse.Namespace) -> None:
    study = load_study(read_yaml(arguments.file), str(arguments.file))
    if arguments.device is not None and arguments.device not in roofline.DEVICES:
        raise UserError(f"--device: there is no {arguments.device!r}.{nearest(arguments.device, roofline.DEVICES)}")
    if arguments.cores < 1 or arguments.gpus < 0:
        raise UserError("--cores is a number of at least 1, --gpus one of at least 0.")
    machine = {
        "cores": arguments.cores,
        "gpus": arguments.gpus,
        "device": arguments.device,
        "memory": GIGABYTE * arguments.memory if arguments.memory else installed_memory(),
        "disk": GIGABYTE * arguments.disk if arguments.disk else None,
    }
    made = plan(study, arguments.results or Path("results") / study.study, machine)
    print(json.dumps(made, indent=1) if arguments.json else "\n".join(line.rstrip() for line in lines(made)))


def installed_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_disk(folder: Path) -> int:
    """Bytes free where the folder is, or will be."""
    there = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    return shutil.disk_usage(there).free


def plan(study: Study, results: Path, machine: Mapping[str, Any]) -> dict[str, Any]:
    """The whole plan as JSON has it.

    machine: cores, gpus, device (a name of the roofline's, or None), memory and disk in bytes (None: what is free).
    """
    sizes = node_sizes(study, results)
    found = jobs(study, sizes)
    done = {job.output for job in found if (results / job.output).exists()}
    records = benchmarks(found, sizes, results)
    left = [job for job in found if job.output not in done]
    device = roofline.DEVICES[machine["device"]] if machine["device"] else None
    seconds = {job.output: seconds_range(job, sizes, records, device) for job in left}
    memory = {job.output: memory_range(job, sizes, records) for job in left}
    stages = [
        stage_row(stage, found, left, seconds, memory, records, machine)
        for stage in dict.fromkeys(job.stage for job in found)
    ]
    elapsed = None
    if left and all(seconds.values()):
        elapsed = [makespan(left, {key: value[end] for key, value in seconds.items()}, machine) for end in (0, 1)]
    evaluations = [job for job in found if job.stage == "evaluate"]
    disk = machine["disk"] or free_disk(results)
    made = {
        "study": study.study,
        "results": str(results),
        "machine": {**machine, "disk": disk},
        "nodes": [node_row(study, name, sizes[name], results) for name in tree.nodes(study)],
        "evaluations": {"done": sum(job.output in done for job in evaluations), "total": len(evaluations)},
        "laws": {
            "done": sum(job.output in done for job in found if job.stage == "fit"),
            "total": len(study.laws),
        },
        "stages": stages,
        "total": {
            "jobs": len(found),
            "left": len(left),
            "seconds": summed(row["seconds"] for row in stages),
            "elapsed_seconds": elapsed,
            "gpu_hours": summed(row["gpu_hours"] for row in stages),
            "disk_bytes": sum(row["disk_bytes"] for row in stages),
        },
        "unknown": sorted({tree.model_of(name) for name, size in sizes.items() if size is None}),
    }
    return {**made, "problems": problems(made, left, memory)}


# Sizes


def node_sizes(study: Study, results: Path) -> dict[str, Size | None]:
    """Of every node: of its checkpoint where it is made, otherwise estimated from its parent's; None where unknown."""
    sizes: dict[str, Size | None] = {}
    for name, node in tree.nodes(study).items():
        folder = results / "models" / name
        if (folder / "manifest.json").exists():
            sizes[name] = size_of_checkpoint(folder)
        elif node.parent is None:
            sizes[name] = size_of_source(study.models[name])
        else:
            parent = sizes[node.parent]
            sizes[name] = None if parent is None else child_size(study, parent, node.step)
    return sizes


def size_of_checkpoint(folder: Path) -> Size:
    """From a node's manifest and config."""
    manifest, config = read_json(folder / "manifest.json"), read_json(store.local(folder / "config.json"))
    return Size(
        shape_of(config),
        config["num_hidden_layers"],
        manifest["parameters"]["total"],
        manifest["parameters"]["decoder_linears"],
        manifest["stored_bits"]["decoder_linears"] / 8,
        manifest["stored_bytes"],
        "measured",
    )


def size_of_source(source: Any) -> Size | None:
    """Of a dense model, from its config and the headers of its weights; None for one that is not on this machine."""
    if isinstance(source, ShippedModel):
        folder = SHIPPED / source.shipped
    elif isinstance(source, LocalModel):
        folder = Path(source.path)
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source.hub, "config.json", revision=source.revision)
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    config = read_json(folder / "config.json")
    shape, bits = shape_of(config), number_bits(config)
    weights = sum(inputs * outputs for inputs, outputs in roofline.block_linears(shape).values()) * shape.layers
    tensors = [tensor for path in sorted(folder.glob("*.safetensors")) for tensor in header(path).items()]
    if tensors:
        parameters = sum(size for _, size in tensors)
        stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    else:
        tables = 1 if config.get("tie_word_embeddings") else 2
        parameters = weights + tables * shape.vocabulary * shape.hidden
        stored = parameters * bits / 8
    return Size(shape, shape.layers, parameters, weights, weights * bits / 8, stored, "measured")


def header(path: Path) -> dict[str, int]:
    """Numbers in each tensor of a safetensors file: eight bytes tell the length of the JSON that begins it."""
    with open(path, "rb") as file:
        described = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    described.pop("__metadata__", None)
    found = {}
    for name, entry in described.items():
        found[name] = 1
        for side in entry["shape"]:
            found[name] *= side
    return found


def shape_of(config: Mapping[str, Any]) -> roofline.Shape:
    """The shape that a config.json tells."""
    return roofline.model_of_node(config, {}).shape


def number_bits(config: Mapping[str, Any]) -> int:
    """Bits of a stored floating number."""
    return roofline.BITS[config.get("dtype") or config.get("torch_dtype") or "float32"]


def child_size(study: Study, parent: Size, step: str) -> Size:
    """What a step makes of a node, from the step's options: exact for a grid or a removal, about right for ranks."""
    method, options = tree.method_of(study, step), study.steps[step].options.model_dump()
    linears, stored = parent.linears, parent.linear_bytes
    # Of a floating number: what is no linear of a block is never packed.
    bits = 8 * (parent.stored - parent.linear_bytes) / (parent.parameters - parent.linears)
    layers, how = parent.layers, "estimated"
    if options.get("linears") or options.get("exclude"):
        return parent._replace(how="at most")
    if method.contract == "structure":
        layers, share = kept_structure(parent, options)
        linears, stored = linears * share, stored * share
    elif method.family == "decompose" and options.get("keep") is not None:
        linears, stored = linears * options["keep"], stored * options["keep"]
    elif method.family in ("decompose", "compensate") and options.get("rank") is not None:
        factors = options["rank"] * sum(map(sum, roofline.block_linears(parent.shape).values())) * layers
        added = factors if method.family == "compensate" else min(factors, linears) - linears
        linears, stored = linears + added, stored + added * bits / 8
    elif method.family == "quantize" and method.contract == "layer" and isinstance(options.get("bits"), int):
        group = options.get("group_size") or options.get("block") or -1
        scales = 0 if group == -1 else (bits + (0 if options.get("symmetric") else options["bits"])) / group
        stored = linears * (options["bits"] + scales) / 8
    elif method.family in ("decompose", "quantize") and method.contract == "layer":
        how = "at most"
    return parent._replace(
        layers=layers,
        parameters=parent.parameters + linears - parent.linears,
        linears=linears,
        linear_bytes=stored,
        stored=parent.stored + stored - parent.linear_bytes,
        how=how if parent.how != "at most" else "at most",
    )


def kept_structure(parent: Size, options: Mapping[str, Any]) -> tuple[int, float]:
    """Blocks that are left, and the share of the linears' weights: of whole blocks, or of neurons and heads."""
    if "kv_ratio" not in options:
        removed = options.get("blocks")
        removed = int((options.get("ratio") or 0) * parent.layers) if removed is None else removed
        return parent.layers - removed, 1 - removed / parent.layers
    sides = roofline.block_linears(parent.shape)
    neurons = sum(m * n for name, (n, m) in sides.items() if name.startswith("mlp"))
    heads = sum(m * n for m, n in sides.values()) - neurons
    of_heads = options["ratio"] if options["kv_ratio"] is None else options["kv_ratio"]
    # Whole groups are removed, rounded down.
    of_heads = int(parent.shape.kv_heads * of_heads) / parent.shape.kv_heads
    return parent.layers, (neurons * (1 - options["ratio"]) + heads * (1 - of_heads)) / (neurons + heads)


# Jobs


def jobs(study: Study, sizes: Mapping[str, Size | None]) -> list[Job]:
    """Every job of the target `all`, those that others read before them."""
    found = [Job("study", "study", "study.yaml")]
    uses = tree.token_uses(study)
    nodes = tree.nodes(study)
    for model in study.models:
        operations = 0.0 if sizes[model] else None
        found.append(
            Job("root", model, checkpoint(model), model=model, operations=operations, disk=stored(sizes[model]))
        )
    asked: dict[str, Job] = {}

    def windows(model: str, use: str) -> str:
        """The output of a tokenization, which is noted as asked for."""
        output = f"tokens/{model}/{use}/manifest.json"
        asked[output] = Job(
            "tokenize", f"{model}/{use}", output, (checkpoint(model),), disk=8 * use_tokens(uses[use]), kind=use
        )
        return output

    made = [job for node in nodes.values() if node.step for job in node_jobs(study, node, sizes, uses, windows)]
    made += [
        evaluation_job(study, name, evaluation, sizes, uses, windows)
        for name in nodes
        for evaluation in tree.evaluations(study, name)
    ]
    found += [*asked.values(), *{job.output: job for job in made}.values()]
    leaves = tuple(job.output for job in found)
    found.append(Job("tables", "tables", "tables/nodes.parquet", leaves))
    fits = [Job("fit", law, f"laws/{law}/fit.json", ("tables/nodes.parquet",)) for law in study.laws]
    read = ("tables/nodes.parquet", *(job.output for job in fits))
    found += [*fits, Job("report", "report", "report/index.html", read)]
    # Weights that are mirrored are stored twice.
    mirrored = sum(map(stored, sizes.values())) if study.tracking.weights == "all" else 0.0
    return [*found, Job("track", "track", "tracking/runs.json", (*read, "report/index.html"), disk=mirrored)]


def checkpoint(node: str) -> str:
    return f"models/{node}/manifest.json"


def stored(size: Size | None) -> float:
    return size.stored if size else 0.0


def use_tokens(use: tree.TokenUse) -> int:
    return (use.windows or USUAL_WINDOWS) * use.length


def node_jobs(study: Study, node: tree.Node, sizes: Mapping[str, Size | None], uses: Any, windows: Any) -> list[Job]:
    """What makes a node from its parent: its statistics, and the step itself."""
    step, method = study.steps[node.step], tree.method_of(study, node.step)
    size, options = sizes[node.parent], {**step.options.model_dump(), "method": step.method}
    shared = {"model": node.parent, "kind": step.method, "options": options, "disk": stored(sizes[node.name])}
    parent = checkpoint(node.parent)
    if method.contract == "training":
        after = [windows(node.model, f"{role}.{node.step}") for role in ("recovery", "validation")]
        dense = sizes[node.model]
        held_out = use_tokens(uses[f"validation.{node.step}"]) * (2 + len(study.budgets))
        taught = 2 * dense.parameters if dense and hasattr(method.module, "loss") else 0
        operations = size and size.parameters * (6 * options["tokens"] + 2 * held_out) + taught * options["tokens"]
        after += [parent, checkpoint(node.model)]
        return [Job("recover", node.name, checkpoint(node.name), tuple(after), **shared, operations=operations)]
    calibration = tree.calibration(study, node.step)
    made, after = [], [parent]
    body = uses[f"calibration.{calibration}"] if calibration else None
    if method.family == "compensate":
        after.append(checkpoint(tree.reference(study, node.parent)))
    for kind in tree.kinds(study, node.step):
        read = windows(node.model, f"calibration.{calibration}")
        made.append(statistics_job(node.parent, calibration, kind, size, body, (parent, read)))
        after.append(made[-1].output)
    tokens = 0
    if tree.reads_windows(step):
        after.append(windows(node.model, f"calibration.{calibration}"))
        tokens = use_tokens(body)
    solves = bool(tree.needs(step)) or method.family == "decompose"
    operations = size and solving(size, solves) + 4 * size.parameters * tokens
    return [*made, Job("compress", node.name, checkpoint(node.name), tuple(after), **shared, operations=operations)]


def solving(size: Size, solves: bool) -> float:
    """Operations of a method on all linears."""
    sides = roofline.block_linears(size.shape).values()
    return 20 * size.layers * sum(m * n * (min(m, n) if solves else 1) for m, n in sides)


def statistics_job(
    node: str, calibration: str, kind: str, size: Size | None, use: tree.TokenUse, after: tuple[str, ...]
) -> Job:
    passes = {"moments": 4, "blocks": 2, "gradients": 8}[kind]
    name = f"{node}/{calibration}/{kind}"
    widths = 3 * size.shape.hidden**2 + size.shape.intermediate**2 if size else 0
    return Job(
        "calibrate",
        name,
        f"statistics/{name}/manifest.json",
        after,
        node,
        kind,
        {"kind": kind, "windows": use.windows or USUAL_WINDOWS, "length": use.length},
        size and passes * size.parameters * use_tokens(use),
        4 * size.layers * widths if size and kind == "moments" else 0.0,
    )


def evaluation_job(
    study: Study, node: str, evaluation: str, sizes: Mapping[str, Size | None], uses: Any, windows: Any
) -> Job:
    body, size = study.evaluations[evaluation], sizes[node]
    after = [checkpoint(node)]
    tokens, alone = 0, body.kind == "cost"
    lengths = [protocol.length for protocol in tree.protocols(body).values()]
    for protocol in tree.protocols(body):
        after.append(windows(tree.model_of(node), f"evaluation.{evaluation}.{protocol}"))
        tokens += use_tokens(uses[f"evaluation.{evaluation}.{protocol}"])
    if body.kind == "quality":
        tokens += len(body.tasks) * (body.limit or USUAL_QUESTIONS) * QUESTION_TOKENS
        tokens += USUAL_QUESTIONS * QUESTION_TOKENS if body.knowledge else 0
    elif alone:
        tokens = body.batch * (body.prompt + body.generate) * (body.repeats + body.warmup)
    else:
        tokens *= body.points
        after.append(checkpoint(tree.twin(node)))
    return Job(
        "evaluate",
        f"{node}/{evaluation}",
        f"evaluations/{node}/{evaluation}/metrics.json",
        tuple(after),
        node,
        evaluation,
        {"length": max(lengths, default=QUESTION_TOKENS)},
        size and 2 * size.parameters * tokens,
        alone=alone,
    )


# What was measured


def benchmarks(found: list[Job], sizes: Mapping[str, Size | None], results: Path) -> dict[str, list[Record]]:
    """The benchmarks of the jobs by stage; of a job that ran twice, the last."""
    records: dict[str, list[Record]] = {}
    for job in found:
        folder = results / "benchmarks"
        path = folder / f"{job.stage}.jsonl" if job.name == job.stage else folder / job.stage / f"{job.name}.jsonl"
        if not path.exists() or job.operations is None:
            continue
        rows = path.read_text(encoding="utf-8").splitlines()
        if not rows:
            continue
        row = json.loads(rows[-1])
        # A job of less than a second may end before its memory is seen.
        memory = float(row["max_rss"]) * 2**20 if isinstance(row["max_rss"], int | float) else 0.0
        records.setdefault(job.stage, []).append(
            Record(job.kind, job.operations, float(row["s"]), memory, expected_memory(job, sizes))
        )
    return records


def alike(job: Job, records: Mapping[str, list[Record]]) -> list[Record]:
    """The benchmarks that tell most about a job: three of its own kind, or all of the stage."""
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
    job: Job, sizes: Mapping[str, Size | None], records: Mapping[str, list[Record]], device: roofline.Device | None
) -> Range | None:
    """Seconds of a job; None where its model's size is unknown."""
    if job.operations is None:
        return None
    pool = alike(job, records)
    if not pool:
        start = START.get(job.stage, START_OF_MODELS)
        rate = operations_per_second(sizes[job.model], device) if job.model else THREAD.float16
        seconds = start + job.operations / rate
        return Range(seconds / 2, seconds * 2)
    start, slope = line(pool)
    seconds = start + slope * job.operations
    ratios = [record.seconds / (start + slope * record.operations) for record in pool]
    low, high = min(ratios), max(ratios)
    if len(ratios) >= 10:
        low, *_, high = quantiles(ratios, n=20)
    low, high = min(low, 1 / SURE), max(high, SURE)
    # Beyond what was measured, and from a few jobs, a line tells less.
    far = job.operations > 4 * max(record.operations for record in pool) or len(pool) < 3
    return Range(seconds * low / (2 if far else 1), seconds * high * (2 if far else 1))


def operations_per_second(size: Size, device: roofline.Device | None) -> float:
    """What a device does of a model's operations on 16 sequences of 512 tokens: its roofline, times the efficiency."""
    used = device or THREAD
    seconds = roofline.latency(roofline.prefill(roofline.uniform(size.shape), 16, 512), used)
    return 2 * size.parameters * 16 * 512 / seconds * (EFFICIENCY if device else 1)


def expected_memory(job: Job, sizes: Mapping[str, Size | None]) -> float:
    """Bytes by `needs`; of a stage that loads no model, its libraries'."""
    size = sizes[job.model] if job.model else None
    if size is None:
        return needs.LIBRARIES[job.stage]
    dense = sizes[tree.model_of(job.model)]
    manifest = {
        "parameters": {"total": size.parameters, "decoder_linears": size.linears},
        "dense": {"total": dense.parameters, "blocks": dense.linears},
        "stored_bytes": size.stored,
    }
    return needs.expected_bytes(job.stage, manifest, job.options)


def memory_range(job: Job, sizes: Mapping[str, Size | None], records: Mapping[str, list[Record]]) -> Range | None:
    """Bytes that a job holds at most; None where its model's size is unknown."""
    if job.operations is None:
        return None
    expected = expected_memory(job, sizes)
    ratios = [record.memory / record.expected for record in alike(job, records) if record.memory]
    if not ratios:
        return Range(expected, expected * needs.HEADROOM)
    return Range(expected * min(ratios) / 1.1, expected * max(ratios) * 1.1)


# Sums


def summed(ranges: Iterable[Any]) -> list[float]:
    """[low, high] of the sum; what is unknown is left out."""
    total = Range(0.0, 0.0)
    for value in ranges:
        total = total.plus(Range(*value)) if value else total
    return list(total)


def stage_row(
    stage: str,
    found: list[Job],
    left: list[Job],
    seconds: Mapping[str, Range | None],
    memory: Mapping[str, Range | None],
    records: Mapping[str, list[Record]],
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """A stage: its jobs, and what those that are left take."""
    own = [job for job in left if job.stage == stage]
    known = [memory[job.output] for job in own if memory[job.output]]
    time = summed(seconds[job.output] for job in own)
    on_gpu = stage in GPU_STAGES and (machine["gpus"] or machine["device"])
    return {
        "stage": stage,
        "jobs": sum(job.stage == stage for job in found),
        "left": len(own),
        "unknown": sum(seconds[job.output] is None for job in own),
        "seconds": time,
        "memory_bytes": [max(value[end] for value in known) for end in (0, 1)] if known else None,
        "gpu_hours": [value / 3600 for value in time] if on_gpu else [0.0, 0.0],
        "disk_bytes": sum(job.disk for job in own),
        "from": "measured" if stage in records else "predicted",
        "benchmarks": len(records.get(stage, [])),
    }


def makespan(left: list[Job], seconds: Mapping[str, float], machine: Mapping[str, Any]) -> float:
    """Seconds until the last job ends, where each begins as soon as what it reads is there and a core, or GPU, is free.

    A job that takes the whole machine waits for all the others that have begun.
    """
    waiting = {job.output: {name for name in job.after if name in seconds} for job in left}
    by_output = {job.output: job for job in left}
    running: list[tuple[float, str]] = []
    clock, cores, gpus = 0.0, machine["cores"], machine["gpus"]

    def takes(job: Job) -> tuple[int, int]:
        return machine["cores"] if job.alone else 1, int(bool(machine["gpus"]) and job.stage in GPU_STAGES)

    while waiting or running:
        for output in [name for name, before in waiting.items() if not before]:
            needed_cores, needed_gpus = takes(by_output[output])
            if needed_cores <= cores and needed_gpus <= gpus:
                cores, gpus = cores - needed_cores, gpus - needed_gpus
                heapq.heappush(running, (clock + seconds[output], output))
                del waiting[output]
        clock, ended = heapq.heappop(running)
        freed = takes(by_output[ended])
        cores, gpus = cores + freed[0], gpus + freed[1]
        for before in waiting.values():
            before.discard(ended)
    return clock


def node_row(study: Study, name: str, size: Size | None, results: Path) -> dict[str, Any]:
    asked = tree.evaluations(study, name)
    return {
        "node": name,
        "done": (results / checkpoint(name)).exists(),
        "parameters": size and round(size.parameters),
        "stored_bytes": size and round(size.stored),
        "size": size.how if size else "unknown",
        "evaluations": len(asked),
        "evaluations_done": sum((results / "evaluations" / name / each / "metrics.json").exists() for each in asked),
    }


def problems(made: Mapping[str, Any], left: list[Job], memory: Mapping[str, Range | None]) -> list[str]:
    """A sentence for everything that will not fit."""
    machine, sentences = made["machine"], []
    known = sorted(((memory[job.output], job) for job in left if memory[job.output]), key=lambda pair: pair[0])
    too_large = [job for value, job in known if value.low > machine["memory"]]
    perhaps = [job for value, job in known if value.low <= machine["memory"] < value.high]
    room = gigabytes(machine["memory"])
    if too_large:
        value, job = known[-1]
        sentences.append(
            f"Memory: {len(too_large)} of the jobs that are left need more than the {room} that there are; the largest "
            f"is {job.stage} {job.name} with {between(value, gigabytes)}. Run them where there is more memory, or "
            "shorten their batches (micro_batch_size) and windows (length)."
        )
    elif perhaps:
        sentences.append(
            f"Memory: {perhaps[-1].stage} {perhaps[-1].name} may need more than the {room} that there are."
        )
    at_once = sum(value.high for value, _ in known[-machine["cores"] :])
    if not (too_large or perhaps) and at_once > machine["memory"]:
        sentences.append(
            f"Memory: the {min(machine['cores'], len(known))} largest jobs at once may hold {gigabytes(at_once)}, and "
            f"there are {room}; run fewer at once with `--cores`."
        )
    disk = made["total"]["disk_bytes"]
    if disk > machine["disk"]:
        sentences.append(f"Disk: the results will take about {gigabytes(disk)}; {gigabytes(machine['disk'])} are free.")
    return sentences


# Text


def lines(made: Mapping[str, Any]) -> list[str]:
    """The plan as text of at most 120 columns."""
    nodes, total = made["nodes"], made["total"]
    done = sum(node["done"] for node in nodes)
    text = [
        f"Study {made['study']}: {len(nodes)} nodes, {made['evaluations']['total']} evaluations, "
        f"{made['laws']['total']} laws; {total['left']} of {total['jobs']} jobs are left",
        "",
        *tree_lines(nodes),
        "",
        *wrapped(
            f"Done: {done} of {len(nodes)} nodes, {made['evaluations']['done']} of {made['evaluations']['total']} "
            f"evaluations, {made['laws']['done']} of {made['laws']['total']} laws, by the files that exist in "
            f"{made['results']}. Snakemake itself decides by content: `snakemake -n`."
        ),
    ]
    if not total["left"]:
        return text
    text += ["", *stage_lines(made), "", *elapsed_lines(made), *notes(made)]
    for sentence in made["problems"] or ["Everything fits."]:
        text += ["", *wrapped(sentence)]
    return text


def tree_lines(nodes: list[Mapping[str, Any]]) -> list[str]:
    """The tree, with what is done and how large each node is."""
    table = [["node", "", "MB", "parameters", "evaluations"]]
    sign = {"measured": "", "estimated": "~", "at most": "<", "unknown": ""}
    for node in sorted(nodes, key=lambda row: row["node"].split("/")):
        depth = node["node"].count("/")
        size = "?" if node["stored_bytes"] is None else sign[node["size"]] + number(node["stored_bytes"] / 1e6)
        parameters = "?" if node["parameters"] is None else sign[node["size"]] + counted(node["parameters"])
        asked = f"{node['evaluations_done']}/{node['evaluations']}" if node["evaluations"] else ""
        name = "  " * depth + node["node"].rpartition("/")[2]
        table.append([name, "done" if node["done"] else "left", size, parameters, asked])
    return aligned(table)


def stage_lines(made: Mapping[str, Any]) -> list[str]:
    """What is left, by stage and in total."""
    on_gpu = made["total"]["gpu_hours"][1] > 0
    table = [["stage", "left", "time", "memory of a job", *(["GPU hours"] if on_gpu else []), "disk", "time is"]]
    for row in made["stages"]:
        if not row["left"]:
            continue
        known = row["unknown"] < row["left"]
        memory = between(row["memory_bytes"], gigabytes) if row["memory_bytes"] else "?"
        hours = [between(row["gpu_hours"], hours_of) if row["gpu_hours"][1] else ""] if on_gpu else []
        table.append(
            [
                row["stage"],
                f"{row['left']}/{row['jobs']}",
                between(row["seconds"], duration) if known else "?",
                memory,
                *hours,
                gigabytes(row["disk_bytes"]) if row["disk_bytes"] else "",
                row["from"],
            ]
        )
    total = made["total"]
    hours = [between(total["gpu_hours"], hours_of)] if on_gpu else []
    seconds = between(total["seconds"], duration)
    table.append(["all", f"{total['left']}/{total['jobs']}", seconds, "", *hours, gigabytes(total["disk_bytes"]), ""])
    return aligned(table)


def elapsed_lines(made: Mapping[str, Any]) -> list[str]:
    elapsed, machine = made["total"]["elapsed_seconds"], made["machine"]
    if elapsed is None:
        return []
    gpus = f" and {machine['gpus']} GPUs" if machine["gpus"] else ""
    return wrapped(f"With {machine['cores']} jobs at once{gpus}: {between(elapsed, duration)} from now to the end.")


def notes(made: Mapping[str, Any]) -> list[str]:
    """How the numbers were got."""
    machine = made["machine"]
    rows = [row for row in made["stages"] if row["left"]]
    counts = ", ".join(f"{row['stage']} {row['benchmarks']}" for row in rows if row["benchmarks"])
    text = []
    if counts:
        text += wrapped(f"measured: from this study's benchmarks ({counts}), scaled by parameters and tokens.")
    if any(row["from"] == "predicted" for row in rows):
        where = (
            f"{EFFICIENCY:.0%} of the roofline of {machine['device']}"
            if machine["device"]
            else "what one thread of a CPU did of the demo (name a GPU with --device)"
        )
        text += wrapped(f"predicted: by operations at {where}, within a factor of two; memory by shapes.")
    if any(node["size"] in ("estimated", "at most") for node in made["nodes"]):
        text += wrapped("~ estimated from the step's options; < at most: as large as its parent.")
    if made["unknown"]:
        text += wrapped(
            f"Unknown: {', '.join(made['unknown'])}, as long as the hub's model is not on this machine; its jobs count "
            "in no sum."
        )
    return text


def between(ends: Iterable[float], said: Any) -> str:
    """Two ends as words; one where they read the same."""
    low, high = map(said, ends)
    return low if low == high else f"{low} to {high}"


def gigabytes(count: float) -> str:
    return f"{number(count / GIGABYTE, 2)} GB" if count >= 0.1 * GIGABYTE else f"{number(count / 1e6, 2)} MB"


def hours_of(hours: float) -> str:
    return number(hours, 2)
