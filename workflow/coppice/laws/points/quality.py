"""Nodes with one measured quality each, for laws that compare nodes rather than follow a recovery."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from coppice.errors import UserError
from coppice.laws.contracts import Tables
from coppice.laws.options import LawOptions
from coppice.records.base import Json

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("node", "evaluation", "metric", "value", "stderr", "unit")
# Traits of nodes that compute with fewer bits, which cost quality that the bits of their weights do not explain.
LOW_BIT_COMPUTE = frozenset({"quantized-activations", "quantized-inputs", "quantized-cache"})

Kind = Literal["perplexity", "accuracy"]


class QualityOptions(LawOptions):
    """Options of a law of measured nodes."""

    evaluation: str | None = Field(
        default=None, description="The evaluation that measured; may be left out where one alone has the metric."
    )
    metric: str | None = Field(
        default=None,
        description="The metric, as the table `metrics` names it; may be left out where there is one of its kind "
        "alone. A perplexity counts as its logarithm: the loss, nats per token.",
    )
    nodes: list[str] | None = Field(
        default=None, description="Patterns of the nodes, such as small/*; null: all of them."
    )


def join_quality(
    tables: Tables, evaluation: str | None, metric: str | None, nodes: list[str] | None, kind: Kind = "perplexity"
) -> pd.DataFrame:
    """The selected nodes, one row each, with the columns of the table `nodes` that were read, and `value`, `stderr`.

    A perplexity becomes a loss ln(perplexity) in nats per token, with stderr by the delta method. The metric is chosen
    by `choose_metric`, the nodes by glob patterns (None: all). Rows without a finite value are kept, for the caller to
    report. Raises UserError as `choose_metric` does, and where the metric has several units.
    """
    metrics = tables["metrics"]
    evaluation, metric = choose_metric(metrics, evaluation, metric, kind)
    rows = metrics[(metrics["evaluation"] == evaluation) & (metrics["metric"] == metric)]
    units = sorted(rows["unit"].dropna().unique())
    if len(units) > 1:
        raise UserError(
            f"The metric {metric} has several units ({', '.join(units)}); evaluate its nodes again with one version."
        )
    joined = tables["nodes"].merge(rows[["node", "value", "stderr"]], on="node", how="inner")
    selected = np.array([matches(node, nodes) for node in joined["node"]], bool)
    joined = joined[selected].reset_index(drop=True)
    if metric.startswith("perplexity_"):
        joined["stderr"] = joined["stderr"] / joined["value"]
        joined["value"] = np.log(joined["value"])
    return joined


def choose_metric(
    metrics: pd.DataFrame, evaluation: str | None, metric: str | None, kind: Kind = "perplexity"
) -> tuple[str, str]:
    """The pair (evaluation, metric) that a law is about: the one that is left, of the kind where no metric is named.

    Raises UserError where the options leave no measurement, or several.
    """
    pairs = metrics[["evaluation", "metric"]].drop_duplicates()
    if evaluation is not None:
        pairs = pairs[pairs["evaluation"] == evaluation]
    if metric is not None:
        pairs = pairs[pairs["metric"] == metric]
    elif kind == "perplexity":
        pairs = pairs[pairs["metric"].str.startswith("perplexity_")]
    else:
        pairs = pairs[pairs["metric"].str.endswith("_acc")]
    known = sorted(f"{row.evaluation}: {row.metric}" for row in pairs.itertuples())
    if len(known) == 1:
        return pairs.iloc[0]["evaluation"], pairs.iloc[0]["metric"]
    if not known:
        requested = metric or ("a perplexity" if kind == "perplexity" else "an accuracy")
        raise UserError(
            f"The tables hold no measurement of {requested}; name one of their metrics as the law's option `metric`."
        )
    raise UserError(
        f"The tables hold several measurements that the law could be about ({', '.join(known)}); name one by the "
        "law's options `metric` and `evaluation`."
    )


def matches(node: str, patterns: list[str] | None) -> bool:
    """Whether the node's name matches one of the glob patterns; None: any name does."""
    return patterns is None or any(fnmatchcase(node, pattern) for pattern in patterns)


# What the table `nodes`, with the nodes' names as index, says of one of them.


def parent(nodes: pd.DataFrame, node: str) -> str | None:
    """The node's parent; None for a dense model."""
    value = nodes.at[node, "parent"]
    return value if isinstance(value, str) else None


def list_steps(nodes: pd.DataFrame, node: str) -> list[str]:
    """The steps that made `node`, from the first, as names of nodes, without the dense model."""
    steps: list[str] = []
    while (before := parent(nodes, node)) is not None:
        steps.insert(0, node)
        node = before
    return steps


def traits(nodes: pd.DataFrame, node: str) -> frozenset[str]:
    """The node's traits, such as `quantized`."""
    value: Any = nodes.at[node, "traits"]
    return frozenset(value)


def step_options(nodes: pd.DataFrame, node: str) -> Json:
    """The options of the step that made the node; none of a dense model."""
    value = nodes.at[node, "options"]
    return json.loads(value) if isinstance(value, str) else {}
