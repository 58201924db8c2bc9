"""Every node's JSON as typed Parquet: nodes, metrics, items, curves, costs, comparisons, signals, failures.

Each column carries its unit and its meaning in the schema's metadata; `docs/formats.md` prints them. Rows are sorted
and nothing of the time of writing is stored, so that the same results give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial as partial_of
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from coppice import storage
from coppice.errors import UserError
from coppice.evaluation import roofline
from coppice.files import atomic_write, read_json
from coppice.records.compression import read_compression
from coppice.results.comparisons import compare, signals
from coppice.results.failures import _relative, failures
from coppice.results.reading import read_parquet, sorted_table
from coppice.results.schemas import SCHEMAS, Row, _text
from coppice.study import changes
from coppice.study.loading import load_study
from coppice.study.schema import Study
from coppice.study.tree import Node, calibration_of, evaluations, model_of, nodes, protocols

# Costs that every manifest tells: metric -> column of nodes; the unit is the column's.
_MANIFEST_COSTS = ("stored_bytes", "parameters", "nonzero_parameters", "bits_per_weight", "bits_per_linear_weight")


def write_tables(study: Study, results: Path, output: Path, partial: bool = False) -> dict[str, pa.Table]:
    """Writes one Parquet file a table, each whole or not at all, and returns the tables.

    `partial`: results that are missing are left out, broken ones become failures, and the files are dated 1970, so that
    whoever compares dates takes them for outdated. Otherwise raises UserError, naming the file, at the first such
    result.
    """
    rows = collect(study, Path(results), partial)
    tables = {name: sorted_table(rows[name], schema) for name, schema in SCHEMAS.items()}
    for name, table in tables.items():
        with atomic_write(Path(output) / f"{name}.parquet") as temporary:
            pq.write_table(table, temporary, compression="zstd")
            if partial:
                os.utime(temporary, (0, 0))
    return tables


def collected(study: Study, results: Path) -> dict[str, list[Row]]:
    """The rows of the partial tables, but for items and what follows from them; nothing is written."""
    rows = collect(study, Path(results), partial=True, itemized=False)
    names = ("nodes", "metrics", "curves", "costs", "failures")
    return {name: sorted_table(rows[name], SCHEMAS[name]).to_pylist() for name in names}


def collect(study: Study, results: Path, partial: bool = False, itemized: bool = True) -> dict[str, Any]:
    """Every table's rows, unsorted; items as Arrow tables, none where not `itemized`.

    Results of nodes that are not in the study are left out, as are those of nodes below one that cannot be read or was
    made of another study.
    """
    tree = nodes(study)
    broken: list[Row] = []

    def read(node: str, path: Path, reader: Callable[[Path], Any], manifest: str = "manifest.json") -> Iterator[Any]:
        try:
            if not partial or storage.ensure_local(path, manifest).exists():
                yield reader(storage.ensure_local(path, manifest))
        except UserError as error:
            if not partial:
                raise
            broken.append({"node": node, "stage": "tables", "error": str(error), "log": _relative(path, results)})

    checkpoints: dict[str, Row] = {}
    for name, node in tree.items():
        path = results / "models" / name / "manifest.json"
        if refused := next((row["node"] for row in broken if name.startswith(f"{row['node']}/")), None):
            if path.exists():
                error = f"It was made from {refused}, which the tables leave out."
                broken.append({"node": name, "stage": "tables", "error": error, "log": _relative(path, results)})
            continue
        for row in read(name, path, partial_of(_checkpoint_row, study, node, results)):
            checkpoints[name] = row
    curves: list[Row] = []
    for name in [name for name, row in checkpoints.items() if row["family"] == "recover"]:
        for rows in read(name, results / "models" / name / "curve.parquet", partial_of(curve_rows, name)):
            curves += rows
    _relate(checkpoints, curves)
    metrics: list[Row] = []
    costs = [row for checkpoint in checkpoints.values() for row in _manifest_costs(checkpoint)]
    for name in checkpoints if study.roofline else ():
        for rows in read(name, results / "models" / name / "config.json", partial_of(roofline_rows, study, name)):
            costs += rows
    items: list[pa.Table] = []
    for name, evaluation in [(node, evaluation) for node in checkpoints for evaluation in evaluations(study, node)]:
        folder = results / "evaluations" / name / evaluation
        reader = partial_of(_evaluation_rows, study, name, evaluation, results)
        for measured in read(name, folder / "metrics.json", reader):
            metrics += measured["metrics"]
            costs += measured["costs"]
            if itemized and study.evaluations[evaluation].kind == "quality":
                items += read(name, folder / "items.parquet", partial_of(item_rows, name, evaluation), "metrics.json")
    asked = {name: protocols(evaluation) for name, evaluation in study.evaluations.items()}
    return {
        "nodes": list(checkpoints.values()),
        "metrics": metrics,
        "items": items,
        "curves": curves,
        "costs": costs,
        "comparisons": compare(checkpoints.values(), items, asked),
        "signals": signals(metrics, curves),
        # Where nothing is missing, a log that ends in an error is an earlier run's.
        "failures": broken + failures(results, study, tree) if partial else [],
    }


def _checkpoint_row(study: Study, node: Node, results: Path, path: Path) -> Row:
    """The node's row. Raises UserError also where what it was calibrated or trained on was of another text."""
    tokens = results / "tokens" / node.model
    row = node_row(study, node, path, tokens)
    uses = [f"calibration.{row['calibration']}"] if row["calibration"] else []
    if row["family"] == "recover":
        uses += [f"recovery.{row['step']}", f"validation.{row['step']}"]
    changes.refuse_other_tokens(study, uses, tokens)
    return row


def _evaluation_rows(study: Study, node: str, evaluation: str, results: Path, path: Path) -> dict[str, list[Row]]:
    """The evaluation's rows. Raises UserError also where what the node was measured on was of another text."""
    uses = [f"evaluation.{evaluation}.{protocol}" for protocol in protocols(study.evaluations[evaluation])]
    changes.refuse_other_tokens(study, uses, results / "tokens" / model_of(node))
    return measured_rows(study, node, evaluation, path)


def node_row(study: Study, node: Node, path: Path, tokens: Path) -> Row:
    """The row of a checkpoint from its manifest; what other nodes tell of it is still missing.

    tokens: the folder of the model's token sets. Raises UserError where the manifest lacks something, or tells of
    another step, calibration or ladder of budgets than the study's.
    """
    manifest = read_json(path)
    try:
        changes.refuse_other_node(study, node, manifest, path, tokens)
        step, recovery = manifest["step"], manifest["recovery"] or {"tokens": None, "tokens_total": 0}
        parameters, stored_bits = manifest["parameters"], manifest["stored_bits"]
        source = manifest.get("source") or {}
        kind = next((kind for kind in ("shipped", "path", "hub") if kind in source), None)
        return {
            "node": node.name,
            "parent": manifest["parent"],
            "model": node.model,
            "recipe": node.name.removeprefix(node.model).removeprefix("/"),
            "depth": node.name.count("/"),
            "step": step and step["name"],
            "method": step and step["method"],
            "family": step and step["family"],
            "options": step and _json(step["options"]),
            "marks": sorted(manifest["marks"]),
            "seed": manifest["seed"],
            "source_kind": kind,
            "source": source.get(kind),
            "source_revision": source.get("revision"),
            "parameters": parameters["total"],
            "block_parameters": parameters["blocks"],
            "linear_parameters": parameters["decoder_linears"],
            "nonzero_parameters": parameters["nonzero"],
            "dense_parameters": manifest["dense_parameters"],
            "rho": manifest["rho"],
            "rho_blocks": manifest["rho_blocks"],
            "rho_nonzero": manifest["rho_nonzero"],
            "stored_bytes": manifest["stored_bytes"],
            "stored_bits": stored_bits["total"],
            "linear_bits": stored_bits["decoder_linears"],
            "bits_per_weight": manifest["bits_per_weight"],
            "bits_per_linear_weight": manifest["bits_per_linear_weight"],
            "asked": _json(manifest["asked"]),
            "achieved": _json(manifest["achieved"]),
            **_calibration(study, node, manifest["calibration"]),
            # Nodes below one that was trained carry its record on.
            "recovery_tokens": recovery["tokens"] if step and step["family"] == "recover" else None,
            "path_recovery_tokens": recovery["tokens_total"],
            "wall_seconds": manifest["wall_seconds"],
            "peak_memory_bytes": manifest.get("peak_memory_bytes"),
            "fingerprint": manifest["fingerprint"],
            "versions": _json(manifest["versions"]),
        }
    except (KeyError, TypeError) as error:
        raise _incomplete(path, error) from error


def _calibration(study: Study, node: Node, fingerprints: dict[str, str] | None) -> Row:
    """Name and fingerprint of what a step's statistics were gathered over; all kinds share one calibration."""
    if not fingerprints:
        return {"calibration": None, "calibration_fingerprint": None}
    name = calibration_of(study, node.step)
    return {"calibration": name, "calibration_fingerprint": next(iter(fingerprints.values()))}


def curve_rows(node: str, path: Path) -> list[Row]:
    """The rows of a recovery's curve.parquet: one for each loss that it holds."""
    splits = {"train": "train_loss", "validation": "validation_loss"}
    wanted = ["tokens", *splits.values(), "lr", "seconds", "budget", "dense_loss"]
    return [
        {
            "node": node,
            "tokens": point["tokens"],
            "split": split,
            "loss": point[column],
            "seconds": point["seconds"],
            "learning_rate": point["lr"],
            "dense_loss": point["dense_loss"],
            "budget": point["budget"],
        }
        for point in read_parquet(path, wanted).to_pylist()
        for split, column in splits.items()
        if point[column] is not None and not math.isnan(point[column])
    ]


def _relate(checkpoints: dict[str, Row], curves: list[Row]) -> None:
    """Adds to the rows of nodes what their roots and their curves tell."""
    validation: dict[str, list[Row]] = {}
    for row in curves:
        if row["split"] == "validation":
            validation.setdefault(row["node"], []).append(row)
    for name, row in checkpoints.items():
        root = checkpoints.get(row["model"], row)
        row |= {column: root[column] for column in ("source_kind", "source", "source_revision")}
        row |= recovery_losses(validation.get(name, []))


def recovery_losses(validation: list[Row]) -> Row:
    """loss_before, loss_after, dense_loss and recovered_share, nats per token, from a run's validation rows.

    recovered_share = (loss_before - loss_after) / (loss_before - dense_loss); None where nothing had been lost, or
    where there is no loss from before the first update.
    """
    ordered = sorted(validation, key=lambda row: row["tokens"])
    if not ordered:
        return dict.fromkeys(("loss_before", "loss_after", "dense_loss", "recovered_share"))
    first, last = ordered[0], ordered[-1]
    before, after, dense = first["loss"] if first["tokens"] == 0 else None, last["loss"], last["dense_loss"]
    lost = None if before is None or dense is None else before - dense
    share = (before - after) / lost if lost is not None and lost > 0 else None
    return {"loss_before": before, "loss_after": after, "dense_loss": dense, "recovered_share": share}


def measured_rows(study: Study | None, node: str, evaluation: str, path: Path) -> dict[str, list[Row]]:
    """The rows of metrics and of costs in an evaluation's metrics.json.

    Raises UserError where it lacks something, or was measured by other options than the study's, if one is given.
    """
    report = read_json(path)
    try:
        if study is not None:
            changes.refuse_other_evaluation(study, node, evaluation, report["options"], path)
        costly = report["kind"] == "cost"
        rows = [_measured_row(node, evaluation, report, entry, costly) for entry in report["metrics"]]
    except (KeyError, TypeError) as error:
        raise _incomplete(path, error) from error
    return {"metrics": [] if costly else rows, "costs": rows if costly else []}


def _measured_row(node: str, evaluation: str, report: Row, entry: Row, costly: bool) -> Row:
    row = {
        "node": node,
        "evaluation": evaluation,
        "metric": entry["metric"],
        "value": entry["value"],
        "unit": entry["unit"],
    }
    if costly:
        return row | {
            "device": entry.get("device", report["device"]),
            "spread": entry.get("spread"),
            "simulated": entry.get("simulated", False),
            "details": _json(entry["settings"]) if "settings" in entry else None,
        }
    known = {"metric", "value", "unit", "stderr", "low", "high", "n"}
    details = {key: value for key, value in entry.items() if key not in known and value is not None}
    return row | {
        "stderr": entry.get("stderr"),
        "low": entry.get("low"),
        "high": entry.get("high"),
        "n": entry.get("n"),
        "details": _json(details) if details else None,
    }


def _manifest_costs(checkpoint: Row) -> list[Row]:
    units = SCHEMAS["nodes"]
    return [
        {
            "node": checkpoint["node"],
            "metric": metric,
            "value": checkpoint[metric],
            "unit": units.field(metric).metadata[b"unit"].decode(),
            "simulated": False,
        }
        for metric in _MANIFEST_COSTS
    ]


def roofline_rows(study: Study, node: str, path: Path) -> list[Row]:
    """The rows of costs that follow from a checkpoint's config.json, which is at `path`, and its compression.json."""
    settings = study.roofline.model_dump()
    sparse = settings.pop("sparse_kernels") and is_two_to_four(study, node)
    config, entries = read_json(path), read_compression(path.parent)
    try:
        model = roofline.model_of_node(config, entries, sparse)
        return roofline.rows(node, model, config["max_position_embeddings"], **settings)
    except (KeyError, TypeError) as error:
        raise _incomplete(path, error) from error


def is_two_to_four(study: Study, node: str) -> bool:
    """Whether a step of the node's path masks by the pattern 2:4."""
    steps = [study.steps[part.partition("@")[0]] for part in node.split("/")[1:]]
    return any(step.options.model_dump().get("pattern") == "2:4" for step in steps)


def item_rows(node: str, evaluation: str, path: Path) -> pa.Table:
    """The rows of an evaluation's items.parquet, in the types of the table."""
    schema = SCHEMAS["items"]
    table = read_parquet(path, [name for name in schema.names if name not in ("node", "evaluation")])
    columns = {name: table[name] for name in table.column_names}
    columns["node"] = pa.array([node] * len(table), _text)
    columns["evaluation"] = pa.array([evaluation] * len(table), _text)
    try:
        return pa.table({name: columns[name].cast(schema.field(name).type) for name in schema.names}, schema=schema)
    except pa.ArrowException as error:
        raise UserError(f"{path} holds a value of the wrong type ({error}); evaluate {node!r} again.") from error


def _incomplete(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} lacks {error}; it was written by another version or by hand: remove it and run again.")


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--study", required=True, type=Path, help="the study's YAML file")
    parser.add_argument("--results", required=True, type=Path, help="folder of the study's results")
    parser.add_argument("--output", required=True, type=Path, help="folder of the tables")
    parser.add_argument(
        "--partial",
        action="store_true",
        help="write what there is; the tables are dated 1970, so that they are made again",
    )


def run(arguments: argparse.Namespace) -> None:
    write_tables(load_study(arguments.study), arguments.results, arguments.output, arguments.partial)
