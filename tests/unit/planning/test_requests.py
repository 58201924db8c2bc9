"""What jobs ask a scheduler for, by the manifests that they read."""

from __future__ import annotations

from pathlib import Path

import pytest
from manifests import manifest

from coppice.methods.registry import method
from coppice.planning.jobs import Job
from coppice.planning.requests import UNREAD_MEGABYTES, available_manifest, disk_megabytes, memory_megabytes

PARAMETERS = {"total": 8_000_000_000, "blocks": 7_000_000_000, "decoder_linears": 7_000_000_000}
MANIFEST = manifest(
    parameters=PARAMETERS | {"nonzero": PARAMETERS["total"]}, dense=PARAMETERS, stored_bytes=16_000_000_000
)


def job(stage: str = "compress", **options) -> Job:
    return Job(stage, "big/wanda", ("models/big/wanda/manifest.json",), options=options)


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    path = tmp_path / "results/s/models/big/manifest.json"
    MANIFEST.write(path)
    return str(path)


def test_requests_are_whole_gigabytes_and_grow_with_the_attempt(checkpoint: str) -> None:
    first = memory_megabytes(job(kinds=[]), checkpoint, 1)
    assert first % 1_000 == 0 and first > 8 * 8_000  # eight bytes a parameter
    assert memory_megabytes(job(kinds=[]), checkpoint, 3) == 3 * first
    alone, with_reference = (disk_megabytes(job(kinds=[]), checkpoint, others, 1) for others in ([], [checkpoint]))
    assert with_reference - alone == pytest.approx(1.3 * 16_000, abs=1_000)


def test_a_frozen_base_asks_for_less_than_full_training(checkpoint: str) -> None:
    full, lora = (
        memory_megabytes(job("recover", resources=method(name).resources), checkpoint, 1) for name in ("full", "lora")
    )
    assert lora < full


def test_the_root_stands_for_a_node_that_is_not_there(checkpoint: str) -> None:
    child = checkpoint.replace("big/manifest.json", "big/wanda/rtn@1/manifest.json")
    assert available_manifest(child) == MANIFEST
    assert memory_megabytes(job(kinds=[]), child, 1) == memory_megabytes(job(kinds=[]), checkpoint, 1)


def test_without_any_manifest_a_fixed_amount_is_asked_for(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "results/s/models/big/manifest.json")
    assert memory_megabytes(job(), nowhere, 2) == 2 * UNREAD_MEGABYTES
    assert disk_megabytes(job(), nowhere, [], 1) == UNREAD_MEGABYTES
    Path(nowhere).parent.mkdir(parents=True)
    Path(nowhere).write_text("{")  # broken: the job itself will report it
    assert memory_megabytes(job(), nowhere, 1) == UNREAD_MEGABYTES


def test_one_missing_manifest_of_several_is_unknown_disk(checkpoint: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "results/s/models/other/manifest.json")
    assert disk_megabytes(job(kinds=[]), checkpoint, [missing], 1) == UNREAD_MEGABYTES
