"""Documents of a text's source, in order and whole.

A text is a mapping with one of three sources:

- `{"builtin": "biographies", ...}`: the built-in stream; the other keys are fields of `biographies.World`;
- `{"path": file, "field": "text"}`: a .jsonl or .parquet file (a document a row), or a .txt file
  (`document`: "paragraph", between blank lines, by default; "line"; or "file", the whole file);
- `{"dataset": name, "name": configuration, "revision": commit, "split": "train", "field": "text"}`: a Hugging Face
  dataset.

`documents` keeps the first so many documents of a file or dataset.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from coppice.data import biographies
from coppice.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".parquet")
Unit = Literal["paragraph", "line", "file"]
UNITS = get_args(Unit)


def describe(text: Mapping[str, Any]) -> str:
    """The source of a text as the subject of a sentence."""
    if "path" in text:
        return f"The text {text['path']}"
    return f"The dataset {text['dataset']}" if "dataset" in text else f"The built-in text {text['builtin']!r}"


def world(text: Mapping[str, Any]) -> biographies.World:
    """The `biographies.World` of a built-in text. Raises UserError for unknown names, keys and sizes."""
    if text["builtin"] != "biographies":
        raise UserError(f"{text['builtin']!r} is not a built-in text; the only one is 'biographies'.")
    known = {field.name for field in fields(biographies.World)}
    options = {key: value for key, value in text.items() if key != "builtin" and value is not None}
    if unknown := sorted(options.keys() - known):
        raise UserError(f"The built-in biographies have no key {unknown[0]!r}; they have {', '.join(sorted(known))}.")
    try:
        return biographies.World(**options)
    except ValueError as error:
        raise UserError(str(error)) from None


def builtin_documents(text: Mapping[str, Any], role: str, seed: int) -> Iterator[str]:
    """Endless biographies of the split `role`."""
    if role not in biographies.SPLITS:
        raise UserError(f"The built-in text has no role {role!r}; choose from {', '.join(biographies.SPLITS)}.")
    return biographies.stream(world(text), role, seed)


def document_reader(text: Mapping[str, Any]) -> Callable[[], Iterable[str]]:
    """A function that reads the documents of a file or dataset from the start at each call."""
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


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a UTF-8 file. Raises UserError, naming the line, for other bytes."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                # A byte-order mark is not part of the text.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file.") from None


def txt_documents(path: Path, unit: str) -> Iterator[str]:
    """Paragraphs (between blank lines), lines, or the whole of a text file."""
    if unit not in UNITS:
        raise UserError(f"The text {path} has `document: {unit}`; choose from {', '.join(UNITS)}.")
    unit_lines: list[str] = []
    for _, line in numbered_lines(path):
        unit_lines.append(line)
        if unit == "line" or (unit == "paragraph" and not line.strip()):
            yield "".join(unit_lines).strip()
            unit_lines = []
    yield "".join(unit_lines) if unit == "file" else "".join(unit_lines).strip()


def jsonl_documents(path: Path, field: str) -> Iterator[str]:
    """`field` of the JSON object on each line; blank lines are skipped."""
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not valid JSON ({error.msg}).") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: a JSON object is expected.")
        yield text_field(row, field, place)


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
            yield text_field(row, field, f"{path}, row {number}")


def text_field(row: Mapping[str, Any], field: str, place: str) -> str:
    """The text in `field` of `row`."""
    if field not in row:
        raise UserError(f"{place} has no key {field!r}, only {', '.join(row)}; set `field`.")
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
        return [text_field(row, field, f"{name}, row {i}") for i, row in enumerate(islice(rows, count))]
    except UserError:
        raise
    except Exception as error:  # the hub's clients share no base class of their errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"The dataset {name} at revision {text['revision']} could not be read ({reason}); "
            "it needs the network or a local copy, given as `path`."
        ) from error
