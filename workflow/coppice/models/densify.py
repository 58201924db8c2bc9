"""A checkpoint as an ordinary dense one: every replaced linear becomes the matrix that it multiplies by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from coppice.errors import UserError
from coppice.models import modules
from coppice.models.architectures.base import blocks
from coppice.records.manifest import Manifest, Provenance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from coppice.models.checkpoint import load_model, read_manifest, save_checkpoint, stored_dtype


def export_dense(directory: Path, output: Path) -> None:
    """Writes a node as an ordinary dense checkpoint: every replaced linear becomes the matrix that it multiplies by.

    Raises UserError for a node that rounds more than its weights, which no dense checkpoint can express.
    """
    source = read_manifest(directory)
    refuse_rounding(source, "a dense checkpoint")
    model = load_model(directory, dtype=torch.float32)
    densify(model)
    recorded = {name: getattr(source, name) for name in Provenance.model_fields}
    provenance = Provenance(**recorded | {"traits": []})
    save_checkpoint(model, output, directory, provenance, stored_dtype(directory), source.dense, upload=False)


def refuse_rounding(manifest: Manifest, holder: str) -> None:
    """Raises UserError for a node that rounds more than its weights; holder: the form that cannot express it."""
    rounded = {"quantized-activations": "the inputs of its linears", "quantized-cache": "its keys and values"}
    for trait, what in rounded.items():
        if trait in manifest.traits:
            raise UserError(
                f"The node {manifest.node!r} rounds {what} while it runs, which {holder} cannot hold; "
                "export the node from before that step."
            )


@torch.no_grad()
def densify(model: PreTrainedModel) -> None:
    """Puts an ordinary linear in the place of every stored form."""
    for block in blocks(model):
        for name, module in modules.replaceable_modules(block).items():
            if type(module) is torch.nn.Linear:
                modules.set_masked(module, False)
                continue
            weight = modules.effective_weight(module)
            dense = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            dense.weight = torch.nn.Parameter(weight)
            if module.bias is not None:
                dense.bias = torch.nn.Parameter(module.bias.detach())
            block.set_submodule(name, dense)
