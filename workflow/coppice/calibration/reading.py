"""Statistics read back from their folder."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from coppice import storage
from coppice.errors import UserError
from coppice.models.checkpoint import read_tensors
from coppice.models.contracts import LinearStatistics
from coppice.records.statistics import Statistics

MOMENT_FIELDS = ("second_moment", "mean", "absmean", "absmax")


def block_file(index: int) -> str:
    return f"block-{index:03d}.safetensors"


def read_statistics(directory: Path, model_fingerprint: str) -> Statistics:
    """The manifest of statistics. Raises UserError when they were gathered on another model than the one named."""
    manifest = Statistics.read(Path(directory) / "manifest.json")
    if manifest.model_fingerprint != model_fingerprint:
        raise UserError(
            f"The statistics in {directory} were gathered on another model (fingerprint "
            f"{manifest.model_fingerprint[:12]} instead of {model_fingerprint[:12]}); calibrate again."
        )
    return manifest


def read_statistics_file(directory: Path, name: str, manifest: Statistics) -> dict[str, Tensor]:
    """The tensors of one file of statistics. Raises UserError when it is not the file that the manifest describes."""
    path = Path(directory) / name
    if name not in manifest.files:
        raise UserError(f"{directory}/manifest.json does not name the file {name!r}; calibrate again.")
    if not storage.fetch_verified(path, manifest.files[name]):
        raise UserError(f"{path} is not the file that its manifest describes; calibrate again.")
    return read_tensors(path)


def block_statistics(directory: Path, index: int, manifest: Statistics, device: str) -> dict[str, LinearStatistics]:
    """The moments of one block on the device, by linear; linears that share an input share the tensors."""
    tensors = read_statistics_file(directory, block_file(index), manifest)
    aliases = manifest.aliases[str(index)]
    distinct = {
        name: LinearStatistics(
            **{field: tensors[f"{name}.{field}"].to(device) for field in MOMENT_FIELDS}, tokens=manifest.tokens
        )
        for name in set(aliases.values())
    }
    return {name: distinct[first] for name, first in aliases.items()}
