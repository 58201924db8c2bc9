"""`evaluations`: how nodes are measured, in three kinds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeInt, PositiveInt, Tag, model_validator

from coppice.errors import did_you_mean
from coppice.study.schema import texts
from coppice.study.schema.section import Length, Section, unknown_name

if TYPE_CHECKING:
    from coppice.study.schema.study import Study

_NODES = "Patterns of the nodes that are measured; `*` matches any text."


class Protocol(Section):
    """Perplexity over windows of the role `evaluation` of a text."""

    text: str = Field(description="Name of a text.")
    length: Length = Field(default=2048, description="Tokens in a window.")
    windows: PositiveInt | None = Field(default=128, description="Number of windows; null: all there are.")
    pack: bool = Field(default=True, description="Fill windows with several documents; false gives each its own.")


class Intrinsic(Section):
    """Intrinsic-dimension metrics of the final hidden states, over texts cut to one length."""

    protocol: str = Field(description="Protocol of perplexity of the same evaluation, whose windows are the texts.")
    length: Length = Field(
        default=32, description="Tokens of a text: the first of each window; the metrics depend on it."
    )
    windows: PositiveInt = Field(default=64, description="Largest number of windows.")


class Quality(Section):
    """Perplexity, accuracy on tasks, and knowledge of a node."""

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
        "when the study has only one.",
    )
    intrinsic: Intrinsic | None = Field(
        default=None, description="Matrix entropy, effective rank and matrix nuclear norm of hidden states; null: none."
    )
    nodes: list[str] = Field(default=["*"], description=_NODES)

    @property
    def needs_world(self) -> bool:
        """Whether it asks about the biographies of a built-in text."""
        return self.knowledge or "biographies" in self.tasks

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
                f"`intrinsic` requests texts of {length} tokens, but the windows of the protocol {name!r} have "
                f"{self.perplexity[name].length}; shorten its `length`."
            )
        return self


class Cost(Section):
    """Size, latency and memory of a node."""

    kind: Literal["cost"] = Field(description="`cost`.")
    batch: PositiveInt = Field(default=1, description="Sequences in a batch.")
    prompt: PositiveInt = Field(default=128, description="Prompt length in tokens.")
    generate: PositiveInt = Field(default=32, description="Tokens to generate.")
    repeats: PositiveInt = Field(default=10, description="Number of measurements.")
    warmup: NonNegativeInt = Field(default=3, description="Runs before the first measurement.")
    nodes: list[str] = Field(default=["*"], description=_NODES)


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
        description="Error by which the path may exceed the mean of its ends while the two still count as connected.",
    )
    similarity: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="Least CKA of the logits at which the outputs of the two count as similar.",
    )
    nodes: list[str] = Field(
        default=["*"],
        description=f"{_NODES} Of the nodes that match, those trained with another seed than the study's are measured, "
        "without the quantized ones.",
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


def protocols(evaluation: Quality | Cost | Connectivity) -> dict[str, Protocol]:
    """The protocols of perplexity of an evaluation; a cost has none."""
    return {} if isinstance(evaluation, Cost) else evaluation.perplexity


def problems(study: Study) -> Iterator[str]:
    """A sentence for each evaluation whose texts, world or tasks are not there."""
    for name, evaluation in study.evaluations.items():
        place = f"evaluations.{name}"
        for protocol, body in protocols(evaluation).items():
            yield from texts.use_problems(study, f"{place}.perplexity.{protocol}.text", body.text, "evaluation")
        if isinstance(evaluation, Quality):
            yield from _world_problems(study, place, evaluation)
            if evaluation.task_path and not Path(evaluation.task_path).is_dir():
                yield f"{place}.task_path: {evaluation.task_path} is not a folder (looked in {Path.cwd()})."


def _world_problems(study: Study, place: str, evaluation: Quality) -> Iterator[str]:
    worlds = [name for name, text in study.texts.items() if isinstance(text, texts.BuiltinText)]
    if evaluation.world is not None and evaluation.world not in worlds:
        yield unknown_name(f"{place}.world", "built-in text", evaluation.world, worlds)
    elif evaluation.needs_world and evaluation.world is None and len(worlds) != 1:
        known = f"name one of {', '.join(worlds)} as its `world`" if worlds else "describe one under `texts`"
        yield f"{place} asks about the biographies of a built-in text; {known}."
