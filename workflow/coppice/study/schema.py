"""The study: every key of the config, typed once; loaded, validated and explained.

`load_study` turns a file (or what a YAML reader made of one) into a `Study`, or raises one UserError that names every
problem with its place. `effective` is the way back: the study after defaults.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

from coppice.data.biographies import World
from coppice.data.text import ROLES, SUFFIXES, UNITS
from coppice.errors import UserError, did_you_mean
from coppice.evaluation.roofline import DEVICES
from coppice.files import read_json
from coppice.laws import registry as laws
from coppice.methods.contracts import KINDS
from coppice.methods.options import MethodOptions
from coppice.methods.registry import method
from coppice.study import tree

SHIPPED = Path(__file__).parents[3] / "resources" / "models"
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# Names become folders beside these.
RESERVED = {"adapter", "models", "tokens", "statistics", "evaluations", "tables", "laws", "report", "tracking"} | {
    *("logs", "benchmarks", "state"),
    *KINDS,
}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_EXPONENT = re.compile(r"[-+]?\d{1,8}(\.\d{0,8})?[eE][-+]?\d{1,3}")


class Section(BaseModel):
    """A mapping of the config. Unknown keys are errors that name the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            _refuse_unknown(value, list(cls.model_fields), "key")
        return value


def _refuse_unknown(value: Mapping[str, Any], known: list[str], noun: str) -> None:
    unknown = [key for key in value if key not in known]
    if unknown:
        raise ValueError(" ".join(f"There is no {noun} {key!r}.{did_you_mean(str(key), known)}" for key in unknown))


def _alternatives(noun: str, **sections: type[Section]) -> Any:
    """A union of sections told apart by the key that each requires; the key's name in <> is the tag."""

    def tag(value: Any) -> str | None:
        keys = value if isinstance(value, Mapping) else type(value).model_fields if isinstance(value, Section) else ()
        found = [key for key in sections if key in keys]
        return f"<{found[0]}>" if len(found) == 1 else None

    union: Any = None
    for key, section in sections.items():
        tagged = Annotated[section, Tag(f"<{key}>")]
        union = tagged if union is None else union | tagged
    message = f"A {noun} needs exactly one of the keys {', '.join(sections)}."
    discriminator = Discriminator(tag, custom_error_type="alternatives", custom_error_message=message)
    return Annotated[union, discriminator]


class ShippedModel(Section):
    """A small pretrained model that comes with Coppice."""

    shipped: str = Field(description="Name of a folder of resources/models.")


class LocalModel(Section):
    """A folder in Hugging Face form: config.json, safetensors, tokenizer."""

    path: str = Field(description="The folder, relative to the working directory.")


class HubModel(Section):
    """A model of the Hugging Face hub, pinned to a revision."""

    hub: str = Field(description="Name on the hub, as in `organisation/name`.", min_length=1)
    revision: str = Field(description="Commit of the model's repository: 40 hexadecimal digits.")

    @model_validator(mode="after")
    def _pinned(self) -> HubModel:
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(
                f"revision is {self.revision!r}; write the commit's 40 hexadecimal digits, so that the model is "
                "the same next year."
            )
        return self


Model = _alternatives("model", shipped=ShippedModel, path=LocalModel, hub=HubModel)

Share = Annotated[float, Field(gt=0, le=1)]
Splits = dict[Literal[ROLES], Share]
_SPLITS = Field(
    default={"calibration": 0.1, "recovery": 0.7, "validation": 0.1, "evaluation": 0.1},
    description=f"Disjoint parts of the text by role ({', '.join(ROLES)}), as shares of its documents, cut in this "
    "order. A document that repeats an earlier one is left out.",
)


class _SplitText(Section):
    splits: Splits = _SPLITS

    @model_validator(mode="after")
    def _shares(self) -> _SplitText:
        total = sum(self.splits.values())
        if total > 1 + 1e-9:
            raise ValueError(f"The shares in splits sum to {total:g}; they may sum to 1 at most.")
        return self


class BuiltinText(Section):
    """The built-in world of synthetic biographies; its parts for the roles are disjoint by construction."""

    builtin: Literal["biographies"] = Field(description="The built-in world: `biographies`.")
    people: PositiveInt = Field(default=1200, description="How many people the world has.")
    seed: NonNegativeInt = Field(default=0, description="Seed that the world is drawn from.")
    first_names: PositiveInt = Field(default=64, description="How many first names there are to draw from.")
    middle_names: PositiveInt = Field(default=64, description="How many middle names.")
    last_names: PositiveInt = Field(default=128, description="How many last names.")
    months: PositiveInt = Field(default=12, description="How many months of birth.")
    days: PositiveInt = Field(default=28, description="How many days of birth.")
    years: PositiveInt = Field(default=64, description="How many years of birth.")
    cities: PositiveInt = Field(default=64, description="How many cities of birth.")
    universities: PositiveInt = Field(default=64, description="How many universities.")
    majors: PositiveInt = Field(default=32, description="How many majors.")
    employers: PositiveInt = Field(default=64, description="How many employers.")
    templates: PositiveInt = Field(default=8, description="How many sentences tell each attribute.")

    @model_validator(mode="after")
    def _possible(self) -> BuiltinText:
        World(**self.model_dump(exclude={"builtin"}))
        return self


class FileText(_SplitText):
    """A local file: .txt, .jsonl or .parquet."""

    path: str = Field(description="The file, relative to the working directory.")
    field: str = Field(default="text", description="Key or column that holds the text; unused for .txt.")
    document: Literal[UNITS] = Field(default="paragraph", description="What a document is in a .txt file.")
    documents: PositiveInt | None = Field(default=None, description="Read only the first documents; null reads all.")


class HubText(_SplitText):
    """A dataset of the Hugging Face hub, pinned to a revision."""

    dataset: str = Field(description="Name on the hub, as in `organisation/name`.", min_length=1)
    name: str | None = Field(default=None, description="The dataset's configuration.")
    revision: str = Field(description="Commit of the dataset's repository: 40 hexadecimal digits.")
    split: str = Field(default="train", description="The dataset's own split to read.")
    field: str = Field(default="text", description="Column that holds the text.")
    documents: PositiveInt | None = Field(default=None, description="Read only the first documents; null reads all.")

    @model_validator(mode="after")
    def _pinned(self) -> HubText:
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(f"revision is {self.revision!r}; write the commit's 40 hexadecimal digits.")
        return self


Text = _alternatives("text", builtin=BuiltinText, path=FileText, dataset=HubText)


class Calibration(Section):
    """Tokens that statistics are gathered over: the role `calibration` of a text."""

    text: str = Field(description="Name of a text.")
    windows: PositiveInt = Field(default=128, description="How many windows.")
    length: Annotated[int, Field(ge=2)] = Field(default=2048, description="Tokens in a window.")
    pack: bool = Field(default=True, description="Fill windows with several documents; false gives each its own.")


class Step(BaseModel):
    """A method with its options: written as one mapping, `{method: wanda, sparsity: 0.5}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field(description="Name of a method; `coppice methods` lists them.")
    calibration: str | None = Field(
        default=None,
        description="Name of a calibration, for methods that need one; may be left out when the study has one only.",
    )
    options: SerializeAsAny[MethodOptions]

    @model_validator(mode="before")
    @classmethod
    def _typed_options(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        options = dict(value)
        name, calibration = options.pop("method", None), options.pop("calibration", None)
        if not isinstance(name, str):
            raise ValueError("A step needs the key 'method' with the name of a method.")
        options_class = method(name).options
        _refuse_unknown(options, ["calibration", *options_class.model_fields], f"{name} option")
        return {"method": name, "calibration": calibration, "options": options_class.model_validate(options)}

    @model_serializer(mode="plain")
    def _flat(self) -> dict[str, Any]:
        calibration = {} if self.calibration is None else {"calibration": self.calibration}
        return {"method": self.method, **calibration, **self.options.model_dump(mode="json")}


def _as_recipe(value: Any) -> Any:
    return {"steps": value} if isinstance(value, list) else value


class Recipe(Section):
    """Steps in order; or lists of steps whose product is taken. A plain list is short for `{steps: [...]}`."""

    models: list[str] | None = Field(default=None, description="Names of the models to run on; left out: on every one.")
    steps: list[str | None] | None = Field(default=None, description="Names of steps, in order.")
    product: list[list[str | None]] | None = Field(
        default=None,
        description="Lists of names of steps: one recipe for each way to take one of each; null leaves the place out.",
    )
    seeds: list[NonNegativeInt] | None = Field(
        default=None,
        description="Seeds to train with, from the first step that recovers on; left out: the study's seed.",
        min_length=1,
    )

    @model_validator(mode="after")
    def _one_form(self) -> Recipe:
        if (self.steps is None) == (self.product is None):
            raise ValueError("A recipe needs exactly one of the keys steps and product.")
        return self

    @model_serializer(mode="wrap")
    def _without_nulls(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value is not None}


class Protocol(Section):
    """Perplexity over windows of the role `evaluation` of a text."""

    text: str = Field(description="Name of a text.")
    length: Annotated[int, Field(ge=2)] = Field(default=2048, description="Tokens in a window.")
    windows: PositiveInt | None = Field(default=128, description="How many windows; null: all there are.")
    pack: bool = Field(default=True, description="Fill windows with several documents; false gives each its own.")


_NODES = Field(default=["*"], description="Patterns of the nodes that are measured; * stands for anything.")


class Intrinsic(Section):
    """How much of their space a node's last hidden states fill, over texts cut to one length."""

    protocol: str = Field(description="Protocol of perplexity of the same evaluation, whose windows are the texts.")
    length: Annotated[int, Field(ge=2)] = Field(
        default=32, description="Tokens of a text: the first of each window; the metrics depend on it."
    )
    windows: PositiveInt = Field(default=64, description="How many windows at most.")


class Quality(Section):
    """What a node knows and can do."""

    kind: Literal["quality"] = Field(description="`quality`.")
    perplexity: dict[str, Protocol] = Field(default={}, description="Protocols of perplexity by name.")
    tasks: list[str] = Field(default=[], description="Tasks of lm-evaluation-harness, and `biographies`.")
    task_path: str | None = Field(
        default=None, description="Folder of your own tasks, relative to the working directory."
    )
    shots: NonNegativeInt = Field(default=0, description="Solved examples before each question.")
    limit: PositiveInt | None = Field(default=None, description="Ask only the first questions of each task; null: all.")
    knowledge: bool = Field(default=False, description="Count the bits of the biographies that the model holds.")
    world: str | None = Field(
        default=None,
        description="Name of the built-in text that `knowledge` and the task `biographies` ask about; may be left out "
        "when the study has one only.",
    )
    intrinsic: Intrinsic | None = Field(
        default=None, description="Matrix entropy, effective rank and matrix nuclear norm of hidden states; null: none."
    )
    nodes: list[str] = _NODES

    @model_validator(mode="after")
    def _texts_of_intrinsic_metrics(self) -> Quality:
        if self.intrinsic is None:
            return self
        name, length = self.intrinsic.protocol, self.intrinsic.length
        if name not in self.perplexity:
            near = did_you_mean(name, self.perplexity) if self.perplexity else " There are none yet."
            raise ValueError(
                f"`intrinsic` reads the windows of a protocol of perplexity, and there is no {name!r} under "
                f"`perplexity`.{near}"
            )
        if length > self.perplexity[name].length:
            raise ValueError(
                f"`intrinsic` asks for texts of {length} tokens, but the windows of the protocol {name!r} have "
                f"{self.perplexity[name].length}; shorten its `length`."
            )
        return self


class Cost(Section):
    """What a node costs: bytes, latency, memory."""

    kind: Literal["cost"] = Field(description="`cost`.")
    batch: PositiveInt = Field(default=1, description="Sequences at once.")
    prompt: PositiveInt = Field(default=128, description="Tokens read.")
    generate: PositiveInt = Field(default=32, description="Tokens written.")
    repeats: PositiveInt = Field(default=10, description="Measurements.")
    warmup: NonNegativeInt = Field(default=3, description="Runs before the first measurement.")
    nodes: list[str] = _NODES


class Connectivity(Section):
    """Whether a node and its twin, trained with the study's seed, are linearly connected and compute the same."""

    kind: Literal["connectivity"] = Field(description="`connectivity`.")
    perplexity: dict[str, Protocol] = Field(
        description="The protocol, by its name, whose windows loss and error are measured on; one."
    )
    points: Annotated[int, Field(ge=3)] = Field(
        default=11, description="Points of the straight path between the two, ends included."
    )
    barrier: float = Field(
        default=0.01,
        ge=0,
        description="Error by which the path may rise over the mean of its ends without parting them.",
    )
    similarity: float = Field(
        default=0.9, ge=0, le=1, description="CKA of the logits from which on the outputs of the two count as similar."
    )
    nodes: list[str] = Field(
        default=["*"],
        description="Patterns of the nodes that are measured; * stands for anything. Of the nodes that match, those "
        "trained with another seed than the study's are measured, and of these no quantized ones.",
    )

    @model_validator(mode="after")
    def _one_protocol(self) -> Connectivity:
        if len(self.perplexity) != 1:
            raise ValueError(f"perplexity names {len(self.perplexity)} protocols; a connectivity has one.")
        return self


def _kind(value: Any) -> str:
    return f"<{value.get('kind') if isinstance(value, Mapping) else getattr(value, 'kind', None)}>"


Evaluation = Annotated[
    Annotated[Quality, Tag("<quality>")]
    | Annotated[Cost, Tag("<cost>")]
    | Annotated[Connectivity, Tag("<connectivity>")],
    Discriminator(
        _kind,
        custom_error_type="alternatives",
        custom_error_message="Its kind must be one of quality, cost, connectivity.",
    ),
]


class Law(Section):
    """A formula that is fitted to the tables."""

    law: str = Field(description="Name of a law.")
    options: dict[str, Any] = Field(default={}, description="The law's options.")


class Roofline(Section):
    """What nodes could run at: times that the devices' bandwidths and peaks allow at best, from shapes and bytes."""

    devices: list[Literal[tuple(DEVICES)]] = Field(
        default=list(DEVICES),
        description="Devices. The figures of the H200 are its vendor's, as recalled: check them first.",
        min_length=1,
    )
    batch: PositiveInt = Field(default=1, description="Sequences at once.")
    prompt: PositiveInt = Field(
        default=1024, description="Tokens read; shortened with `generate` where both exceed the model's context."
    )
    generate: NonNegativeInt = Field(default=128, description="Tokens written.")
    sparse_kernels: bool = Field(
        default=False, description="Suppose a kernel that makes use of masks of the pattern 2:4."
    )


class Tracking(Section):
    """Where results are mirrored to."""

    uri: str | None = Field(default=None, description="MLflow tracking URI; null: results/mlflow.db.")
    weights: Literal["none", "pareto", "all"] = Field(
        default="none", description="Whose weights are uploaded: nobody's, those of the best at their size, or all."
    )

    @field_validator("uri")
    @classmethod
    def _without_a_password(cls, value: str | None) -> str | None:
        if value and re.search(r"://[^/@:]*:.*@", value):
            raise ValueError(
                "An address with a password would stand in logs and reports; leave the password out, and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (for a database: PGUSER and PGPASSWORD)."
            )
        return value


def _readable_numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string: it wants 1.0e-3. Here both are numbers, and 1e6 is a whole one."""
    if isinstance(value, Mapping):
        return {key: _readable_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_readable_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


class Study(Section):
    """Everything that one study is: models, texts, steps, recipes, evaluations, laws and tracking."""

    study: str = Field(description="The study's name; results go to results/<study>.")
    seed: NonNegativeInt = Field(default=0, description="Seed of everything random.")
    models: dict[str, Model] = Field(description="Dense models by name.", min_length=1)
    texts: dict[str, Text] = Field(default={}, description="Texts by name. A source appears once.")
    budgets: list[PositiveInt] = Field(
        default=[],
        description="Ladder of tokens: recovery reports the held-out loss at each budget that is within its tokens.",
    )
    calibrations: dict[str, Calibration] = Field(default={}, description="Calibrations by name.")
    steps: dict[str, Step] = Field(default={}, description="Steps by name.")
    recipes: list[Annotated[Recipe, BeforeValidator(_as_recipe)]] = Field(
        default=[], description="What is done to the models, each an ordered list of steps."
    )
    evaluations: dict[str, Evaluation] = Field(default={}, description="Evaluations by name.")
    laws: dict[str, Law] = Field(default={}, description="Laws by name.")
    roofline: Roofline | None = Field(
        default=Roofline(), description="Lower bounds of times on devices, for every node; null: none."
    )
    tracking: Tracking = Field(default=Tracking(), description="Where results are mirrored to.")


def _refuse(where: str, problems: list[str]) -> None:
    if len(problems) == 1:
        raise UserError(f"{where}: {problems[0]}")
    if problems:
        raise UserError("\n".join([f"{where} has {len(problems)} problems:", *(f"  - {line}" for line in problems)]))


def _sentence(details: Mapping[str, Any]) -> str:
    """One of pydantic's errors as a sentence that begins with its place."""
    # Parts in brackets are pydantic's own and no keys of the file.
    place = ".".join(str(part) for part in details["loc"] if not re.fullmatch(r"<.*>|\[key\]", str(part)))
    kind, message = details["type"], details["msg"]
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message if message[-1] in ".?" else f"{message}."
    if kind == "missing":
        return f"{place} is missing."
    if kind == "too_short":
        return f"{place} is empty; it needs at least one entry."
    if kind in ("value_error", "assertion_error", "alternatives"):
        return f"{place}: {message[0].lower()}{message[1:]}" if place else message
    if kind in ("model_type", "dict_type"):
        message = "Input should be a mapping of keys to values."
    return f"{place} is {_shown(details['input'])}; {message.replace('Input', 'it', 1)}"


def _shown(value: Any) -> str:
    text = "null" if value is None else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _badly_named(value: Mapping[str, Any]) -> Iterator[str]:
    """Names that cannot be folders, or that two things share."""
    if isinstance(value.get("study"), str) and not _NAME.fullmatch(value["study"]):
        yield _name_rule("study", value["study"])
    owners: dict[str, str] = {}
    for section in ("models", "steps", "calibrations", "evaluations", "texts", "laws"):
        for name in value.get(section) or {} if isinstance(value.get(section), Mapping) else {}:
            place = f"{section}.{name}"
            if not isinstance(name, str) or _EXPONENT.fullmatch(name):
                yield f"{place}: this name is a number to YAML; choose one with more letters, or put it in quotes."
            elif not _NAME.fullmatch(name):
                yield _name_rule(place, name)
            elif name in RESERVED and section not in ("texts", "laws"):
                yield f"{place}: the name {name!r} is reserved, because folders bear it; choose another."
            elif section not in ("texts", "laws"):
                # Some file systems do not tell upper from lower case.
                owner = owners.setdefault(name.casefold(), place)
                if owner != place:
                    yield f"{place}: the name is taken by {owner}; one name stands for one thing."
    evaluations = value.get("evaluations")
    for evaluation, body in evaluations.items() if isinstance(evaluations, Mapping) else ():
        protocols = body.get("perplexity") if isinstance(body, Mapping) else None
        for protocol in protocols if isinstance(protocols, Mapping) else ():
            if not isinstance(protocol, str) or not _NAME.fullmatch(protocol):
                yield _name_rule(f"evaluations.{evaluation}.perplexity.{protocol}", str(protocol))


def _name_rule(place: str, name: str) -> str:
    return f"{place}: {name!r} is no name; names are letters, digits, - and _, and begin with a letter or digit."


def _unknown(place: str, noun: str, name: str, known: Mapping[str, Any] | list[str]) -> str:
    near = did_you_mean(name, known) if known else f" There are no {noun}s yet."
    return f"{place}: there is no {noun} {name!r}.{near}"


def _references(study: Study) -> Iterator[str]:
    """Names that stand for nothing."""
    for place, name, role in _texts_used(study):
        if name not in study.texts:
            yield _unknown(place, "text", name, study.texts)
        elif isinstance(text := study.texts[name], _SplitText) and role not in text.splits:
            yield (
                f"{place}: the text {name!r} has no part for {role}; add `{role}` to texts.{name}.splits, or use "
                "another text."
            )
    for name, step in study.steps.items():
        yield from _calibration_of_step(study, name, step)
    for i, recipe in enumerate(study.recipes):
        for model in recipe.models or ():
            if model not in study.models:
                yield _unknown(f"recipes.{i}.models", "model", model, study.models)
        for step in {name for option in recipe.product or [recipe.steps] for name in option if name is not None}:
            if step in study.models:
                yield (
                    f"recipes.{i}: {step!r} is a model; a recipe lists steps, and its key `models` the models that it "
                    "runs on."
                )
            elif step not in study.steps:
                yield _unknown(f"recipes.{i}", "step", step, study.steps)
    for name, evaluation in study.evaluations.items():
        if isinstance(evaluation, Quality):
            yield from _world_of_evaluation(study, name, evaluation)
    known_laws = list(laws.names())
    for name, law in study.laws.items():
        if law.law not in known_laws:
            yield _unknown(f"laws.{name}.law", "law", law.law, known_laws)
            continue
        try:
            options = laws.validate_options(law.law, law.options)
        except UserError as error:
            yield f"laws.{name}.options: {error}"
            continue
        if options.file is not None and not Path(options.file).is_file():
            yield f"laws.{name}.options.file: {options.file} does not exist (looked in {Path.cwd()})."


def _texts_used(study: Study) -> Iterator[tuple[str, str, str]]:
    """(place, name of a text, role) of every use of a text."""
    for name, calibration in study.calibrations.items():
        yield f"calibrations.{name}.text", calibration.text, "calibration"
    for name, step in study.steps.items():
        if method(step.method).contract == "training":
            yield f"steps.{name}.text", step.options.text, "recovery"
            yield f"steps.{name}.validation", step.options.validation, "validation"
    for name, evaluation in study.evaluations.items():
        for protocol, body in tree.protocols(evaluation).items():
            yield f"evaluations.{name}.perplexity.{protocol}.text", body.text, "evaluation"


def _calibration_of_step(study: Study, name: str, step: Step) -> Iterator[str]:
    place = f"steps.{name}"
    if step.calibration is not None:
        if step.calibration not in study.calibrations:
            yield _unknown(f"{place}.calibration", "calibration", step.calibration, study.calibrations)
        elif not method(step.method).needs(step.options):
            yield f"{place}.calibration: {step.method} with these options needs no calibration; leave the key out."
    elif method(step.method).needs(step.options) and len(study.calibrations) != 1:
        known = ", ".join(study.calibrations)
        what = f"name one of the study's: {known}" if known else "describe one under `calibrations`"
        yield f"{place}: {step.method} needs a calibration; {what}."


def _world_of_evaluation(study: Study, name: str, evaluation: Quality) -> Iterator[str]:
    worlds = {text: body for text, body in study.texts.items() if isinstance(body, BuiltinText)}
    asks = evaluation.knowledge or "biographies" in evaluation.tasks
    if evaluation.world is not None and evaluation.world not in worlds:
        yield _unknown(f"evaluations.{name}.world", "built-in text", evaluation.world, worlds)
    elif asks and evaluation.world is None and len(worlds) != 1:
        known = f"name one of {', '.join(worlds)} as its `world`" if worlds else "describe one under `texts`"
        yield f"evaluations.{name} asks about the biographies of a built-in text; {known}."


def _sources(study: Study) -> Iterator[str]:
    """Models and texts that are not there, that are not supported, or that are described twice."""
    for name, model in study.models.items():
        if isinstance(model, ShippedModel):
            shipped = sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))
            if model.shipped not in shipped:
                yield _unknown(f"models.{name}.shipped", "shipped model", model.shipped, shipped)
        elif isinstance(model, LocalModel):
            yield from _local_model(f"models.{name}.path", Path(model.path))
    for name, text in study.texts.items():
        if isinstance(text, FileText):
            path = Path(text.path)
            if path.suffix not in SUFFIXES:
                yield f"texts.{name}.path: {text.path} must be one of {', '.join(SUFFIXES)}."
            elif not path.is_file():
                yield f"texts.{name}.path: {text.path} does not exist (looked in {Path.cwd()})."
    counts = Counter(_identity(text) for text in study.texts.values())
    for identity, count in counts.items():
        if count > 1:
            names = [name for name, text in study.texts.items() if _identity(text) == identity]
            yield (
                f"texts.{names[1]} is the same source as texts.{names[0]}; use one text with splits, so that its parts "
                "stay apart."
            )
    for name, evaluation in study.evaluations.items():
        if isinstance(evaluation, Quality) and evaluation.task_path and not Path(evaluation.task_path).is_dir():
            yield f"evaluations.{name}.task_path: {evaluation.task_path} is no folder (looked in {Path.cwd()})."


def _local_model(place: str, path: Path) -> Iterator[str]:
    if not (path / "config.json").is_file():
        yield f"{place}: {path} is no model folder: it has no config.json (looked in {Path.cwd()})."
        return
    model_type = read_json(path / "config.json").get("model_type")
    if model_type not in MODEL_TYPES:
        yield f"{place}: {path} is a model of type {model_type!r}; supported are {', '.join(MODEL_TYPES)}."


def _identity(text: Any) -> tuple[str, ...]:
    if isinstance(text, FileText):
        return ("path", str(Path(text.path).resolve()))
    if isinstance(text, HubText):
        return ("dataset", text.dataset, text.name or "", text.split)
    return ("builtin", text.builtin, str(text.people), str(text.seed))


def _merged(value: Any, changes: Any) -> Any:
    """Mappings merged key by key, as Snakemake's --config does; anything else replaced."""
    if isinstance(value, Mapping) and isinstance(changes, Mapping):
        return {**value, **{key: _merged(value.get(key), item) for key, item in changes.items()}}
    return changes
