"""Checkpoints of nodes: Hugging Face form, safetensors, with a manifest that describes them.

A folder holds `config.json`, `model*.safetensors`, the tokenizer's files, `compression.json` (what takes the place of
each replaced module) and `manifest.json`, written last. A folder without a manifest, or whose files differ from it, is
refused.

Stock loaders read dense, masked, shorter, narrower and integer-quantized nodes. Any other node, such as one whose
blocks are of different widths, carries a model class, `modeling_coppice.py`, and copies of the modules that it is made
of, for loaders that trust remote code.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coppice import __version__, storage
from coppice.errors import UserError
from coppice.files import atomic_directory, describe_files, fingerprint, read_json_object, write_json
from coppice.models import modules
from coppice.models.modules.kv_cache import install_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from coppice.models.accounting import is_weights, peak_memory, sizes
from coppice.models.architectures.base import architecture, architecture_of
from coppice.models.stock_formats import write_config
from coppice.records.compression import CACHE, FILE, Entries, Entry, linear_entries, read_compression
from coppice.records.manifest import DenseParameters, Manifest, Provenance

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
PACKAGES = ("torch", "transformers", "safetensors")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint. Raises UserError where it is missing, damaged, or of a newer format."""
    return Manifest.read(Path(directory) / "manifest.json")


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Raises UserError when a file of the checkpoint is missing or its SHA-256 is not the manifest's.

    Where a store is named, such files are fetched from it.
    """
    for name, entry in manifest.files.items():
        path = Path(directory) / name
        if not storage.fetch_verified(path, entry.sha256):
            problem = "is not the file that its manifest describes" if path.exists() else "is missing"
            raise UserError(f"{path} {problem}; recompute the node {manifest.node!r}.")


def load_model(directory: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a checkpoint, in evaluation mode, with every replaced module in its place.

    Args:
        dtype: of the floating tensors; None for what suits the device (see `computing_dtype`).

    Raises:
        UserError: when a file differs from the manifest, or the weights from the modules that are to hold them.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    verify_files(directory, manifest)
    config = read_json_object(directory / "config.json")
    model = build_model(directory, config, read_compression(directory))
    load_weights(model, directory, dtype or computing_dtype(directory, device))
    return model.to(device)


def build_model(directory: Path, config: Mapping[str, Any], entries: Entries) -> PreTrainedModel:
    """The model that a config and the entries of compression.json describe, without values.

    It is on the meta device, but for rotary tables.
    """
    family = architecture(config.get("model_type", "none"))
    config_class, model_class = family.classes()
    # Instructions to other loaders are not part of the model.
    foreign = ("quantization_config", "auto_map", "compression")
    settings = config_class.from_dict({key: value for key, value in config.items() if key not in foreign})
    settings.name_or_path = str(directory)
    with torch.device("meta"):
        model = model_class(settings)
    model.set_submodule(family.rotary, type(model.get_submodule(family.rotary))(config=settings))
    modules.install(model, linear_entries(entries))
    if CACHE in entries:
        install_cache(model, {key: value for key, value in entries[CACHE].items() if key != "type"})
    return model.eval()


def load_weights(model: PreTrainedModel, directory: Path, dtype: torch.dtype | None) -> None:
    """Puts a folder's tensors into a model built on the meta device; memory-mapped when the dtype is the stored one.

    Raises UserError that names missing or unexpected keys, wrong shapes, or a broken file.
    """
    tied, head = model.config.tie_word_embeddings, architecture_of(model).head_weight
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if tied:
        expected.pop(head)
    state: dict[str, Tensor] = {}
    for path in weight_files(directory):
        for name, tensor in read_tensors(path).items():
            state[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    if tied:
        state.pop(head, None)
    problems = [f"{name} is missing" for name in expected.keys() - state.keys()]
    problems += [f"{name} is unexpected" for name in state.keys() - expected.keys()]
    problems += [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if problems:
        sentence = "; ".join(sorted(problems)[:5]) + ("; ..." if len(problems) > 5 else "")
        raise UserError(f"The weights in {directory} do not fit its config.json: {sentence}.")
    model.load_state_dict(state, strict=not tied, assign=True)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a folder. Raises UserError where it has none."""
    files = sorted(path for path in Path(directory).glob("*.safetensors") if is_weights(path.name))
    if not files:
        raise UserError(f"{directory} holds no model*.safetensors; other weight formats are not read.")
    return files


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, memory-mapped. Raises UserError when the file is broken."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); fetch it again or recompute it.") from error


def save_checkpoint(
    model: PreTrainedModel,
    directory: Path,
    tokenizer: Path,
    provenance: Provenance,
    dtype: torch.dtype,
    dense: DenseParameters | None = None,
    extra_files: dict[str, Path] | None = None,
    upload: bool = True,
) -> Manifest:
    """Writes a checkpoint, whole or not at all, and returns its manifest.

    Args:
        tokenizer: the folder whose tokenizer files are copied (the parent's).
        provenance: how the node was made; sizes, hashes, versions and memory are measured here.
        dtype: in which floating tensors are stored.
        dense: the parameters of the dense model that the node comes from; None for a dense model.
        extra_files: further files by the name that they get.
        upload: whether the files go to the store, where one is named; those of an export do not.
    """
    with atomic_directory(directory) as temporary:
        entries: dict[str, Entry] = {**modules.describe_replacements(model)}
        if hasattr(model.model, "cache_settings"):
            entries[CACHE] = {"type": "Cache", **model.model.cache_settings}
        tied, head = model.config.tie_word_embeddings, architecture_of(model).head_weight
        state = {
            name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
            for name, tensor in model.state_dict().items()
            if not (tied and name == head)
        }
        save_torch_state_dict(state, temporary, metadata={"format": "pt"})
        write_config(model, entries, dtype, temporary)
        write_json(temporary / FILE, entries)
        for name in TOKENIZER_FILES:
            if (Path(tokenizer) / name).exists():
                shutil.copyfile(Path(tokenizer) / name, temporary / name)
        for name, path in (extra_files or {}).items():
            (temporary / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, temporary / name)
        files = describe_files(temporary)
        digests = {name: entry.sha256 for name, entry in files.items()}
        identity = ("config.json", "compression.json", "model")
        manifest = Manifest(
            **dict(provenance),
            **dict(sizes(model, state, files, dense)),
            fingerprint=fingerprint({name: digest for name, digest in digests.items() if name.startswith(identity)}),
            files=files,
            versions=versions(),
            peak_memory_bytes=peak_memory(),
        )
        if upload:
            storage.upload(temporary, digests)
        manifest.write(temporary / "manifest.json")
    return manifest


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype in which a checkpoint's floating tensors are stored."""
    config = read_json_object(storage.ensure_local(Path(directory) / "config.json"))
    return DTYPES[config.get("dtype", config.get("torch_dtype", "float32"))]


def computing_dtype(directory: Path, device: str) -> torch.dtype:
    """The dtype to run a checkpoint's model in: float32 on the CPU, the stored one elsewhere."""
    return torch.float32 if torch.device(device).type == "cpu" else stored_dtype(directory)


@cache
def versions() -> dict[str, str]:
    """The versions of the software that writes a file."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "coppice": __version__, **packages}
