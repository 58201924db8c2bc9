"""What a compression step reads in addition to its parent: calibration statistics and windows, the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from coppice.calibration import reading, walk
from coppice.data.tokenizer import check_tokenizer
from coppice.data.windows import Windows, load_windows
from coppice.errors import UserError
from coppice.methods.options import MethodOptions
from coppice.methods.registry import Method
from coppice.models import modules
from coppice.models.architectures.base import blocks
from coppice.models.checkpoint import computing_dtype, load_model
from coppice.models.contracts import FROM_WINDOWS, LinearStatistics
from coppice.records.statistics import Statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MISSING = {
    "tokens": "the calibration windows themselves; pass their folder with --tokens",
    "reference": "the checkpoint from before the compression that it makes up for; pass its folder with --reference",
}


@dataclass(frozen=True)
class Inputs:
    """needs: what the method reads. folders: of calibration statistics by kind, with their manifests. windows: the
    calibration windows, for a method that reads them. reference: the checkpoint from before compression, for a
    compensate method."""

    needs: frozenset[str] = frozenset()
    folders: Mapping[str, tuple[Path, Statistics]] = field(default_factory=dict)
    windows: Windows | None = None
    reference: Path | None = None

    def moments(self, index: int, device: str) -> dict[str, LinearStatistics]:
        """The parent's moments of a block by the linear's name within it; empty where none were given."""
        if "moments" not in self.folders:
            return {}
        folder, manifest = self.folders["moments"]
        return reading.block_statistics(folder, index, manifest, device)

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Every tensor of one kind of calibration statistics."""
        folder, manifest = self.folders[kind]
        tensors: dict[str, Tensor] = {}
        for name in manifest.files:
            tensors |= reading.read_statistics_file(folder, name, manifest)
        return tensors

    def whole_model_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of every kind but the moments, which are read block by block."""
        return {kind: self.tensors(kind) for kind in self.folders if kind != "moments"}

    def tokens(self) -> tuple[Tensor | None, Tensor | None]:
        """tokens [w, t] int64 of the windows and kept [w, t] bool, False at padding; None without windows."""
        return (None, None) if self.windows is None else walk.as_tensors(self.windows)

    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of the windows that each input comes from, by its name."""
        fingerprints = {kind: manifest.tokens_fingerprint for kind, (_, manifest) in self.folders.items()}
        if self.windows is not None:
            fingerprints["windows"] = self.windows.manifest.fingerprint
        return fingerprints


def read_inputs(
    step: str,
    method: Method,
    options: MethodOptions,
    parent: Path,
    parent_fingerprint: str,
    statistics: list[Path],
    tokens: Path | None,
    reference: Path | None,
) -> Inputs:
    """The inputs that the method reads with these options; what else was given is left out.

    Moments, where there are any, also give the output error of a layer method that does not need them.
    Raises UserError for an input that is missing, or that was made from another model than the parent.
    """
    needs = method.needs(options)
    required = (needs - FROM_WINDOWS) | ({"tokens"} if needs & FROM_WINDOWS else set())
    if method.family == "compensate":
        required |= {"reference"}
    readable = set(required)
    if method.contract == "layer" and "sequential_moments" not in needs:
        readable.add("moments")
    folders = {}
    for folder in statistics:
        manifest = reading.read_statistics(folder, parent_fingerprint)
        if manifest.kind in readable:
            folders[manifest.kind] = (folder, manifest)
    given = {name for name, path in (("tokens", tokens), ("reference", reference)) if path is not None}
    _require(step, method, required, given | folders.keys())
    windows = None
    if tokens is not None and "tokens" in required:
        windows = load_windows(tokens)
        check_tokenizer(parent, windows)
    return Inputs(needs, folders, windows, reference if "reference" in required else None)


def _require(step: str, method: Method, required: frozenset[str], given: set[str]) -> None:
    for missing in sorted(required - given):
        how = MISSING.get(missing) or (
            f"statistics of the kind {missing!r}, gathered on its parent; gather them with "
            f"`coppice calibrate --kind {missing}` and pass their folder with --statistics"
        )
        raise UserError(f"Step {step!r} ({method.name}) needs {how}.")


def load_reference(directory: Path, model: PreTrainedModel, device: str) -> PreTrainedModel:
    """The model from before compression. Raises UserError when its linears are not those of the parent's model."""
    reference = load_model(directory, dtype=computing_dtype(directory, device))
    shapes, reference_shapes = (
        {
            name: (linear.out_features, linear.in_features)
            for name, linear in modules.replaceable_modules(blocks(each)).items()
        }
        for each in (model, reference)
    )
    if shapes != reference_shapes:
        raise UserError(
            f"The reference {directory} has linears of other shapes than the parent; pass the checkpoint that the "
            "parent's linears were compressed from."
        )
    return reference
