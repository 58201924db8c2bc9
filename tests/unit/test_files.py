"""Files appear whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from coppice.errors import UserError
from coppice.files import atomic_directory, atomic_write, read_json, read_json_object, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "value.txt"
    path.write_text("old")
    with (
        pytest.raises(
            UserError, match=r"value\.txt could not be written: No space left on device\. Nothing was changed"
        ),
        atomic_write(path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.txt"]


def test_a_directory_keeps_folders_of_other_nodes_and_drops_stale_files(tmp_path: Path) -> None:
    (tmp_path / "child").mkdir()
    (tmp_path / "child" / "manifest.json").write_text("child")
    (tmp_path / "stale.safetensors").write_text("old")
    (tmp_path / "manifest.json").write_text("old")
    with atomic_directory(tmp_path) as temporary:
        (temporary / "model.safetensors").write_text("new")
        (temporary / "manifest.json").write_text("new")
    assert (tmp_path / "child" / "manifest.json").read_text() == "child"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["child", "manifest.json", "model.safetensors"]
    assert (tmp_path / "manifest.json").read_text() == "new"


def test_stale_files_go_from_folders_that_are_written_to(tmp_path: Path) -> None:
    """A reader would take the one file of an earlier export, and not the parts of the new one."""
    for name in ("base/model.safetensors", "base/child/manifest.json", "other/model.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    with atomic_directory(tmp_path) as temporary:
        (temporary / "base").mkdir()
        for name in ("base/model-00001-of-00002.safetensors", "base/model-00002-of-00002.safetensors", "manifest.json"):
            (temporary / name).write_text("new")
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == [
        "child",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert (tmp_path / "base/child/manifest.json").exists()
    assert (tmp_path / "other/model.safetensors").exists()


def test_an_interrupted_directory_is_as_before(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path) as temporary:
        (temporary / "model.safetensors").write_text("new")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".partial-killed").mkdir()
    (tmp_path / ".partial-killed" / "model.safetensors").write_text("half")
    with atomic_directory(tmp_path) as temporary:
        (temporary / "manifest.json").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe"])
def test_broken_json_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json is not valid JSON"):
        read_json(tmp_path / "manifest.json")


def test_a_folder_in_the_place_of_json_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json cannot be read: Is a directory\."):
        (tmp_path / "manifest.json").mkdir()
        read_json(tmp_path / "manifest.json")


def test_json_that_is_not_an_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json is not a JSON object"):
        read_json_object(tmp_path / "config.json")
