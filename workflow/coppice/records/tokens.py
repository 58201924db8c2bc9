"""The manifest of a token set: windows of tokens, and where they come from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from coppice.files import FileEntry
from coppice.records.base import Column, Json, Record


class TokenSet(Record):
    """`manifest.json` of a token set."""

    fingerprint: Annotated[str, Column("Fingerprint of the documents, the tokenizer and how windows are cut.")]
    text: Annotated[Json, Column("The text that it was cut from, as the study names it.")]
    text_sha256: Annotated[str | None, Column("SHA-256 of the text's file; absent for texts that are not a file.")] = (
        None
    )
    content: Annotated[str, Column("SHA-256 of the documents that were read.")]
    tokenizer: Annotated[str, Column("SHA-256 of the tokenizer.json that cut it.")]
    length: Annotated[int, Column("Tokens in a window.", unit="tokens")]
    windows: Annotated[int, Column("Number of windows.", unit="windows")]
    seed: Annotated[int, Column("Seed of the built-in stream.")]
    role: Annotated[str, Column("Split of the text: calibration, recovery, validation or evaluation.")]
    packed: Annotated[bool, Column("Whether documents were joined; otherwise a window holds one document.")]
    bos: Annotated[int | None, Column("Token that begins each document; null without one.")]
    tokens: Annotated[int, Column("Tokens in the windows, without padding.", unit="tokens")]
    tokens_read: Annotated[int, Column("Tokens of the documents that were read.", unit="tokens")]
    documents: Annotated[int, Column("Documents in the windows.", unit="documents")]
    files: Annotated[dict[str, FileEntry], Column("Size and SHA-256 of each file.")] = Field(default_factory=dict)
