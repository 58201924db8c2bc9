"""The job graph of a study: the one list of jobs that Snakemake's rules and `coppice plan` both read.

A job is what one command does: its outputs, what it reads, the options that its command is given. It follows from the
study alone; nothing is read from disk. Paths are relative to the study's results folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from os.path import relpath
from pathlib import Path
from typing import Any

from coppice.errors import UserError
from coppice.files import fingerprint, sha256
from coppice.laws import registry as laws
from coppice.methods.registry import Method
from coppice.models.sources import dense_files, locate
from coppice.records.layout import TABLES, ResultsLayout
from coppice.records.node_name import NodeName
from coppice.study import tree
from coppice.study.schema import FileText, HubModel, Study
from coppice.study.schema.evaluations import protocols

LAYOUT = ResultsLayout(Path())
RUNS_MODELS = ("calibrate", "compress", "recover", "evaluate")
STAGES = ("study", "root", "tokenize", *RUNS_MODELS, "tables", "fit", "report", "track")
# What a fit writes next to fit.json: the report and the tracker read all of it.
FIT_FILES = ("fit.json", "points.parquet", "samples.parquet", "fit.svg")
REPORT_FILES = ("index.html", "frontier.svg", "curves.svg", "layers.svg")


@dataclass(frozen=True)
class Job:
    """A job of the workflow.

    name: as its log and benchmark are named. outputs: the job is done when the first exists. inputs:
    outputs of other jobs, by the name that the rule gives them. files: what it reads outside the results. sources:
    source files of the package on which its result rests. model: the node whose weights it loads, or None. kind: which
    of the stage's jobs are alike. parameters: what its command is given, by the option's name. options: as
    `planning.resources` reads them. gpus: how many it requests where GPUs exist. alone: it takes the whole machine.
    """

    stage: str
    name: str
    outputs: tuple[str, ...]
    inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    sources: tuple[Path, ...] = ()
    model: str | None = None
    kind: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    gpus: int = 0
    alone: bool = False

    @property
    def output(self) -> str:
        return self.outputs[0]

    @property
    def after(self) -> tuple[str, ...]:
        """All outputs of other jobs that it reads."""
        return tuple(path for paths in self.inputs.values() for path in paths)

    @property
    def source_files(self) -> list[str]:
        """The sources relative to the working directory, so that a project that moves as a whole stays done."""
        return [relpath(file) for file in self.sources]

    @property
    def source_hash(self) -> str:
        """Of the content of its source files and of the files that it reads outside the results."""
        return fingerprint({file: sha256(Path(file)) for file in (*self.source_files, *self.files)})


class JobGraph:
    """The jobs of a study, each built when it is first requested, and all of them in an order in which they can run."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.nodes = tree.nodes(study)
        self.uses = tree.token_uses(study)
        self._by_key: dict[tuple[str, ...], Job] = {}

    @cached_property
    def jobs(self) -> list[Job]:
        """Every job of the target `all`; what a job reads comes before it."""
        nodes = [self.node(name) for name in self.nodes]
        evaluations = [self.evaluation(node, name) for node, name in self.measurements]
        leaves = [*nodes, *evaluations]
        read = {path for job in leaves for path in job.after}
        statistics = [job for job in self._statistics() if job.output in read]
        read |= {path for job in statistics for path in job.after}
        tokens = [job for job in self._tokens() if job.output in read]
        roots = [job for job in nodes if job.stage == "root"]
        downstream = [job for job in nodes if job.stage != "root"]
        fits = [self.fit(law) for law in self.study.laws]
        # Statistics of a node come after the node and before its children.
        placed = sorted([*statistics, *downstream], key=_depth)
        gather = [self.tables, *fits, self.report, self.track]
        return [self.effective_study, *roots, *tokens, *placed, *evaluations, *gather]

    @cached_property
    def measurements(self) -> list[tuple[str, str]]:
        """(node, evaluation) of every measurement."""
        return [(node, name) for node in self.nodes for name in tree.evaluations(self.study, node)]

    @cached_property
    def checkpoints(self) -> tuple[str, ...]:
        return tuple(str(LAYOUT.manifest(node)) for node in self.nodes)

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        return tuple(str(LAYOUT.metrics(node, evaluation)) for node, evaluation in self.measurements)

    @cached_property
    def token_sets(self) -> tuple[str, ...]:
        """The token sets that the nodes are calibrated, trained and measured on."""
        sets: set[str] = set()
        for name, node in self.nodes.items():
            if node.step and tree.trains(self.study, node.step):
                sets |= {_tokens(node.model, f"{use}.{node.step}") for use in ("recovery", "validation")}
            elif node.step and (calibration := tree.calibration(self.study, node.step)):
                sets.add(_tokens(node.model, f"calibration.{calibration}"))
            for evaluation in tree.evaluations(self.study, name):
                sets |= set(self._protocol_tokens(name, evaluation))
        return tuple(sorted(sets))

    @cached_property
    def fits(self) -> tuple[str, ...]:
        return tuple(path for law in self.study.laws for path in _fit_files(law))

    @property
    def effective_study(self) -> Job:
        """The study after defaults, as YAML."""
        return Job("study", "study", (str(LAYOUT.study),))

    def job(self, **wildcards: str) -> Job:
        """The job by the wildcards of its output in the rules. Raises UserError for a node that is not the study's."""
        key = tuple(wildcards.values())
        if key not in self._by_key:
            self._by_key[key] = self._by_wildcards(wildcards)
        return self._by_key[key]

    def _by_wildcards(self, wildcards: Mapping[str, str]) -> Job:
        match wildcards:
            case {"parent": parent, "part": part}:
                return self.node(f"{parent}/{part}")
            case {"node": node, "calibration": calibration, "kind": kind}:
                return self.calibration(node, calibration, kind)
            case {"node": node, "evaluation": evaluation}:
                return self.evaluation(node, evaluation)
            case {"model": model, "use": use}:
                return self.tokenization(model, use)
            case {"law": law}:
                return self.fit(law)
        return self.node(wildcards["model"])

    def node(self, name: str) -> Job:
        """The job that computes a node. Raises UserError for a name that is not a node of the study."""
        if name not in self.nodes:
            raise UserError(f"{name} is not a node of the study {self.study.study}; `coppice study` prints its tree.")
        node = self.nodes[name]
        if node.step is None:
            return self._root(node.model)
        return self._recovery(node) if tree.trains(self.study, node.step) else self._compression(node)

    def _root(self, model: str) -> Job:
        source = self.study.models[model]
        local = () if isinstance(source, HubModel) else map(relpath, dense_files(locate(source.model_dump())))
        return Job(
            "root",
            model,
            (str(LAYOUT.manifest(model)),),
            files=tuple(local),
            model=model,
            parameters={"source": source.model_dump_json(), "seed": self.study.seed},
        )

    def tokenization(self, model: str, use: str) -> Job:
        """The job that cuts a token set. Raises KeyError for a use that the study does not have."""
        body = self.uses[use]
        text = self.study.texts[body.text]
        return Job(
            "tokenize",
            f"{model}/{use}",
            (_tokens(model, use),),
            {"model": (str(LAYOUT.manifest(model)),)},
            files=(text.path,) if isinstance(text, FileText) else (),
            kind=use,
            parameters={
                "text": text.model_dump_json(exclude_none=True),
                "role": body.role,
                "windows": body.windows or 0,
                "length": body.length,
                "packing": [] if body.pack else ["--no-pack"],
                "seed": self.study.seed,
            },
        )

    def calibration(self, node: str, calibration: str, kind: str) -> Job:
        """The job that gathers one kind of statistics of a node."""
        body = self.study.calibrations[calibration]
        name = f"{node}/{calibration}/{kind}"
        return Job(
            "calibrate",
            name,
            (str(LAYOUT.statistics(node, calibration, kind)),),
            {
                "model": (str(LAYOUT.manifest(node)),),
                "tokens": (_tokens(NodeName(node).model, f"calibration.{calibration}"),),
            },
            model=node,
            kind=kind,
            options={"kind": kind, "windows": body.windows, "length": body.length},
            gpus=1,
        )

    def _compression(self, node: tree.StepNode) -> Job:
        step, method = self.study.steps[node.step], tree.method_of(self.study, node.step)
        calibration = tree.calibration(self.study, node.step)
        kinds = tree.kinds(self.study, node.step)
        reference = tree.reference(self.study, node.parent) if method.family == "compensate" else None
        return Job(
            "compress",
            node.name,
            (str(LAYOUT.manifest(node.name)),),
            {
                "parent": (str(LAYOUT.manifest(node.parent)),),
                "statistics": tuple(
                    str(LAYOUT.statistics(node.parent, calibration, kind)) for kind in kinds if calibration
                ),
                "tokens": (_tokens(node.model, f"calibration.{calibration}"),) if tree.reads_windows(step) else (),
                "reference": (str(LAYOUT.manifest(reference)),) if reference else (),
            },
            sources=tuple(method.files),
            model=node.parent,
            kind=step.method,
            parameters={"step": self._step(node, method), "seed": node.seed},
            options={**step.options.model_dump(mode="json"), "resources": method.resources, "kinds": kinds},
            gpus=1,
        )

    def _recovery(self, node: tree.StepNode) -> Job:
        method, options = tree.method_of(self.study, node.step), tree.training_options(self.study, node.step)
        # A method that computes how many tokens it trains on may train on more.
        most = inf if method.training.tokens else options.tokens
        return Job(
            "recover",
            node.name,
            (str(LAYOUT.manifest(node.name)),),
            {
                "parent": (str(LAYOUT.manifest(node.parent)),),
                "dense": (str(LAYOUT.manifest(node.model)),),
                "tokens": (_tokens(node.model, f"recovery.{node.step}"),),
                "validation": (_tokens(node.model, f"validation.{node.step}"),),
            },
            sources=tuple(method.files),
            model=node.parent,
            kind=method.name,
            parameters={
                "step": self._step(node, method),
                "seed": node.seed,
                "budgets": [budget for budget in sorted(set(self.study.budgets)) if budget <= most],
            },
            options={**options.model_dump(mode="json"), "resources": method.resources, "kinds": []},
            gpus=options.gpus,
        )

    def _step(self, node: tree.StepNode, method: Method) -> str:
        """The step as its command takes it. On how many GPUs it runs changes nothing of the node."""
        options = self.study.steps[node.step].options.model_dump(mode="json", exclude={"gpus"})
        return json.dumps({"name": node.step, "method": method.name, "options": options})

    def evaluation(self, node: str, evaluation: str) -> Job:
        """The job that measures a node. Raises KeyError for an evaluation that the study does not have."""
        body = self.study.evaluations[evaluation]
        inputs = {"model": (str(LAYOUT.manifest(node)),), "tokens": self._protocol_tokens(node, evaluation)}
        if body.kind == "connectivity":
            inputs["other"] = (str(LAYOUT.manifest(NodeName(node).with_study_seed)),)
        lengths = [protocol.length for protocol in protocols(body).values()]
        return Job(
            "evaluate",
            f"{node}/{evaluation}",
            (str(LAYOUT.metrics(node, evaluation)),),
            inputs,
            model=node,
            kind=evaluation,
            parameters={
                "evaluation": json.dumps(tree.evaluation_options(self.study, evaluation)),
                "protocols": tuple(protocols(body)),
            },
            options={"kind": body.kind, **({"length": max(lengths)} if lengths else {})},
            gpus=1,
            alone=body.kind == "cost",
        )

    def _protocol_tokens(self, node: str, evaluation: str) -> tuple[str, ...]:
        """The token sets of an evaluation, in the order of its protocols."""
        model = NodeName(node).model
        names = protocols(self.study.evaluations[evaluation])
        return tuple(_tokens(model, f"evaluation.{evaluation}.{name}") for name in names)

    @property
    def tables(self) -> Job:
        inputs = {"results": (*self.checkpoints, *self.metrics, *self.token_sets), "study": (str(LAYOUT.study),)}
        return Job("tables", "tables", tuple(str(LAYOUT.table(name)) for name in TABLES), inputs)

    def fit(self, law: str) -> Job:
        """The job that fits a law. Raises KeyError for a law that the study does not have."""
        body = self.study.laws[law]
        return Job(
            "fit",
            law,
            _fit_files(law),
            {"tables": self.tables.outputs},
            files=(body.options.file,) if body.options.file else (),
            sources=tuple(laws.source_files(body.law)),
            parameters={"law": body.law, "options": body.options.model_dump_json()},
        )

    @property
    def report(self) -> Job:
        inputs = {
            "nodes": self.checkpoints,
            "tables": self.tables.outputs,
            "laws": self.fits,
            "study": (str(LAYOUT.study),),
        }
        return Job("report", "report", tuple(str(LAYOUT.report / name) for name in REPORT_FILES), inputs)

    @property
    def track(self) -> Job:
        inputs = {
            "results": (*self.checkpoints, *self.metrics, *self.token_sets),
            "tables": self.tables.outputs,
            "laws": self.fits,
            "report": (str(LAYOUT.page),),
            "study": (str(LAYOUT.study),),
        }
        return Job("track", "track", (str(LAYOUT.tracking),), inputs)

    def _statistics(self) -> Iterator[Job]:
        """The statistics that the steps of the nodes read, each once."""
        parents: dict[str, Job] = {}
        for node in self.nodes.values():
            if node.step is None or tree.trains(self.study, node.step):
                continue
            if calibration := tree.calibration(self.study, node.step):
                for kind in tree.kinds(self.study, node.step):
                    job = self.calibration(node.parent, calibration, kind)
                    parents.setdefault(job.output, job)
        yield from parents.values()

    def _tokens(self) -> Iterator[Job]:
        for model in self.study.models:
            for use in self.uses:
                yield self.tokenization(model, use)


def _tokens(model: str, use: str) -> str:
    return str(LAYOUT.tokens(model, use))


def _fit_files(law: str) -> tuple[str, ...]:
    return tuple(str(LAYOUT.law(law) / file) for file in FIT_FILES)


def _depth(job: Job) -> tuple[int, bool]:
    """Nodes in the order of their depth; the statistics of a node after it and before its children."""
    node = job.model or ""
    return NodeName(node).depth, job.stage != "calibrate"
