"""To PEFT: the low-rank corrections of a node's linears as a LoRA adapter, and in `base/` the model without them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from coppice.export import compressed_tensors
from coppice.export.node import Node, Written, save_for_others
from coppice.files import read_json, write_json
from coppice.models import modules
from coppice.models.adapter import write_adapter
from coppice.models.architectures.base import blocks
from coppice.models.checkpoint import load_model
from coppice.models.densify import densify
from coppice.models.replacements import LowRankCorrection, form_of
from coppice.models.stock_formats import quantization_grids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HOLDER = "an adapter"
READER = "peft over transformers"
BASE = "base"


def reason_against(node: Node) -> str | None:
    """Why the node has no such form, and what to do instead."""
    corrected = [name for name, form in node.forms.items() if form is LowRankCorrection]
    if not corrected:
        if node.manifest.step is not None and node.manifest.step.method == "lora":
            return "what its training updated is merged into its weights; export it to dense"
        return "its linears have no low-rank corrections, which eora and lora make; export it to dense"
    factorized = {name for name, form in node.forms.items() if form.factorized}
    inside = [name for name in corrected if any(name.startswith(f"{outer}.") for outer in factorized)]
    if inside:
        return f"{inside[0]} is a factor, which a dense base does not have; export it to dense"
    return None


def write(node: Node, folder: Path) -> Written:
    model = load_model(node.folder, dtype=node.dtype)
    write_adapter(model, folder)
    described = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", {**described, "base_model_name_or_path": BASE})
    remove_corrections(model)
    entries = modules.describe_replacements(model)
    replaced = {name: entry for name, entry in entries.items() if not form_of(entry).keeps_linear}
    # While it puts weights together, transformers takes one grid for the whole model.
    if len(quantization_grids(replaced)) == 1 and all(form_of(entry).pack_quantized for entry in replaced.values()):
        compressed_tensors.save_packed(model, node, folder / BASE, dequantize=True)
    else:
        densify(model)
        save_for_others(model, node, folder / BASE)
    return Written(rounded=bool(replaced))


def remove_corrections(model: PreTrainedModel) -> None:
    """Puts the base of each linear with a low-rank correction in its place."""
    for block in blocks(model):
        for name, module in modules.replaceable_modules(block).items():
            if isinstance(module, modules.LowRankCorrectionLinear):
                block.set_submodule(name, module.base)


def load(folder: Path) -> PreTrainedModel:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / BASE, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder)
