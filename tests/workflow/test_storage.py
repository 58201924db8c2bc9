"""A study whose results lie in a bucket or in a shared folder, gone on with on machines that never saw it."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from coppice import storage
from coppice.errors import UserError

# Apart from the environment, where they would be imported by every job.
STORAGE = Path(sys.prefix) / "storage"
LACKING = f"needs moto[server] and snakemake-storage-plugin-s3 in {STORAGE}, of tests/storage-requirements.txt"

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("rules", "workflow", "profiles", "config", "envs", "resources/models/bio-tiny")
PREFIX = "s3://coppice/team"
RESULTS = "team/results/away"
RECOVERY = {
    "method": "full",
    "text": "bio",
    "validation": "bio",
    "validation_windows": 4,
    "tokens": 1_600,
    "length": 32,
    "batch_size": 4,
    "warmup": 0,
    "learning_rate": 0.001,
}
STUDY = {
    "study": "away",
    "models": {"bio": {"shipped": "bio-tiny"}},
    "texts": {"bio": {"builtin": "biographies", "people": 50}},
    "budgets": [400, 800, 1_200, 1_600],
    "calibrations": {"few": {"text": "bio", "windows": 4, "length": 32}},
    "steps": {
        "wanda-50": {"method": "wanda", "sparsity": 0.5},
        "full-2k": RECOVERY,
        "rtn-4": {"method": "rtn", "bits": 4, "group_size": 32},
    },
    "recipes": [["wanda-50", "full-2k"]],
    "evaluations": {
        "quality": {
            "kind": "quality",
            "nodes": ["*/full-2k"],
            "perplexity": {"own": {"text": "bio", "length": 32, "windows": 4}},
        },
        "cost": {"kind": "cost", "nodes": ["*/full-2k"], "prompt": 8, "generate": 2, "repeats": 2, "warmup": 0},
    },
    "laws": {"curves": {"law": "learning-curve"}},
}
NODES = ["bio", "bio/wanda-50", "bio/wanda-50/full-2k"]
# What follows from the study's file alone, and is made again where that is newer.
FOLLOWS = Counter(["study", "tables", "fit", "report", "track", "all"])


def checkout(folder: Path, study: dict[str, Any]) -> Path:
    """A machine: a fresh copy of the repository, every file dated now as after a clone, with a study."""
    folder.mkdir()
    shutil.copyfile(ROOT / "Snakefile", folder / "Snakefile")
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / part, copy_function=shutil.copyfile, ignore=skipped)
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder


def run(
    machine: Path, environment: dict[str, str], provider: str, prefix: str, *words: str
) -> subprocess.CompletedProcess:
    """Snakemake on a machine, to its end; `stdout` holds all that it printed."""
    command = [sys.executable, "-m", "snakemake", *words, "--cores", "2", "--configfile", "study.yaml"]
    command += ["--default-storage-provider", provider, "--default-storage-prefix", prefix]
    variables = {name: value for name, value in os.environ.items() if name != storage.VARIABLE} | environment
    variables["PYTHONPATH"] = os.pathsep.join([variables["PYTHONPATH"], str(STORAGE)])
    return subprocess.run(
        command, cwd=machine, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


def jobs(finished: subprocess.CompletedProcess) -> Counter[str]:
    """How many jobs of each rule ran."""
    table = finished.stdout.partition("Job stats:")[2].partition("total")[0]
    rules = {rule: int(count) for rule, count in re.findall(r"^(\w+)\s+(\d+)$", table, re.MULTILINE)}
    return Counter(rules)


def succeed(finished: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert finished.returncode == 0, finished.stdout[-6000:]
    return finished


class Bucket:
    """The bucket of a server on this machine, and what was asked of it."""

    def __init__(self, address: str, requests: list[tuple[str, str]]) -> None:
        self.address, self.requests = address, requests
        import boto3

        self.client = boto3.client(
            "s3",
            endpoint_url=address,
            region_name="us-east-1",
            aws_access_key_id="somebody",
            aws_secret_access_key="something",
        )

    def sizes(self) -> dict[str, int]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket="coppice")
        return {entry["Key"]: entry["Size"] for page in pages for entry in page["Contents"]}

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket="coppice", Key=key)["Body"].read()

    def files(self, node: str) -> dict[str, str]:
        """SHA-256 of a node's files."""
        manifest = json.loads(self.read(f"{RESULTS}/models/{node}/manifest.json"))
        return {name: entry["sha256"] for name, entry in manifest["files"].items()}

    def weights(self, *nodes: str) -> dict[str, str]:
        """By node the SHA-256 of its weights."""
        return {node: self.files(node)["model.safetensors"] for node in nodes}

    def statistics(self) -> set[str]:
        """SHA-256 of the files that the calibration left."""
        return set(json.loads(self.read(f"{RESULTS}/statistics/bio/few/moments/manifest.json"))["files"].values())

    def bytes(self, objects: set[str]) -> int:
        """The size of objects of the store."""
        return sum(size for key, size in self.sizes().items() if key.rpartition("/")[2] in objects)

    def objects(self, method: str, since: int) -> set[str]:
        """The objects of the store that were asked for since so many requests."""
        asked = {path.partition("?")[0] for verb, path in self.requests[since:] if verb == method}
        return {path.rpartition("/")[2] for path in asked if "/objects/" in path} - {""}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """An S3 server on a free port, known to Snakemake's plugin by its own variables."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(STORAGE)])
    for module in ("boto3", "snakemake_storage_plugin_s3"):
        pytest.importorskip(module, reason=LACKING)
    moto_server = pytest.importorskip("moto.moto_server.threaded_moto_server", reason=LACKING)
    requests: list[tuple[str, str]] = []

    class Noting(moto_server.MotoRequestHandler):
        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            requests.append((self.command, self.path))

    monkeypatch.setattr(moto_server, "MotoRequestHandler", Noting)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {"ENDPOINT_URL": address, "ACCESS_KEY": "somebody", "SECRET_KEY": "something"}.items():
        monkeypatch.setenv(f"SNAKEMAKE_STORAGE_S3_{name}", value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    yield Bucket(address, requests)
    server.stop()


def tracked(machine: Path) -> set[str]:
    """The names of the runs in a machine's own MLflow database, and that their files are not in the cache."""
    with closing(sqlite3.connect(machine / "results" / "mlflow.db")) as database:
        runs = database.execute("SELECT name, artifact_uri FROM runs WHERE lifecycle_stage = 'active'").fetchall()
    for _, address in runs:
        assert Path(address.removeprefix("file://")).is_relative_to(machine / "results" / "mlartifacts")
        assert any(Path(address.removeprefix("file://")).iterdir())
    return {name for name, _ in runs}


def test_a_study_in_a_bucket_goes_on_anywhere(
    bucket: Bucket, forks: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = checkout(tmp_path / "first", STUDY)
    succeed(run(first, forks, "s3", PREFIX))
    held = bucket.sizes()
    for name in (
        "models/bio/manifest.json",
        "tables/nodes.parquet",
        "report/index.html",
        "tracking/runs.json",
        "logs/recover/bio/wanda-50/full-2k.log",
    ):
        assert f"{RESULTS}/{name}" in held
    assert not [key for key in held if key.startswith(RESULTS) and key.endswith(".safetensors")]
    parent = bucket.files("bio/wanda-50")
    # The tokenizer is the root's: the store has it once.
    assert parent["tokenizer.json"] == bucket.files("bio")["tokenizer.json"]
    stored = {key.rpartition("/")[2]: size for key, size in held.items() if "/objects/" in key}
    assert {*parent.values(), *bucket.files(NODES[-1]).values(), *bucket.statistics()} <= stored.keys()
    # The law saw the recovery's curve, which came from the store, and the report and MLflow saw the law.
    assert json.loads(bucket.read(f"{RESULTS}/laws/curves/fit.json"))["points"] == len(STUDY["budgets"])
    assert b"learning-curve" in bucket.read(f"{RESULTS}/report/index.html")
    assert tracked(first) == {*NODES, "away"}
    print(f"{sum(stored.values()):,} bytes in the store")

    # A machine that has nothing adds a node: it makes that node, and fetches the weights of its parent alone. Tables,
    # report and tracking need small files only.
    longer = STUDY | {"recipes": [["wanda-50", "full-2k", "rtn-4"]]}
    before = len(bucket.requests)
    second = checkout(tmp_path / "second", longer)
    assert jobs(succeed(run(second, forks, "s3", PREFIX))) == FOLLOWS + Counter(["compress"])
    fetched = bucket.objects("GET", before)
    weights = bucket.weights(*NODES, f"{NODES[-1]}/rtn-4")
    assert fetched & {*weights.values(), *bucket.statistics()} == {weights[NODES[-1]]}
    assert tracked(second) == {*weights, "away"}
    print(f"{bucket.bytes(fetched):,} bytes fetched for a node")

    # Tables refuse what was made of another calibration, and the bucket's stay as they are. Nobody fetches weights.
    changed = longer | {"calibrations": {"few": STUDY["calibrations"]["few"] | {"windows": 3}}}
    before = len(bucket.requests)
    third = checkout(tmp_path / "third", changed)
    refused = run(third, forks, "s3", PREFIX, "tables", "--no-hooks")
    assert refused.returncode
    assert jobs(refused) == {"study": 1, "tables": 1}
    said = bucket.read(f"{RESULTS}/logs/tables.log").decode()
    assert "calibration 'few' or its text 'bio' changed: windows (was 4, is 3). Give what changed a new name" in said
    fetched = bucket.objects("GET", before)
    assert not fetched & {*weights.values(), *bucket.statistics()}
    assert not bucket.objects("PUT", before)
    assert not list((third / ".snakemake").rglob("*.safetensors"))
    # With what the sentence names removed, all that was calibrated so is made again.
    bucket.client.delete_object(Bucket="coppice", Key=f"{RESULTS}/tokens/bio/calibration.few/manifest.json")
    again = jobs(succeed(run(third, forks, "s3", PREFIX, "tables", "--dry-run")))
    assert again == {"tokenize": 1, "calibrate": 1, "compress": 2, "recover": 1, "evaluate": 1, "cost": 1, "tables": 1}

    # A copy that changed in the bucket is refused.
    damaged = f"team/objects/{weights['bio']}"
    bucket.client.put_object(Bucket="coppice", Key=damaged, Body=b"\0" * stored[weights["bio"]])
    server = bucket.address.removeprefix("http://")
    monkeypatch.setenv(storage.VARIABLE, f"{PREFIX}?scheme=http&endpoint_override={server}&region=us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    with pytest.raises(UserError, match=r"s3://coppice/team holds a damaged copy of .*Remove that object"):
        storage.fetch_verified(tmp_path / "model.safetensors", weights["bio"])
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.raises(UserError, match=r"the store s3://coppice/team has no copy of it"):
        storage.fetch_verified(tmp_path / "model.safetensors", "0" * 64)


@pytest.mark.skipif(shutil.which("rsync") is None, reason="needs rsync, which the storage plugin fs runs")
def test_a_study_in_a_shared_folder_is_done_for_every_machine(forks: dict[str, str], tmp_path: Path) -> None:
    study = STUDY | {"recipes": [], "evaluations": {}, "laws": {}}
    shared = tmp_path / "shared"
    first = checkout(tmp_path / "first", study)
    refused = run(first, forks, "fs", f"{shared} folder", "tables")
    assert f"The storage prefix '{shared} folder' holds a blank" in refused.stdout
    assert not list(tmp_path.glob("shared*"))
    succeed(run(first, forks, "fs", str(shared), "tables"))
    manifest = json.loads((shared / "results/away/models/bio/manifest.json").read_text())
    assert (shared / "results/away/tables/costs.parquet").is_file()
    assert {entry["sha256"] for entry in manifest["files"].values()} <= {
        path.name for path in (shared / "objects").iterdir()
    }
    # A fresh clone is newer than all results: only what follows from the study's file is made again.
    second = succeed(run(checkout(tmp_path / "second", study), forks, "fs", str(shared), "tables", "--dry-run"))
    assert jobs(second) == {"study": 1, "tables": 1}
