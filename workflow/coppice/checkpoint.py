"""Checkpoints of nodes: Hugging Face form, safetensors, with a manifest that says what they are.

A folder holds `config.json`, `model*.safetensors`, the tokenizer's files, `compression.json` (what stands at each
replaced module) and `manifest.json`, written last. A folder without a manifest, or whose files differ from it, is
refused.

Stock loaders read dense, masked, shorter, narrower and integer-quantized nodes. A node with factors carries, as
`modeling_coppice.py`, a copy of `layers.py` and a model class, for loaders that are told to trust it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import resource
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coppice import __version__, layers, store
from coppice.errors import UserError
from coppice.files import atomic_directory, described, fingerprint, read_json, write_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
PACKAGES = ("torch", "transformers", "safetensors")
FORMAT_VERSION = 1
# The fields of a linear on a uniform integer grid in `compression.json`.
GRID_KEYS = {"type", "bits", "group_size", "symmetric"}
# The name in `compression.json` of what a model does with its keys and values.
CACHE = "cache"


def architecture(model_type: str) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """The config and model classes of a supported architecture. Raises UserError for any other."""
    if model_type not in ARCHITECTURES:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"Architecture {model_type!r} is not supported; supported are {supported}.")
    name = ARCHITECTURES[model_type]
    package = f"transformers.models.{model_type}"
    # The submodules are imported rather than transformers' Auto classes, which cost a second more at every start.
    config = importlib.import_module(f"{package}.configuration_{model_type}")
    modeling = importlib.import_module(f"{package}.modeling_{model_type}")
    return getattr(config, f"{name}Config"), getattr(modeling, f"{name}ForCausalLM")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises UserError when there is none, or it is of another format."""
    manifest = read_json(Path(directory) / "manifest.json")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{directory}/manifest.json has format {manifest.get('format_version')}, this version reads "
            f"{FORMAT_VERSION}; make the node again."
        )
    return manifest


def verify_files(directory: Path, manifest: dict[str, Any]) -> None:
    """Raises UserError when a file of the checkpoint is missing or its SHA-256 is not the manifest's.

    Where a store is named, such files are fetched from it.
    """
    for name, entry in manifest["files"].items():
        path = Path(directory) / name
        if not store.obtain(path, entry["sha256"]):
            problem = "is not the file that its manifest describes" if path.exists() else "is missing"
            raise UserError(f"{path} {problem}; make the node {manifest['node']!r} again.")


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
    config = read_json(directory / "config.json")
    model = build(directory, config, read_json(directory / "compression.json"))
    fill(model, directory, dtype or computing_dtype(directory, device))
    return model.to(device)


def build(directory: Path, config: dict[str, Any], planned: dict[str, dict[str, Any]]) -> PreTrainedModel:
    """The model that a config and a plan describe, without values (on the meta device, but for rotary tables)."""
    config_class, model_class = architecture(config.get("model_type", "none"))
    # What tells other loaders how to read this folder is no part of the model.
    foreign = ("quantization_config", "auto_map", "compression")
    settings = config_class.from_dict({key: value for key, value in config.items() if key not in foreign})
    settings.name_or_path = str(directory)
    with torch.device("meta"):
        model = model_class(settings)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=settings)
    layers.install(model, {name: entry for name, entry in planned.items() if name != CACHE})
    if CACHE in planned:
        from coppice.kv_cache import install_cache

        install_cache(model, {key: value for key, value in planned[CACHE].items() if key != "type"})
    return model.eval()


def fill(model: PreTrainedModel, directory: Path, dtype: torch.dtype | None) -> None:
    """Puts a folder's tensors into a model built on the meta device; memory-mapped when the dtype is the stored one.

    Raises UserError that names missing or unexpected keys, wrong shapes, or a broken file.
    """
    tied = model.config.tie_word_embeddings
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if tied:
        expected.pop("lm_head.weight")
    state: dict[str, Tensor] = {}
    for path in weight_files(directory):
        for name, tensor in read_tensors(path).items():
            state[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    if tied:
        state.pop("lm_head.weight", None)
    problems = [f"{name} is missing" for name in expected.keys() - state.keys()]
    problems += [f"{name} is unexpected" for name in state.keys() - expected.keys()]
    problems += [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if problems:
        listed = "; ".join(sorted(problems)[:5]) + ("; ..." if len(problems) > 5 else "")
        raise UserError(f"The weights in {directory} do not fit its config.json: {listed}.")
    model.load_state_dict(state, strict=not tied, assign=True)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a folder. Raises UserError when there is none."""
    found = sorted(path for path in Path(directory).glob("*.safetensors") if _is_weights(path.name))
    if not found:
        raise UserError(f"{directory} holds no model*.safetensors; other weight formats are not read.")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, memory-mapped. Raises UserError when the file is broken."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); fetch or make it again.") from error


def save_checkpoint(
    model: PreTrainedModel,
    directory: Path,
    tokenizer: Path,
    manifest: dict[str, Any],
    dtype: torch.dtype,
    extra_files: dict[str, Path] | None = None,
    travels: bool = True,
) -> dict[str, Any]:
    """Writes a checkpoint, whole or not at all, and returns its manifest.

    Args:
        tokenizer: the folder whose tokenizer files are copied (the parent's).
        manifest: what the caller knows of the node (node, parent, step, seed, marks, source ...); sizes, hashes and
            versions are added here. `dense` holds the root's numbers, or is absent for a root.
        dtype: in which floating tensors are stored.
        extra_files: further files by the name that they get.
        travels: whether the files go to the store, where one is named; those of an export do not.
    """
    with atomic_directory(directory) as temporary:
        planned = layers.plan(model)
        if hasattr(model.model, "cache_settings"):
            planned[CACHE] = {"type": "Cache", **model.model.cache_settings}
        tied = model.config.tie_word_embeddings
        state = {
            name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
            for name, tensor in model.state_dict().items()
            if not (tied and name == "lm_head.weight")
        }
        save_torch_state_dict(state, temporary, metadata={"format": "pt"})
        _write_config(model, planned, dtype, temporary)
        write_json(temporary / "compression.json", planned)
        for name in TOKENIZER_FILES:
            if (Path(tokenizer) / name).exists():
                shutil.copyfile(Path(tokenizer) / name, temporary / name)
        for name, path in (extra_files or {}).items():
            (temporary / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, temporary / name)
        files = described(temporary)
        identity = ("config.json", "compression.json", "model")
        written = {
            "format_version": FORMAT_VERSION,
            **manifest,
            **sizes(model, state, files, manifest.get("dense")),
            "fingerprint": fingerprint({k: v["sha256"] for k, v in files.items() if k.startswith(identity)}),
            "files": files,
            "versions": versions(),
            "peak_memory_bytes": peak_memory(),
        }
        if travels:
            store.send(temporary, files)
        write_json(temporary / "manifest.json", written)
    return written


def sizes(
    model: PreTrainedModel, state: dict[str, Tensor], files: dict[str, Any], dense: dict[str, int] | None
) -> dict[str, Any]:
    """The accounting of a node; the same for every method.

    parameters: how many numbers the model multiplies by (a quantized weight counts as one, a pruned but stored zero
    too; `nonzero` leaves zeros out); decoder_linears: those in the blocks' linears. stored_bytes: of the weight files.
    bits_per_weight: stored bits of all tensors by the parameters of the dense root; bits_per_linear_weight: stored bits
    of the blocks' linears (scales and zero points included) by the weights that the dense root has there.
    rho: 1 - parameters / dense parameters; rho_blocks: the same within the blocks; rho_nonzero: with non-zeros.
    """
    linear_weights = linear_zeros = 0
    linear_prefixes = []
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            count = module.in_features * module.out_features
            linear_weights += count
            linear_zeros += int((module.weight == 0).sum())
            linear_prefixes.append(f"model.layers.{name}.")
    packed = {name: module for name, module in model.named_modules() if isinstance(module, layers.PACKED)}
    packed_weights = sum(module.in_features * module.out_features for module in packed.values())
    # Of a packed linear, all but the bias stands for its weights.
    packed_tensors = {f"{name}.{buffer}" for name, module in packed.items() for buffer, _ in module.named_buffers()}
    total = packed_weights + sum(tensor.numel() for name, tensor in state.items() if name not in packed_tensors)
    in_blocks = total - sum(tensor.numel() for name, tensor in state.items() if not name.startswith("model.layers."))
    bytes_of = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    linear_bytes = sum(size for name, size in bytes_of.items() if name.startswith(tuple(linear_prefixes)))
    dense = dense or {"total": total, "blocks": in_blocks, "decoder_linears": linear_weights}
    return {
        "parameters": {
            "total": total,
            "blocks": in_blocks,
            "decoder_linears": linear_weights,
            "nonzero": total - linear_zeros,
        },
        "dense": dense,
        "dense_parameters": dense["total"],
        "stored_bytes": sum(entry["bytes"] for name, entry in files.items() if _is_weights(name)),
        "stored_bits": {"total": 8 * sum(bytes_of.values()), "decoder_linears": 8 * linear_bytes},
        "bits_per_weight": 8 * sum(bytes_of.values()) / dense["total"],
        "bits_per_linear_weight": 8 * linear_bytes / dense["decoder_linears"],
        "rho": 1 - total / dense["total"],
        "rho_blocks": 1 - in_blocks / dense["blocks"],
        "rho_nonzero": 1 - (total - linear_zeros) / dense["total"],
    }


def _is_weights(name: str) -> bool:
    return name.startswith("model") and name.endswith(".safetensors")


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype in which a checkpoint's floating tensors are stored."""
    config = read_json(store.local(Path(directory) / "config.json"))
    return DTYPES[config.get("dtype", config.get("torch_dtype", "float32"))]


def computing_dtype(directory: Path, device: str) -> torch.dtype:
    """The dtype to run a checkpoint's model in: float32 on the CPU, the stored one elsewhere."""
    return torch.float32 if torch.device(device).type == "cpu" else stored_dtype(directory)


@cache
def versions() -> dict[str, str]:
    """The versions of what made a file."""
    installed = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "coppice": __version__, **installed}


def peak_memory() -> int:
    """The most bytes that this process has held: resident on the CPU, plus allocated on CUDA."""
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return resident + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def export_dense(directory: Path, output: Path) -> None:
    """Writes a node as an ordinary dense checkpoint: every replaced linear becomes the matrix that it stands for.

    Raises UserError for a node that rounds more than its weights, which no dense checkpoint can say.
    """
    source = read_manifest(directory)
    refuse_rounding(source, "a dense checkpoint")
    model = load_model(directory, dtype=torch.float32)
    densify(model)
    kept = ("node", "parent", "step", "seed", "source", "dense", "recovery")
    manifest = {**{key: source.get(key) for key in kept}, "marks": [], "exported_from": source["fingerprint"]}
    save_checkpoint(model, output, directory, manifest, stored_dtype(directory), travels=False)


def refuse_rounding(manifest: dict[str, Any], holder: str) -> None:
    """Raises UserError for a node that rounds more than its weights; holder: the form that cannot say so."""
    for mark, what in (("quantized-inputs", "the inputs of its linears"), ("quantized-cache", "its keys and values")):
        if mark in manifest["marks"]:
            raise UserError(
                f"The node {manifest['node']!r} rounds {what} while it runs, which {holder} cannot hold; "
                "export the node from before that step."
            )


@torch.no_grad()
def densify(model: PreTrainedModel) -> None:
    """Puts an ordinary linear in the place of every composite and quantized one."""
    for block in layers.blocks(model):
        for name, module in layers.linears(block).items():
            if type(module) is torch.nn.Linear:
                module.masked = False
                continue
            weight = layers.effective_weight(module)
            dense = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            dense.weight = torch.nn.Parameter(weight)
            if module.bias is not None:
                dense.bias = torch.nn.Parameter(module.bias.detach())
            block.set_submodule(name, dense)


def _write_config(model: PreTrainedModel, planned: dict[str, Any], dtype: torch.dtype, directory: Path) -> None:
    """config.json, with what a stock loader needs to know of packed or factorized linears."""
    config = model.config
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    written = config.to_dict()
    written["dtype"] = str(dtype).removeprefix("torch.")
    if any(entry["type"] != "Masked" or "rounded_inputs" in entry for entry in planned.values()):
        grids = quantization_grids(planned)
        if all(entry.keys() == GRID_KEYS for entry in planned.values()) and stock_loaders_read(grids):
            written["quantization_config"] = _compressed_tensors(grids)
        else:
            written["compression"] = planned
            written["auto_map"] = {"AutoModelForCausalLM": "modeling_coppice.CompressedForCausalLM"}
            (directory / "modeling_coppice.py").write_text(_carried_code(type(model).__name__), encoding="utf-8")
    write_json(directory / "config.json", {k: v for k, v in written.items() if k != "_name_or_path"})
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)


def quantization_grids(planned: dict[str, Any]) -> dict[tuple[int, int, bool], list[str]]:
    """(bits, group_size, symmetric) -> the modules on that grid."""
    grids: dict[tuple[int, int, bool], list[str]] = {}
    for name, entry in planned.items():
        if entry["type"] == "Quantized":
            grids.setdefault((entry["bits"], entry["group_size"], entry["symmetric"]), []).append(name)
    return grids


def stock_loaders_read(grids: dict[tuple[int, int, bool], list[str]]) -> bool:
    """Whether transformers can load a model on these grids.

    transformers 5.23 with compressed-tensors 0.20 reads packed zero points only while it dequantizes, and then takes
    one grid for the whole model.
    """
    return len(grids) == 1 or all(symmetric for _, _, symmetric in grids)


def _compressed_tensors(grids: dict[tuple[int, int, bool], list[str]]) -> dict[str, Any]:
    """The quantization_config of compressed-tensors: one group of modules for each grid."""
    described = {}
    for index, ((bits, size, symmetric), targets) in enumerate(sorted(grids.items())):
        strategy = {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
        weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
        described[f"group_{index}"] = {"targets": targets, "weights": weights, "format": "pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "dequantize": not all(symmetric for _, _, symmetric in grids),
        "config_groups": described,
        "ignore": ["lm_head"],
    }


def _carried_code(model_class: str) -> str:
    """`layers.py`, `kv_cache.py` and a class that installs what a checkpoint holds, for loaders without Coppice."""
    directory = Path(layers.__file__).parent
    cache = (directory / "kv_cache.py").read_text(encoding="utf-8")
    # One file cannot begin twice: what the second has at its head, the first has imported.
    for line in ("from __future__ import annotations\n", "from coppice.layers import pack, unpack\n"):
        cache = cache.replace(line, "", 1)
    return (
        Path(layers.__file__).read_text(encoding="utf-8")
        + "\n\n"
        + cache
        + f'''

from transformers import {model_class} as DenseForCausalLM  # noqa: E402


class CompressedForCausalLM(DenseForCausalLM):
    """The dense architecture with what config.json names under `compression`: modules in place of its linears, and how
    it keeps keys and values."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        planned = dict(config.compression)
        cache = planned.pop("{CACHE}", None)
        install(self, planned)
        if cache is not None:
            install_cache(self, {{key: value for key, value in cache.items() if key != "type"}})
'''
    )
