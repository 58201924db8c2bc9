"""Text: documents of a source, their disjoint splits by role, and windows of tokens.

A text is a mapping with one of three sources:

- `{"builtin": "biographies", ...}`: the built-in stream; the other keys are fields of `biographies.World`;
- `{"path": file, "field": "text"}`: a .jsonl or .parquet file (a document a row), or a .txt file
  (`document`: "paragraph", between blank lines, by default; "line"; or "file", the whole file);
- `{"dataset": name, "name": configuration, "revision": commit, "split": "train", "field": "text"}`: a Hugging Face
  dataset.

`documents` keeps the first so many documents of a file or dataset. `splits` {role: share} gives each role a stretch of
its documents, in the order of ROLES; a document that is the exact repetition of an earlier one is left out, so that no
text lies in two roles. Biographies are disjoint by their own construction and need no `splits`.

Neither torch nor transformers is imported here: tokens are NumPy arrays.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coppice import storage
from coppice.errors import UserError
from coppice.files import atomic_directory, describe_files, fingerprint, read_json, sha256
from coppice.records.tokens import TokenSet

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROLES = ("calibration", "recovery", "validation", "evaluation")
SUFFIXES = (".txt", ".jsonl", ".parquet")
UNITS = ("paragraph", "line", "file")
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


def documents(text: Mapping[str, Any], role: str, seed: int = 0) -> Iterator[str]:
    """The documents of `text` for `role`, in order; those of the built-in stream have no end and depend on `seed`.

    Raises UserError where the source is missing, empty or broken, naming file, line or key, or has no share for `role`.
    """
    text = {key: value for key, value in text.items() if value is not None}
    if "builtin" in text:
        yield from builtin_documents(text, role, seed)
        return
    read = reader(text)
    count = sum(1 for _ in distinct(read()))
    if not count:
        raise UserError(f"{describe(text)} holds no documents.")
    start, stop = bounds(text, role, count)
    if start == stop:
        raise UserError(f"{describe(text)} has {count} documents, too few to give the role {role!r} any.")
    yield from islice(distinct(read()), start, stop)


def bounds(text: Mapping[str, Any], role: str, count: int) -> tuple[int, int]:
    """First and past-the-last document of `role` among `count`: shares laid end to end in the order of ROLES.

    Raises UserError for a role without a share, an unknown role, and shares that are not positive or exceed 1 together.
    """
    splits = text.get("splits") or {}
    for name, share in splits.items():
        if name not in ROLES:
            raise UserError(f"{describe(text)} has a split {name!r}; choose from {', '.join(ROLES)}.")
        if not share > 0:
            raise UserError(f"{describe(text)} gives {name!r} the share {share}; a share is more than 0.")
    if role not in splits:
        raise UserError(
            f"{describe(text)} has no share for the role {role!r}; give it one, as in `splits: {{{role}: 0.5}}`."
        )
    if (total := sum(splits.values())) > 1 + 1e-9:
        raise UserError(f"The splits of {describe(text)} add up to {total:g}; shares may not exceed 1 together.")
    before = sum(splits.get(name, 0) for name in ROLES[: ROLES.index(role)])
    # The small addend takes sums such as 0.1 + 0.2 over the integer that they stand for.
    return int(count * before + 1e-6), min(count, int(count * (before + splits[role]) + 1e-6))


def distinct(source: Iterable[str]) -> Iterator[str]:
    """The documents of `source` that are not blank and not exact repetitions of an earlier one."""
    seen: set[int] = set()
    for document in source:
        if document.strip() and (key := document_hash(document)) not in seen:
            seen.add(key)
            yield document


def document_hash(document: str) -> int:
    """64 bits of the document's BLAKE2b digest, as a signed integer."""
    return int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), "big", signed=True)


def describe(text: Mapping[str, Any]) -> str:
    """The source of a text, in words."""
    if "path" in text:
        return f"The text {text['path']}"
    return f"The dataset {text['dataset']}" if "dataset" in text else f"The built-in text {text['builtin']!r}"


def world(text: Mapping[str, Any]):
    """The `biographies.World` of a built-in text. Raises UserError for unknown names, keys and sizes."""
    from coppice.data import biographies

    if text["builtin"] != "biographies":
        raise UserError(f"There is no built-in text {text['builtin']!r}; the one there is is 'biographies'.")
    known = {field.name for field in fields(biographies.World)}
    options = {key: value for key, value in text.items() if key != "builtin" and value is not None}
    if unknown := sorted(options.keys() - known):
        raise UserError(f"The built-in biographies have no key {unknown[0]!r}; they have {', '.join(sorted(known))}.")
    try:
        return biographies.World(**options)
    except ValueError as error:
        raise UserError(str(error)) from None


def builtin_documents(text: Mapping[str, Any], role: str, seed: int) -> Iterator[str]:
    """Biographies of the split `role`, without end."""
    from coppice.data import biographies

    if role not in biographies.SPLITS:
        raise UserError(f"The built-in text has no role {role!r}; choose from {', '.join(biographies.SPLITS)}.")
    return biographies.stream(world(text), role, seed)


def reader(text: Mapping[str, Any]) -> Callable[[], Iterable[str]]:
    """A function that goes through the documents of a file or dataset anew at each call."""
    if "dataset" in text:
        rows = hub_rows(text)
        return lambda: rows
    if "path" in text:
        return lambda: islice(file_documents(text), text.get("documents"))
    raise UserError("A text needs one of the keys 'builtin', 'path' and 'dataset'.")


def file_documents(text: Mapping[str, Any]) -> Iterator[str]:
    """The documents of a .txt, .jsonl or .parquet file. Raises UserError naming file, line and key."""
    path = Path(text["path"])
    if not path.is_file():
        raise UserError(f"The text {path} {'is not a file' if path.exists() else 'does not exist'}.")
    if path.suffix == ".jsonl":
        return jsonl_documents(path, text.get("field", "text"))
    if path.suffix == ".parquet":
        return parquet_documents(path, text.get("field", "text"))
    if path.suffix == ".txt":
        return txt_documents(path, text.get("document", "paragraph"))
    raise UserError(f"The text {path} has the suffix {path.suffix!r}; texts are {', '.join(SUFFIXES)}.")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a UTF-8 file. Raises UserError, naming the line, for other bytes."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                # A byte-order mark is no part of the text.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file.") from None


def txt_documents(path: Path, unit: str) -> Iterator[str]:
    """Paragraphs (between blank lines), lines, or the whole of a text file."""
    if unit not in UNITS:
        raise UserError(f"The text {path} has `document: {unit}`; choose from {', '.join(UNITS)}.")
    gathered: list[str] = []
    for _, line in lines(path):
        gathered.append(line)
        if unit == "line" or (unit == "paragraph" and not line.strip()):
            yield "".join(gathered).strip()
            gathered = []
    yield "".join(gathered) if unit == "file" else "".join(gathered).strip()


def jsonl_documents(path: Path, field: str) -> Iterator[str]:
    """`field` of the JSON object on each line; blank lines are skipped."""
    for number, line in lines(path):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not valid JSON ({error.msg}).") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: a JSON object is expected.")
        yield cell(row, field, place)


def parquet_documents(path: Path, field: str) -> Iterator[str]:
    """Column `field` of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file ({error}).") from None
    if field not in file.schema_arrow.names:
        raise UserError(f"{path} has no column {field!r}; it has {', '.join(file.schema_arrow.names)}. Set `field`.")
    number = 0
    for batch in file.iter_batches(batch_size=1024, columns=[field]):
        for row in batch.to_pylist():
            number += 1
            yield cell(row, field, f"{path}, row {number}")


def cell(row: Mapping[str, Any], field: str, place: str) -> str:
    """The text in `field` of `row`."""
    if field not in row:
        raise UserError(f"{place}: there is no key {field!r} among {', '.join(row)}; set `field`.")
    if not isinstance(row[field], str):
        raise UserError(f"{place}: {field!r} holds {type(row[field]).__name__}, but text is expected.")
    return row[field]


def hub_rows(text: Mapping[str, Any]) -> list[str]:
    """The documents of a Hugging Face dataset; with `documents` they are streamed, and no more is downloaded."""
    name, count, field = text["dataset"], text.get("documents"), text.get("field", "text")
    if "revision" not in text:
        raise UserError(f"The dataset {name} needs a pinned `revision` (a commit).")
    from datasets import load_dataset

    try:
        rows = load_dataset(
            name,
            text.get("name"),
            split=text.get("split", "train"),
            revision=text["revision"],
            streaming=count is not None,
        )
        return [cell(row, field, f"{name}, row {i}") for i, row in enumerate(islice(rows, count))]
    except UserError:
        raise
    except Exception as error:  # the hub's clients share no base class of their errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"The dataset {name} at revision {text['revision']} could not be read ({reason}); "
            "it needs the network or a local copy, given as `path`."
        ) from error


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint, from its tokenizer.json alone.

    Raises UserError where that is missing or broken, or holds tokens that the model has no embedding for.
    """
    from tokenizers import Tokenizer

    path = storage.ensure_local(Path(directory) / "tokenizer.json")
    if not path.is_file():
        raise UserError(
            f"{directory} has no tokenizer.json; make one with transformers: "
            f"`AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})`."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path} is not a tokenizer ({error}).") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    size = optional_json(Path(directory) / "config.json").get("vocab_size")
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if size is not None and largest >= size:
        raise UserError(
            f"Tokenizer and model of {directory} disagree: the tokenizer's largest token is {largest}, but the model "
            f"has embeddings for {size} (0 to {size - 1})."
        )
    return tokenizer


def check_tokenizer(directory: Path, windows: Windows) -> None:
    """Raises UserError where `windows` were made with another tokenizer than that of the checkpoint `directory`."""
    if sha256(storage.ensure_local(Path(directory) / "tokenizer.json")) != windows.manifest.tokenizer:
        raise UserError(
            f"{describe(windows.manifest.text)} was cut into windows with another tokenizer than that of "
            f"{directory}; make them anew with the model's own."
        )


def beginning_token(directory: Path, tokenizer: Tokenizer) -> int:
    """The token that stands before each document: the tokenizer's beginning of sequence, else the model's.

    Raises UserError where neither names one.
    """
    named = optional_json(Path(directory) / "tokenizer_config.json").get("bos_token")
    content = named["content"] if isinstance(named, dict) else named
    if content is not None and (token := tokenizer.token_to_id(content)) is not None:
        return token
    token = optional_json(Path(directory) / "config.json").get("bos_token_id")
    if token is None:
        raise UserError(
            f"Neither tokenizer_config.json nor config.json of {directory} names a beginning-of-sequence token; "
            "set `bos: false` to do without."
        )
    return token


def optional_json(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's JSON file; empty where there is no such file."""
    return read_json(path) if storage.ensure_local(path).is_file() else {}


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

    `windows` says how many; 0 or None takes all there are. The seed matters to the built-in stream only.
    Packed: documents are joined in order, each after one beginning-of-sequence token (`bos`), and cut into windows that
    have no gaps; what is left over is dropped. Not packed: one document a window, cut or padded to `length`.

    Raises UserError where there are fewer windows than asked for (for the role recovery: none), and where all of an
    endless stream are.
    """
    text = {key: value for key, value in text.items() if value is not None}
    if not windows and "builtin" in text:
        raise UserError("The built-in text has no end; say how many windows of it are wanted.")
    tokenizer = load_tokenizer(directory)
    first = [beginning_token(directory, tokenizer)] if bos else []
    capacity = length if pack else 1
    wanted = windows * capacity if windows else None

    content = hashlib.sha256()
    rows: list[np.ndarray] = []
    hashes: list[int] = []
    filled = 0  # tokens when packing, windows when not
    for document, ids in encoded(tokenizer, documents(text, role, seed)):
        row = np.array(first + ids, dtype=np.int32)
        rows.append(row if pack else row[:length])
        hashes.append(document_hash(document) if len(document) >= SHORT else 0)
        encoding = document.encode()
        content.update(len(encoding).to_bytes(8, "big") + encoding)
        filled += len(row) if pack else 1
        if wanted is not None and filled >= wanted:
            break
    found = filled // capacity
    # Training reads a short text again; measurements must not differ in how much they read.
    needed = 1 if role == "recovery" else windows or 1
    if found < needed:
        raise UserError(
            f"{describe(text)} has {found} windows of {length} tokens for the role {role!r}, but {needed} are "
            "asked for; ask for fewer or shorter ones, or give the role more text."
        )
    tokens, owners = (packed if pack else padded)(rows, min(windows or found, found), length)
    identity = {
        "content": content.hexdigest(),
        "tokenizer": sha256(Path(directory) / "tokenizer.json"),
        "length": length,
        "windows": len(tokens),
        "seed": seed,
        "role": role,
        "packed": pack,
        "bos": first[0] if first else None,
    }
    used = int(owners.max()) + 1
    manifest = TokenSet(
        fingerprint=fingerprint(identity),
        text=text,
        **({"text_sha256": sha256(text["path"])} if "path" in text else {}),
        **identity,
        tokens=int((owners >= 0).sum()),
        tokens_read=sum(map(len, rows)),
        documents=used,
    )
    return Windows(tokens, owners, np.array(hashes[:used], dtype=np.int64), manifest)


def encoded(tokenizer: Tokenizer, source: Iterator[str]) -> Iterator[tuple[str, list[int]]]:
    """Each document with its tokens, none of them special."""
    while batch := list(islice(source, BATCH)):
        # Special tokens are left to us, so that a tokenizer that adds its own puts no second one.
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        yield from zip(batch, (encoding.ids for encoding in encodings), strict=True)


def packed(rows: list[np.ndarray], windows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows joined and cut: tokens and documents, [windows, length] int32."""
    joined = np.concatenate(rows)[: windows * length]
    owners = np.repeat(np.arange(len(rows), dtype=np.int32), [len(row) for row in rows])[: windows * length]
    return joined.reshape(windows, length), owners.reshape(windows, length)


def padded(rows: list[np.ndarray], windows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
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
        raise UserError(f"{directory}/tokens.safetensors cannot be read ({error}); make the tokens anew.") from error
    if arrays["tokens"].shape != (manifest.windows, manifest.length):
        raise UserError(f"{directory}: manifest.json and tokens.safetensors disagree in shape; make the tokens anew.")
    return Windows(arrays["tokens"], arrays["documents"], arrays["document_hashes"], manifest)


def assert_disjoint(first: Windows, second: Windows) -> None:
    """Raises UserError where a document of at least SHORT characters lies in both."""
    shared = np.intersect1d(first.document_hashes, second.document_hashes)
    if count := int((shared != 0).sum()):
        raise UserError(
            f"{count} documents lie in both texts, {first.manifest.role} and {second.manifest.role} "
            f"({describe(first.manifest.text)}; {describe(second.manifest.text)}); use disjoint splits."
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `coppice tokenize`."""
    parser.add_argument("--tokenizer", type=Path, required=True, help="checkpoint whose tokenizer.json is used")
    parser.add_argument("--text", type=json.loads, required=True, help="the text, as JSON")
    parser.add_argument("--role", choices=ROLES, required=True, help="which split of the text")
    parser.add_argument("--windows", type=int, default=0, help="how many windows; 0: all there are")
    parser.add_argument("--length", type=int, required=True, help="tokens in a window")
    parser.add_argument("--seed", type=int, default=0, help="seed of the built-in stream")
    parser.add_argument("--no-pack", dest="pack", action="store_false", help="one document a window")
    parser.add_argument("--no-bos", dest="bos", action="store_false", help="no token before each document")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")


def run(arguments: argparse.Namespace) -> None:
    """`coppice tokenize`."""
    windows = tokenize(
        arguments.tokenizer,
        arguments.text,
        arguments.role,
        arguments.windows,
        arguments.length,
        arguments.seed,
        arguments.pack,
        arguments.bos,
    )
    save_windows(windows, arguments.output)
