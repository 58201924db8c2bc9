"""The jobs of a study, what each reads, and how many operations it takes.

For P parameters, T tokens and a linear [m, n],

    recovery      6 P T, 2 D T more for a teacher of D parameters, and 2 P T for each held-out loss
    evaluation    2 P T
    calibration   2 P T, twice that for second moments, four times for gradients
    compression   20 m n min(m, n) of every linear where a method solves for it, otherwise 20 m n; and the calibration
                  again where it is gathered behind the compressed blocks
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from coppice.evaluation import roofline
from coppice.planning import resources
from coppice.planning.sizes import Size
from coppice.records.node_name import NodeName
from coppice.study import tree
from coppice.study.schema import Study

RUN_ON_GPUS = ("calibrate", "compress", "recover", "evaluate")
STAGES = ("study", "root", "tokenize", *RUN_ON_GPUS, "tables", "fit", "report", "track")
USUAL_WINDOWS = 256  # of a protocol that reads its whole text
USUAL_QUESTIONS, QUESTION_TOKENS = 1000, 4 * 32  # of a task, over its choices


class Job(NamedTuple):
    """A job of the workflow.

    name: as its log and benchmark are named; output: its file in the results; after: outputs that it reads; model: the
    node that it loads, or None; kind: which of the stage's jobs are alike; options: as `needs` reads them; operations:
    None where the model's size is unknown; disk: bytes that it leaves; alone: whether it takes the whole machine; gpus:
    how many it asks for where there are any.
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
    gpus: int = 0


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
        gpus = {"operations": operations, "gpus": options["gpus"]}
        return [Job("recover", node.name, checkpoint(node.name), tuple(after), **shared, **gpus)]
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
    compress = Job("compress", node.name, checkpoint(node.name), tuple(after), **shared, operations=operations, gpus=1)
    return [*made, compress]


def solving(size: Size, solves: bool) -> float:
    """Operations of a method on all linears."""
    sides = roofline.block_linears(size.shape).values()
    return 20 * size.layers * sum(m * n * (min(m, n) if solves else 1) for m, n in sides)


def statistics_job(
    node: str, calibration: str, kind: str, size: Size | None, use: tree.TokenUse, after: tuple[str, ...]
) -> Job:
    passes = {"moments": 4, "blocks": 2, "gradients": 8}[kind]
    name = f"{node}/{calibration}/{kind}"
    return Job(
        "calibrate",
        name,
        f"statistics/{name}/manifest.json",
        after,
        node,
        kind,
        {"kind": kind, "windows": use.windows or USUAL_WINDOWS, "length": use.length},
        size and passes * size.parameters * use_tokens(use),
        resources.moments_bytes(widths_of(size)) if size and kind == "moments" else 0.0,
        gpus=1,
    )


def widths_of(size: Size) -> resources.Widths:
    return resources.Widths(size.shape.hidden, size.shape.intermediate, size.layers, size.shape.vocabulary)


def evaluation_job(
    study: Study, node: str, evaluation: str, sizes: Mapping[str, Size | None], uses: Any, windows: Any
) -> Job:
    body, size = study.evaluations[evaluation], sizes[node]
    after = [checkpoint(node)]
    tokens, alone = 0, body.kind == "cost"
    lengths = [protocol.length for protocol in tree.protocols(body).values()]
    for protocol in tree.protocols(body):
        after.append(windows(NodeName(node).model, f"evaluation.{evaluation}.{protocol}"))
        tokens += use_tokens(uses[f"evaluation.{evaluation}.{protocol}"])
    if body.kind == "quality":
        tokens += len(body.tasks) * (body.limit or USUAL_QUESTIONS) * QUESTION_TOKENS
        tokens += USUAL_QUESTIONS * QUESTION_TOKENS if body.knowledge else 0
    elif alone:
        tokens = body.batch * (body.prompt + body.generate) * (body.repeats + body.warmup)
    else:
        tokens *= body.points
        after.append(checkpoint(NodeName(node).with_study_seed))
    return Job(
        "evaluate",
        f"{node}/{evaluation}",
        f"evaluations/{node}/{evaluation}/metrics.json",
        tuple(after),
        node,
        evaluation,
        {"kind": body.kind, "length": max(lengths, default=QUESTION_TOKENS)},
        size and 2 * size.parameters * tokens,
        alone=alone,
        gpus=1,
    )
