"""Low-rank corrections as a PEFT adapter of the parent's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from coppice.models import modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_adapter(model: PreTrainedModel, folder: Path) -> dict[str, Path]:
    """Writes the low-rank corrections as a PEFT adapter of the parent; returns the files by name in the node.

    PEFT scales a module by alpha / rank of that module; alpha equal to the rank, module by module, makes it 1.
    """
    from safetensors.torch import save_file

    tensors, ranks = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, modules.LowRankCorrectionLinear):
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = module.compensation.first.weight.float().contiguous()
            tensors[f"{prefix}.lora_B.weight"] = module.compensation.second.weight.float().contiguous()
            ranks[name] = module.compensation.first.out_features
    rank = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted(ranks),
        "bias": "none",
        "inference_mode": True,
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return {f"adapter/{path.name}": path for path in folder.iterdir()}
