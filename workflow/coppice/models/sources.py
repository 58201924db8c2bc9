"""Dense roots: a local folder, a hub model at a pinned revision, or a model that Coppice ships."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

from coppice.errors import UserError
from coppice.files import json_object, read_json_object, sha256
from coppice.records.manifest import Provenance, Source

SHIPPED = Path(__file__).parents[3] / "resources" / "models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--node", required=True, help="the root's name in the study")
    parser.add_argument("--source", required=True, type=json_object, help="JSON: path, hub and revision, or shipped")
    parser.add_argument("--seed", type=int, default=0, help="the study's seed")
    parser.add_argument("--output", required=True, type=Path, help="folder of the checkpoint")


def run(arguments: argparse.Namespace) -> None:
    import_root(arguments.node, arguments.source, arguments.seed, arguments.output)


def import_root(node: str, source: Mapping[str, str], seed: int, output: Path) -> None:
    """Checks a dense model and writes it as a root's checkpoint, in the dtype that it has.

    Raises UserError when the architecture is not supported, the model is already quantized, keys are missing, a weight
    is not finite, or the hub cannot be reached.
    """
    import torch

    from coppice.models.checkpoint import build_model, load_weights, save_checkpoint, stored_dtype

    started = time.monotonic()
    folder = locate(source)
    config = read_json_object(folder / "config.json")
    if "quantization_config" in config:
        raise UserError(f"{folder} is already quantized; a root must be dense.")
    model = build_model(folder, config, {})
    load_weights(model, folder, None)
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name} in {folder} holds NaN or infinite values; a root must be finite.")
    check_tokenizer(folder, config["vocab_size"])
    provenance = Provenance(
        node=node,
        parent=None,
        step=None,
        seed=seed,
        traits=[],
        source=Source(**source, folder_config=config.get("_name_or_path")),
        source_files={path.name: sha256(path) for path in dense_files(folder)},
        requested={},
        achieved={},
        layers={},
        calibration=None,
        recovery=None,
        wall_seconds=time.monotonic() - started,
    )
    save_checkpoint(model, output, folder, provenance, stored_dtype(folder))


def dense_files(folder: Path) -> list[Path]:
    """The files of a model that a root depends on: its config, its tokenizer and its weights."""
    return sorted(
        file for pattern in ("config.json", "tokenizer.json", "*.safetensors") for file in folder.glob(pattern)
    )


def locate(source: Mapping[str, str]) -> Path:
    """The folder of a source; a hub model is downloaded first. Raises UserError when it cannot be downloaded."""
    if "shipped" in source:
        return SHIPPED / source["shipped"]
    if "path" in source:
        return Path(source["path"])
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*"]
    try:
        return Path(snapshot_download(source["hub"], revision=source["revision"], allow_patterns=patterns))
    except Exception as error:  # the hub's client raises a dozen types; each means that the model is unavailable
        raise UserError(
            f"Model {source['hub']} at revision {source['revision']} could not be downloaded "
            f"({type(error).__name__}); connect to the hub, or put it into the local cache first."
        ) from error


def check_tokenizer(folder: Path, vocabulary: int) -> None:
    """Raises UserError when the folder's tokenizer is missing or has ids beyond the model's vocabulary."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{folder} has no tokenizer.json; save the model with a fast tokenizer.")
    from tokenizers import Tokenizer

    largest = max(Tokenizer.from_file(str(path)).get_vocab().values())
    if largest >= vocabulary:
        raise UserError(
            f"The tokenizer in {folder} has ids up to {largest} but the model's vocabulary is {vocabulary}; "
            "they do not belong together."
        )
