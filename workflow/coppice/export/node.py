"""The input of the export formats, and the result of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from coppice import storage
from coppice.files import read_json_object
from coppice.models.checkpoint import read_manifest, save_checkpoint, stored_dtype
from coppice.models.replacements import Replacement, form_of
from coppice.records.compression import Entries, linear_entries, read_compression
from coppice.records.manifest import Manifest, Provenance

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Node:
    """A checkpoint's folder with its manifest, its config and, from compression.json, the entries of its linears."""

    folder: Path
    manifest: Manifest
    config: Mapping[str, Any]
    entries: Entries

    @property
    def name(self) -> str:
        return self.manifest.node

    @property
    def dtype(self) -> torch.dtype:
        """In which its floating tensors are stored."""
        return stored_dtype(self.folder)

    @property
    def forms(self) -> dict[str, type[Replacement]]:
        """What takes the place of each linear, by its name."""
        return {name: form_of(entry) for name, entry in self.entries.items()}


class Written(NamedTuple):
    """rounded: whether the export's reader multiplies by weights that were rounded to the stored type again, where the
    node multiplies by their exact values; notes: sentences for the user."""

    rounded: bool
    notes: tuple[str, ...] = ()


def read_node(folder: Path) -> Node:
    """Raises UserError when the folder is not a checkpoint."""
    manifest = read_manifest(folder)
    config = read_json_object(storage.ensure_local(folder / "config.json"))
    return Node(folder, manifest, config, linear_entries(read_compression(folder)))


def save_for_others(model: PreTrainedModel, node: Node, folder: Path) -> None:
    """Writes a model derived from a node as a checkpoint, without the two files that only Coppice reads."""
    provenance = Provenance(**{name: getattr(node.manifest, name) for name in Provenance.model_fields})
    save_checkpoint(model, folder, node.folder, provenance, node.dtype, node.manifest.dense, upload=False)
    for name in ("compression.json", "manifest.json"):
        (folder / name).unlink()
