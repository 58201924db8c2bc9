"""`coppice evaluate`: measures a node, and writes metrics.json and items.parquet.

One evaluation loads the model once. An item row is an answer choice (or a scored document); `cost` has no items.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from coppice import storage
from coppice.errors import UserError
from coppice.files import atomic_directory, describe_files, fingerprint, json_object, read_json_object
from coppice.records.base import Json
from coppice.records.metrics import Item, Metric, Metrics

if TYPE_CHECKING:
    from coppice.data.biographies import World
    from coppice.data.windows import Windows
    from coppice.records.manifest import Manifest


class Measurement(NamedTuple):
    """Rows of metrics.json and items.parquet, and the fingerprint of each protocol's windows."""

    metrics: list[Json]
    items: list[Item]
    tokens_fingerprints: dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--node", required=True, help="the node's name")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the node's checkpoint")
    parser.add_argument("--name", required=True, metavar="EVALUATION", help="the evaluation's name")
    parser.add_argument("--evaluation", type=json_object, required=True, metavar="JSON", help="the evaluation")
    parser.add_argument(
        "--tokens",
        type=parse_protocol_directory,
        action="append",
        default=[],
        metavar="PROTOCOL=DIR",
        help="windows of a protocol of perplexity; once for each",
    )
    parser.add_argument(
        "--other", type=Path, metavar="DIR", help="connectivity: the checkpoint that the node is compared with"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")


def parse_protocol_directory(value: str) -> tuple[str, Path]:
    """PROTOCOL=DIR as a pair."""
    name, separator, directory = value.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{value!r} is not of the form PROTOCOL=DIR")
    return name, Path(directory)


def run(arguments: argparse.Namespace) -> None:
    evaluate(
        arguments.node,
        arguments.model,
        arguments.name,
        arguments.evaluation,
        dict(arguments.tokens),
        arguments.output,
        arguments.device,
        arguments.other,
    )


def evaluate(
    node: str,
    model: Path,
    name: str,
    evaluation: Mapping[str, Any],
    tokens: Mapping[str, Path],
    output: Path,
    device: str = "cpu",
    other: Path | None = None,
) -> None:
    """Measures the checkpoint `model` of `node` by `evaluation` and writes the results whole or not at all.

    `tokens` names the folder of windows of each protocol of perplexity; `other` is the checkpoint that a connectivity
    compares the node with. Raises UserError where windows are missing or stem from another tokenizer, and where a
    result is not finite.
    """
    from coppice.models import accounting, checkpoint

    started = time.monotonic()
    manifest = checkpoint.read_manifest(model)
    measures: dict[str, Callable[..., Measurement]] = {
        "quality": measure_quality,
        "cost": measure_cost,
        "connectivity": partial(measure_connectivity, other=other),
    }
    if (kind := evaluation.get("kind")) not in measures:
        raise UserError(f"The evaluation {name!r} has the kind {kind!r}; it must be one of {', '.join(measures)}.")
    metrics, items, fingerprints = measures[kind](model, manifest, evaluation, tokens, device)
    refuse_infinite(node, metrics, items)
    identity = {
        "node": node,
        "evaluation": name,
        "kind": kind,
        "model_fingerprint": manifest.fingerprint,
        **({"other_fingerprint": checkpoint.read_manifest(other).fingerprint} if other else {}),
        "tokens_fingerprints": fingerprints,
        "options": dict(evaluation),
        "device": device_name(device),
    }
    seconds, peak = time.monotonic() - started, accounting.peak_memory()
    with atomic_directory(output, last="metrics.json") as temporary:
        write_items([{"node": node, **item} for item in items], temporary / "items.parquet")
        files = describe_files(temporary)
        storage.upload(temporary, {name: entry.sha256 for name, entry in files.items()})
        record = Metrics(
            fingerprint=fingerprint(identity),
            **identity,
            metrics=[Metric.model_validate(row) for row in metrics],
            versions=versions(evaluation),
            wall_seconds=seconds,
            peak_memory_bytes=peak,
            files=files,
        )
        record.write(temporary / "metrics.json")


def measure_quality(
    model_directory: Path,
    manifest: Manifest,
    evaluation: Mapping[str, Any],
    tokens: Mapping[str, Path],
    device: str,
) -> Measurement:
    """Perplexities, hidden states, tasks, knowledge."""
    from coppice.evaluation import perplexity
    from coppice.models import checkpoint

    protocols = protocol_windows(model_directory, evaluation, tokens)
    tasks, with_knowledge = evaluation.get("tasks") or [], evaluation.get("knowledge")
    with_world = with_knowledge or "biographies" in tasks
    world = built_in_world(evaluation, protocols.values()) if with_world else None

    model = checkpoint.load_model(model_directory, device)
    metrics: list[Json] = []
    items: list[Item] = []

    def add(rows: tuple[list[Json], list[Item]]) -> None:
        metrics.extend(rows[0])
        items.extend(rows[1])

    for protocol, windows in protocols.items():
        add(perplexity.measure(model, windows, protocol))
    if options := evaluation.get("intrinsic"):
        from coppice.evaluation import intrinsic

        name = options["protocol"]
        metrics += intrinsic.measure(model, protocols[name], name, length=options["length"], most=options["windows"])
    if tasks:
        from transformers import AutoTokenizer

        from coppice.evaluation import harness

        add(
            harness.measure(
                model,
                AutoTokenizer.from_pretrained(model_directory),
                tasks,
                shots=evaluation.get("shots", 0),
                limit=evaluation.get("limit"),
                task_path=evaluation.get("task_path"),
                world=world,
            )
        )
    if with_knowledge:
        from coppice.evaluation import knowledge

        assert world is not None  # as `with_world` holds
        add(knowledge.measure(model, model_directory, manifest, world))
    return Measurement(metrics, items, {name: windows.manifest.fingerprint for name, windows in protocols.items()})


def measure_connectivity(
    model_directory: Path,
    manifest: Manifest,
    evaluation: Mapping[str, Any],
    tokens: Mapping[str, Path],
    device: str,
    other: Path | None,
) -> Measurement:
    """Mode connectivity with the checkpoint `other`; it has no items.

    Raises UserError where `other` is None, or the two cannot be compared.
    """
    from coppice.evaluation import connectivity
    from coppice.models import checkpoint

    if other is None:
        raise UserError("A connectivity compares two checkpoints; give the other one with `--other DIR`.")
    compared = checkpoint.read_manifest(other).node
    [(protocol, windows)] = protocol_windows(model_directory, evaluation, tokens).items()
    metrics = connectivity.measure(
        checkpoint.load_model(model_directory, device),
        checkpoint.load_model(other, device),
        windows,
        protocol,
        points=evaluation["points"],
        barrier=evaluation["barrier"],
        similarity=evaluation["similarity"],
    )
    rows: list[Json] = [{**row, "other": compared} for row in metrics]
    return Measurement(rows, [], {protocol: windows.manifest.fingerprint})


def protocol_windows(
    model_directory: Path, evaluation: Mapping[str, Any], tokens: Mapping[str, Path]
) -> dict[str, Windows]:
    """The windows of each protocol of perplexity. Raises UserError where they are missing or another tokenizer's."""
    from coppice.data.tokenizer import check_tokenizer
    from coppice.data.windows import load_windows

    protocols = {}
    for protocol in evaluation.get("perplexity") or {}:
        if protocol not in tokens:
            raise UserError(f"The protocol {protocol!r} has no windows; give them with `--tokens {protocol}=DIR`.")
        protocols[protocol] = load_windows(tokens[protocol])
        check_tokenizer(model_directory, protocols[protocol])
    return protocols


def measure_cost(
    model_directory: Path,
    manifest: Manifest,
    evaluation: Mapping[str, Any],
    tokens: Mapping[str, Path],
    device: str,
) -> Measurement:
    """Latency, throughput and memory; it has no items and reads no windows."""
    from coppice.evaluation import cost
    from coppice.models import checkpoint
    from coppice.models.architectures.base import architecture

    # The libraries' own memory does not count as the model's, so they are imported before the baseline is taken.
    architecture(read_json_object(storage.ensure_local(model_directory / "config.json"))["model_type"]).classes()
    baseline = cost.resident_bytes()
    model = checkpoint.load_model(model_directory, device)
    metrics = cost.measure(
        model,
        **{key: evaluation[key] for key in ("batch", "prompt", "generate", "repeats", "warmup")},
        baseline_memory=baseline,
        simulated=cost.is_simulated(model),
    )
    return Measurement(metrics, [], {})


def built_in_world(evaluation: Mapping[str, Any], windows: Iterable[Windows]) -> World:
    """The built-in world that the questions are about: the evaluation's `world`, else that of a protocol of perplexity.

    Raises UserError where neither names one, or protocols are about several.
    """
    from coppice.data import sources

    own = evaluation.get("world")
    texts = [own] if own else [each.manifest.text for each in windows if "builtin" in each.manifest.text]
    worlds = {fingerprint(text): text for text in texts}
    if len(worlds) != 1:
        reason = "its protocols of perplexity are about several worlds" if worlds else "no built-in text is named"
        raise UserError(
            f"The evaluation asks about the built-in world, but {reason}; give it a `world`, as in "
            "`world: {builtin: biographies, people: 1200}`."
        )
    return sources.world(next(iter(worlds.values())))


def refuse_infinite(node: str, metrics: Sequence[Json], items: Sequence[Item]) -> None:
    """Raises UserError, naming the node and the protocol or task, where a number is NaN or infinite."""
    for entry in [*metrics, *items]:
        numbers = [entry.get(key) for key in ("value", "stderr", "spread", "log_likelihood")]
        if not all(math.isfinite(number) for number in numbers if isinstance(number, int | float)):
            what = entry.get("task", entry.get("metric"))
            raise UserError(
                f"The node {node!r} gives numbers that are not finite in {what!r}; its weights are broken (trained "
                "with too high a learning rate, or compressed too far)."
            )


def write_items(items: Sequence[Item], path: Path) -> None:
    """Items as Parquet, typed even without items."""
    from coppice.records.arrow import schema_of, write_parquet

    write_parquet(path, items, schema_of(Item))


def device_name(device: str) -> str:
    """What the numbers were measured on: cpu, or the accelerator's name."""
    import torch

    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"


def versions(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """The versions of what measured; that of the harness where it did."""
    from importlib.metadata import version

    from coppice.models import checkpoint

    return checkpoint.versions() | ({"lm-eval": version("lm-eval")} if evaluation.get("tasks") else {})
