"""The tree: what nodes a study has, and what each of them needs.

A node is a model after some steps; its name is its path, `<model>/<step>/<step>`, so its parent is the path less its
last part, and recipes that begin alike share nodes. A step that is trained with another seed than the study's, and
every step after it, bears the seed: `<step>@1`.

All functions take a validated `Study`. A node may be given by its name alone, because the name is its path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from math import ceil
from typing import ClassVar, cast

from coppice.methods.options import RecoverOptions
from coppice.methods.registry import Method, method
from coppice.models.contracts import FROM_WINDOWS
from coppice.records.base import Json
from coppice.records.node_name import NodeName
from coppice.study.schema import BuiltinText, Evaluation, Quality, Recipe, Step, Study
from coppice.study.schema.evaluations import protocols


@dataclass(frozen=True, slots=True)
class Root:
    """A dense model. It has neither a parent nor a step."""

    name: str
    seed: int
    parent: ClassVar[None] = None
    step: ClassVar[None] = None

    @property
    def model(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class StepNode:
    """A model after a step. name: the path; step: the step's name without a seed."""

    name: str
    model: str
    parent: str
    step: str
    seed: int


Node = Root | StepNode


@dataclass(frozen=True, slots=True)
class TokenUse:
    """A token set that a model needs: `windows` windows of `length` tokens from the part of a text for `role`."""

    text: str
    role: str
    windows: int | None
    length: int
    pack: bool


def nodes(study: Study) -> dict[str, Node]:
    """Every node by name: all dense models, then what the recipes make of them; parents come before children."""
    tree: dict[str, Node] = {model: Root(model, study.seed) for model in study.models}
    for _, model, steps, seed in expand_recipes(study):
        parent = model
        for step, part in zip(steps, _parts(study, steps, seed), strict=True):
            name = f"{parent}/{part}"
            if name not in tree:
                tree[name] = StepNode(name, model, parent, step, seed if "@" in part else study.seed)
            parent = name
    return tree


def expand_recipes(study: Study) -> Iterator[tuple[int, str, tuple[str, ...], int]]:
    """(index of the recipe, model, steps, seed) of every single recipe that the study's recipes expand to."""
    for i, recipe in enumerate(study.recipes):
        for model in recipe.models or study.models:
            for steps in expand_steps(recipe):
                for seed in recipe.seeds or [study.seed]:
                    yield i, model, steps, seed


def expand_steps(recipe: Recipe) -> list[tuple[str, ...]]:
    """The lists of steps that a recipe expands to, without its nulls."""
    combinations = [recipe.steps] if recipe.steps is not None else product(*recipe.product or ())
    return [tuple(step for step in steps if step is not None) for steps in combinations]


def _parts(study: Study, steps: tuple[str, ...], seed: int) -> Iterator[str]:
    """The parts of the path: steps, with the seed from the first one that recovers on."""
    suffix = ""
    for step in steps:
        if seed != study.seed and method_of(study, step).family == "recover":
            suffix = f"@{seed}"
        yield step + suffix


def method_of(study: Study, step: str) -> Method:
    """The method of a step."""
    return method(study.steps[step].method)


def traits(study: Study, name: str) -> frozenset[str]:
    """The traits that the steps of a node's path give it."""
    gathered: frozenset[str] = frozenset()
    for step in NodeName(name).steps:
        gathered = method_of(study, step).traits(gathered, study.steps[step].options)
    return gathered


def incompatibilities(study: Study) -> list[str]:
    """A sentence for every step of a recipe that cannot follow what comes before it."""
    sentences: dict[tuple[int, str], str] = {}
    traits_by_node: dict[str, frozenset[str]] = {model: frozenset() for model in study.models}
    for i, model, steps, seed in expand_recipes(study):
        parent = model
        for place, (step, part) in enumerate(zip(steps, _parts(study, steps, seed), strict=True)):
            name = f"{parent}/{part}"
            if name not in traits_by_node:
                before = traits_by_node[parent]
                reason = _incompatibility(study, parent, steps[place - 1] if place else None, step, before)
                if reason:
                    sentences.setdefault((i, step), f"recipes.{i} ({' > '.join(steps)}): {reason}")
                traits_by_node[name] = method_of(study, step).traits(before, study.steps[step].options)
            parent = name
    return list(sentences.values())


def _incompatibility(
    study: Study, parent: str, previous: str | None, step: str, parent_traits: frozenset[str]
) -> str | None:
    """Why a step cannot follow its parent; None where it can."""
    applied = method_of(study, step)
    if step == previous:
        return f"the step {step!r} appears twice in a row; write it once."
    if problem := applied.incompatibility(parent_traits):
        trait, reason = problem
        return f"the step {step!r} ({applied.name}) cannot work on a {trait} model, because {reason}."
    if applied.family == "compensate" and reference(study, parent) == parent:
        return (
            f"the step {step!r} ({applied.name}) has nothing to compensate: put it after a step that prunes, "
            "decomposes or quantizes layers."
        )
    return None


def compresses_layers(method: Method) -> bool:
    """Whether a method replaces linears one by one, so that what they were before can be compensated for."""
    return method.contract == "layer" and method.family in ("prune", "decompose", "quantize")


def reference(study: Study, parent: str) -> str:
    """The node whose linears a compensate method, which works on `parent`, approximates.

    The nearest one above the last run of steps that compressed layers; `parent` itself when there was none. Steps that
    leave the linears alone, as those of the cache, do not end the run.
    """
    name = uncompressed = NodeName(parent)
    while name.step and name.parent:
        applied = method_of(study, name.step)
        if not (compresses_layers(applied) or applied.contract == "cache"):
            break
        name = name.parent
        if compresses_layers(applied):
            uncompressed = name
    return uncompressed


def calibration(study: Study, step: str) -> str | None:
    """The calibration of a step: the one it names, or the study's only one; None when it needs none."""
    return calibration_of(study, step) if needs(study.steps[step]) else None


def calibration_of(study: Study, step: str) -> str:
    """The calibration of a step that needs one: the one that it names, or the study's only one."""
    return study.steps[step].calibration or next(iter(study.calibrations))


def needs(step: Step) -> frozenset[str]:
    """What a step reads besides its parent."""
    return method(step.method).needs(step.options)


def reads_windows(step: Step) -> bool:
    """Whether a step reads the calibration windows themselves."""
    return bool(needs(step) & FROM_WINDOWS)


def kinds(study: Study, step: str) -> list[str]:
    """The kinds of statistics that a step reads from its parent."""
    return sorted(needs(study.steps[step]) - FROM_WINDOWS)


def trains(study: Study, step: str) -> bool:
    """Whether a step's method is a training method."""
    return method_of(study, step).contract == "training"


def training_options(study: Study, step: str) -> RecoverOptions:
    """The options of a step that trains; the registry takes no training method with others."""
    return cast(RecoverOptions, study.steps[step].options)


def token_uses(study: Study) -> dict[str, TokenUse]:
    """Every token set by name: calibration.<name>, recovery.<step>, validation.<step>, evaluation.<name>.<protocol>."""
    uses = {
        f"calibration.{name}": TokenUse(body.text, "calibration", body.windows, body.length, body.pack)
        for name, body in study.calibrations.items()
    }
    for name, step in study.steps.items():
        options = step.options
        if isinstance(options, RecoverOptions):
            # A padded window holds fewer tokens than its length; the text is then read again.
            windows = ceil(options.tokens / options.length)
            uses[f"recovery.{name}"] = TokenUse(options.text, "recovery", windows, options.length, options.pack)
            uses[f"validation.{name}"] = TokenUse(
                options.validation, "validation", options.validation_windows, options.length, options.pack
            )
    for name, evaluation in study.evaluations.items():
        for protocol, body in protocols(evaluation).items():
            uses[f"evaluation.{name}.{protocol}"] = TokenUse(
                body.text, "evaluation", body.windows, body.length, body.pack
            )
    return uses


def world(study: Study, evaluation: Evaluation) -> str | None:
    """The built-in text that an evaluation asks about: the one it names, or the study's only one; None when none."""
    if not (isinstance(evaluation, Quality) and evaluation.needs_world):
        return None
    return evaluation.world or next(name for name, text in study.texts.items() if isinstance(text, BuiltinText))


def evaluation_options(study: Study, evaluation: str) -> Json:
    """How an evaluation measures, as `coppice evaluate` takes it: which nodes it measures is not part of it.

    Options that are null are left out, so that a new option that is off measures nothing again; within a protocol null
    has a meaning: all windows.
    """
    body = study.evaluations[evaluation]
    options = {k: v for k, v in body.model_dump(mode="json", exclude={"nodes", "world"}).items() if v is not None}
    text = world(study, body)
    return options | ({"world": study.texts[text].model_dump(mode="json")} if text else {})


def evaluations(study: Study, name: str) -> list[str]:
    """The evaluations that measure a node: their patterns match it, and a connectivity can interpolate its weights."""
    return [
        evaluation
        for evaluation, body in study.evaluations.items()
        if any(fnmatchcase(name, pattern) for pattern in body.nodes)
        and (body.kind != "connectivity" or _has_other_seed(study, name))
    ]


def _has_other_seed(study: Study, name: str) -> bool:
    """Whether a node was trained with another seed than the study's and holds no packed integers."""
    return NodeName(name).with_study_seed != name and "quantized" not in traits(study, name)


def missing_seed_pairs(study: Study) -> list[str]:
    """A sentence for every connectivity that measures nothing, or a node that has no twin."""
    tree = nodes(study)
    sentences = []
    for name, body in study.evaluations.items():
        if body.kind != "connectivity":
            continue
        measured = [node for node in tree if name in evaluations(study, node)]
        if not measured:
            sentences.append(
                f"evaluations.{name}: no node that matches its `nodes` was trained with another seed than the study's, "
                f"{study.seed}, and holds weights that can be interpolated; give a recipe several `seeds`."
            )
        lonely = [node for node in measured if NodeName(node).with_study_seed not in tree]
        if lonely:
            sentences.append(
                f"evaluations.{name}: the node {lonely[0]!r} has no twin {NodeName(lonely[0]).with_study_seed!r} to be "
                f"compared with; add the study's seed, {study.seed}, to the `seeds` of its recipe."
            )
    return sentences


def render_tree(study: Study) -> str:
    """The tree, one node a line, indented by its depth."""
    tree = nodes(study)
    children: dict[str | None, list[Node]] = {}
    for node in tree.values():
        children.setdefault(node.parent, []).append(node)
    lines = [f"{study.study}: {len(tree)} nodes"]

    def draw(parent: str | None, depth: int) -> None:
        for node in children.get(parent, []):
            lines.append("  " * depth + NodeName(node.name).last_part)
            draw(node.name, depth + 1)

    draw(None, 1)
    return "\n".join(lines)
