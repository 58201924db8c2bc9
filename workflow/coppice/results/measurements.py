"""Rows of metrics, costs and items, from what evaluations wrote and from checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from coppice.errors import UserError
from coppice.evaluation import roofline
from coppice.files import read_json_object
from coppice.records.arrow import read_parquet
from coppice.records.compression import read_compression
from coppice.records.layout import ResultsLayout
from coppice.records.metrics import Metric, Metrics
from coppice.records.node_name import NodeName
from coppice.results.nodes import as_json
from coppice.results.schemas import SCHEMAS, Row
from coppice.study import changes
from coppice.study.schema import Roofline, Study
from coppice.study.schema.evaluations import protocols

# Costs that every manifest holds: metric -> column of nodes; the unit is the column's.
_MANIFEST_COSTS = ("stored_bytes", "parameters", "nonzero_parameters", "bits_per_weight", "bits_per_linear_weight")


class Measurements(NamedTuple):
    """Rows of the tables metrics and costs."""

    metrics: list[Row]
    costs: list[Row]


def evaluation_rows(study: Study, node: str, evaluation: str, layout: ResultsLayout, path: Path) -> Measurements:
    """The rows of an evaluation's metrics.json.

    Raises UserError where it is damaged, was measured by other options than the study's, or on another text.
    """
    uses = [f"evaluation.{evaluation}.{protocol}" for protocol in protocols(study.evaluations[evaluation])]
    changes.refuse_other_tokens(study, uses, layout.token_sets(NodeName(node).model))
    record = Metrics.read(path)
    changes.refuse_other_evaluation(study, node, evaluation, record.options, path)
    return rows_of(record, node, evaluation)


def rows_of(record: Metrics, node: str, evaluation: str) -> Measurements:
    """The rows of what an evaluation measured: of a cost in the table of costs, otherwise in that of metrics."""
    if record.kind == "cost":
        return Measurements([], [_cost_row(record, entry, node, evaluation) for entry in record.metrics])
    return Measurements([_metric_row(entry, node, evaluation) for entry in record.metrics], [])


def _metric_row(entry: Metric, node: str, evaluation: str) -> Row:
    return {
        "node": node,
        "evaluation": evaluation,
        "metric": entry.metric,
        "value": entry.value,
        "unit": entry.unit,
        "stderr": entry.stderr,
        "low": entry.low,
        "high": entry.high,
        "n": entry.n,
        "details": as_json(entry.details) if entry.details else None,
    }


def _cost_row(record: Metrics, entry: Metric, node: str, evaluation: str) -> Row:
    return {
        "node": node,
        "evaluation": evaluation,
        "metric": entry.metric,
        "value": entry.value,
        "unit": entry.unit,
        "device": entry.device or record.device,
        "spread": entry.spread,
        "simulated": entry.simulated,
        "details": None if entry.settings is None else as_json(entry.settings),
    }


def manifest_costs(checkpoint: Row) -> list[Row]:
    """The costs that a node's manifest holds."""
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


def roofline_rows(study: Study, section: Roofline, node: str, path: Path) -> list[Row]:
    """The rows of costs that follow from a checkpoint's config.json, which is at `path`, and its compression.json."""
    settings = section.model_dump()
    sparse = settings.pop("sparse_kernels") and is_two_to_four(study, node)
    config, entries = read_json_object(path), read_compression(path.parent)
    try:
        model = roofline.model_of_node(config, entries, sparse)
        return roofline.rows(node, model, config["max_position_embeddings"], **settings)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} lacks {error}; it is damaged or was edited by hand: remove it and run again."
        ) from error


def is_two_to_four(study: Study, node: str) -> bool:
    """Whether a step of the node's path masks by the pattern 2:4."""
    steps = [study.steps[step] for step in NodeName(node).steps]
    return any(step.options.model_dump().get("pattern") == "2:4" for step in steps)


def item_rows(node: str, evaluation: str, path: Path) -> pa.Table:
    """The rows of an evaluation's items.parquet, in the types of the table."""
    schema = SCHEMAS["items"]
    table = read_parquet(path, [name for name in schema.names if name not in ("node", "evaluation")])
    columns = {name: table[name] for name in table.column_names}
    columns["node"] = pa.array([node] * len(table), pa.string())
    columns["evaluation"] = pa.array([evaluation] * len(table), pa.string())
    try:
        return pa.table({name: columns[name].cast(schema.field(name).type) for name in schema.names}, schema=schema)
    except pa.ArrowException as error:
        raise UserError(f"{path} holds a value of the wrong type ({error}); evaluate {node!r} again.") from error
