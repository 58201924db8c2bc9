"""Several trackers against one `mlflow server` with PostgreSQL, killed, late and cut off."""

from __future__ import annotations

import hashlib
import http.client
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fake_results import fake_study, write_results

from coppice import tracking
from coppice.errors import UserError
from coppice.results import collection as tables
from coppice.study.schema import Study
from coppice.tracking import server as speaking
from coppice.tracking.mirror import study_mirrors

processes = multiprocessing.get_context("fork")  # a fresh one would import for seconds


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_results(tmp_path_factory.mktemp("results") / "demo")
    tables.write_tables(fake_study(), folder, folder / "tables", partial=True)
    return folder


def named(name: str) -> Study:
    return fake_study().model_copy(update={"study": name})


def content(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.md5(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def assert_one_run_a_node(address: str, study: Study, results: Path) -> dict[str, str]:
    """Every node has one visible run: whole, with the fingerprint of what it shows, nested under its dense model."""
    client = tracking.connect(address)
    experiment = client.get_experiment_by_name(study.study)
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    found = {run.data.tags["coppice.node"]: run for run in runs}
    expected = {mirror.name: mirror for mirror in study_mirrors(study, results)}
    assert len(runs) == len(found) == len(expected) == 13
    for node, run in found.items():
        assert run.info.status == expected[node].status
        assert run.data.tags["coppice.fingerprint"] == expected[node].fingerprint
        assert set(expected[node].parameters) == set(run.data.params)
        assert {name for name, _, _ in expected[node].metrics} == set(run.data.metrics)
        root = found[node.partition("/")[0]].info.run_id
        assert run.data.tags.get("mlflow.parentRunId") == (root if "/" in node else None)
    return {node: run.info.run_id for node, run in found.items()}


def at_once(*jobs: Callable[[], object]) -> list[int]:
    """Exit codes of the jobs, each in a process of its own, begun together."""
    barrier = processes.Barrier(len(jobs))

    def work(job: Callable[[], object]) -> None:
        barrier.wait()
        job()

    running = [processes.Process(target=work, args=(job,)) for job in jobs]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    return [process.exitcode for process in running]


def test_many_trackers_at_once_make_each_run_once(server: str, results: Path) -> None:
    """Four of one study and two of another: both experiments are made by whoever comes first."""
    one, other = named("one"), named("other")
    studies = [one] * 4 + [other] * 2
    codes = at_once(*[lambda study=study: tracking.track(study, results, server) for study in studies])
    assert codes == [0] * 6
    shown = {study.study: assert_one_run_a_node(server, study, results) for study in (one, other)}
    assert tracking.track(one, results, server) == shown["one"]
    assert tracking.track(other, results, server) == shown["other"]


def killed_at(call: int, study: Study, results: Path, address: str) -> None:
    """Tracks until the process kills itself when a run's metrics are to be logged for that time."""
    log, calls = speaking.log_metrics, iter(range(1, call))

    def log_or_die(*arguments: object) -> None:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        log(*arguments)

    speaking.log_metrics = log_or_die
    tracking.track(study, results, address)


def test_one_killed_in_the_middle_of_its_writes(server: str, results: Path) -> None:
    study = named("killed")
    assert at_once(lambda: killed_at(4, study, results, server)) == [-signal.SIGKILL]
    client = tracking.connect(server)
    experiment = client.get_experiment_by_name("killed").experiment_id
    states = [run.info.status for run in client.search_runs([experiment])]
    assert sorted(states) == ["FINISHED", "FINISHED", "FINISHED", "RUNNING"]
    # A later one completes, beside one that is killed too.
    codes = at_once(lambda: tracking.track(study, results, server), lambda: killed_at(3, study, results, server))
    assert codes[0] == 0
    tracking.track(study, results, server)
    assert_one_run_a_node(server, study, results)


def test_views_of_different_age_at_once_end_with_one(server: str, results: Path, tmp_path: Path) -> None:
    """Two machines whose results differ: either may win, and no node is lost or doubled."""
    study = named("ages")
    newer = write_results(tmp_path / "demo")
    for path in newer.glob("evaluations/**/quality/metrics.json"):
        path.write_text(path.read_text().replace("0.02", "0.03"))
    tables.write_tables(study, newer, newer / "tables", partial=True)
    assert at_once(*[lambda folder=folder: tracking.track(study, folder, server) for folder in (results, newer)]) == [
        0,
        0,
    ]
    client = tracking.connect(server)
    experiment = client.get_experiment_by_name("ages").experiment_id
    nodes = sorted(run.data.tags["coppice.node"] for run in client.search_runs([experiment], max_results=1000))
    assert nodes == sorted(mirror.name for mirror in study_mirrors(study, results))
    tracking.track(study, newer, server)
    assert_one_run_a_node(server, study, newer)


class Proxy(BaseHTTPRequestHandler):
    """Hands requests on to `behind`; `late` tells for each how many seconds its answer, already made, is held back."""

    behind = ""
    late: Callable[[str], float]

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection(urlsplit(self.behind).netloc)
        headers = {name: value for name, value in self.headers.items() if name != "Host"}
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        data = response.read()
        time.sleep(type(self).late(self.path))
        try:
            self.send_response(response.status)
            self.send_header("Content-Type", response.headers["Content-Type"])
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # whoever asked waits no longer
            pass

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy(server: str) -> Iterator[tuple[str, type[Proxy]]]:
    """A proxy before the server, and its class, whose `late` a test sets."""

    class Slow(Proxy):
        behind = server
        late = staticmethod(lambda path: 0.0)

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}", Slow
    listening.shutdown()
    thread.join()
    listening.server_close()


def test_answers_that_come_too_late_double_nothing(
    server: str, results: Path, proxy: tuple[str, type[Proxy]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server makes a run but says so too late; the request is made again, and makes another one."""
    address, slow = proxy
    counts: dict[str, int] = {}

    def late(path: str) -> float:
        counts[path] = counts.get(path, 0) + 1
        return 4.0 if path.endswith("runs/create") and counts[path] in (2, 5) else 0.0

    slow.late = staticmethod(late)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    tracking.track(named("late"), results, address)
    assert counts["/api/2.0/mlflow/runs/create"] >= 15
    assert_one_run_a_node(server, named("late"), results)


def test_a_server_that_hangs_is_one_sentence_and_a_later_track_completes(
    server: str, results: Path, proxy: tuple[str, type[Proxy]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, slow = proxy
    counts: list[str] = []

    def late(path: str) -> float:
        counts.append(path)
        return 4.0 if len(counts) > 25 else 0.0

    slow.late = staticmethod(late)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    before = content(results)
    with pytest.raises(UserError, match=r"does not answer \(read timed out\).*are whole.*`coppice track --study"):
        tracking.track(named("hangs"), results, address)
    assert content(results) == before
    slow.late = staticmethod(lambda path: 0.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    tracking.track(named("hangs"), results, address)
    assert_one_run_a_node(server, named("hangs"), results)
