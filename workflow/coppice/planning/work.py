"""How many operations the jobs of a study take, and what they leave on disk, by the sizes of its nodes.

For P parameters, T tokens and a linear [m, n],

    recovery      6 P T, 2 D T more for a teacher of D parameters, and 2 P T for each held-out loss
    evaluation    2 P T
    calibration   2 P T, twice that for second moments, four times for gradients
    compression   20 m n min(m, n) of every linear where a method solves for it, otherwise 20 m n; and the calibration
                  again where statistics are gathered after the blocks already compressed
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coppice.planning import resources
from coppice.planning.jobs import Job, JobGraph
from coppice.planning.sizes import Size
from coppice.records.node_name import NodeName
from coppice.study import tree
from coppice.study.schema.evaluations import protocols

Sizes = Mapping[str, Size | None]

USUAL_WINDOWS = 256  # of a protocol that reads its whole text
USUAL_QUESTIONS, QUESTION_TOKENS = 1000, 4 * 32  # of a task, over its choices
CALIBRATION_PASSES = {"moments": 4, "blocks": 2, "gradients": 8}


@dataclass(frozen=True)
class SizedJob(Job):
    """A job with what it takes. operations: None where the model's size is unknown. disk: bytes that it leaves."""

    operations: float | None = 0.0
    disk: float = 0.0


def sized_jobs(graph: JobGraph, sizes: Sizes) -> list[SizedJob]:
    """Every job of the study, in the order of the graph, with its operations and its disk space."""
    return [
        SizedJob(**vars(job), operations=operations(graph, job, sizes), disk=disk(graph, job, sizes))
        for job in graph.jobs
    ]


def operations(graph: JobGraph, job: Job, sizes: Sizes) -> float | None:
    """Operations of a job; None where the size of its model is unknown."""
    if job.model is None:
        return 0.0
    size = sizes[job.model]
    if size is None:
        return None
    match job.stage:
        case "calibrate":
            tokens = job.options["windows"] * job.options["length"]
            return CALIBRATION_PASSES[job.kind] * size.parameters * tokens
        case "compress":
            return _compression(graph, job, size)
        case "recover":
            return _recovery(graph, job, size, sizes)
        case "evaluate":
            return 2 * size.parameters * _evaluated_tokens(graph, job)
    return 0.0


def _compression(graph: JobGraph, job: Job, size: Size) -> float:
    name = NodeName(job.name).steps[-1]
    step, method = graph.study.steps[name], tree.method_of(graph.study, name)
    solves = bool(tree.needs(step)) or method.family == "decompose"
    sides = size.shape.linears().values()
    solving = 20 * size.layers * sum(m * n * (min(m, n) if solves else 1) for m, n in sides)
    calibration = f"calibration.{tree.calibration(graph.study, name)}"
    tokens = use_tokens(graph, calibration) if tree.reads_windows(step) else 0
    return solving + 4 * size.parameters * tokens


def _recovery(graph: JobGraph, job: Job, size: Size, sizes: Sizes) -> float:
    node = NodeName(job.name)
    tokens, dense = job.options["tokens"], sizes[node.model]
    held_out = use_tokens(graph, f"validation.{node.step}") * (2 + len(graph.study.budgets))
    taught = 2 * dense.parameters if dense and job.options["resources"].teacher else 0
    return size.parameters * (6 * tokens + 2 * held_out) + taught * tokens


def _evaluated_tokens(graph: JobGraph, job: Job) -> int:
    body = graph.study.evaluations[job.kind]
    tokens = sum(use_tokens(graph, f"evaluation.{job.kind}.{protocol}") for protocol in protocols(body))
    if body.kind == "cost":
        return body.batch * (body.prompt + body.generate) * (body.repeats + body.warmup)
    if body.kind == "connectivity":
        return tokens * body.points
    knowledge = USUAL_QUESTIONS if body.knowledge else 0
    questions = len(body.tasks) * (body.limit or USUAL_QUESTIONS) + knowledge
    return tokens + questions * QUESTION_TOKENS


def disk(graph: JobGraph, job: Job, sizes: Sizes) -> float:
    """Bytes that a job leaves in the results."""
    match job.stage:
        case "root" | "compress" | "recover":
            return stored_bytes(sizes[job.name])
        case "tokenize":
            return 8 * use_tokens(graph, job.kind)
        case "calibrate":
            size = sizes[job.model or ""]
            return resources.moments_bytes(widths_of(size)) if size and job.kind == "moments" else 0.0
        case "track":
            # Weights that are mirrored are stored twice.
            return sum(map(stored_bytes, sizes.values())) if graph.study.tracking.weights == "all" else 0.0
    return 0.0


def use_tokens(graph: JobGraph, use: str) -> int:
    """Tokens of a token set."""
    body = graph.uses[use]
    return (body.windows or USUAL_WINDOWS) * body.length


def stored_bytes(size: Size | None) -> float:
    return size.stored if size else 0.0


def widths_of(size: Size) -> resources.Widths:
    return resources.Widths(size.shape.hidden, size.shape.intermediate, size.layers, size.shape.vocabulary)
