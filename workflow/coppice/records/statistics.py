"""The manifest of one kind of calibration statistics."""

from __future__ import annotations

from typing import Annotated

from coppice.records.base import Column, Record


class Statistics(Record):
    """`manifest.json` of calibration statistics."""

    kind: Annotated[str, Column("Kind of the calibration statistics: moments, blocks or gradients.")]
    model_fingerprint: Annotated[str, Column("Fingerprint of the weights of the checkpoint that they are of.")]
    tokens_fingerprint: Annotated[str, Column("Fingerprint of the calibration's tokens.")]
    fingerprint: Annotated[str, Column("Fingerprint of the three above.")]
    tokens: Annotated[int, Column("Tokens that they were gathered over, without padding.", unit="tokens")]
    blocks: Annotated[int, Column("Decoder blocks of the model.", unit="blocks")]
    aliases: Annotated[
        dict[str, dict[str, str]],
        Column("Moments: by block, for each linear the first one that has the same input, whose tensors it shares."),
    ]
    files: Annotated[dict[str, str], Column("SHA-256 of each file.")]
    versions: Annotated[dict[str, str], Column("Versions of the software that gathered them.")]
    wall_seconds: Annotated[float, Column("Time that it took.", unit="s")]
