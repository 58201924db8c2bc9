"""To compressed-tensors: packed integers, as vLLM and transformers read them, and nothing else.

A node on an integer grid is stored so already. The export leaves out what only Coppice reads, and has its
`quantization_config` written by the library's own schema.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from coppice.export.node import Node, Written, save_for_others
from coppice.files import read_json, write_json
from coppice.models import modules
from coppice.models.architectures.base import blocks
from coppice.models.checkpoint import load_model
from coppice.models.replacements import LowRankCorrection
from coppice.models.stock_formats import quantization_grids, stock_loaders_read
from coppice.records.base import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HOLDER = "compressed-tensors"
READER = "transformers with compressed-tensors"
# Of weights alone, in vLLM's kernels for packed integers.
VLLM_BITS = {4, 8}


def reason_against(node: Node) -> str | None:
    """Why the node has no such form, and what to do instead."""
    others = {form for form in node.forms.values() if not (form.pack_quantized or form.keeps_linear)}
    if LowRankCorrection in others:
        return "its linears have low-rank corrections; export it to peft, which keeps a packed base with the adapter"
    if others:
        names = ", ".join(sorted(form.__name__ for form in others))
        return f"the format holds integer grids alone and the node holds {names}; export it to dense"
    if not packed_names(node):
        zeros = "its zeros are stored as numbers, and compressed-tensors 0.20 no longer compresses sparse weights"
        return f"{zeros if node.entries else 'none of its linears is quantized'}; export it to dense"
    if not stock_loaders_read(quantization_grids(node.entries)):
        return "transformers 5.23 reads zero points on one grid only and the node has several; export it to dense"
    return None


def write(node: Node, folder: Path) -> Written:
    model = load_model(node.folder, dtype=node.dtype)
    save_packed(model, node, folder)
    beyond = {node.entries[name]["bits"] for name in packed_names(node)} - VLLM_BITS
    note = f"vLLM's kernels take 4 or 8 bits, not {', '.join(map(str, sorted(beyond)))}; transformers reads the export."
    # Readers put a weight together in the type of its scales.
    return Written(rounded=True, notes=(note,) if beyond else ())


def packed_names(node: Node) -> list[str]:
    """The linears that are stored as packed integers, by name."""
    return [name for name, form in node.forms.items() if form.pack_quantized]


def save_packed(model: PreTrainedModel, node: Node, folder: Path, dequantize: bool = False) -> None:
    """Writes a model whose replaced linears are all on integer grids, without what only Coppice reads.

    dequantize: whether transformers is to put the weights together as it loads them, which it has to for zero points,
    and for whoever attaches something to the linears. Other programs pass over that key.
    """
    linears = modules.weight_matrices(blocks(model))
    for linear in linears.values():
        modules.set_masked(linear, False)
    entries = modules.describe_replacements(model)
    grids = quantization_grids(entries)
    save_for_others(model, node, folder)
    described = quantization_config(grids, every_linear=len(entries) == len(linears))
    if dequantize or not all(symmetric for _, _, symmetric in grids):
        described["dequantize"] = True
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "quantization_config": described})


def quantization_config(grids: dict[tuple[int, int, bool], list[str]], every_linear: bool) -> Json:
    """The library's description of grids (see `stock_formats.quantization_grids`).

    every_linear: whether all linears of the blocks are on a grid, so that a single one names them all.
    """
    from compressed_tensors import __version__
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    groups = {}
    for index, ((bits, size, symmetric), names) in enumerate(sorted(grids.items())):
        strategy = {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
        groups[f"group_{index}"] = QuantizationScheme(
            targets=["Linear"] if every_linear and len(grids) == 1 else names,
            weights=QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **strategy),
            format="pack-quantized",
        )
    described = QuantizationConfig(
        config_groups=groups, format="pack-quantized", quantization_status="compressed", ignore=["lm_head"]
    )
    return {**described.model_dump(mode="json"), "version": __version__}


def load(folder: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
