"""The manifest of a checkpoint: what a node is, how it was made, what it weighs."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from coppice.files import FileEntry
from coppice.records.base import Column, Json, Part, Record
from coppice.records.renamed import METHODS, OPTIONS, TRAITS, rename_keys

Versions = dict[str, str]


class StepRecord(Part):
    """The step that made a node."""

    name: Annotated[str, Column("Name of the last step; null for a dense model.")]
    method: Annotated[str, Column("Method of the last step; null for a dense model.")]
    family: Annotated[
        str, Column("Family of that method: prune, decompose, quantize, compensate or recover; null for a dense model.")
    ]
    options: Annotated[
        Json, Column("All options of the last step, defaults included; null for a dense model.", unit="JSON")
    ]


class Source(Part):
    """Where a dense model came from: one of `shipped`, `path` and `hub`."""

    model_config = ConfigDict(extra="allow")

    shipped: Annotated[str | None, Column("Name of a model that Coppice ships.")] = None
    path: Annotated[str | None, Column("Folder of a local model.")] = None
    hub: Annotated[str | None, Column("Name of a model of the Hugging Face hub.")] = None
    revision: Annotated[str | None, Column("Its pinned revision; null without one.")] = None
    folder_config: Annotated[str | None, Column("The name that the model's own config.json gives, if any.")] = None

    @property
    def kind(self) -> str | None:
        """Which of the three it is; None where none is recorded."""
        return next((kind for kind in ("shipped", "path", "hub") if getattr(self, kind) is not None), None)

    @property
    def name(self) -> str | None:
        """The name, folder or hub repository."""
        return None if self.kind is None else getattr(self, self.kind)


class RecoveryRecord(Part):
    """The last training on a node's path."""

    method: Annotated[str, Column("Method that trained.")]
    tokens: Annotated[int, Column("Tokens trained on.", unit="tokens")]
    tokens_requested: Annotated[int, Column("Tokens that the step requested.", unit="tokens")]
    tokens_total: Annotated[
        int, Column("Tokens that all recovery steps of the path trained on, this one included.", unit="tokens")
    ]
    budgets: Annotated[
        list[int] | None, Column("The ladder of budgets; absent in files of early versions.", unit="tokens")
    ] = None
    steps: Annotated[int, Column("Optimizer steps.", unit="steps")]
    stopped_early: Annotated[bool, Column("Whether `stop_gain` ended it before the tokens requested.")] = False
    epochs: Annotated[float, Column("Passes through the windows.")]
    seconds: Annotated[float, Column("Training time.", unit="s")]
    precision: Annotated[str | None, Column("Autocast dtype.")] = None


class DenseParameters(Part):
    """Parameters of the dense model at the root of a node's path."""

    total: Annotated[int, Column("All parameters of the dense model.", unit="parameters")]
    blocks: Annotated[int, Column("Parameters in its decoder blocks.", unit="parameters")]
    decoder_linears: Annotated[int, Column("Parameters in the linears of its decoder blocks.", unit="parameters")]


class Parameters(Part):
    """How many numbers a node's model multiplies by."""

    total: Annotated[
        int, Column("All parameters; a stored zero and a quantized weight count as one.", unit="parameters")
    ]
    blocks: Annotated[int, Column("Parameters in the decoder's blocks.", unit="parameters")]
    decoder_linears: Annotated[int, Column("Parameters in the linears of the decoder's blocks.", unit="parameters")]
    nonzero: Annotated[int, Column("All parameters but the zeros of masked linears.", unit="parameters")]


class StoredBits(Part):
    """Bits of a node's stored tensors."""

    total: Annotated[
        int,
        Column("Bits of the stored tensors: weights, scales and zero points; zeros cost as much.", unit="bits"),
    ]
    decoder_linears: Annotated[int, Column("The same over the linears of the decoder's blocks.", unit="bits")]


class Provenance(Part):
    """How a node was made, as the stage that made it records it."""

    node: Annotated[str, Column("Name and path of the checkpoint: `<model>/<step>/<step>`.")]
    parent: Annotated[str | None, Column("Node it was made from; null for a dense model.")]
    step: Annotated[StepRecord | None, Column("The last step; null for a dense model.")]
    seed: Annotated[int, Column("Seed of the step.")]
    traits: Annotated[
        list[str],
        Column(
            "What the node is: masked, factorized, quantized, compensated, smaller, rotated, quantized-activations, "
            "quantized-cache."
        ),
    ]
    source: Annotated[Source, Column("Where the dense model came from.")]
    source_files: Annotated[
        dict[str, str], Column("Dense models: SHA-256 of each file that the model was read from.")
    ] = Field(default_factory=dict)
    requested: Annotated[Json, Column("What the step's options requested.", unit="JSON")]
    achieved: Annotated[Json, Column("What was achieved, under the same names.", unit="JSON")]
    layers: Annotated[
        dict[str, Json],
        Column("The method's record of each module: kept units, rank, bits, reconstruction error."),
    ]
    calibration: Annotated[
        dict[str, str] | None,
        Column("For each kind of calibration statistics read, the fingerprint of its tokens; null where none was."),
    ]
    recovery: Annotated[RecoveryRecord | None, Column("The last training on the path; null where there was none.")]
    wall_seconds: Annotated[float, Column("Time that the step took.", unit="s")]


class Sizes(Part):
    """The accounting of a node, the same for every method."""

    parameters: Parameters
    dense: DenseParameters
    dense_parameters: Annotated[int, Column("All parameters of the dense model.", unit="parameters")]
    stored_bytes: Annotated[int, Column("Size of the weight files on disk.", unit="bytes")]
    stored_bits: StoredBits
    bits_per_weight: Annotated[float, Column("stored_bits / dense_parameters.", unit="bits/parameter")]
    bits_per_linear_weight: Annotated[
        float, Column("linear_bits / linear parameters of the dense model.", unit="bits/parameter")
    ]
    rho: Annotated[float, Column("Part of all parameters removed: 1 - parameters / dense_parameters.", unit="ratio")]
    rho_blocks: Annotated[float, Column("The same within the decoder's blocks.", unit="ratio")]
    rho_nonzero: Annotated[float, Column("The same over all parameters, zeros counted as removed.", unit="ratio")]


# The fields of a record are in its file from the last base to the first.
class Manifest(Sizes, Provenance, Record):
    """`manifest.json` of a checkpoint. Format 2: `traits` and `requested` were `marks` and `asked` before."""

    FORMAT_VERSION: ClassVar[int] = 2

    fingerprint: Annotated[str, Column("Fingerprint of the weights.")]
    files: Annotated[dict[str, FileEntry], Column("Size and SHA-256 of each file.")]
    versions: Annotated[Versions, Column("Versions of the software that made the checkpoint.", unit="JSON")]
    peak_memory_bytes: Annotated[int | None, Column("Largest memory that the step held.", unit="bytes")] = None

    @classmethod
    def upgrade(cls, content: Json, version: int) -> Json:
        """Format 1 under the names of format 2, those of options, methods and traits included."""
        if version >= 2:
            return content
        content = rename_keys(content, {"marks": "traits", "asked": "requested"})
        # Values of another kind are left to validation.
        if isinstance(traits := content.get("traits"), list):
            content["traits"] = [TRAITS.get(str(trait), trait) for trait in traits]
        if isinstance(requested := content.get("requested"), dict):
            content["requested"] = rename_keys(requested, OPTIONS)
        if isinstance(step := content.get("step"), dict):
            content["step"] = _rename_step(step)
        if isinstance(recovery := content.get("recovery"), dict):
            content["recovery"] = rename_keys(recovery, {"tokens_asked": "tokens_requested"})
        return content


def _rename_step(step: Json) -> Json:
    method, options = step.get("method"), step.get("options")
    return {
        **step,
        **({"method": METHODS.get(method, method)} if isinstance(method, str) else {}),
        **({"options": rename_keys(options, OPTIONS)} if isinstance(options, dict) else {}),
    }
