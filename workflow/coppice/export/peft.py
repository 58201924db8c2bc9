"""To PEFT: the updates beside a node's linears as a LoRA adapter, and in `base/` the model without them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from coppice.compression.adapter import write_adapter
from coppice.export import compressed_tensors
from coppice.export.node import Node, Written, save_for_others
from coppice.files import read_json, write_json
from coppice.models import layers
from coppice.models.checkpoint import load_model
from coppice.models.densify import densify
from coppice.models.stock_formats import quantization_grids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HOLDER = "an adapter"
READER = "peft over transformers"
BASE = "base"


def reason_against(node: Node) -> str | None:
    """Why the node has no such form, and what to do instead."""
    compensated = node.of("Compensated")
    if not compensated:
        if node.manifest.step is not None and node.manifest.step.method == "lora":
            return "what its training updated is merged into its weights; export it to dense"
        return "it has no low-rank updates beside its linears, as eora and lora make them; export it to dense"
    factors = {name for kind in ("LowRank", "Skeleton", "TensorTrain") for name in node.of(kind)}
    inside = [name for name in compensated if any(name.startswith(f"{factor}.") for factor in factors)]
    if inside:
        return f"{inside[0]} is a factor, which a dense base does not have; export it to dense"
    return None


def write(node: Node, folder: Path) -> Written:
    model = load_model(node.folder, dtype=node.dtype)
    write_adapter(model, folder)
    described = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", {**described, "base_model_name_or_path": BASE})
    leave_out_updates(model)
    kept = {name: entry for name, entry in layers.describe_replacements(model).items() if entry["type"] != "Masked"}
    # While it puts weights together, transformers takes one grid for the whole model.
    if len(quantization_grids(kept)) == 1 and all(entry["type"] == "Quantized" for entry in kept.values()):
        compressed_tensors.save_packed(model, node, folder / BASE, dequantize=True)
    else:
        densify(model)
        save_for_others(model, node, folder / BASE)
    return Written(rounded=bool(kept))


def leave_out_updates(model: PreTrainedModel) -> None:
    """Puts the compressed linear alone in the place of each with an update beside it."""
    for block in layers.blocks(model):
        for name, module in layers.replaceable_modules(block).items():
            if isinstance(module, layers.LowRankCorrectedLinear):
                block.set_submodule(name, module.base)


def load(folder: Path) -> PreTrainedModel:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / BASE, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder)
