"""To dense: an ordinary checkpoint of transformers, every replaced linear as its effective matrix."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from coppice.export.node import Node, Written
from coppice.models.densify import export_dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HOLDER = "a dense checkpoint"
READER = "transformers"


def reason_against(node: Node) -> str | None:
    """None: whatever computes in floats has a dense form."""
    return None


def write(node: Node, folder: Path) -> Written:
    export_dense(node.folder, folder)
    return Written(rounded=not all(form.keeps_linear for form in node.forms.values()))


def load(folder: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
