"""One pass over a node's model with a calibration set -> statistics, shared by every step that starts there.

Each of `KINDS` is gathered by the file of its name next to this one: `moments` of each distinct linear input, `blocks`
(how alike a block's input and output are), `gradients` (Taylor scores by unit). Its function `gather(model, tokens,
kept, device, output)` writes safetensors to a folder and returns, for each block, whose moments every linear shares.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from coppice import storage
from coppice.calibration.walk import as_tensors
from coppice.data.tokenizer import check_tokenizer
from coppice.data.windows import load_windows
from coppice.files import atomic_directory, fingerprint, sha256
from coppice.models.architectures.base import blocks
from coppice.models.checkpoint import computing_dtype, load_model, read_manifest, versions
from coppice.models.contracts import KINDS
from coppice.records.statistics import Statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Gather = Callable[[PreTrainedModel, Tensor, Tensor, str, Path], dict[str, dict[str, str]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=Path, help="folder of the node's checkpoint")
    parser.add_argument("--tokens", required=True, type=Path, help="folder of the calibration windows")
    parser.add_argument("--kind", required=True, choices=KINDS, help="what to gather")
    parser.add_argument("--output", required=True, type=Path, help="folder of the statistics")


def run(arguments: argparse.Namespace) -> None:
    calibrate(arguments.model, arguments.tokens, arguments.kind, arguments.output, arguments.device)


def _gather(kind: str) -> Gather:
    return importlib.import_module(f"coppice.calibration.{kind}").gather


def calibrate(model_directory: Path, tokens_directory: Path, kind: str, output: Path, device: str) -> None:
    """Gathers one kind of statistics and writes it, whole or not at all, with the fingerprints of what it came from."""
    started = time.monotonic()
    windows = load_windows(tokens_directory)
    check_tokenizer(model_directory, windows)
    model = load_model(model_directory, dtype=computing_dtype(model_directory, device))
    tokens, kept = as_tensors(windows)
    identity = {
        "kind": kind,
        "model_fingerprint": read_manifest(model_directory).fingerprint,
        "tokens_fingerprint": windows.manifest.fingerprint,
    }
    with atomic_directory(output) as temporary:
        aliases = _gather(kind)(model, tokens, kept, device, temporary)
        files = {path.name: sha256(path) for path in sorted(temporary.glob("*.safetensors"))}
        statistics = Statistics(
            **identity,
            fingerprint=fingerprint(identity),
            tokens=int(kept.sum()),
            blocks=len(blocks(model)),
            aliases=aliases,
            files=files,
            versions=versions(),
            wall_seconds=time.monotonic() - started,
        )
        storage.upload(temporary, files)
        statistics.write(temporary / "manifest.json")
