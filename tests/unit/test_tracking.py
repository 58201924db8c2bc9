from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_results import fake_study, log, write_results

from coppice import tables, tracking
from coppice.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of MLflow, whose tables take seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    tracking.connect(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def results(tmp_path: Path, database: Path) -> Path:
    folder = write_results(tmp_path / "demo")
    shutil.copyfile(database, tmp_path / "mlflow.db")
    tables.write_tables(fake_study(), folder, folder / "tables", partial=True)
    return folder


def client(results: Path):
    return tracking.connect(f"sqlite:///{results.parent / 'mlflow.db'}")


def active(results: Path) -> dict[str, list]:
    """Runs that the user sees, by node."""
    shown = client(results)
    experiment = shown.get_experiment_by_name("demo").experiment_id
    found: dict[str, list] = {}
    for run in shown.search_runs([experiment], max_results=1000):
        found.setdefault(run.data.tags["coppice.node"], []).append(run)
    return found


def _datasets(run) -> set[tuple[str, str]]:
    return {(entry.dataset.name, entry.tags[0].value) for entry in run.inputs.dataset_inputs}


def test_every_node_becomes_a_run_with_all_it_has(results: Path) -> None:
    made = tracking.track(fake_study(), results, None)
    runs = active(results)
    assert {node: found[0].info.run_id for node, found in runs.items()} == made
    assert all(len(found) == 1 for found in runs.values())
    assert len(runs) == 13  # ten nodes made, two that failed, and the study

    run = runs["small/laco-25/full-1m/gptq-4"][0]
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "small/laco-25/full-1m/gptq-4"
    assert run.data.params["method"] == "gptq"
    assert run.data.params["prune.ratio"] == "0.25"
    assert run.data.params["recover.learning_rate"] == "0.001"
    assert run.data.params["quantize.bits"] == "4"
    assert run.data.metrics["bits_per_weight"] == pytest.approx(4.0)
    assert run.data.metrics["decode_latency"] == pytest.approx(0.011)
    assert run.data.metrics["perplexity_stories_stderr"] == pytest.approx(0.05 * run.data.metrics["perplexity_stories"])
    assert run.data.tags["mlflow.parentRunId"] == made["small"]
    assert run.data.tags["coppice.parent"] == "small/laco-25/full-1m"
    assert _datasets(run) == {("default", "calibration"), ("evaluation.quality.stories", "evaluation")}
    assert {len(entry.dataset.digest) for entry in run.inputs.dataset_inputs} == {36}
    assert _datasets(runs["small/laco-25/full-1m"][0]) == {
        ("recovery.full-1m", "recovery"),
        ("validation.full-1m", "validation"),
        ("evaluation.quality.stories", "evaluation"),
    }
    flat = {"stored_mb", "parameters_m", "bits_per_weight", "rho", "perplexity_stories", "biographies_acc"}
    assert all(
        flat <= set(found[0].data.metrics) for node, found in runs.items() if "broken" not in node and node != "."
    )
    for node, found in runs.items():
        assert ("mlflow.parentRunId" in found[0].data.tags) == ("/" in node)

    shown = client(results)
    history = shown.get_metric_history(made["small/laco-25/full-1m"], "validation_loss")
    assert [point.step for point in history] == [0, 50_000, 100_000, 200_000, 400_000, 1_000_000]
    assert [point.value for point in history] == sorted((point.value for point in history), reverse=True)

    folder = results.parent / "mlartifacts" / made["small/wanda-50"] / "artifacts"
    assert (folder / "manifest.json").read_bytes() == (results / "models/small/wanda-50/manifest.json").read_bytes()
    assert (folder / "logs/compress.log").read_text() == "done\n"
    assert (folder / "benchmarks/compress.jsonl").exists()
    weights = json.loads((folder / "weights.json").read_text())
    assert weights["files"]["model.safetensors"]["sha256"] == "a" * 64
    assert not (folder / "weights").exists()

    study = results.parent / "mlartifacts" / made["."] / "artifacts"
    assert (study / "tables/nodes.parquet").exists()
    assert (study / "laws/p2/fit.json").exists()
    assert runs["."][0].data.metrics["p2_later_tokens_rmse"] == pytest.approx(0.012)
    assert runs["."][0].info.run_name == "demo"


def test_failed_nodes_are_failed_runs_with_their_log(results: Path) -> None:
    made = tracking.track(fake_study(), results, None)
    run = active(results)["small/broken-9"][0]
    assert run.info.status == "FAILED"
    assert "no such thing" in run.data.tags["mlflow.note.content"]
    stored = results.parent / "mlartifacts" / made["small/broken-9"] / "artifacts/logs/compress.log"
    assert "error: model.layers.3" in stored.read_text()


def test_tracking_again_changes_only_what_changed(results: Path) -> None:
    study = fake_study()
    first = tracking.track(study, results, None)
    assert tracking.track(study, results, None) == first

    path = results / "evaluations/small/quality/metrics.json"
    before = path.read_text()
    report = json.loads(before)
    report["metrics"][0]["value"] *= 2
    path.write_text(json.dumps(report))
    tables.write_tables(study, results, results / "tables", partial=True)
    second = tracking.track(study, results, None)
    assert {node for node in first if first[node] != second[node]} == {"small", "."}
    runs = active(results)
    assert all(len(found) == 1 for found in runs.values())
    # The children stay, and hang on the new run of their root.
    assert runs["small/wanda-50"][0].data.tags["mlflow.parentRunId"] == second["small"]

    # What was shown before comes back from the trash.
    path.write_text(before)
    tables.write_tables(study, results, results / "tables", partial=True)
    assert tracking.track(study, results, None) == first
    assert {node: [run.info.run_id for run in found] for node, found in active(results).items()} == {
        node: [run_id] for node, run_id in first.items()
    }

    # Times alone are no reason for a new run.
    manifest = json.loads((results / "models/small/wanda-50/manifest.json").read_text())
    (results / "models/small/wanda-50/manifest.json").write_text(json.dumps(manifest | {"wall_seconds": 99.0}))
    tables.write_tables(study, results, results / "tables", partial=True)
    assert tracking.track(study, results, None)["small/wanda-50"] == first["small/wanda-50"]


def test_runs_cut_short_and_nodes_that_left_go_to_the_trash(results: Path) -> None:
    study = fake_study()
    first = tracking.track(study, results, None)
    client(results).update_run(first["small/wanda-50"], status="RUNNING")
    second = tracking.track(study, results, None)
    assert {node for node in first if first[node] != second[node]} == {"small/wanda-50"}
    smaller = study.model_copy(update={"recipes": study.recipes[:1]})
    tables.write_tables(smaller, results, results / "tables")
    tracking.track(smaller, results, None)
    assert set(active(results)) == {".", "small", "medium", "small/wanda-50", "medium/wanda-50"}


def test_weights_are_uploaded_by_policy(results: Path) -> None:
    study = fake_study(weights="pareto")
    made = tracking.track(study, results, None)
    # By hand: from the smallest up, each of these has a lower perplexity than all that are smaller.
    best = {"small/laco-25/full-1m/gptq-4", "medium/laco-25/full-1m/gptq-4", "small/laco-25/full-1m", "small", "medium"}
    stored = results.parent / "mlartifacts"
    assert {node for node in made if (stored / made[node] / "artifacts/weights/model.safetensors").exists()} == best
    everything = tracking.track(fake_study(weights="all"), results, None)
    assert {node for node in made if made[node] != everything[node]} == {
        node for node in made if node not in best and node != "." and "broken" not in node
    }
    path = "artifacts/weights/model.safetensors"
    assert (stored / everything["small/wanda-50"] / path).read_text() == "weights of small/wanda-50"


def test_two_at_once_make_each_run_once(results: Path) -> None:
    program = (
        "import json, sys\nfrom pathlib import Path\nfrom coppice import tracking\n"
        "from fake_results import fake_study\n"
        "print(json.dumps(tracking.track(fake_study(), Path(sys.argv[1]), None)))"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'workflow'}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", program, str(results)]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], printed
    first, second = (json.loads(output) for output, _ in printed)
    assert first == second
    assert all(len(found) == 1 for found in active(results).values())


def test_tables_must_be_there(results: Path) -> None:
    (results / "tables/costs.parquet").unlink()
    with pytest.raises(UserError, match=r"costs\.parquet does not exist"):
        tracking.track(fake_study(), results, None)


def test_limits_of_mlflow(results: Path) -> None:
    log(results, "compress", "small/broken-9", "error: " + "x" * 9000 + "\n")
    path = results / "models/small/wanda-50/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["step"]["options"] = {"layers": "y" * 7000, **{f"option{index}": index for index in range(150)}}
    path.write_text(json.dumps(manifest))
    tables.write_tables(fake_study(), results, results / "tables", partial=True)
    tracking.track(fake_study(), results, None)
    runs = active(results)
    assert len(runs["small/wanda-50"][0].data.params["prune.layers"]) == 6000
    assert runs["small/wanda-50"][0].data.params["prune.option149"] == "149"
    assert len(runs["small/broken-9"][0].data.tags["coppice.error"]) <= 8000


@pytest.fixture
def server(tmp_path: Path, database: Path) -> Iterator[str]:
    """A tracking server on a free port."""
    shutil.copyfile(database, tmp_path / "server.db")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "served"),
    ]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment = os.environ | quiet
    with open(tmp_path / "server.log", "w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=tmp_path, env=environment, start_new_session=True
        )
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.25)
        else:
            pytest.skip("the tracking server did not start within 30 s")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=20)


def test_a_tracking_server(results: Path, server: str, tmp_path: Path) -> None:
    made = tracking.track(fake_study(), results, server)
    assert tracking.track(fake_study(), results, server) == made
    run = tracking.connect(server).get_run(made["small/wanda-50"])
    assert run.data.params["prune.sparsity"] == "0.5"
    assert len(list((tmp_path / "served").rglob("manifest.json"))) == 10
    assert not (tmp_path / "mlartifacts").exists()


def test_a_server_that_is_not_there(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9"):
        tracking.track(fake_study(), results, "http://127.0.0.1:9")


def test_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking.tracking_uri(None, tmp_path / "demo") == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking.tracking_uri("sqlite:///here/mlflow.db", tmp_path) == f"sqlite:///{tmp_path}/here/mlflow.db"
    assert tracking.tracking_uri("http://host:5000", tmp_path) == "http://host:5000"
