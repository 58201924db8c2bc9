"""Mirrors a study to MLflow: one run a node, and one run for the study itself.

Files are the truth and MLflow shows them: everything here is read from the tables and the checkpoints' folders, by a
single process that holds a lock. A run bears the fingerprint of what it shows, so that tracking again changes only what
changed: the run of a node that changed, or that left the study, is moved to MLflow's trash, and one in the trash that
fits comes back.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from coppice.errors import UserError
from coppice.files import fingerprint, read_json, sha256, write_json
from coppice.study import Study, load_study
from coppice.tables import OUTPUTS, SCHEMAS, Row, front, read_table
from coppice.tree import nodes

if TYPE_CHECKING:
    from mlflow import MlflowClient

STUDY = "."  # stands for the study's own run where nodes are named; no node can have this name
FORMAT_VERSION = 1

# Limits of MLflow.
_VALUE, _TAG, _BATCH, _PARAMETERS, _DIGEST = 6000, 8000, 900, 100, 36

_SQLITE = "sqlite:///"
# Differ between two runs of the same work, and so are no reason for a new run.
_TIMING = frozenset({"wall_seconds", "peak_memory_bytes", "seconds", "versions"})


@dataclass(frozen=True)
class Mirror:
    """A run as MLflow is to show it.

    metrics: (name, value, step); files: by the path that they get among the run's artifacts; texts: small artifacts by
    path; datasets: (name, fingerprint, use). start and end: milliseconds since 1970.
    """

    name: str
    status: str
    fingerprint: str
    parameters: dict[str, Any]
    metrics: list[tuple[str, float, int]]
    tags: dict[str, str]
    start: int
    end: int
    files: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, Any] = field(default_factory=dict)
    datasets: list[tuple[str, str, str]] = field(default_factory=list)


def track(study: Study, results: Path, uri: str | None) -> dict[str, str]:
    """Brings MLflow up to date with a study's results; returns the id of each node's run, the study's own under ".".

    Raises UserError when the tables are missing or MLflow refuses.
    """
    results = Path(results).resolve()
    uri = tracking_uri(uri or study.tracking.uri, results)
    mirrors = mirrored(study, results)
    lock = Path(f"{uri.removeprefix(_SQLITE)}.lock") if uri.startswith(_SQLITE) else results / "tracking" / ".lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that make the database's tables at once crash, and two that look for a run both create it.
    with FileLock(lock):
        client = connect(uri)
        from mlflow.exceptions import MlflowException

        try:
            experiment = _experiment(client, study.study, None if uri.startswith("http") else results)
            return synchronize(client, experiment, mirrors, frozenset(nodes(study)))
        except MlflowException as error:
            raise UserError(f"MLflow at {uri} refused: {' '.join(str(error).split())[:500]}") from error


def tracking_uri(uri: str | None, results: Path) -> str:
    """The URI with an absolute path; the default is the database mlflow.db beside the study's folder."""
    if uri is None:
        return f"{_SQLITE}{results.parent / 'mlflow.db'}"
    if uri.startswith(_SQLITE):
        return f"{_SQLITE}{Path(uri.removeprefix(_SQLITE)).resolve()}"
    return uri


def connect(uri: str) -> MlflowClient:
    """A client that reports to nobody but the server at `uri`."""
    for variable in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ[variable] = "true"
    os.environ["_MLFLOW_TELEMETRY_PRE_WARM_DATABRICKS_SDK"] = "false"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    from mlflow import MlflowClient, set_tracking_uri

    set_tracking_uri(uri)  # artifacts that a server hands on are found through it
    return MlflowClient(tracking_uri=uri)


def _experiment(client: MlflowClient, name: str, results: Path | None) -> str:
    """The id of the study's experiment, made or fetched from the trash; `results` None leaves artifacts to a server."""
    found = client.get_experiment_by_name(name)
    if found is None:
        location = None if results is None else (results.parent / "mlartifacts").as_uri()
        return client.create_experiment(name, artifact_location=location)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def synchronize(client: MlflowClient, experiment: str, mirrors: list[Mirror], known: frozenset[str]) -> dict[str, str]:
    """Makes the runs that are missing and moves those that are outdated, or not of a `known` node, to the trash."""
    existing = list(_runs(client, experiment))
    whole = {
        run.data.tags["coppice.fingerprint"]: run
        for run in existing
        if "coppice.fingerprint" in run.data.tags and run.info.status in ("FINISHED", "FAILED")
    }
    made: dict[str, str] = {}
    for mirror in mirrors:
        parent = made.get(mirror.name.partition("/")[0]) if "/" in mirror.name else None
        run = whole.get(mirror.fingerprint)
        if run is None:
            made[mirror.name] = _create(client, experiment, mirror, parent)
            continue
        made[mirror.name] = run.info.run_id
        if run.info.lifecycle_stage == "deleted":
            client.restore_run(run.info.run_id)
        if parent and run.data.tags.get("mlflow.parentRunId") != parent:
            client.set_tag(run.info.run_id, "mlflow.parentRunId", parent)
    for run in existing:
        node = run.data.tags.get("coppice.node")
        outdated = node in made and run.info.run_id != made[node]
        foreign = node is not None and node != STUDY and node not in known
        if run.info.lifecycle_stage == "active" and (outdated or foreign):
            client.delete_run(run.info.run_id)
    return made


def _runs(client: MlflowClient, experiment: str) -> Iterator[Any]:
    """Every run of an experiment, those in the trash included."""
    from mlflow.entities import ViewType

    token = None
    while True:
        page = client.search_runs([experiment], run_view_type=ViewType.ALL, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _create(client: MlflowClient, experiment: str, mirror: Mirror, parent: str | None) -> str:
    """Makes a run; its status becomes final last, so that one cut short is made again."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    tags = mirror.tags | {"coppice.node": mirror.name, "coppice.fingerprint": mirror.fingerprint}
    if parent:
        tags["mlflow.parentRunId"] = parent
    tags = {key: value[:_TAG] for key, value in tags.items()}
    name = mirror.tags["coppice.study"] if mirror.name == STUDY else mirror.name
    run = client.create_run(experiment, start_time=mirror.start, tags=tags, run_name=name).info.run_id
    parameters = [Param(key, str(value)[:_VALUE]) for key, value in mirror.parameters.items()]
    metrics = [
        Metric(_key(key), value, mirror.end, step) for key, value, step in mirror.metrics if math.isfinite(value)
    ]
    for first in range(0, max(len(parameters), 1), _PARAMETERS):
        client.log_batch(run, params=parameters[first : first + _PARAMETERS])
    for first in range(0, len(metrics), _BATCH):
        client.log_batch(run, metrics=metrics[first : first + _BATCH])
    if mirror.datasets:
        inputs = [
            DatasetInput(Dataset(text, digest[:_DIGEST], "coppice", text), [InputTag("mlflow.data.context", use)])
            for text, digest, use in mirror.datasets
        ]
        client.log_inputs(run, inputs)
    with tempfile.TemporaryDirectory() as folder:
        for place, path in mirror.files.items():
            link = Path(folder) / place
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
        for place, value in mirror.texts.items():
            write_json(Path(folder) / place, value)
        client.log_artifacts(run, folder)
    client.set_terminated(run, mirror.status, end_time=mirror.end)
    return run


def _key(name: str) -> str:
    """A name in the letters that MLflow allows."""
    return re.sub(r"[^\w\-. /]", "_", name)[:250]


def mirrored(study: Study, results: Path) -> list[Mirror]:
    """The runs that MLflow is to show: every node made or failed, roots first, then the study's own."""
    tables = {name: read_table(results / "tables", name).to_pylist() for name in SCHEMAS if name != "items"}
    rows = {row["node"]: row for row in tables["nodes"]}
    of = {name: _by_node(tables[name]) for name in ("metrics", "costs", "curves", "failures")}
    repeated = _repeated(tables["metrics"] + tables["costs"])
    uploaded = _uploaded(study.tracking.weights, tables["nodes"], tables["metrics"])
    mirrors = []
    for node in nodes(study):
        parts = {name: rows_of.get(node, []) for name, rows_of in of.items()}
        if node in rows:
            mirrors.append(_node_mirror(study, results, rows, node, parts, repeated, node in uploaded))
        elif parts["failures"]:
            mirrors.append(_failed_mirror(study, results, node, parts["failures"]))
    return [*mirrors, _study_mirror(study, results, tables)]


def _by_node(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["node"], []).append(row)
    return found


def _repeated(rows: list[Row]) -> frozenset[str]:
    """Names of metrics that two evaluations use, so that the evaluation has to be told too."""
    pairs = {(row["evaluation"], row["metric"]) for row in rows if row["evaluation"]}
    counts = Counter(metric for _, metric in pairs)
    return frozenset(metric for metric, count in counts.items() if count > 1)


def _uploaded(policy: str, rows: list[Row], metrics: list[Row]) -> frozenset[str]:
    """Nodes whose weights are uploaded: nobody's, everybody's, or those on the front of size against a perplexity."""
    if policy == "all":
        return frozenset(row["node"] for row in rows)
    if policy == "none":
        return frozenset()
    size = {row["node"]: row["stored_bytes"] for row in rows}
    found: set[str] = set()
    for name in {(row["evaluation"], row["metric"]) for row in metrics if row["metric"].startswith("perplexity")}:
        measured = [row for row in metrics if (row["evaluation"], row["metric"]) == name and row["value"] is not None]
        best = front([(size[row["node"]], row["value"]) for row in measured if row["node"] in size])
        found |= {measured[index]["node"] for index in best}
    return frozenset(found)


def _node_mirror(
    study: Study,
    results: Path,
    rows: dict[str, Row],
    node: str,
    parts: dict[str, list[Row]],
    repeated: frozenset[str],
    upload: bool,
) -> Mirror:
    row, folder = rows[node], results / "models" / node
    recipe = [rows[other] for other in _path(node) if other in rows and rows[other]["step"]]
    manifest = read_json(folder / "manifest.json")
    end = int((folder / "manifest.json").stat().st_mtime * 1000)
    files = {name: folder / name for name in ("manifest.json", "compression.json", "curve.parquet")}
    files |= {
        f"evaluations/{path.name}/metrics.json": path / "metrics.json"
        for path in _folders(results / "evaluations" / node)
    }
    if upload:
        files |= {f"weights/{name}": folder / name for name in manifest["files"]}
    return Mirror(
        name=node,
        status="FAILED" if parts["failures"] else "FINISHED",
        fingerprint=_identity(row, parts, upload),
        parameters=_parameters(row) | _recipe_parameters(recipe),
        metrics=_sizes(row) + _measurements(parts, repeated) + _curve(parts["curves"]),
        tags=_tags(study, row["parent"], parts["failures"]),
        start=end - int(1000 * (row["wall_seconds"] or 0)),
        end=end,
        files={place: path for place, path in (files | _job_files(results, node)).items() if path.exists()},
        texts={
            "recipe.json": [
                {key: step[key] for key in ("step", "method", "family", "seed", "options")} for step in recipe
            ],
            "weights.json": {"folder": f"{study.study}/models/{node}", "files": manifest["files"]},
        },
        datasets=_datasets(results, row),
    )


def _path(node: str) -> list[str]:
    parts = node.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _folders(folder: Path) -> list[Path]:
    """Folders of evaluations: those of further nodes, which lie in the same place, have no metrics of their own."""
    return sorted(path.parent for path in folder.glob("*/metrics.json"))


def _identity(row: Row, parts: dict[str, list[Row]], upload: bool) -> str:
    """Fingerprint of what a run shows, but for times."""
    content = {name: [_timeless(entry) for entry in entries] for name, entries in parts.items()}
    return fingerprint({"version": FORMAT_VERSION, "node": _timeless(row), "upload": upload, **content})


def _timeless(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in _TIMING}


def _parameters(row: Row) -> dict[str, Any]:
    names = ("model", "recipe", "depth", "step", "method", "family", "seed", "calibration", "source", "source_revision")
    return {name: row[name] for name in names if row[name] is not None} | {"marks": ",".join(row["marks"])}


def _recipe_parameters(recipe: list[Row]) -> dict[str, Any]:
    """The options of every step of a path as `<family>.<option>`, `<family>2.<option>` where a family comes twice."""
    found: dict[str, Any] = {}
    seen: Counter[str] = Counter()
    for row in recipe:
        seen[row["family"]] += 1
        place = row["family"] + (str(seen[row["family"]]) if seen[row["family"]] > 1 else "")
        found[f"{place}.method"] = row["method"]
        found |= {f"{place}.{option}": value for option, value in json.loads(row["options"]).items()}
    return {_key(name): value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}


def _sizes(row: Row) -> list[tuple[str, float, int]]:
    values = {
        "stored_mb": row["stored_bytes"] / 1e6,
        "parameters_m": row["parameters"] / 1e6,
        "nonzero_parameters_m": row["nonzero_parameters"] / 1e6,
        "peak_memory_mb": None if row["peak_memory_bytes"] is None else row["peak_memory_bytes"] / 1e6,
    }
    same = "bits_per_weight bits_per_linear_weight rho rho_blocks rho_nonzero recovered_share path_recovery_tokens"
    values |= {name: row[name] for name in [*same.split(), "wall_seconds"]}
    return [(name, float(value), 0) for name, value in values.items() if value is not None]


def _measurements(parts: dict[str, list[Row]], repeated: frozenset[str]) -> list[tuple[str, float, int]]:
    """Metrics and costs by name, with standard errors as <name>_stderr and spreads as <name>_spread."""
    found = []
    for row in parts["metrics"] + [row for row in parts["costs"] if row["evaluation"]]:
        name = f"{row['evaluation']}.{row['metric']}" if row["metric"] in repeated else row["metric"]
        values = {"": row["value"], "_stderr": row.get("stderr"), "_spread": row.get("spread")}
        found += [(f"{name}{suffix}", float(value), 0) for suffix, value in values.items() if value is not None]
    return found


def _curve(rows: list[Row]) -> list[tuple[str, float, int]]:
    """Losses of a recovery, with tokens as the step."""
    return [(f"{row['split']}_loss", row["loss"], row["tokens"]) for row in rows if row["loss"] is not None]


def _tags(study: Study, parent: str | None, failed: list[Row]) -> dict[str, str]:
    tags = {"coppice.study": study.study}
    if parent:
        tags["coppice.parent"] = parent
    if failed:
        tags["coppice.error"] = "; ".join(f"{row['stage']}: {row['error']}" for row in failed)
        tags["mlflow.note.content"] = tags["coppice.error"]
    return tags


def _job_files(results: Path, node: str) -> dict[str, Path]:
    """Logs and benchmarks of the jobs of one node, by the paths that they get: <kind>/<stage>[/<rest>].<suffix>."""
    found = {}
    for kind, suffix in (("logs", "log"), ("benchmarks", "jsonl")):
        for stage, (_, _, parts) in OUTPUTS.items():
            folder = results / kind / stage
            if parts == 0:
                found[f"{kind}/{stage}.{suffix}"] = folder / f"{node}.{suffix}"
                continue
            for path in (folder / node).glob("*/" * (parts - 1) + f"*.{suffix}"):
                found[f"{kind}/{stage}/{path.relative_to(folder / node).as_posix()}"] = path
    return found


def _datasets(results: Path, row: Row) -> list[tuple[str, str, str]]:
    """The token sets that a node was calibrated, trained and measured on: name, fingerprint, use."""
    found = []
    if row["calibration"]:
        found.append((row["calibration"], row["calibration_fingerprint"], "calibration"))
    folder = results / "tokens" / row["model"]
    trained = row["family"] == "recover"
    uses = {f"{use}.{row['step']}": use for use in ("recovery", "validation") if trained}
    uses |= {path.parent.name: "evaluation" for path in folder.glob("evaluation.*/manifest.json")}
    for name, use in uses.items():
        if (folder / name / "manifest.json").exists():
            found.append((name, read_json(folder / name / "manifest.json")["fingerprint"], use))
    return found


def _failed_mirror(study: Study, results: Path, node: str, failed: list[Row]) -> Mirror:
    """The run of a node that was never made: its error and its logs."""
    end = int(max((results / row["log"]).stat().st_mtime for row in failed) * 1000)
    model, _, recipe = node.partition("/")
    return Mirror(
        name=node,
        status="FAILED",
        fingerprint=fingerprint({"version": FORMAT_VERSION, "node": node, "failures": failed}),
        parameters={"model": model, "recipe": recipe, "depth": node.count("/")},
        metrics=[],
        tags=_tags(study, node.rpartition("/")[0], failed),
        start=end,
        end=end,
        files={place: path for place, path in _job_files(results, node).items() if path.exists()},
    )


def _study_mirror(study: Study, results: Path, tables: dict[str, list[Row]]) -> Mirror:
    """The study's own run: tables, laws, report and plots as artifacts, fitted numbers as metrics."""
    patterns = ("study.yaml", "tables/*.parquet", "laws/*/*", "report/*.html", "report/*.svg")
    files = {
        path.relative_to(results).as_posix(): path for pattern in patterns for path in sorted(results.glob(pattern))
    }
    metrics = [("nodes", float(len(tables["nodes"])), 0), ("failures", float(len(tables["failures"])), 0)]
    for path in sorted(results.glob("laws/*/fit.json")):
        metrics += _law_metrics(path.parent.name, read_json(path))
    shown = {place: sha256(path) for place, path in files.items()}
    end = int(max(path.stat().st_mtime for path in files.values()) * 1000)
    return Mirror(
        name=STUDY,
        status="FINISHED",
        fingerprint=fingerprint({"version": FORMAT_VERSION, "study": study.study, "files": shown}),
        parameters={"study": study.study, "seed": study.seed, "models": ",".join(study.models)},
        metrics=metrics,
        tags={"coppice.study": study.study},
        start=end,
        end=end,
        files=files,
    )


def _law_metrics(name: str, fit: dict[str, Any]) -> list[tuple[str, float, int]]:
    """Quality of a fit and its held-out errors, as <law>_<metric> and <law>_<test>_rmse."""
    values = {f"{name}_{metric}": value for metric, value in fit["metrics"].items()}
    values |= {f"{name}_{test}_rmse": errors[fit["law"]].get("rmse") for test, errors in fit["held_out"].items()}
    return [(metric, float(value), 0) for metric, value in values.items() if value is not None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--study", required=True, type=Path, help="the study's YAML file")
    parser.add_argument("--results", required=True, type=Path, help="folder of the study's results, with its tables")
    parser.add_argument("--uri", help="MLflow tracking URI (default: the study's, or mlflow.db beside its folder)")
    parser.add_argument("--output", required=True, type=Path, help="JSON file that gets the id of each node's run")


def run(arguments: argparse.Namespace) -> None:
    write_json(arguments.output, track(load_study(arguments.study), arguments.results, arguments.uri))
