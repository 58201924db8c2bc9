"""config.json as loaders without Coppice need it, and the code that a checkpoint carries for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coppice.files import write_json
from coppice.models import layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# The name in `compression.json` of what a model does with its keys and values.
CACHE = "cache"
# The fields of a linear on a uniform integer grid in `compression.json`.
GRID_KEYS = {"type", "bits", "group_size", "symmetric"}


def write_config(model: PreTrainedModel, planned: dict[str, Any], dtype: torch.dtype, directory: Path) -> None:
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
    for line in ("from __future__ import annotations\n", "from coppice.models.layers import pack, unpack\n"):
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
