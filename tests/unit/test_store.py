from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep
from typing import Any

import pytest

from coppice import storage
from coppice.cli import main
from coppice.errors import UserError
from coppice.files import describe_files, sha256, write_json
from coppice.records.layout import ResultsLayout
from coppice.results.failures import failed_jobs


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the store."""
    folder = tmp_path / "a shared folder"
    monkeypatch.setenv(storage.VARIABLE, str(folder))
    return folder


def made(folder: Path, **files: str) -> Path:
    """A folder with files and the manifest that names them, sent as a stage sends it."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    entries = {name: entry.sha256 for name, entry in describe_files(folder).items()}
    storage.upload(folder, entries)
    write_json(folder / "manifest.json", {"files": entries})
    return folder


def elsewhere(node: Path, folder: Path) -> Path:
    """What another machine has of a node: its manifest."""
    folder.mkdir()
    (folder / "manifest.json").write_bytes((node / "manifest.json").read_bytes())
    return folder


def test_content_is_stored_once_under_its_hash(
    tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = made(tmp_path / "parent", weights="1 2 3", tokenizer="a b c")
    assert capsys.readouterr().err == "Store: sent 2 of 2 files, 10 bytes.\n"
    child = made(tmp_path / "child", weights="1 0 3", tokenizer="a b c")
    assert capsys.readouterr().err == "Store: sent 1 of 2 files, 5 bytes.\n"
    stored = {path.name: path.read_text() for path in (shared / "objects").iterdir()}
    expected = [parent / "weights", parent / "tokenizer", child / "weights"]
    assert stored == {sha256(path): path.read_text() for path in expected}


def test_a_file_is_fetched_when_it_is_opened_and_not_before(tmp_path: Path, shared: Path) -> None:
    node = elsewhere(made(tmp_path / "made", weights="1 2 3", tokenizer="a b c"), tmp_path / "node")
    assert [path.name for path in node.iterdir()] == ["manifest.json"]
    assert storage.ensure_local(node / "tokenizer").read_text() == "a b c"
    assert not (node / "weights").exists()
    # What stayed from a node that was made again elsewhere gives way to what the manifest names.
    (node / "weights").write_text("3 2 1")
    assert storage.ensure_local(node / "weights").read_text() == "1 2 3"


def test_an_interrupted_copy_is_sent_again(tmp_path: Path, shared: Path) -> None:
    node = made(tmp_path / "made", weights="1 2 3")
    stored = shared / "objects" / sha256(node / "weights")
    stored.write_text("1 2")
    storage.upload(node, {name: entry.sha256 for name, entry in describe_files(node).items()})
    assert stored.read_text() == "1 2 3"


def test_a_damaged_or_missing_copy_is_refused(tmp_path: Path, shared: Path) -> None:
    node = elsewhere(made(tmp_path / "made", weights="1 2 3"), tmp_path / "node")
    [stored] = (shared / "objects").iterdir()
    stored.write_text("1 2 4")
    with pytest.raises(UserError, match=rf"holds a damaged copy of {node}/weights: objects/{stored.name}"):
        storage.ensure_local(node / "weights")
    stored.unlink()
    with pytest.raises(UserError, match=rf"{node}/weights is not here, and the store .* has no copy of it"):
        storage.ensure_local(node / "weights")
    assert not (node / "weights").exists()


@pytest.mark.parametrize("address", ["ftp://somewhere/prefix", "s3://"])
def test_an_address_that_is_none_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv(storage.VARIABLE, address)
    with pytest.raises(UserError, match=f"The store {address} is neither a folder nor"):
        storage.fetch_verified(tmp_path / "weights", "0" * 64)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("ftp://somebody:secret@host/prefix?token=secret", "ftp://host/prefix"),
        ("s3://AKIA:secret/with+slash@bucket/prefix", "s3://bucket/prefix"),
        ("s3://AKIA:a secret@bucket", "s3://bucket"),
    ],
)
def test_credentials_in_an_address_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, shown: str
) -> None:
    monkeypatch.setenv(storage.VARIABLE, address)
    with pytest.raises(UserError) as raised:
        storage.fetch_verified(tmp_path / "weights", "0" * 64)
    assert f"The store {shown} is" in str(raised.value)
    assert "secret" not in str(raised.value)


def test_without_a_store_nothing_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(storage.VARIABLE, raising=False)
    node = elsewhere(made(tmp_path / "made", weights="1 2 3"), tmp_path / "node")
    assert not storage.ensure_local(node / "weights").exists()
    assert not storage.fetch_verified(node / "weights", sha256(tmp_path / "made" / "weights"))


def test_a_manifest_without_a_list_names_nothing(tmp_path: Path, shared: Path) -> None:
    write_json(tmp_path / "metrics.json", {"metrics": []})
    assert not storage.ensure_local(tmp_path / "items.parquet", "metrics.json").exists()


def test_fetch_brings_small_files_once(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node = made(shared / "results/demo/models/bio", weights="1 2 3")
    (node / "weights").unlink()
    monkeypatch.chdir(tmp_path)
    assert main(["fetch", "--results", "results/demo"]) == 0
    here = tmp_path / "results/demo/models/bio"
    assert [path.name for path in here.iterdir()] == ["manifest.json"]
    assert storage.ensure_local(here / "weights").read_text() == "1 2 3"
    capsys.readouterr()
    assert main(["fetch", "--store", str(shared), "--results", "results/demo"]) == 0
    assert capsys.readouterr().out == "0 files fetched to results/demo.\n"


def test_fetch_goes_by_what_the_storage_holds_whatever_the_clock_here_says(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = shared / "results/demo/tables/nodes.parquet"
    stored.parent.mkdir(parents=True)
    stored.write_text("old")
    monkeypatch.chdir(tmp_path)
    assert storage.fetch_results(str(shared), Path("results/demo")) == 1
    # It was made again there, as large, and its clock is behind.
    stored.write_text("new")
    os.utime(stored, (1e9, 1e9))
    assert storage.fetch_results(str(shared), Path("results/demo")) == 1
    assert Path("results/demo/tables/nodes.parquet").read_text() == "new"


def test_fetch_removes_what_it_brought_and_the_storage_no_longer_holds(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Snakemake removes the manifest of a node that changed; where the job then fails, the node is no longer made."""
    stored = made(shared / "results/demo/models/bio/rtn", weights="1 2 3") / "manifest.json"
    table = shared / "results/demo/tables/nodes.parquet"
    log = shared / "results/demo/logs/compress/bio/rtn.log"
    for file in (table, log):
        file.parent.mkdir(parents=True)
        file.write_text("of the first run")
    monkeypatch.chdir(tmp_path)
    results = Path("results/demo")
    assert storage.fetch_results(str(shared), results) == 4
    assert not list(failed_jobs(ResultsLayout(results)))
    capsys.readouterr()
    for file in (stored, table):
        file.unlink()
    log.write_text("error: It broke.\n")
    assert storage.fetch_results(str(shared), results) == 1
    assert capsys.readouterr().err == "Store: removed 1 files that it no longer holds.\n"
    assert [(node, stage) for node, stage, _ in failed_jobs(ResultsLayout(results))] == [("bio/rtn", "compress")]
    # What was computed from the nodes says so itself where it is outdated.
    assert (results / "tables/nodes.parquet").exists()
    # Made again, it comes again.
    stored.write_text("{}")
    assert storage.fetch_results(str(shared), results) == 1
    assert (results / "models/bio/rtn/manifest.json").read_text() == "{}"


def manifests(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("manifest.json")}


def test_fetch_removes_nothing_that_was_made_or_changed_here(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"models/bio/manifest.json", "models/bio/a/manifest.json", "models/bio/b/manifest.json"}
    monkeypatch.chdir(tmp_path)
    results, own = Path("results/demo"), Path("results/demo/models/bio/own/manifest.json")
    write_json(own, {})
    for name in names:
        write_json(shared / results / name, {})
    # The storage holds it as it is here, as after a copy of all of a study: that it was not brought is known.
    copied = results / "models/bio/copied/manifest.json"
    write_json(copied, {})
    write_json(shared / copied, {})
    os.utime(shared / copied, ns=(copied.stat().st_mtime_ns,) * 2)
    assert storage.fetch_results(str(shared), results) == 3
    write_json(results / "models/bio/a/manifest.json", {"made": "here"})
    for name in ("a", "b", "copied"):
        (shared / results / f"models/bio/{name}/manifest.json").unlink()
    assert storage.fetch_results(str(shared), results) == 0
    left = {"models/bio/manifest.json", "models/bio/a/manifest.json"}
    assert manifests(results) == left | {"models/bio/own/manifest.json", "models/bio/copied/manifest.json"}


def test_fetch_removes_nothing_because_of_another_or_an_emptied_storage(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    results = Path("results/demo")
    write_json(shared / results / "models/bio/manifest.json", {})
    write_json(tmp_path / "other" / results / "models/tiny/manifest.json", {})
    assert storage.fetch_results(str(shared), results) == 1
    (shared / results / "models/bio/manifest.json").unlink()
    assert storage.fetch_results(str(shared), results) == 0
    assert manifests(results) == {"models/bio/manifest.json"}
    assert storage.fetch_results(str(tmp_path / "other"), results) == 1
    assert manifests(results) == {"models/bio/manifest.json", "models/tiny/manifest.json"}


def test_fetch_into_the_storage_itself_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = Path("results/demo")
    for name in ("bio", "tiny"):
        write_json(results / "models" / name / "manifest.json", {})
    assert storage.fetch_results(".", results) == 0
    (results / "models/tiny/manifest.json").unlink()
    assert storage.fetch_results(str(tmp_path), results) == 0
    assert [path.as_posix() for path in results.rglob("*") if path.is_file()] == [
        "results/demo/models/bio/manifest.json"
    ]


def test_fetch_writes_nowhere_but_into_the_results(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket may hold a key with dots in it; a folder does not list one."""
    from pyarrow import fs

    class Bucket(fs.FileSystemHandler):
        def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
            return [fs.FileInfo(f"{selector.base_dir}/../../taken", fs.FileType.File, size=1, mtime_ns=1)]

    for method in Bucket.__abstractmethods__:
        setattr(Bucket, method, lambda self, *_: None)
    Bucket.__abstractmethods__ = frozenset()
    monkeypatch.setattr(storage, "_open_store", lambda address: (fs.PyFileSystem(Bucket()), "prefix"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"results/demo/\.\./\.\./taken, which is not a path of results; remove it"):
        storage.fetch_results("s3://prefix", Path("results/demo"))
    assert not (tmp_path / "taken").exists()


def test_jobs_that_open_a_file_at_once_fetch_it_once(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = elsewhere(made(tmp_path / "made", weights="1 2 3"), tmp_path / "node")
    copy, copies = storage._copy, []

    def slowly(*arguments: Any) -> None:
        copies.append(arguments)
        sleep(0.2)
        copy(*arguments)

    monkeypatch.setattr(storage, "_copy", slowly)
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(storage.ensure_local, [node / "weights"] * 4))
    assert [path.read_text() for path in opened] == ["1 2 3"] * 4
    assert len(copies) == 1


def test_fetch_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(storage.VARIABLE, raising=False)
    assert main(["fetch", "--results", "results/demo"]) == 1
    assert main(["fetch", "--store", str(tmp_path), "--results", str(tmp_path)]) == 1
    assert main(["fetch", "--store", str(tmp_path), "--results", "results/none"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "error: No store is given; pass --store, or set COPPICE_STORE."
    assert "is not below the storage's prefix" in errors[1]
    assert errors[2].startswith(f"error: The store {tmp_path} cannot be used")
