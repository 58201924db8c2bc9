"""A checkpoint as an ordinary dense one: every replaced linear becomes the matrix that it multiplies by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from coppice.errors import UserError
from coppice.models import modules
from coppice.models.architectures.base import Architecture, architecture_of, blocks
from coppice.records.compression import Entries
from coppice.records.manifest import Manifest, Provenance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from coppice.models.checkpoint import load_model, read_manifest, save_checkpoint, stored_dtype


def export_dense(directory: Path, output: Path) -> None:
    """Writes a node as an ordinary dense checkpoint: every replaced linear becomes the matrix that it multiplies by.

    Raises UserError for a node that rounds more than its weights, and for one whose blocks are of different widths,
    which no dense checkpoint can express.
    """
    source, holder = read_manifest(directory), "a dense checkpoint"
    refuse_rounding(source, holder)
    model = load_model(directory, dtype=torch.float32)
    refuse_unequal_blocks(source, architecture_of(model), modules.describe_replacements(model), holder)
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


def refuse_unequal_blocks(manifest: Manifest, family: Architecture, entries: Entries, holder: str) -> None:
    """Raises UserError for a node whose blocks are of different widths; entries: of its linears in compression.json."""
    resized = [name for name, entry in entries.items() if "in_features" in entry]
    if indices := sorted({family.place(name)[0] for name in resized}):
        named = f"block {indices[0]} is" if len(indices) == 1 else f"blocks {', '.join(map(str, indices))} are"
        raise UserError(
            f"Of the node {manifest.node!r}, {named} narrower than the widest one, and {holder} holds blocks of one "
            "width only; load the node with transformers and trust_remote_code, or export the node from before that "
            "step."
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
