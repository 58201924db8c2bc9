"""Requests to MLflow: bounded retries, complete runs, and several trackers at once.

How trackers agree is in `agreement`; here its plans are applied.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice.errors import UserError
from coppice.files import write_json
from coppice.records.node_name import NodeName
from coppice.study.schema import Study
from coppice.tracking.agreement import FIRST, ListedRun, Plan, Turn, plan
from coppice.tracking.mirror import STUDY, Mirror
from coppice.tracking.notes import experiment_note, link_nodes
from coppice.tracking.quantities import key

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run
    from mlflow.exceptions import MlflowException

SQLITE = "sqlite:///"
# What a request may take, and how often it is repeated (after 0, 2, 4 and 8 s, and up to one more): a server that is
# down is given up within 20 s, one that hangs within 6 minutes.
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
AT_ONCE = 4  # runs made between two listings: fewer are made twice by trackers that run at once, but more is listed
CONFLICTS = 50  # listings without an end, beyond those that the work needs

# Limits of MLflow.
_VALUE, _TAG, _BATCH, _PARAMETERS, _DIGEST = 6000, 8000, 900, 100, 36
_NOTE, _PARENT = "mlflow.note.content", "mlflow.parentRunId"
_FINGERPRINT, _NODE, _TURN, _LIVE = "coppice.fingerprint", "coppice.node", "coppice.turn", "coppice.live"


def tracking_uri(uri: str | None, results: Path) -> str:
    """The URI with an absolute path; the default is the database mlflow.db next to the study's folder."""
    if uri is None:
        return f"{SQLITE}{results.parent / 'mlflow.db'}"
    if uri.startswith(SQLITE):
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).resolve()}"
    return uri


def connect(uri: str) -> MlflowClient:
    """A client that reports to nobody but the server at `uri`, and waits for it by `PATIENCE`."""
    for variable in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ[variable] = "true"
    os.environ["_MLFLOW_TELEMETRY_PRE_WARM_DATABRICKS_SDK"] = "false"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    for variable, value in PATIENCE.items():
        os.environ.setdefault(variable, value)
    from mlflow import MlflowClient, set_tracking_uri

    set_tracking_uri(uri)  # artifacts that a server hands on are found through it
    return MlflowClient(tracking_uri=uri)


@contextmanager
def mlflow_errors(uri: str, results: Path) -> Iterator[None]:
    """Turns what goes wrong with MLflow into one sentence: what, that the results are whole, and what to run later."""
    from mlflow.exceptions import MlflowException, RestException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError) as error:
        reason = _reason(error)
        if uri.startswith("http") and not isinstance(error, RestException):
            what = f"MLflow at {_redact(uri)} does not answer ({reason})"
        else:
            what = f"MLflow at {_redact(uri)} refused ({reason})"
        again = f"coppice track --study {results}/study.yaml --results {results} --uri {_redact(uri)}"
        raise UserError(
            f"{what}; the results in {results} are whole and were not touched, so once it answers run "
            f"`{again} --output {results}/tracking/runs.json`."
        ) from error


def _reason(error: Exception) -> str:
    """The cause of an error without the layers around it."""
    text = " ".join(str(error).split())
    for cause in ("Connection refused", "Read timed out", "Name or service not known", "No route to host"):
        if cause in text:
            return cause[0].lower() + cause[1:]
    return _redact(text)[:300]


def _redact(text: str) -> str:
    """The text without the passwords of addresses in it."""
    return re.sub(r"(://[^/\s:@]*):\S*@", r"\1:...@", text)


def ready_experiment(client: MlflowClient, study: Study, artifacts: str | None) -> Experiment:
    """The study's experiment, created or fetched from the trash; `artifacts` None leaves their place to the server."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(study.study)
    if experiment is None:
        try:
            client.create_experiment(study.study, artifact_location=artifacts)
        except MlflowException:  # another tracker created it meanwhile, or else it still does not exist
            if client.get_experiment_by_name(study.study) is None:
                raise
        experiment = client.get_experiment_by_name(study.study)
    if experiment.lifecycle_stage == "deleted":
        try:
            client.restore_experiment(experiment.experiment_id)
        except MlflowException:  # another tracker restored it meanwhile
            if client.get_experiment_by_name(study.study).lifecycle_stage == "deleted":
                raise
    # The UI then opens its table of runs, not that of traces.
    for tag, value in {_NOTE: experiment_note(study), "mlflow.experimentKind": "custom_model_development"}.items():
        if experiment.tags.get(tag) != value:
            set_tag = partial(client.set_experiment_tag, experiment.experiment_id, tag, value)
            _retry_conflicts("experiment_tag_pk", set_tag)
    return experiment


def _retry_conflicts(key: str, request: Callable[[], None]) -> None:
    """Makes a request that MLflow refuses where another tracker makes the same row at the same moment.

    key: the name of what must be unique. On the next request MLflow uses the row that exists.
    """
    from mlflow.exceptions import MlflowException

    for attempt in range(CONFLICTS):
        try:
            return request()
        except MlflowException as error:
            if key not in str(error) or attempt == CONFLICTS - 1:
                raise


def runs_of(client: MlflowClient, experiment: str) -> list[Run]:
    """Every run of an experiment that bears a node, those in the trash included."""
    from mlflow.entities import ViewType

    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs([experiment], run_view_type=ViewType.ALL, max_results=1000, page_token=token)
        runs += [run for run in page if _NODE in run.data.tags]
        token = page.token
        if not token:
            return runs


def read_run(run: Run) -> ListedRun:
    tags, live = run.data.tags, run.data.tags.get(_LIVE) == "yes"
    number, finished, chance = tags.get(_TURN, "0-0-").split("-")
    return ListedRun(
        id=run.info.run_id,
        node=tags[_NODE],
        fingerprint=tags.get(_FINGERPRINT, ""),
        turn=(int(number), int(finished), chance),
        whole=live or run.info.status in ("FINISHED", "FAILED"),
        active=run.info.lifecycle_stage == "active",
        live=live,
    )


def next_turn(runs: list[Run], finished: bool = True) -> Turn:
    """A turn above all that the runs bear. finished: of a tracker that shows finished work only."""
    return max((read_run(run).turn for run in runs), default=FIRST)[0] + 1, int(finished), secrets.token_hex(4)


def synchronize(
    client: MlflowClient, experiment: str, mirrors: list[Mirror], known: AbstractSet[str], turn: Turn
) -> dict[str, str]:
    """Brings the experiment to one run for each mirror; returns the ids of the current runs.

    known: all nodes that the study has; runs of others go to the trash. Raises UserError where other trackers change
    the runs again and again.
    """
    from mlflow.exceptions import MlflowException

    by_name = {mirror.name: mirror for mirror in mirrors}
    fingerprints = {mirror.name: mirror.fingerprint for mirror in mirrors}
    for _ in range(CONFLICTS + len(mirrors)):
        runs = {run.info.run_id: run for run in runs_of(client, experiment)}
        planned = plan([read_run(run) for run in runs.values()], fingerprints, known | {STUDY}, turn)
        try:
            if planned.is_empty:
                _relabel(client, experiment, planned.current, by_name, runs)
                return planned.current
            _apply(client, experiment, planned, by_name, runs, turn)
        except MlflowException as error:
            if not _is_lost(error):
                raise
    raise UserError("Other trackers change the same runs of MLflow again and again; run this one when they are done.")


def _is_lost(error: MlflowException) -> bool:
    """Whether another tracker moved the run to the trash meanwhile; the next listing shows the current one."""
    return "must be in the 'active' state" in str(error) or error.error_code == "RESOURCE_DOES_NOT_EXIST"


def _apply(
    client: MlflowClient,
    experiment: str,
    planned: Plan,
    by_name: Mapping[str, Mirror],
    runs: Mapping[str, Run],
    turn: Turn,
) -> None:
    for run in planned.claimed:
        if runs[run].info.lifecycle_stage == "deleted":
            client.restore_run(run)
        client.set_tag(run, _TURN, _turn_text(turn))
    for node in _choose_nodes(planned.missing or planned.contested):
        run = _begin(client, experiment, by_name[node], planned.current, turn)
        _fill(client, run, by_name[node])
    for run in planned.trash:
        client.delete_run(run)


def _choose_nodes(missing: list[str]) -> list[str]:
    """Some of the nodes: dense models first, which the others are nested under, and drawn by chance.

    So trackers that run at once share the work.
    """
    roots = [node for node in missing if "/" not in node]
    return random.sample(roots or missing, min(len(roots or missing), max(AT_ONCE, len(missing) // 20)))


def _begin(client: MlflowClient, experiment: str, mirror: Mirror, current: Mapping[str, str], turn: Turn) -> str:
    tags = _labels(experiment, mirror, current) | {
        _NODE: mirror.name,
        _FINGERPRINT: mirror.fingerprint,
        _TURN: _turn_text(turn),
        **({_LIVE: "yes"} if mirror.live else {}),
    }
    name = mirror.tags["coppice.study"] if mirror.name == STUDY else mirror.name
    return client.create_run(experiment, start_time=mirror.start, tags=tags, run_name=name).info.run_id


def _turn_text(turn: Turn) -> str:
    return "-".join(map(str, turn))


def _labels(experiment: str, mirror: Mirror, current: Mapping[str, str]) -> dict[str, str]:
    """The tags of a run that depend on other runs, and so may change while it is current."""
    tags = mirror.tags | {_NOTE: link_nodes(mirror.note, experiment, current)}
    root = current.get(NodeName(mirror.name).model)
    if root and "/" in mirror.name:
        tags[_PARENT] = root
    return {name: value[:_TAG] for name, value in tags.items()}


def _relabel(
    client: MlflowClient,
    experiment: str,
    current: Mapping[str, str],
    by_name: Mapping[str, Mirror],
    runs: Mapping[str, Run],
) -> None:
    """Updates the tags of the current runs, but for those of a newer view, which knows more."""
    from mlflow.entities import RunTag

    for node, run in current.items():
        known_tags = runs[run].data.tags
        if known_tags[_FINGERPRINT] != by_name[node].fingerprint:
            continue
        labels = _labels(experiment, by_name[node], current)
        changed = [RunTag(name, value) for name, value in labels.items() if known_tags.get(name) != value]
        if changed:
            client.log_batch(run, tags=changed)


def _fill(client: MlflowClient, run: str, mirror: Mirror) -> None:
    """Writes a run; its status becomes final last, so that one cut short is written again."""
    log_parameters(client, run, mirror.parameters)
    log_metrics(client, run, mirror)
    _log_inputs(client, run, mirror)
    if mirror.live:
        return
    with tempfile.TemporaryDirectory() as folder:
        for place, path in mirror.files.items():
            link = Path(folder) / place
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        for place, value in mirror.texts.items():
            write_json(Path(folder) / place, value)
        client.log_artifacts(run, folder)
    client.set_terminated(run, mirror.status, end_time=mirror.end)


def log_parameters(client: MlflowClient, run: str, values: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    parameters = [Param(name, str(value)[:_VALUE]) for name, value in values.items()]
    for first in range(0, len(parameters), _PARAMETERS):
        client.log_batch(run, params=parameters[first : first + _PARAMETERS])


def log_metrics(client: MlflowClient, run: str, mirror: Mirror) -> None:
    """Logged again, a point of the same name, value, step and time is the same point."""
    from mlflow.entities import Metric

    metrics = [
        Metric(key(name), value, mirror.end, step) for name, value, step in mirror.metrics if math.isfinite(value)
    ]
    for first in range(0, len(metrics), _BATCH):
        client.log_batch(run, metrics=metrics[first : first + _BATCH])


def _log_inputs(client: MlflowClient, run: str, mirror: Mirror) -> None:
    """Data sets are unique in an experiment."""
    if mirror.datasets:
        _retry_conflicts("dataset_pk", lambda: client.log_inputs(run, _inputs(mirror)))


def _inputs(mirror: Mirror) -> list[Any]:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    schema = json.dumps({"mlflow_colspec": [{"name": name, "type": "integer"} for name in ("token", "document")]})
    return [
        DatasetInput(
            Dataset(
                data.name,
                data.digest[:_DIGEST],
                "local",
                json.dumps({"uri": data.source or data.name}),
                schema,
                json.dumps(dict(data.profile)),
            ),
            [InputTag("mlflow.data.context", data.use)],
        )
        for data in mirror.datasets
    ]


class Extension:
    """What a tracker that watches has sent of the runs under way, so that it sends what is new."""

    def __init__(self) -> None:
        self.sent: dict[str, set[tuple[str, float, int]]] = {}

    def send(self, client: MlflowClient, run: str, mirror: Mirror) -> None:
        sent = self.sent.setdefault(run, set())
        new = [point for point in mirror.metrics if point not in sent]
        log_metrics(client, run, replace(mirror, metrics=new))
        sent.update(new)
