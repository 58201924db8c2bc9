"""profiles/kubernetes, by Snakemake's plugin and the official client, against an API server of the tests: no cluster.

Pods are processes of this machine in empty folders, which share nothing but a bucket.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest

from coppice.files import read_json
from coppice.planning.resources import memory_bytes
from coppice.records.manifest import Manifest
from tests.cluster.daemons import descendants, kill, wait_until
from tests.cluster.study import ROOT, TIMES
from tests.workflow import test_storage
from tests.workflow.test_storage import STORAGE, Bucket, checkout

if TYPE_CHECKING:
    from tests.cluster.pods import Cluster, Pod

PACKAGES = Path(sys.prefix) / "kubernetes"
LACKING = f"needs Kubernetes' client and Snakemake's plugin in {PACKAGES}: make .venv/kubernetes/ready"
bucket = test_storage.bucket

STUDY = {
    "study": "podded",
    "models": {"bio": {"shipped": "bio-tiny"}},
    "texts": {"bio": {"builtin": "biographies", "people": 200}},
    "calibrations": {"default": {"text": "bio", "windows": 4, "length": 32}},
    "budgets": [512, 1024],
    "steps": {
        "wanda-50": {"method": "wanda", "sparsity": 0.5},
        "rtn-4": {"method": "rtn", "bits": 4, "group_size": 32},
        "full": {
            "method": "full",
            **{"text": "bio", "validation": "bio", "length": 32, "batch_size": 4, "validation_windows": 4},
            **{"tokens": 1024, "learning_rate": 1e-3},
        },
    },
    "recipes": [["wanda-50", "full"], ["rtn-4"]],
    "evaluations": {
        "quality": {
            "kind": "quality",
            "nodes": ["*/wanda-50"],
            "perplexity": {"own": {"text": "bio", "length": 32, "windows": 4}},
        }
    },
    "laws": {"p2": {"law": "p2", "bootstrap": 4, "starts": 4}},
}
RESULTS = "results/podded"
# What a user edits at the top of the profile.
EDITED = ["--kubernetes-namespace", "studies", "--container-image", "registry.example.org/team/coppice:1"]
EDITED += ["--default-storage-prefix", "s3://coppice/team"]
# Cores and GPUs of the pods of a stage; memory and disk are by its stage and model.
MODEL, TABLES = {"cpu": "4000m", "nvidia.com/gpu": "1"}, {"cpu": "2000m"}
LIMITS = dict.fromkeys(("calibrate", "compress", "recover", "evaluate"), MODEL) | {"fit": TABLES}
# Pods find no Coppice but the one that they are sent: this machine's installation is taken off their path.
SITECUSTOMIZE = """
import sys

sys.path.remove({package!r})
"""
ENTRY = 'print("This is the code that was sent.", flush=True)\n'


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr(sys, "path", [*sys.path, str(PACKAGES)])
    for module in ("kubernetes", "snakemake_executor_plugin_kubernetes"):
        pytest.importorskip(module, reason=LACKING)
    from tests.cluster.pods import Cluster

    started = Cluster(tmp_path / "cluster", "studies", image(tmp_path / "image"))
    started.start()
    try:
        yield started
    finally:
        started.stop()


def image(folder: Path) -> dict[str, str]:
    """The variables of a container of the image: this machine's Python, and what the Dockerfile says."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE.format(package=str(ROOT / "workflow")))
    dockerfile = (ROOT / "profiles/kubernetes/Dockerfile").read_text()
    [declared] = re.findall("^ENV (.+)$", dockerfile, re.MULTILINE)
    variables = dict(word.split("=") for word in declared.split())
    return {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"]),
        "PYTHONPATH": os.pathsep.join([str(folder), str(STORAGE)]),
        **variables,
        "PIP_FIND_LINKS": str(PACKAGES / "wheels"),
    }


def committed(folder: Path) -> Path:
    """A checkout with the study; Snakemake sends what git lists."""
    checkout(folder, STUDY)
    entry = folder / "workflow/coppice/__main__.py"
    entry.write_text(entry.read_text().replace("sys.exit", f"{ENTRY}sys.exit"))
    for words in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


class Run:
    """Snakemake with the profile in a checkout, under way; `log` has what it prints."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster, self.log = folder, cluster, folder.parent / "run.log"
        command = [sys.executable, "-m", "snakemake", "laws", "--workflow-profile", "profiles/kubernetes"]
        command += ["--configfile", "study.yaml", "--seconds-between-status-checks", "1", *EDITED]
        searched = [str(STORAGE), str(PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {"KUBECONFIG": str(cluster.kubeconfig), "PYTHONPATH": os.pathsep.join(searched)}
        with self.log.open("w") as printed:
            self.process = subprocess.Popen(
                command, cwd=folder, env=os.environ | variables, stdout=printed, stderr=subprocess.STDOUT
            )

    def printed(self) -> str:
        return self.log.read_text()

    def pod_at_work(self, rule: str) -> Pod:
        """A pod of the rule that has begun its job."""

        found: list[Pod] = []

        def begun() -> bool:
            assert self.process.poll() is None, self.printed()
            found.extend(pod for pod in self.pods(rule) if f"rule {rule}:" in pod.log and pod.exit_code() is None)
            return bool(found)

        wait_until(begun, 600, f"a pod begins a job of {rule}")
        return found[0]

    def pods(self, rule: str) -> list[Pod]:
        return [pod for pod in self.cluster.history if pod.rule == rule]

    def finish(self) -> int:
        return self.process.wait(timeout=1200)

    def stop(self) -> None:
        if self.process.poll() is None:
            for pid in (self.process.pid, *descendants(self.process.pid)):
                kill(pid)
            self.process.wait()


def asked(pod: Pod) -> dict[str, str]:
    """What a pod may use at most."""
    return pod.container["resources"]["limits"]


def tables(files: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """Tables by their names, without what is a time; of files that pandas reads."""
    return {name: pd.read_parquet(file).drop(columns=TIMES.get(name, [])) for name, file in files.items()}


def bucket_tables(bucket: Bucket) -> dict[str, pd.DataFrame]:
    folder = f"team/{RESULTS}/tables/"
    keys = [key for key in bucket.sizes() if key.startswith(folder)]
    return tables({key.removeprefix(folder).removesuffix(".parquet"): BytesIO(bucket.read(key)) for key in keys})


def local_tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Those of the same study without a cluster and without a bucket."""
    checkout(folder, STUDY)
    command = [sys.executable, "-m", "snakemake", "laws", "--cores", "2", "--configfile", "study.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return tables({file.stem: file for file in (folder / RESULTS / "tables").glob("*.parquet")})


@pytest.fixture
def run(cluster: Cluster, bucket: Bucket, tmp_path: Path) -> Iterator[Run]:
    started = Run(committed(tmp_path / "checkout"), cluster)
    yield started
    started.stop()


def test_a_killed_and_an_evicted_pod_end_in_the_tables_of_a_local_run(
    cluster: Cluster, bucket: Bucket, run: Run, tmp_path: Path
) -> None:
    killed = run.pod_at_work("compress")
    killed.kill()
    evicted = run.pod_at_work("evaluate")
    with cluster.lock:
        cluster.delete_pod(evicted.name)
    assert run.finish() == 0, run.printed()
    printed = run.printed()
    found, wanted = bucket_tables(bucket), local_tables(tmp_path / "local")
    assert found.keys() == wanted.keys() != set()
    for name in wanted:
        pd.testing.assert_frame_equal(found[name], wanted[name], check_exact=True)
    assert found["failures"].empty
    assert not found["metrics"].empty
    law = f"{RESULTS}/laws/p2/fit.json"
    assert json.loads(bucket.read(f"team/{law}")) == read_json(tmp_path / "local" / law)

    # A pod may use what its stage says; at the second attempt, twice the memory.
    root = Manifest.model_validate_json(bucket.read(f"team/{RESULTS}/models/bio/manifest.json"))
    for stage, attempts in {"compress": (1, 1, 2), "evaluate": (1, 2)}.items():
        # What a pod made is in the bucket alone, and is taken to be as large as its root.
        needed = ceil(memory_bytes(stage, root) / 1e9)
        memory = sorted(int(asked(pod)["memory"].removesuffix("000M")) for pod in run.pods(stage))
        assert memory == [times * needed for times in attempts]
    # Stages of seconds ran beside Snakemake, all others in pods.
    assert {pod.rule for pod in cluster.history} == LIMITS.keys()
    assert all(f"localrule {stage}:" in printed for stage in ("study", "root", "tokenize", "tables"))
    for pod in cluster.history:
        assert asked(pod).items() >= LIMITS[pod.rule].items()
        assert asked(pod).keys() - LIMITS[pod.rule].keys() == {"memory", "ephemeral-storage"}
        cores = int(asked(pod)["cpu"].removesuffix("m"))
        assert pod.container["resources"]["requests"] == {**asked(pod), "cpu": f"{cores * 95 // 100}m"}
        assert pod.container["image"] == "registry.example.org/team/coppice:1"
        tolerated = [toleration["key"] for toleration in pod.spec.get("tolerations", ())]
        assert tolerated == [name for name in ("nvidia.com/gpu",) if name in asked(pod)]

    # The killed pod's log is kept and named; of an evicted one nothing is left.
    kept = run.folder / ".snakemake/auxiliary/kubernetes-logs" / f"{killed.job}.log"
    assert "rule compress:" in kept.read_text()
    assert str(kept) in printed
    assert f"Job {evicted.job} failed. For details, please issue:" in printed

    # Keys reach pods by a secret that is gone with the run, and the study's code through the bucket.
    for pod in cluster.history:
        assert not re.search("somebody|something", json.dumps(pod.spec))
        named = {variable["name"] for variable in pod.container["env"]}
        assert {"SNAKEMAKE_STORAGE_S3_ACCESS_KEY", "SNAKEMAKE_STORAGE_S3_SECRET_KEY"} <= named
    assert not re.search("somebody|something", printed)
    assert cluster.secrets == {}
    assert ENTRY.split('"')[1] in bucket.read(f"team/{RESULTS}/logs/compress/bio/rtn-4.log").decode()
    assert not [key for key in bucket.sizes() if "snakemake-workflow-sources" in key]
    # The plugin leaves the job of an evicted pod behind, and nothing else.
    assert set(cluster.jobs) == {evicted.job}
    assert cluster.pods == {}


def job(**resources: Any) -> Any:
    """A job as the plugin makes it, whose pod asks for these resources."""
    from kubernetes import client

    container = client.V1Container(name="snakemake", image="coppice", command=["/bin/true"], args=[], env=[])
    container.resources = client.V1ResourceRequirements(**resources)
    pod = client.V1PodSpec(containers=[container], restart_policy="Never")
    template = client.V1PodTemplateSpec(spec=pod)
    return client.V1Job(metadata=client.V1ObjectMeta(name="job"), spec=client.V1JobSpec(template=template))


def test_the_api_server_refuses_what_a_cluster_refuses(cluster: Cluster) -> None:
    from kubernetes import client, config

    connection = config.new_client_from_config(str(cluster.kubeconfig))
    batch, core = client.BatchV1Api(connection), client.CoreV1Api(connection)
    gpu = {"nvidia.com/gpu": "1"}
    refused = [
        (job(requests=gpu), "Limit must be set for non overcommitable resources"),
        (job(requests=gpu, limits={"nvidia.com/gpu": "2"}), "must be equal to nvidia.com/gpu limit"),
        (job(requests={"memory": "8 GB"}), "no quantity"),
        (job(requests={"memory": "8G"}, limits={"memory": "4G"}), "must be less than or equal to memory limit"),
    ]
    wrongly_named = job(requests=gpu, limits=gpu)
    wrongly_named.metadata.name = "Job_1"
    for body, reason in [*refused, (wrongly_named, "RFC 1123")]:
        with pytest.raises(client.ApiException, match=reason):
            batch.create_namespaced_job("studies", body)
    with pytest.raises(client.ApiException, match='namespaces \\\\"default\\\\" not found'):
        batch.create_namespaced_job("default", job(requests=gpu, limits=gpu))
    batch.create_namespaced_job("studies", job(requests=gpu, limits=gpu))
    with pytest.raises(client.ApiException, match="AlreadyExists"):
        batch.create_namespaced_job("studies", job(requests=gpu, limits=gpu))
    # What version 0.5.1 of the plugin asks for when a pod failed.
    [pod] = core.list_namespaced_pod("studies", label_selector="job-name=job").items
    assert core.read_namespaced_pod_log(pod.metadata.name, "studies", container="snakemake") == ""
    with pytest.raises(client.ApiException, match="previous terminated container"):
        core.read_namespaced_pod_log(pod.metadata.name, "studies", container="snakemake", previous=True)
