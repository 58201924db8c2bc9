"""Nodes with one measured quality each, for laws that compare nodes rather than follow a recovery."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from coppice.errors import UserError
from coppice.laws import LawOptions

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("node", "evaluation", "metric", "value", "stderr", "unit")


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


def measured(tables: dict[str, pd.DataFrame], options: dict[str, Any], kind: str = "perplexity") -> pd.DataFrame:
    """The chosen nodes, one row each, with the columns of the table `nodes` that were read, and `value`, `stderr`.

    kind: `perplexity`, whose values become losses ln(perplexity) in nats per token with stderr by the delta method, or
    `accuracy`; it picks the metric where the options name none. Rows without a finite value are kept: whoever reads
    them says so. Raises UserError where the options name no measurement, or leave several to choose from.
    """
    nodes, metrics = tables["nodes"], tables["metrics"]
    evaluation, metric = choice(metrics, options, kind)
    rows = metrics[(metrics["evaluation"] == evaluation) & (metrics["metric"] == metric)]
    units = sorted(rows["unit"].dropna().unique())
    if len(units) > 1:
        raise UserError(
            f"The metric {metric} stands in several units ({', '.join(units)}); evaluate its nodes anew with one "
            "version."
        )
    found = nodes.merge(rows[["node", "value", "stderr"]], on="node", how="inner")
    chosen = np.array([matches(node, options["nodes"]) for node in found["node"]], bool)
    found = found[chosen].reset_index(drop=True)
    if metric.startswith("perplexity_"):
        found["stderr"] = found["stderr"] / found["value"]
        found["value"] = np.log(found["value"])
    return found


def choice(metrics: pd.DataFrame, options: dict[str, Any], kind: str) -> tuple[str, str]:
    """The evaluation and the metric that `measured` reads: the one pair that the options leave. Raises as it does."""
    pairs = metrics[["evaluation", "metric"]].drop_duplicates()
    if options["evaluation"] is not None:
        pairs = pairs[pairs["evaluation"] == options["evaluation"]]
    if options["metric"] is not None:
        pairs = pairs[pairs["metric"] == options["metric"]]
    else:
        of_kind = (
            pairs["metric"].str.startswith("perplexity_")
            if kind == "perplexity"
            else pairs["metric"].str.endswith("_acc")
        )
        pairs = pairs[of_kind]
    known = sorted(f"{row.evaluation}: {row.metric}" for row in pairs.itertuples())
    if len(known) == 1:
        return pairs.iloc[0]["evaluation"], pairs.iloc[0]["metric"]
    if not known:
        asked = options["metric"] or ("a perplexity" if kind == "perplexity" else "an accuracy")
        raise UserError(
            f"The tables hold no measurement of {asked}; name one of their metrics as the law's option `metric`."
        )
    raise UserError(
        f"The tables hold several measurements that the law could be about ({', '.join(known)}); name one by the "
        "law's options `metric` and `evaluation`."
    )


def matches(node: str, patterns: list[str] | None) -> bool:
    """Whether the node's name matches one of the glob patterns; None: any name does."""
    return patterns is None or any(fnmatchcase(node, pattern) for pattern in patterns)


def path(nodes: pd.DataFrame, node: str) -> list[str]:
    """The steps that made `node`, from the first, as names in the index of `nodes`, without the dense model."""
    steps: list[str] = []
    while isinstance(nodes.at[node, "parent"], str):
        steps.insert(0, node)
        node = nodes.at[node, "parent"]
    return steps
