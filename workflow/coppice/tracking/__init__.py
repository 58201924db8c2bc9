"""Mirrors a study to MLflow: one run a node, and one run for the study itself.

Files are the truth and MLflow shows them. A run bears the fingerprint of what it shows, so that tracking again changes
only what changed: the run of a node that changed, or that left the study, is moved to MLflow's trash, and one in the
trash that fits comes back. Several trackers may work on one server at once; see `agreement`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import sleep

from filelock import FileLock

from coppice.errors import UserError
from coppice.files import write_json
from coppice.records.layout import ResultsLayout
from coppice.study.loading import load_study
from coppice.study.schema import Study
from coppice.study.tree import nodes
from coppice.tracking import server, watching
from coppice.tracking.mirror import Mirror, study_mirrors
from coppice.tracking.server import SQLITE, connect, tracking_uri

__all__ = ["add_arguments", "connect", "run", "track", "tracking_uri", "watch"]

EVERY = 20.0  # seconds between two looks at a study under way


def track(study: Study, results: Path, uri: str | None) -> dict[str, str]:
    """Brings MLflow up to date with a study's results; returns the id of each node's run, the study's own under ".".

    Raises UserError when the tables are missing, and when MLflow refuses or does not answer.
    """
    run_ids, _ = _synchronize(study, results, uri, study_mirrors)
    return run_ids


def watch(study: Study, results: Path, uri: str | None, every: float = EVERY) -> dict[str, str]:
    """Follows a study under way to its end, and then returns what `track` returns.

    A server that does not answer is tried again at the next look, as is a file that was removed while it was read.
    """
    results = Path(results).resolve()
    ending, extension, printed = watching.Ending(results), server.Extension(), ""
    while not ending.is_over(study):
        try:
            run_ids, mirrors = _synchronize(study, results, uri, watching.live_mirrors, extension)
            live = sum(mirror.live for mirror in mirrors)
            message = f"{len(run_ids) - live} of {len(nodes(study))} nodes are in MLflow, {live} are under way."
        except (UserError, FileNotFoundError) as error:
            message = str(error)
        if message != printed:
            print(message, flush=True)
        printed = message
        sleep(every)
    return track(study, results, uri)


def _synchronize(
    study: Study,
    results: Path,
    uri: str | None,
    mirrors_of: Callable[[Study, Path], list[Mirror]],
    extension: server.Extension | None = None,
) -> tuple[dict[str, str], list[Mirror]]:
    """Brings MLflow to the runs of `mirrors_of`. extension: sends what is new of runs under way."""
    results = Path(results).resolve()
    uri = tracking_uri(uri or study.tracking.uri, results)
    with _database_lock(uri, results), server.mlflow_errors(uri, results):
        client = connect(uri)
        existing = client.get_experiment_by_name(study.study)
        # Before the results are read: a later reader has the higher turn.
        turn = server.next_turn(server.runs_of(client, existing.experiment_id) if existing else [], extension is None)
        mirrors = mirrors_of(study, results)
        experiment = server.ready_experiment(client, study, _artifacts(uri, results)).experiment_id
        run_ids = server.synchronize(client, experiment, mirrors, frozenset(nodes(study)), turn)
        if extension:
            for mirror in mirrors:
                if mirror.live:
                    extension.send(client, run_ids[mirror.name], mirror)
    return run_ids, mirrors


def _database_lock(uri: str, results: Path) -> AbstractContextManager:
    """A lock for a database: two processes that make its tables at once crash. A server needs none."""
    if uri.startswith("http"):
        return nullcontext()
    lock = (
        Path(f"{uri.removeprefix(SQLITE)}.lock")
        if uri.startswith(SQLITE)
        else ResultsLayout(results).tracking.with_name(".lock")
    )
    lock.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(lock)


def _artifacts(uri: str, results: Path) -> str | None:
    """Where artifacts go: mlartifacts next to a database file, else next to the study's folder; None: to the server.

    Of results that lie elsewhere the study's folder is a cache, which must not hold them.
    """
    if uri.startswith("http"):
        return None
    neighbour = Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else results
    return (neighbour.parent / "mlartifacts").as_uri()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--study", required=True, type=Path, help="the study's YAML file")
    parser.add_argument("--results", required=True, type=Path, help="folder of the study's results, with its tables")
    parser.add_argument("--uri", help="MLflow tracking URI (default: the study's, or mlflow.db next to its folder)")
    parser.add_argument("--output", required=True, type=Path, help="JSON file that gets the id of each node's run")
    parser.add_argument("--watch", action="store_true", help="follow a running study to its end")
    parser.add_argument(
        "--every", type=float, default=EVERY, metavar="SECONDS", help=f"with --watch, how often (default: {EVERY:g})"
    )


def run(arguments: argparse.Namespace) -> None:
    study = load_study(arguments.study)
    if not arguments.every > 0:
        raise UserError(f"--every {arguments.every:g} is not a pause; pass a number of seconds above 0.")
    if not arguments.watch:
        write_json(arguments.output, track(study, arguments.results, arguments.uri))
        return
    try:
        write_json(arguments.output, watch(study, arguments.results, arguments.uri, arguments.every))
    except KeyboardInterrupt:
        print(
            f"Stopped watching {study.study}; the study itself goes on, and `coppice track` brings MLflow up to date.",
            flush=True,
        )
