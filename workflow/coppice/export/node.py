"""What the formats need to know of a node, and what each of them answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from coppice import storage
from coppice.files import read_json
from coppice.models.checkpoint import read_manifest, save_checkpoint, stored_dtype
from coppice.records.manifest import Manifest, Provenance

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Node:
    """A checkpoint's folder and what stands in it: config.json, compression.json and manifest.json."""

    folder: Path
    manifest: Manifest
    config: dict[str, Any]
    planned: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        return self.manifest.node

    @property
    def dtype(self) -> torch.dtype:
        """In which its floating tensors are stored."""
        return stored_dtype(self.folder)

    def of(self, kind: str) -> list[str]:
        """The modules of a type of `coppice.layers`, by name."""
        return [name for name, entry in self.planned.items() if entry["type"] == kind]


class Written(NamedTuple):
    """rounded: whether the export's reader multiplies by weights that were rounded to the stored type anew, where the
    node multiplies by what they stand for; notes: sentences that the user is to read."""

    rounded: bool
    notes: tuple[str, ...] = ()


def read_node(folder: Path) -> Node:
    """Raises UserError when the folder is no checkpoint."""
    manifest = read_manifest(folder)
    config, planned = (read_json(storage.ensure_local(folder / name)) for name in ("config.json", "compression.json"))
    return Node(folder, manifest, config, planned)


def save_for_others(model: PreTrainedModel, node: Node, folder: Path) -> None:
    """Writes a model that was made from a node as a checkpoint, without the two files that only Coppice reads."""
    provenance = Provenance(**{name: getattr(node.manifest, name) for name in Provenance.model_fields})
    save_checkpoint(model, folder, node.folder, provenance, node.dtype, node.manifest.dense, travels=False)
    for name in ("compression.json", "manifest.json"):
        (folder / name).unlink()
