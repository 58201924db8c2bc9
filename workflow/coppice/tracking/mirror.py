"""What MLflow shows of a study: a run for each node, and one for the study itself.

All of it is read from the tables and the checkpoints' folders. A run bears the fingerprint of what it shows; names of
metrics are the same in every run, flat, and end in their unit where they have one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from coppice import storage
from coppice.files import fingerprint, sha256
from coppice.formatting import human_count
from coppice.records.base import Json
from coppice.records.fit import FitRecord
from coppice.records.layout import ResultsLayout
from coppice.records.manifest import Manifest
from coppice.records.node_name import NodeName
from coppice.records.tokens import TokenSet
from coppice.results.failures import STAGES
from coppice.results.reading import pareto_front, read_table
from coppice.results.schemas import SCHEMAS, Row
from coppice.study.schema import Study
from coppice.study.tree import nodes
from coppice.tracking import notes
from coppice.tracking.quantities import Metrics, curve, key, measurements, ranks_of, sizes

Parameters = dict[str, str | int]

STUDY = "."  # the name of the study's own run; no node can have this name
FORMAT_VERSION = 3

# Differ between two runs of the same work, and so are no reason for a new run.
_TIMING = frozenset({"wall_seconds", "peak_memory_bytes", "seconds", "versions"})


@dataclass(frozen=True)
class Dataset:
    """Tokens that a node was calibrated, trained or measured on. use: the context in which MLflow lists it."""

    name: str
    digest: str
    use: str
    source: str = ""
    profile: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Mirror:
    """A run as MLflow is to show it.

    metrics: (name, value, step); files: by the path that they get among the run's artifacts; texts: small artifacts by
    path. tags, and note with its links, may change while the run is current: they depend on other nodes too. start and
    end: milliseconds since 1970. live: of a node under way, so that more metrics follow.
    """

    name: str
    status: str
    fingerprint: str
    parameters: Parameters
    metrics: Metrics
    tags: dict[str, str]
    note: str
    start: int
    end: int
    files: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, object] = field(default_factory=dict)
    datasets: list[Dataset] = field(default_factory=list)
    live: bool = False


def study_mirrors(study: Study, results: Path) -> list[Mirror]:
    """The runs that MLflow is to show: every node that is complete or failed, roots first, then the study's own."""
    tables = {name: read_table(ResultsLayout(results).tables, name).to_pylist() for name in SCHEMAS if name != "items"}
    uploaded = _nodes_to_upload(study.tracking.weights, tables["nodes"], tables["metrics"])
    return [*node_mirrors(study, results, tables, uploaded), _study_mirror(study, results, tables)]


def node_mirrors(
    study: Study, results: Path, tables: Mapping[str, list[Row]], uploaded: AbstractSet[str]
) -> list[Mirror]:
    """The runs of the nodes that are complete or failed, roots first. uploaded: whose weights go to MLflow too."""
    rows = {row["node"]: row for row in tables["nodes"]}
    rows_of_tables = {
        "metrics": tables["metrics"],
        # Costs of the manifest and the roofline follow from the node's row.
        "costs": [row for row in tables["costs"] if row["evaluation"]],
        "curves": tables["curves"],
        "failures": tables["failures"],
    }
    of = {name: _by_node(entries) for name, entries in rows_of_tables.items()}
    repeated = _ambiguous_metrics(rows_of_tables["metrics"] + rows_of_tables["costs"])
    best = on_pareto_front(tables["nodes"], tables["metrics"])
    mirrors = []
    for node in nodes(study):
        parts = {name: rows_of.get(node, []) for name, rows_of in of.items()}
        if node in rows:
            path = [rows[name] for name in NodeName(node).lineage if name in rows]
            mirrors.append(_node_mirror(study, results, path, parts, repeated, node in uploaded, node in best))
        elif parts["failures"]:
            mirrors.append(_failed_mirror(study, results, node, parts["failures"]))
    return mirrors


def on_pareto_front(rows: list[Row], metrics: list[Row]) -> frozenset[str]:
    """Nodes that no other one beats in both stored bytes and some quality: a perplexity or an accuracy."""
    return _best(rows, metrics, ("perplexity", "accuracy"))


def _best(rows: list[Row], metrics: list[Row], units: tuple[str, ...]) -> frozenset[str]:
    size = {row["node"]: row["stored_bytes"] for row in rows}
    measured: dict[tuple[str, str], list[Row]] = {}
    for row in metrics:
        if row["unit"] in units and row["value"] is not None and row["node"] in size:
            measured.setdefault((row["evaluation"], row["metric"]), []).append(row)
    front: set[str] = set()
    for entries in measured.values():
        points = [(size[row["node"]], -row["value"] if row["unit"] == "accuracy" else row["value"]) for row in entries]
        front |= {entries[index]["node"] for index in pareto_front(points)}
    return frozenset(front)


def _nodes_to_upload(policy: str, rows: list[Row], metrics: list[Row]) -> frozenset[str]:
    """Nodes whose weights are uploaded: nobody's, everybody's, or those on the front of size against a perplexity."""
    if policy == "all":
        return frozenset(row["node"] for row in rows)
    return _best(rows, metrics, ("perplexity",)) if policy == "pareto" else frozenset()


def _by_node(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["node"], []).append(row)
    return groups


def _ambiguous_metrics(rows: list[Row]) -> frozenset[str]:
    """Names of metrics that two evaluations use, so that the evaluation must be named too."""
    pairs = {(row["evaluation"], row["metric"]) for row in rows}
    counts = Counter(metric for _, metric in pairs)
    return frozenset(metric for metric, count in counts.items() if count > 1)


def _node_mirror(
    study: Study,
    results: Path,
    path: list[Row],
    parts: dict[str, list[Row]],
    repeated: frozenset[str],
    upload: bool,
    best: bool,
) -> Mirror:
    row, recipe = path[-1], [step for step in path if step["step"]]
    node, layout = row["node"], ResultsLayout(results)
    manifest = Manifest.read(layout.manifest(node))
    end = int(layout.manifest(node).stat().st_mtime * 1000)
    return Mirror(
        name=node,
        status="FAILED" if parts["failures"] else "FINISHED",
        fingerprint=_identity(row, parts, repeated, upload),
        parameters=_parameters(row) | _recipe_parameters(recipe),
        metrics=sizes(row, ranks_of(layout.checkpoint(node))) + measurements(parts, repeated) + curve(parts["curves"]),
        tags=_tags(study, path, best) | _errors(parts["failures"]),
        note=notes.node_note(study, row, path, parts["metrics"], parts["failures"]),
        start=end - int(1000 * (row["wall_seconds"] or 0)),
        end=end,
        files=_node_files(layout, node, manifest.files if upload else ()),
        texts={
            "recipe.json": [
                {key: step[key] for key in ("step", "method", "family", "seed", "options")} for step in recipe
            ],
            "weights.json": {
                "folder": ResultsLayout(Path(study.study)).checkpoint(node).as_posix(),
                "files": {name: asdict(entry) for name, entry in manifest.files.items()},
            },
        },
        datasets=_datasets(study, layout, row),
    )


def _node_files(layout: ResultsLayout, node: str, weights: Iterable[str]) -> dict[str, Path]:
    folder = layout.checkpoint(node)
    files = {name: folder / name for name in ("manifest.json", "compression.json", "curve.parquet")}
    # Folders of further nodes lie in the same place, and have no metrics of their own.
    for path in layout.metrics_of(node):
        files[f"evaluations/{path.parent.name}/metrics.json"] = path
    files |= {f"weights/{name}": folder / name for name in weights} | _job_files(layout, node)
    local = {place: storage.ensure_local(path) for place, path in files.items()}
    return {place: path for place, path in local.items() if path.exists()}


def _identity(row: Row, parts: dict[str, list[Row]], repeated: frozenset[str], upload: bool) -> str:
    """Fingerprint of what a run shows, but for times."""
    content = {name: [_without_times(entry) for entry in entries] for name, entries in parts.items()}
    named = sorted(repeated & {entry["metric"] for entry in parts["metrics"] + parts["costs"]})
    written = {"version": FORMAT_VERSION, "upload": upload, "repeated": named}
    return fingerprint({**written, "node": _without_times(row), **content})


def _without_times(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in _TIMING}


def _parameters(row: Row) -> Parameters:
    names = ("model", "recipe", "depth", "step", "seed", "calibration", "source", "source_revision")
    method_and_family = {name: row[name] or "dense" for name in ("method", "family")}
    return (
        {name: row[name] for name in names if row[name] is not None}
        | method_and_family
        | {"traits": ",".join(row["traits"])}
    )


def _recipe_parameters(recipe: list[Row]) -> Parameters:
    """The options of every step of a path as `<family>.<option>`, `<family>2.<option>` where a family comes twice."""
    options: Json = {}
    steps: Counter[str] = Counter()
    for row in recipe:
        steps[row["family"]] += 1
        place = row["family"] + (str(steps[row["family"]]) if steps[row["family"]] > 1 else "")
        options[f"{place}.method"] = row["method"]
        options |= {f"{place}.{option}": value for option, value in json.loads(row["options"]).items()}
    return {key(name): value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}


def _tags(study: Study, path: list[Row], best: bool) -> dict[str, str]:
    """The tags that group and filter runs."""
    row = path[-1]
    return {
        **node_tags(study, row["node"]),
        "coppice.family": row["family"] or "dense",
        "coppice.method": row["method"] or "dense",
        "coppice.composition": notes.composition(path),
        "coppice.budget": human_count(row["path_recovery_tokens"]) if row["path_recovery_tokens"] else "none",
        "coppice.pareto": "yes" if best else "no",
    }


def node_tags(study: Study, node: str) -> dict[str, str]:
    """The tags that follow from a node's name."""
    name = NodeName(node)
    tags = {"coppice.study": study.study, "coppice.model": name.model}
    return tags | ({"coppice.parent": str(name.parent)} if name.parent else {})


def _errors(failed: list[Row]) -> dict[str, str]:
    return {"coppice.error": "; ".join(f"{row['stage']}: {row['error']}" for row in failed)} if failed else {}


def _job_files(layout: ResultsLayout, node: str) -> dict[str, Path]:
    """Logs and benchmarks of the jobs of one node, by the paths that they get: <kind>/<stage>[/<rest>].<suffix>."""
    files: dict[str, Path] = {}
    for kind, path_of in (("logs", layout.log), ("benchmarks", layout.benchmark)):
        for name, stage in STAGES.items():
            own = path_of(name, node)
            if stage.parts == 0:
                files[f"{kind}/{name}{own.suffix}"] = own
                continue
            folder = own.with_suffix("")
            for path in folder.glob("*/" * (stage.parts - 1) + f"*{own.suffix}"):
                files[f"{kind}/{name}/{path.relative_to(folder).as_posix()}"] = path
    return files


def _datasets(study: Study, layout: ResultsLayout, row: Row) -> list[Dataset]:
    """The token sets that a node was calibrated, trained and measured on."""
    datasets: list[Dataset] = []
    folder = layout.token_sets(row["model"])
    if row["calibration"]:
        path = layout.tokens(row["model"], f"calibration.{row['calibration']}")
        data = _dataset(study, path, "calibration") if path.exists() else Dataset("", "", "calibration")
        datasets.append(replace(data, name=row["calibration"], digest=row["calibration_fingerprint"]))
    trained = row["family"] == "recover"
    uses = {f"{use}.{row['step']}": use for use in ("recovery", "validation") if trained}
    uses |= {path.parent.name: "evaluation" for path in folder.glob("evaluation.*/manifest.json")}
    for name, use in uses.items():
        path = layout.tokens(row["model"], name)
        if path.exists():
            datasets.append(_dataset(study, path, use))
    return datasets


def _dataset(study: Study, path: Path, use: str) -> Dataset:
    """The token set of a manifest as MLflow describes data: rows are windows, elements are tokens."""
    tokens, model, name = TokenSet.read(path), path.parents[1].name, path.parent.name
    return Dataset(
        name=name,
        digest=tokens.fingerprint,
        use=use,
        source=ResultsLayout(Path(study.study)).tokens(model, name).parent.as_posix(),
        profile={
            "num_rows": tokens.windows,
            "num_elements": tokens.tokens,
            "documents": tokens.documents,
            "window_length": tokens.length,
        },
    )


def _failed_mirror(study: Study, results: Path, node: str, failed: list[Row]) -> Mirror:
    """The run of a node without a checkpoint: its error and its logs; of 1970 where it has no logs."""
    # A damaged one may have been removed since the tables were written, as their sentence advises.
    logs = [log for log in (results / row["log"] for row in failed) if log.exists()]
    end = int(max((log.stat().st_mtime for log in logs), default=0) * 1000)
    return Mirror(
        name=node,
        status="FAILED",
        fingerprint=fingerprint({"version": FORMAT_VERSION, "node": node, "failures": failed}),
        parameters=name_parameters(node),
        metrics=[],
        tags=node_tags(study, node) | {"coppice.pareto": "no"} | _errors(failed),
        note=notes.failed_note(study, node, NodeName(node).parent, failed),
        start=end,
        end=end,
        files={place: path for place, path in _job_files(ResultsLayout(results), node).items() if path.exists()},
    )


def name_parameters(node: str) -> Parameters:
    """The parameters that follow from a node's name."""
    name = NodeName(node)
    return {"model": name.model, "recipe": name.recipe, "depth": name.depth}


def _study_mirror(study: Study, results: Path, tables: dict[str, list[Row]]) -> Mirror:
    """The study's own run: tables, laws, report and plots as artifacts, fitted numbers as metrics."""
    patterns = ("study.yaml", "tables/*.parquet", "laws/*/*", "report/*.html", "report/*.svg")
    files = {
        path.relative_to(results).as_posix(): path for pattern in patterns for path in sorted(results.glob(pattern))
    }
    metrics = [("nodes", float(len(tables["nodes"])), 0), ("failures", float(len(tables["failures"])), 0)]
    for name, path in ResultsLayout(results).fits.items():
        metrics += _law_metrics(name, FitRecord.read(path))
    digests = {place: sha256(path) for place, path in files.items()}
    end = int(max(path.stat().st_mtime for path in files.values()) * 1000)
    return Mirror(
        name=STUDY,
        status="FINISHED",
        fingerprint=fingerprint({"version": FORMAT_VERSION, "study": study.study, "files": digests}),
        parameters={"study": study.study, "seed": study.seed, "models": ",".join(study.models)},
        metrics=metrics,
        tags={"coppice.study": study.study},
        note=notes.study_note(study, tables["nodes"], tables["failures"]),
        start=end,
        end=end,
        files=files,
    )


def _law_metrics(name: str, fit: FitRecord) -> Metrics:
    """Quality of a fit and its held-out errors, as <law>_<metric> and <law>_<test>_rmse."""
    values = {f"{name}_{metric}": value for metric, value in fit.metrics.items()}
    values |= {f"{name}_{test}_rmse": error.rmse for test, error in fit.own_errors.items()}
    return [(metric, float(value), 0) for metric, value in values.items() if value is not None]
