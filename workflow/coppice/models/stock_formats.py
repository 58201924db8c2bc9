"""config.json as loaders without Coppice need it, and the code that a checkpoint carries for them."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.dynamic_module_utils import get_relative_import_files

from coppice.files import write_json
from coppice.models import modules
from coppice.models.modules.kv_cache import install_cache
from coppice.models.replacements import form_of
from coppice.records.base import Json
from coppice.records.compression import CACHE, Entries, Entry, linear_entries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The fields of a linear on a uniform integer grid in `compression.json`.
GRID_KEYS = {"type", "bits", "group_size", "symmetric"}
CARRIED = "modeling_coppice"


def write_config(model: PreTrainedModel, entries: Entries, dtype: torch.dtype, directory: Path) -> None:
    """config.json, with what a stock loader needs to know of packed or factorized linears.

    entries: of compression.json.
    """
    config = model.config
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    content = config.to_dict()
    content["dtype"] = str(dtype).removeprefix("torch.")
    linears = linear_entries(entries)
    if CACHE in entries or not all(is_ordinary(entry) for entry in linears.values()):
        grids = quantization_grids(linears)
        if all(entry.keys() == GRID_KEYS for entry in entries.values()) and stock_loaders_read(grids):
            content["quantization_config"] = _compressed_tensors_config(grids)
        else:
            content["compression"] = entries
            content["auto_map"] = {"AutoModelForCausalLM": f"{CARRIED}.CompressedForCausalLM"}
            carry_code(type(model).__name__, linears, directory)
    write_json(directory / "config.json", {k: v for k, v in content.items() if k != "_name_or_path"})
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)


def is_ordinary(entry: Entry) -> bool:
    """Whether a linear stays one of its shape in config.json whose weight and inputs are ordinary numbers, masked or
    not."""
    return form_of(entry).keeps_linear and entry.keys() == {"type"}


def quantization_grids(entries: Entries) -> dict[tuple[int, int, bool], list[str]]:
    """(bits, group_size, symmetric) -> the linears that are stored packed on that grid, by name."""
    grids: dict[tuple[int, int, bool], list[str]] = {}
    for name, entry in entries.items():
        if form_of(entry).pack_quantized:
            grids.setdefault((entry["bits"], entry["group_size"], entry["symmetric"]), []).append(name)
    return grids


def stock_loaders_read(grids: dict[tuple[int, int, bool], list[str]]) -> bool:
    """Whether transformers can load a model on these grids.

    transformers 5.23 with compressed-tensors 0.20 reads packed zero points only while it dequantizes, and then takes
    one grid for the whole model.
    """
    return len(grids) == 1 or all(symmetric for _, _, symmetric in grids)


def _compressed_tensors_config(grids: dict[tuple[int, int, bool], list[str]]) -> Json:
    """The quantization_config of compressed-tensors: one group of modules for each grid."""
    groups: Json = {}
    for index, ((bits, size, symmetric), targets) in enumerate(sorted(grids.items())):
        strategy: Json = {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
        weights: Json = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
        groups[f"group_{index}"] = {"targets": [*targets], "weights": weights, "format": "pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "dequantize": not all(symmetric for _, _, symmetric in grids),
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def carry_code(model_class: str, entries: Entries, directory: Path) -> None:
    """Writes what loaders without Coppice need to build the model: a class that installs what config.json names, and
    copies of the files of `coppice.models.modules` that it imports.

    entries: those of linears in compression.json.
    """
    kinds = sorted({entry["type"] for entry in entries.values() if not form_of(entry).keeps_linear})
    # By file and name. Importing a form registers it.
    imported = [(inspect.getfile(modules.FORMS[kind]), modules.FORMS[kind].__name__) for kind in kinds]
    imported += [(inspect.getfile(each), each.__name__) for each in (modules.install, install_cache)]
    for file in {file for used, _ in imported for file in (used, *get_relative_import_files(used))}:
        shutil.copyfile(file, directory / Path(file).name)
    imports = "\n".join(f"from .{Path(file).stem} import {name}" for file, name in sorted(imported))
    code = f'''"""The dense architecture with compressed linears and caches; written by Coppice."""

from transformers import {model_class} as DenseForCausalLM

{imports}


class CompressedForCausalLM(DenseForCausalLM):
    """The dense architecture with what config.json names under `compression`: modules in place of its linears, and how
    it keeps keys and values."""

    def __init__(self, config):
        super().__init__(config)
        entries = dict(config.compression)
        cache = entries.pop("{CACHE}", None)
        install(self, entries)
        if cache is not None:
            install_cache(self, {{key: value for key, value in cache.items() if key != "type"}})
'''
    (directory / f"{CARRIED}.py").write_text(code, encoding="utf-8")
