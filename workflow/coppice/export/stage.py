"""`coppice export`: a node in a form that other programs read, checked against the node's own logits."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice.errors import UserError
from coppice.files import atomic_directory, read_json, write_json
from coppice.formatting import number
from coppice.records.base import Json
from coppice.records.layout import ResultsLayout
from coppice.results.lookup import complete_node

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from coppice.export.check import Difference, Tolerance
    from coppice.records.manifest import Manifest

FORMATS = {
    "dense": "coppice.export.dense",
    "compressed-tensors": "coppice.export.compressed_tensors",
    "peft": "coppice.export.peft",
    "gguf": "coppice.export.gguf",
}
RECORD = "export.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("node", nargs="?", help="the node's name, or the end of it, with --results")
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder of the study's results")
    parser.add_argument("--model", type=Path, metavar="DIR", help="folder of a checkpoint, instead of a node's name")
    parser.add_argument("--to", choices=FORMATS, default="dense", help="the form (default: dense)")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="NATS",
        help="largest difference of log-probabilities (default: 0.001; 1 where weights are rounded to bfloat16 again)",
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.tolerance is not None and not arguments.tolerance >= 0:
        raise UserError(f"--tolerance {arguments.tolerance:g} means nothing; pass nats, 0 or more.")
    folder = source_folder(arguments.node, arguments.results, arguments.model)
    try:
        export(folder, arguments.to, arguments.output, arguments.tolerance)
    except OSError as error:
        raise UserError(f"{error.filename or arguments.output}: {error.strerror}; pass another --output.") from error


def source_folder(node: str | None, results: Path | None, model: Path | None) -> Path:
    """The checkpoint that the arguments name, a node as `coppice show` takes it.

    Raises UserError unless it is a node of results that was made, or a folder.
    """
    if model is not None and node is None and results is None:
        return model
    if model is None and node is not None and results is not None:
        return ResultsLayout(results).checkpoint(complete_node(results, node))
    raise UserError("Pass a node's name and --results, or --model with the folder of a checkpoint, and not both.")


def export(folder: Path, to: str, output: Path, tolerance: float | None = None) -> Difference:
    """Writes the checkpoint of `folder` as `to`, one of `FORMATS`, and prints how close its logits are.

    tolerance: the largest difference of log-probabilities [nats], the only test then; None for those of `check`.
    Raises UserError, and writes nothing, when the node has no such form, the folder to write holds something
    else, the format's own reader cannot read the export, or it gives other logits.
    """
    from coppice.export import check
    from coppice.export.node import read_node
    from coppice.models.architectures.base import architecture
    from coppice.models.densify import refuse_rounding, refuse_unequal_blocks

    node, form = read_node(folder), import_module(FORMATS[to])
    refuse_rounding(node.manifest, form.HOLDER)
    refuse_unequal_blocks(node.manifest, architecture(node.config["model_type"]), node.entries, form.HOLDER)
    reason = form.reason_against(node)
    if reason is not None:
        raise UserError(f"The node {node.name!r} cannot go to {to}, because {reason}.")
    refuse_other_files(output, to)
    with remove_on_failure(output), atomic_directory(output, last=RECORD) as temporary:
        inputs, ours = check.of_node(folder)
        written = form.write(node, temporary)
        difference = check.compute_difference(ours, check.log_probabilities(load_with_reader(form, temporary), inputs))
        limit = check.tolerance(written.rounded, node.dtype)
        if tolerance is not None:
            limit = check.Tolerance(tolerance, math.inf)
        if not check.within(difference, limit):
            raise UserError(
                f"The export of {node.name!r} to {to} gives other logits than the node: "
                f"{describe_difference(difference, limit)}. Nothing was written; pass a wider --tolerance if "
                "that is close enough."
            )
        write_json(temporary / RECORD, record(node.manifest, to, form.READER, difference, limit))
    print(
        f"{output}: {node.name} as {to}, read back by {form.READER}. Over {difference.tokens} tokens, "
        f"{describe_difference(difference, limit)}."
    )
    for note in written.notes:
        print(note)
    return difference


def describe_difference(difference: Difference, limit: Tolerance) -> str:
    """A difference and its tolerance in words."""
    words = f"log-probabilities differ by up to {number(difference.largest)} nats (tolerance {limit.largest:g})"
    words += f", and the divergence is {number(difference.divergence)} nats a token"
    return words if limit.divergence == math.inf else f"{words} (tolerance {limit.divergence:g})"


def record(manifest: Manifest, to: str, reader: str, difference: Difference, limit: Tolerance) -> Json:
    """The content of `export.json`: what was exported, and how it was checked."""
    return {
        "format": to,
        "node": manifest.node,
        "fingerprint": manifest.fingerprint,
        "read_back_by": reader,
        "difference": asdict(difference),
        "tolerance": {name: value for name, value in asdict(limit).items() if value != math.inf},
        "versions": dict(manifest.versions),
    }


def load_with_reader(form: Any, folder: Path) -> PreTrainedModel:
    """The model that the format's own reader makes of an export. Raises UserError with its reason when it cannot."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # Readers report each tensor there, even so.
        with redirect_stderr(StringIO()):
            return form.load(folder)
    except Exception as error:  # each reader raises types of its own; all mean that the export is of no use
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(f"{form.READER} cannot read the export ({reason}). Nothing was written.") from error


def refuse_other_files(output: Path, to: str) -> None:
    """Raises UserError when the folder to write holds anything but an earlier export of this format."""
    if output.is_file():
        raise UserError(f"{output} is a file; pass a folder to write.")
    # What a killed export left is removed with the next one.
    if not output.exists() or all(path.name.startswith(".partial-") for path in output.iterdir()):
        return
    if not (output / RECORD).exists() or read_json(output / RECORD)["format"] != to:
        raise UserError(f"{output} holds other files; pass an empty folder, or one of an earlier export to {to}.")


@contextmanager
def remove_on_failure(output: Path) -> Iterator[None]:
    """Removes the folder after an error, if it was not there before."""
    existed = output.exists()
    try:
        yield
    except BaseException:
        if not existed and output.exists():
            output.rmdir()
        raise
