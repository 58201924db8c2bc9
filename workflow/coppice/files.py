"""Files that appear whole or not at all."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from coppice.errors import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path next to `path`; renamed onto it, after fsync, when the block ends without an error.

    What a killed process left next to `path` is removed: one process at a time writes a file.
    Raises UserError when the disk refuses the write (full, read-only); `path` is then as it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*.partial"):
        leftover.unlink()
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        synchronize(temporary)
        # mkstemp makes files private; outputs are read by others as any file is.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # the latter where the disk is full
        raise UserError(f"{path} could not be written: {_reason(error)}. Nothing was changed.") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(directory: Path, last: str = "manifest.json") -> Iterator[Path]:
    """A temporary folder inside `directory`; its files are moved up when the block ends without an error.

    Folders of other nodes may lie in `directory`, so files move one by one; `last` is removed first and moved last, so
    that its presence means that all files are there. Files of an earlier run that the new one did not write are
    removed, in folders that it wrote to.
    Raises UserError when the disk refuses; the files of an earlier run are then as they were.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".partial-*"):
        shutil.rmtree(leftover)
    temporary = Path(tempfile.mkdtemp(dir=directory, prefix=".partial-"))
    try:
        yield temporary
        files = [path for path in temporary.rglob("*") if path.is_file()]
        for path in files:
            path.chmod(0o666 & ~_umask())
            synchronize(path)
        (directory / last).unlink(missing_ok=True)
        for folder in {path.parent.relative_to(temporary) for path in files} | {Path()}:
            for stale in (directory / folder).glob("*"):
                if stale.is_file() and not (temporary / folder / stale.name).exists():
                    stale.unlink()
        for path in sorted(files, key=lambda path: path.name == last):
            target = directory / path.relative_to(temporary)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
        synchronize(directory)
    except (OSError, SafetensorError) as error:  # the latter where the disk is full
        raise UserError(f"{directory} could not be written: {_reason(error)}. Nothing was changed.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def synchronize(path: Path) -> None:
    """Waits until what was written to a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON whole or not at all. NaN is an error: JSON has none."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads JSON. Raises UserError, naming the file, when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); remove it and run again.") from error
    except OSError as error:  # a folder, or not readable
        raise UserError(f"{path} cannot be read: {_reason(error)}.") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads JSON that maps names to values. Raises UserError, naming the file, when it is missing, broken or other."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; it is damaged or was edited by hand: remove it and run again.")
    return content


def json_object(text: str) -> dict[str, Any]:
    """The JSON of an argument that maps names to values. Raises argparse's error for anything else."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not JSON ({error}); quote it for the shell, as in '{{\"name\": 1}}'"
        ) from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} does not map names to values, as '{{\"name\": 1}}' does")
    return value


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file by its size in bytes and its SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


def describe_files(directory: Path) -> dict[str, FileEntry]:
    """Every file in a folder, by its path there."""
    return {
        path.relative_to(directory).as_posix(): FileEntry(path.stat().st_size, sha256(path))
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def fingerprint(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
