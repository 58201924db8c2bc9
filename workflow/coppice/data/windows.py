"""Windows of tokens: cut from a text's documents, written, read and compared.

Neither torch nor transformers is imported here: tokens are NumPy arrays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np

from coppice import storage
from coppice.data.sources import describe
from coppice.data.splits import document_hash, documents
from coppice.data.tokenizer import beginning_token, load_tokenizer
from coppice.errors import UserError
from coppice.files import atomic_directory, describe_files, fingerprint, sha256
from coppice.records.tokens import TokenSet

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BATCH = 64  # documents encoded at once
SHORT = 64  # characters below which a document may occur in two texts by chance: a heading, a line of dialogue


@dataclass(frozen=True)
class Windows:
    """Windows of tokens, and where they come from.

    tokens: [windows, length] int32. documents: [windows, length] int32, the document that each token belongs to, -1 at
    padding; the attention mask is `documents >= 0`. document_hashes: [documents] int64, 0 for a short document.
    """

    tokens: np.ndarray
    documents: np.ndarray
    document_hashes: np.ndarray
    manifest: TokenSet


class _Identity(TypedDict):
    """What the fingerprint of a token set is taken of; fields of `TokenSet`."""

    content: str
    tokenizer: str
    length: int
    windows: int
    seed: int
    role: str
    packed: bool
    bos: int | None


class _FileHash(TypedDict):
    text_sha256: NotRequired[str]


def tokenize(
    directory: Path,
    text: Mapping[str, Any],
    role: str,
    windows: int | None,
    length: int,
    seed: int = 0,
    pack: bool = True,
    bos: bool = True,
) -> Windows:
    """Windows of `length` tokens of `text` for `role`, by the tokenizer of the checkpoint in `directory`.

    windows: how many; 0 or None takes all. seed: matters to the built-in stream only.
    Packed: documents are joined in order, each after one beginning-of-sequence token (`bos`), and cut into windows that
    have no gaps; what is left over is dropped. Not packed: one document a window, cut or padded to `length`.

    Raises UserError where there are fewer windows than requested (for the role recovery: none), and where all windows
    of an endless stream are requested.
    """
    text = {key: value for key, value in text.items() if value is not None}
    if not windows and "builtin" in text:
        raise UserError("The built-in text is endless; set how many windows of it to take.")
    tokenizer = load_tokenizer(directory)
    first = [beginning_token(directory, tokenizer)] if bos else []
    capacity = length if pack else 1
    enough = windows * capacity if windows else None

    content = hashlib.sha256()
    rows: list[np.ndarray] = []
    hashes: list[int] = []
    count = 0  # tokens when packing, windows when not
    for document, ids in encode_documents(tokenizer, documents(text, role, seed)):
        row = np.array(first + ids, dtype=np.int32)
        rows.append(row if pack else row[:length])
        hashes.append(document_hash(document) if len(document) >= SHORT else 0)
        encoding = document.encode()
        content.update(len(encoding).to_bytes(8, "big") + encoding)
        count += len(row) if pack else 1
        if enough is not None and count >= enough:
            break
    available = count // capacity
    # Training reads a short text again; measurements must not differ in how much they read.
    needed = 1 if role == "recovery" else windows or 1
    if available < needed:
        raise UserError(
            f"{describe(text)} has {available} windows of {length} tokens for the role {role!r}, but {needed} are "
            "requested; request fewer or shorter ones, or give the role more text."
        )
    tokens, owners = (pack_rows if pack else pad_rows)(rows, min(windows or available, available), length)
    identity: _Identity = {
        "content": content.hexdigest(),
        "tokenizer": sha256(Path(directory) / "tokenizer.json"),
        "length": length,
        "windows": len(tokens),
        "seed": seed,
        "role": role,
        "packed": pack,
        "bos": first[0] if first else None,
    }
    document_count = int(owners.max()) + 1
    file_hash: _FileHash = {"text_sha256": sha256(Path(text["path"]))} if "path" in text else {}
    manifest = TokenSet(
        fingerprint=fingerprint(identity),
        text=text,
        **file_hash,
        **identity,
        tokens=int((owners >= 0).sum()),
        tokens_read=sum(map(len, rows)),
        documents=document_count,
    )
    return Windows(tokens, owners, np.array(hashes[:document_count], dtype=np.int64), manifest)


def encode_documents(tokenizer: Tokenizer, source: Iterator[str]) -> Iterator[tuple[str, list[int]]]:
    """Each document with its tokens, none of them special."""
    while batch := list(islice(source, BATCH)):
        # `tokenize` adds the beginning-of-sequence token itself; a tokenizer that adds its own would double it.
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        yield from zip(batch, (encoding.ids for encoding in encodings), strict=True)


def pack_rows(rows: list[np.ndarray], windows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows joined and cut: tokens and documents, [windows, length] int32."""
    joined = np.concatenate(rows)[: windows * length]
    owners = np.repeat(np.arange(len(rows), dtype=np.int32), [len(row) for row in rows])[: windows * length]
    return joined.reshape(windows, length), owners.reshape(windows, length)


def pad_rows(rows: list[np.ndarray], windows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """One row a window, filled up with token 0 of document -1: tokens and documents, [windows, length] int32."""
    tokens = np.zeros((windows, length), dtype=np.int32)
    owners = np.full((windows, length), -1, dtype=np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        owners[i, : len(row)] = i
    return tokens, owners


def save_windows(windows: Windows, directory: Path) -> None:
    """Writes tokens.safetensors, then manifest.json, which names it with its size and SHA-256."""
    from safetensors.numpy import save_file

    arrays = {name: getattr(windows, name) for name in ("tokens", "documents", "document_hashes")}
    with atomic_directory(directory) as temporary:
        save_file(arrays, temporary / "tokens.safetensors")
        files = describe_files(temporary)
        storage.upload(temporary, {name: entry.sha256 for name, entry in files.items()})
        windows.manifest.model_copy(update={"files": files}).write(temporary / "manifest.json")


def load_windows(directory: Path) -> Windows:
    """The windows that `save_windows` wrote. Raises UserError where they are missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    directory = Path(directory)
    manifest = TokenSet.read(directory / "manifest.json")
    try:
        arrays = load_file(storage.ensure_local(directory / "tokens.safetensors"))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory}/tokens.safetensors cannot be read ({error}); recompute the tokens.") from error
    if arrays["tokens"].shape != (manifest.windows, manifest.length):
        raise UserError(f"{directory}: manifest.json and tokens.safetensors disagree in shape; recompute the tokens.")
    return Windows(arrays["tokens"], arrays["documents"], arrays["document_hashes"], manifest)


def assert_disjoint(first: Windows, second: Windows) -> None:
    """Raises UserError where a document of at least SHORT characters lies in both."""
    shared = np.intersect1d(first.document_hashes, second.document_hashes)
    if count := int((shared != 0).sum()):
        raise UserError(
            f"{count} documents lie in both texts, {first.manifest.role} and {second.manifest.role} "
            f"({describe(first.manifest.text)}; {describe(second.manifest.text)}); use disjoint splits."
        )
