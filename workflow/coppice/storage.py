"""Files that travel by their content, where results lie elsewhere: in a bucket, or in a folder that machines share.

There the workflow carries the small files that its rules declare. What lies next to them undeclared (weights, tokens,
statistics, items) goes to `<store>/objects/<sha256>` before the manifest that names it is written, each content once;
a reader of such a file fetches it from there if it is missing locally. So a job that needs only manifests moves no
weights.

The environment variable COPPICE_STORE names the store: a folder, or an address that Apache Arrow reads, such as
`s3://bucket/prefix?region=eu-central-1`. Without it nothing travels.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from coppice.errors import UserError
from coppice.files import atomic_write, read_json, read_json_object, sha256, write_json

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

VARIABLE = "COPPICE_STORE"
TRANSFERS = 16  # small files that are fetched at once
FETCHED = ".fetched.json"  # in a study's folder: what `coppice fetch` wrote there
RESULT_FOLDERS = ("models", "tokens", "statistics", "evaluations", "laws")  # folders whose files are outputs of jobs


def upload(directory: Path, digests: Mapping[str, str]) -> None:
    """Sends those of a folder's files to the store that it does not hold yet. Without a store: nothing.

    digests: SHA-256 by name. Raises UserError where the store cannot be used.
    """
    if VARIABLE not in os.environ:
        return
    address = os.environ[VARIABLE]
    filesystem, objects = _objects(address)
    sources = {f"{objects}/{digest}": Path(directory) / name for name, digest in digests.items()}
    with _store_errors(address):
        held = {info.path: info.size for info in filesystem.get_file_info(list(sources))}
        # A copy of another size is what an interrupted transfer left.
        missing = {target: path for target, path in sources.items() if held[target] != path.stat().st_size}
        if missing:
            filesystem.create_dir(objects, recursive=True)
        for target, path in missing.items():
            _put(filesystem, path, target)
    sent = sum(path.stat().st_size for path in missing.values())
    print(f"Store: sent {len(missing)} of {len(digests)} files, {sent:,} bytes.", file=sys.stderr, flush=True)


def fetch_verified(path: Path, digest: str) -> bool:
    """Whether the file of this SHA-256 is at `path`, after it was fetched if it was not there and a store is named.

    Raises UserError where the store does not hold the file, holds a damaged copy, or is not to be used.
    """
    if _holds(path, digest):
        return True
    if VARIABLE not in os.environ:
        return False
    with _exclusive(path.parent):
        # Another job may have fetched it while this one waited.
        if not _holds(path, digest):
            _fetch(path, digest)
    return True


def ensure_local(path: Path, manifest: str = "manifest.json") -> Path:
    """`path`, fetched from the store if the file is not the one that the manifest next to it names.

    Without a store, and where the manifest is missing or does not name the file, `path` stays as it is.
    """
    if VARIABLE in os.environ and (digest := _recorded_digest(Path(path), manifest)) is not None:
        fetch_verified(Path(path), digest)
    return path


def _recorded_digest(path: Path, manifest: str) -> str | None:
    """The SHA-256 of a file that the manifest next to it names; None where it names none."""
    record = path.with_name(manifest)
    entry = read_json_object(record).get("files", {}).get(path.name) if record.is_file() else None
    return entry["sha256"] if isinstance(entry, Mapping) else entry


def _holds(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest


@contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """One process at a time fetches into a folder, so that two jobs of one node fetch its weights once."""
    with open(directory / ".fetching", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(path: Path, digest: str) -> None:
    from pyarrow.fs import FileType

    address = os.environ[VARIABLE]
    filesystem, objects = _objects(address)
    source = f"{objects}/{digest}"
    with _store_errors(address):
        if filesystem.get_file_info(source).type == FileType.NotFound:
            raise UserError(
                f"{path} is not here, and the store {_redact(address)} has no copy of it (objects/{digest}); remove "
                "the manifest next to it from the storage, so that it is recomputed."
            )
        with atomic_write(path) as temporary:
            _copy(filesystem, source, temporary)
            if sha256(temporary) != digest:
                raise UserError(
                    f"The store {_redact(address)} holds a damaged copy of {path}: objects/{digest} has another "
                    "SHA-256. Remove that object, and the manifest that names it, so that both are recomputed."
                )
    print(f"Store: fetched {path.name}, {path.stat().st_size:,} bytes.", file=sys.stderr, flush=True)


def _put(filesystem: FileSystem, path: Path, target: str) -> None:
    """Copies a file into the store; a listing of a folder shows whole objects only, as in a bucket."""
    from pyarrow.fs import LocalFileSystem, copy_files

    in_folder = isinstance(filesystem, LocalFileSystem)
    written = f"{target}.{uuid4().hex}.partial" if in_folder else target
    copy_files(str(path), written, LocalFileSystem(), filesystem)
    if in_folder:
        filesystem.move(written, target)


def _copy(filesystem: FileSystem, source: str, path: Path) -> None:
    from pyarrow.fs import LocalFileSystem, copy_files

    copy_files(source, str(path), filesystem, LocalFileSystem())


def _open_store(address: str) -> tuple[FileSystem, str]:
    """The store's file system and the path of its root there. Raises UserError for an address that is not one."""
    from pyarrow.fs import FileSystem

    try:
        filesystem, root = FileSystem.from_uri(address if "://" in address else str(Path(address).resolve()))
        if not root:
            raise ValueError("it names no bucket")
    except (ValueError, OSError) as error:
        raise UserError(
            f"The store {_redact(address)} is neither a folder nor an address of a bucket ({_reason(error, address)}); "
            f"check {VARIABLE}."
        ) from error
    return filesystem, root


def _objects(address: str) -> tuple[FileSystem, str]:
    filesystem, root = _open_store(address)
    return filesystem, f"{root.rstrip('/')}/objects"


@contextmanager
def _store_errors(address: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The store {_redact(address)} cannot be used ({_reason(error, address)}); check its address, the "
            "network and the credentials, then run again."
        ) from error


def _redact(address: str) -> str:
    """The address without settings and credentials, also where a slash in a secret key was not written as %2F."""
    return re.sub(r"//[^/@:]*(:.*)?@", "//", address.partition("?")[0])


def _reason(error: Exception, address: str) -> str:
    """The first line of an error; Arrow's may quote the address."""
    return str(error).splitlines()[0].replace(address, _redact(address)).rstrip(".")


def fetch_results(address: str, results: Path) -> int:
    """Fetches a study's small files (manifests, metrics, logs, tables, report) from a storage; returns their number.

    Paths are the same there and here, and so are modification times: an unchanged file is recognized by its size and
    time, whatever the clocks of the two machines. Files fetched earlier that the storage no longer holds are removed.
    Snakemake removes them there before they are recomputed, and a local copy would hide that this failed.
    Raises UserError where the storage is not to be used, or names a file outside.
    """
    from pyarrow.fs import FileSelector, FileType

    filesystem, root = _open_store(address)
    remote = f"{root.rstrip('/')}/{results.as_posix()}"

    def relative_path(path: str) -> str:
        below = Path(path).relative_to(remote)
        if ".." in below.parts:
            raise UserError(
                f"The storage {_redact(address)} holds {path}, which is not a path of results; remove it there."
            )
        return below.as_posix()

    def fetch(below: str) -> None:
        info = infos[below]
        with atomic_write(results / below) as temporary:
            _copy(filesystem, info.path, temporary)
            os.utime(temporary, ns=(info.mtime_ns, info.mtime_ns))

    with _store_errors(address):
        listing = filesystem.get_file_info(FileSelector(remote, recursive=True))
        files = [info for info in listing if info.type == FileType.File and info.base_name != FETCHED]
        infos = {relative_path(info.path): info for info in files}
        stamps = {below: [info.size, info.mtime_ns] for below, info in infos.items()}
        if not stamps:
            return 0  # An emptied storage does not mean that no results exist.
        fetched = _read_stamps(results, remote)
        _remove_deleted(results, fetched, stamps)
        changed = [below for below, stamp in stamps.items() if _stamp(results / below) != stamp]
        # Recorded before the transfer: a file that an interruption left out has another stamp.
        record = {below: stamps[below] for below in sorted({*changed, *(fetched.keys() & stamps.keys())})}
        if record != fetched:
            write_json(results / FETCHED, {"storage": remote, "files": record})
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(fetch, changed))
    return len(changed)


def _read_stamps(results: Path, remote: str) -> dict[str, list[int]]:
    """The stamps, by path, of the files fetched earlier from `remote`, the study's folder in a storage."""
    record = results / FETCHED
    if not record.is_file():
        return {}
    fetched = read_json(record)
    return fetched["files"] if fetched["storage"] == remote else {}


def _remove_deleted(results: Path, fetched: Mapping[str, list[int]], held: Mapping[str, list[int]]) -> None:
    """Removes fetched files that the storage no longer holds. fetched, held: stamps by path.

    Files created here, or changed since they were fetched, are kept: they may be the only copies.
    """
    deleted = [
        results / below
        for below, stamp in fetched.items()
        if below not in held and Path(below).parts[0] in RESULT_FOLDERS and _stamp(results / below) == stamp
    ]
    for path in deleted:
        path.unlink()
    if deleted:
        print(f"Store: removed {len(deleted)} files that it no longer holds.", file=sys.stderr, flush=True)


def _stamp(path: Path) -> list[int] | None:
    """Size and date of a file, in bytes and nanoseconds; None for a missing file."""
    if not path.is_file():
        return None
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `coppice fetch`."""
    parser.add_argument(
        "--store",
        default=os.environ.get(VARIABLE),
        help=f"prefix of the storage: folder or URI (default: ${VARIABLE})",
    )
    parser.add_argument("--results", type=Path, required=True, help="folder of the study's results, as results/demo")


def store_address(address: str | None = None) -> str:
    """The address of the store, by default that of the environment. Raises UserError when neither names one."""
    address = address or os.environ.get(VARIABLE)
    if not address:
        raise UserError(f"No store is given; pass --store, or set {VARIABLE}.")
    return address


def run(arguments: argparse.Namespace) -> None:
    """`coppice fetch`."""
    if arguments.results.is_absolute():
        raise UserError(
            f"--results {arguments.results} is not below the storage's prefix; pass a path as results/demo."
        )
    print(f"{fetch_results(store_address(arguments.store), arguments.results)} files fetched to {arguments.results}.")
