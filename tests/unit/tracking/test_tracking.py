from __future__ import annotations

import json
import random
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from fake_results import fake_study, log, write_results

from coppice import tracking
from coppice.cli import main
from coppice.errors import UserError
from coppice.formatting import number
from coppice.results import collection as tables
from coppice.tracking import server, watching
from coppice.tracking.agreement import ListedRun, plan
from coppice.tracking.mirror import Mirror


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
    assert run.data.metrics["decode_ms_per_token"] == pytest.approx(11)
    assert run.data.metrics["decode_ms_per_token_spread"] == pytest.approx(1)
    assert runs["small/wanda-50"][0].data.metrics["sparsity"] == pytest.approx(0.35, abs=1e-3)
    assert run.data.metrics["sparsity"] == 0
    assert run.data.metrics["perplexity_stories_stderr"] == pytest.approx(0.05 * run.data.metrics["perplexity_stories"])
    assert run.data.tags["mlflow.parentRunId"] == made["small"]
    tags = {name.removeprefix("coppice."): value for name, value in run.data.tags.items()}
    assert tags["parent"] == "small/laco-25/full-1m"
    assert tags["composition"] == "prune > recover > quantize"
    assert (tags["model"], tags["family"], tags["method"], tags["budget"]) == ("small", "quantize", "gptq", "1M")
    front = {node for node, found in runs.items() if found[0].data.tags.get("coppice.pareto") == "yes"}
    # By hand: these perplexities fall with the size, and so do the accuracies that are made from them.
    assert front == {
        f"{model}{path}"
        for model in ("small", "medium")
        for path in ("", "/laco-25/full-1m", "/laco-25/full-1m/gptq-4")
    } - {"medium/laco-25/full-1m"}
    assert _datasets(run) == {("default", "calibration"), ("evaluation.quality.stories", "evaluation")}
    assert {len(entry.dataset.digest) for entry in run.inputs.dataset_inputs} == {36}
    note = run.data.tags["mlflow.note.content"]
    parent = made["small/laco-25/full-1m"]
    assert f"computed from [small/laco-25/full-1m](#/experiments/{run.info.experiment_id}/runs/{parent})" in note
    assert "| gptq (quantize) | bits 4, group_size 32 |" in note
    assert "snakemake --cores all --configfile study.yaml --force results/demo/models/small/laco-25/full-1m/" in note
    stderr = run.data.metrics["perplexity_stories_stderr"]
    low = number(run.data.metrics["perplexity_stories"] - 1.959964 * stderr, 4)
    assert f"| {low} to " in note
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


def test_nodes_below_a_broken_one_keep_nothing_from_being_tracked(results: Path) -> None:
    """The tables may also be older than the removal of the broken file, which their sentence asks for."""
    broken = results / "models/small/laco-25/manifest.json"
    broken.write_text('{"half')
    shutil.rmtree(broken.parent / "full-1m/gptq-4")
    tables.write_tables(fake_study(), results, results / "tables", partial=True)
    for _ in range(2):
        tracking.track(fake_study(), results, None)
        runs = active(results)
        assert {node for node in runs if node.startswith("small/laco-25")} == {"small/laco-25", "small/laco-25/full-1m"}
        assert {runs[node][0].info.status for node in ("small/laco-25", "small/laco-25/full-1m")} == {"FAILED"}
        assert "not valid JSON" in runs["small/laco-25"][0].data.tags["coppice.error"]
        broken.unlink(missing_ok=True)


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


def test_tables_must_be_there(results: Path) -> None:
    (results / "tables/costs.parquet").unlink()
    with pytest.raises(UserError, match=r"costs\.parquet does not exist"):
        tracking.track(fake_study(), results, None)


def test_limits_of_mlflow(results: Path) -> None:
    log(results, "compress", "small/broken-9", "error: " + "x" * 9000 + "\n")
    path = results / "models/small/wanda-50/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["step"]["options"] |= {"layers": "y" * 7000, **{f"option{index}": index for index in range(150)}}
    path.write_text(json.dumps(manifest))
    tables.write_tables(fake_study(), results, results / "tables", partial=True)
    tracking.track(fake_study(), results, None)
    runs = active(results)
    assert len(runs["small/wanda-50"][0].data.params["prune.layers"]) == 6000
    assert runs["small/wanda-50"][0].data.params["prune.option149"] == "149"
    assert len(runs["small/broken-9"][0].data.tags["coppice.error"]) <= 8000


def test_a_server_that_is_not_there(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "load_study", lambda path: fake_study())
    before = sorted(results.rglob("*"))
    words = ["--study", "study.yaml", "--results", str(results), "--output", str(results / "tracking/runs.json")]
    assert main(["track", *words, "--uri", "http://me:secret@127.0.0.1:9"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        "error: MLflow at http://me:...@127.0.0.1:9 does not answer (connection refused); the results"
    )
    assert f"are whole and were not touched, so once it answers run `coppice track --study {results}/study.yaml" in said
    assert "secret" not in said
    assert sorted(results.rglob("*")) == before


@pytest.mark.parametrize("password", ["secret", "a/secret", "a@secret", "a:secret?"])
def test_passwords_of_addresses_are_not_shown(tmp_path: Path, password: str) -> None:
    uri = f"http://me:{password}@host:5000"
    said = r"MLflow at http://me:\.\.\.@host:5000 does not answer"
    with pytest.raises(UserError, match=said) as raised, server.mlflow_errors(uri, tmp_path):
        raise requests.ConnectionError(f"no route to {uri} today")
    assert "secret" not in str(raised.value)


def test_a_file_that_goes_while_it_is_read_ends_no_watching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the state of a recovery does when it ends."""
    looks = iter([FileNotFoundError(2, "No such file or directory", "state.safetensors"), ({}, []), ({".": "1"}, [])])

    def look(*_: object) -> object:
        found = next(looks)
        if isinstance(found, Exception):
            raise found
        return found

    ends = iter([False, False, True])
    monkeypatch.setattr(tracking, "_synchronize", look)
    monkeypatch.setattr(tracking, "sleep", lambda seconds: None)
    monkeypatch.setattr(watching.Ending, "is_over", lambda self, study: next(ends))
    assert tracking.watch(fake_study(), tmp_path, None) == {".": "1"}
    assert "0 of 12 nodes are in MLflow" in capsys.readouterr().out


def test_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking.tracking_uri(None, tmp_path / "demo") == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking.tracking_uri("sqlite:///here/mlflow.db", tmp_path) == f"sqlite:///{tmp_path}/here/mlflow.db"
    assert tracking.tracking_uri("http://host:5000", tmp_path) == "http://host:5000"


def test_a_plan_by_hand() -> None:
    mine = (5, 1, "b")
    shown = [
        ListedRun("old", "a", "1", (3, 1, ""), whole=True, active=True),
        ListedRun("new", "a", "2", (4, 1, ""), whole=True, active=True),
        ListedRun("half", "a", "2", (5, 1, "a"), whole=False, active=True),
        ListedRun("coming", "a", "3", (6, 1, "a"), whole=False, active=True),  # of a newer view: it may yet stand
        ListedRun("outdated", "b", "1", (4, 1, ""), whole=True, active=True),
        ListedRun("trashed", "b", "2", (3, 1, ""), whole=True, active=False),
        ListedRun("begun", "c", "2", (5, 1, "a"), whole=False, active=True),
        ListedRun("newer", "d", "3", (6, 1, ""), whole=True, active=True),
        ListedRun("left", "gone", "1", (1, 1, ""), whole=True, active=True),
        ListedRun("kept", "unmade", "1", (1, 1, ""), whole=True, active=True),
        ListedRun("stale", "unmade", "1", (2, 0, ""), whole=True, active=True, live=True),
    ]
    wanted = dict.fromkeys("abcde", "2")
    made = plan(shown, wanted, {*wanted, "unmade"}, mine)
    assert made.current == {"a": "new", "d": "newer"}
    assert made.claimed == ["trashed"]
    assert (made.missing, made.contested) == (["e"], ["c"])
    # The previous run of a node stays until its new one is complete.
    assert sorted(made.trash) == ["half", "left", "old", "stale"]


class Killed(BaseException):
    """Ends a tracker as kill -9 does."""


@dataclass
class Store:
    """MLflow's runs in memory; each request waits until it is its turn, so that a test chooses who comes next."""

    runs: dict[str, SimpleNamespace] = field(default_factory=dict)
    gate: Callable[[], None] = lambda: None

    def search_runs(self, *_: object, **__: object) -> list[SimpleNamespace]:
        self.gate()
        copies = [
            SimpleNamespace(
                info=SimpleNamespace(**vars(run.info)), data=SimpleNamespace(tags=dict(run.data.tags), params={})
            )
            for run in self.runs.values()
        ]
        return Page(copies)

    def create_run(self, experiment: str, tags: dict[str, str], **_: object) -> SimpleNamespace:
        self.gate()
        name = f"{random.getrandbits(64):016x}"
        info = SimpleNamespace(run_id=name, status="RUNNING", lifecycle_stage="active")
        self.runs[name] = SimpleNamespace(info=info, data=SimpleNamespace(tags=dict(tags)))
        return self.runs[name]

    def _active(self, run: str) -> SimpleNamespace:
        from mlflow.exceptions import MlflowException

        self.gate()
        if self.runs[run].info.lifecycle_stage != "active":
            raise MlflowException(f"The run {run} must be in the 'active' state. Current state is deleted.")
        return self.runs[run]

    def log_batch(self, run: str, tags: tuple = (), **_: object) -> None:
        self._active(run).data.tags.update({tag.key: tag.value for tag in tags})

    def set_tag(self, run: str, key: str, value: str) -> None:
        self._active(run).data.tags[key] = value

    def log_artifacts(self, run: str, folder: str) -> None:
        self.gate()

    def set_terminated(self, run: str, status: str, end_time: int) -> None:
        self._active(run).info.status = status

    def delete_run(self, run: str) -> None:
        self.gate()
        self.runs[run].info.lifecycle_stage = "deleted"

    def restore_run(self, run: str) -> None:
        self.gate()
        self.runs[run].info.lifecycle_stage = "active"

    def visible(self) -> list[tuple[str, str, str]]:
        """(node, fingerprint, status) of every run that a user sees."""
        active = [run for run in self.runs.values() if run.info.lifecycle_stage == "active"]
        return sorted(
            (run.data.tags["coppice.node"], run.data.tags["coppice.fingerprint"], run.info.status) for run in active
        )


class Page(list):
    token = None


class Baton:
    """Lets one thread at a time go on, from one request to its next, in an order drawn by chance."""

    def __init__(self, chance: random.Random) -> None:
        self.chance, self.parked = chance, threading.Semaphore(0)
        self.waiting: dict[int, threading.Semaphore] = {}
        self.doomed: set[int] = set()

    def gate(self) -> None:
        me = threading.get_ident()
        if me in self.waiting:
            self.parked.release()
            self.waiting[me].acquire()
            if me in self.doomed:
                raise Killed

    def run(self, jobs: list[Callable[[], object]], kills: int) -> None:
        threads = [threading.Thread(target=self._work, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
            self.parked.acquire()
        while self.waiting:
            chosen = self.chance.choice(sorted(self.waiting))
            if kills and self.chance.random() < 0.05:
                self.doomed.add(chosen)
                kills -= 1
            self.waiting[chosen].release()
            self.parked.acquire()
        for thread in threads:
            thread.join()

    def _work(self, job: Callable[[], object]) -> None:
        self.waiting[threading.get_ident()] = threading.Semaphore(0)
        try:
            self.gate()
            job()
        except Killed:
            pass
        finally:
            del self.waiting[threading.get_ident()]
            self.parked.release()


NODES = ("m", "m/a", "m/a/b", "m/c")


def simulated(store: Store, version: str) -> None:
    """What `track` does, on a store in memory. version: of the results that are read."""
    turn = server.next_turn(server.runs_of(store, "0"))
    mirrors = [
        Mirror(node, "FINISHED", version, {"x": 1}, [], {"coppice.study": "s"}, f"[m](node:m) {version}", 0, 0)
        for node in NODES
    ]
    server.synchronize(store, "0", mirrors, frozenset(NODES), turn)


@pytest.mark.parametrize(("views", "kills"), [("111", 0), ("1112", 0), ("123", 0), ("112", 2), ("1234", 1)])
def test_trackers_in_any_order_end_with_one_run_a_node(views: str, kills: int) -> None:
    """Every order of requests that chance draws; each tracker reads the version of the results that its view names."""
    for seed in range(25):
        random.seed(seed)
        store, baton = Store(), Baton(random.Random(seed))
        store.gate = baton.gate
        baton.run([partial(simulated, store, view) for view in views], kills)
        if not kills:
            visible = store.visible()
            assert [node for node, _, _ in visible] == sorted(NODES), seed
            assert all(status == "FINISHED" for _, _, status in visible), seed
        store.gate = lambda: None
        # A later one of a view that was killed, perhaps in the middle of a run.
        simulated(store, views[0])
        assert store.visible() == [(node, views[0], "FINISHED") for node in sorted(NODES)], seed


def test_a_study_is_followed_while_it_runs(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery under way is a run whose curve grows; at the end the runs are those that `track` makes."""
    study, node = fake_study(), "small/laco-25/full-1m"
    plain = tracking.track(study, results, None)
    shutil.copytree(results, results.parent / "later/demo")
    shutil.rmtree(results / "models" / node)
    shutil.rmtree(results / "evaluations/medium/wanda-50")
    shutil.rmtree(results / "report", ignore_errors=True)
    state = results / "state" / node / "state.safetensors"
    state.parent.mkdir(parents=True)
    rows = [{"tokens": 0, "train_loss": None, "validation_loss": 2.51234}, {"tokens": 50_000, "train_loss": 2.4}]
    rows = [{"validation_loss": None, **row} for row in rows]
    header = json.dumps({"__metadata__": {"progress": json.dumps({"rows": rows}), "identity": "{}"}}).encode()
    state.write_bytes(struct.pack("<Q", len(header)) + header)
    lines = ["Resuming after step 5 (50,000 tokens).", "100,000 of 1,000,000 tokens: train loss 2.2000, 9 tokens/s"]
    log(results, "recover", node, "\n".join(lines))
    seen: list[tuple[str, dict]] = []

    def look() -> None:
        found = active(results)
        assert all(len(found[name]) == 1 for name in found)
        run = found[node][0]
        history = {
            loss: {point.step: point.value for point in client(results).get_metric_history(run.info.run_id, loss)}
            for loss in ("train_loss", "validation_loss")
        }
        seen.append((run.info.status, history))
        assert found["medium/wanda-50"][0].info.status == "RUNNING"
        assert "stored_mb" in found["medium/wanda-50"][0].data.metrics

    def further() -> None:
        look()
        lines.append("200,000 of 1,000,000 tokens: train loss 2.1000, held-out loss 2.1500, 9 tokens/s")
        log(results, "recover", node, "\n".join(lines))

    def finished() -> None:
        look()
        shutil.rmtree(results)
        shutil.copytree(results.parent / "later/demo", results)
        (results / "report").mkdir(exist_ok=True)
        (results / "report/index.html").write_text("page")
        (results / "tracking").mkdir()
        (results / "tracking/runs.json").write_text("{}")

    story: Iterator[Callable[[], None]] = iter([further, finished])
    monkeypatch.setattr(tracking, "sleep", lambda seconds: next(story)())
    made = tracking.watch(study, results, None)
    first = {"train_loss": {50_000: 2.4, 100_000: 2.2}, "validation_loss": {0: 2.5123}}
    second = {"train_loss": {**first["train_loss"], 200_000: 2.1}, "validation_loss": {0: 2.5123, 200_000: 2.15}}
    assert seen == [("RUNNING", first), ("RUNNING", second)]
    assert {name: run for name, run in made.items() if name != "."} == {
        name: run for name, run in plain.items() if name != "."
    }
    assert {name: [run.info.run_id for run in found] for name, found in active(results).items()} == {
        name: [run] for name, run in made.items()
    }


def test_a_workflow_that_runs_is_not_at_its_end(tmp_path: Path) -> None:
    results = tmp_path / "results" / "demo"
    study = fake_study().model_copy(update={"models": {}, "laws": {}, "recipes": []})
    (results / "report").mkdir(parents=True)
    ending = watching.Ending(results)
    assert not ending.is_over(study)
    (results / "report/index.html").touch()
    assert ending.is_over(study)
    lock = tmp_path / ".snakemake/locks/0.input.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert not ending.is_over(study)
