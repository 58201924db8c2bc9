"""Losses along recovery runs, for laws that follow a recovery."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from coppice.laws import LawOptions
from coppice.laws.quality import matches, path

if TYPE_CHECKING:
    import pandas as pd

CURVES = ("node", "tokens", "split", "loss", "dense_loss")


class RecoveryOptions(LawOptions):
    """Options of a law of recovery runs."""

    method: str = Field(default="full", description="The recovery method whose runs are the points.")
    nodes: list[str] | None = Field(
        default=None, description="Patterns of the recovery nodes, such as small/*; null: all of them."
    )


def recoveries(tables: dict[str, pd.DataFrame], options: dict[str, Any]) -> pd.DataFrame:
    """One row a validation loss of a run after its first tokens (at D = 0 laws of D diverge), by run and tokens.

    A run is a node of family "recover" and method options["method"], whose name matches one of the glob patterns
    options["nodes"] (None: all), and whose parent was not recovered before, since D counts from the pruned model.
    Columns: run, tokens, loss and dense_loss (nats per token); those of the table `nodes` that were read, for the run;
    and the same of its parent as `parent.<column>` and of its dense model as `dense.<column>`.
    """
    nodes = tables["nodes"].set_index("node", drop=False)
    runs = [
        node
        for node, row in nodes.iterrows()
        if row["family"] == "recover"
        and row["method"] == options["method"]
        and matches(node, options["nodes"])
        and "recover" not in set(nodes.loc[path(nodes, row["parent"]), "family"])
    ]
    curves = tables["curves"]
    rows = curves[(curves["split"] == "validation") & (curves["tokens"] > 0) & curves["node"].isin(runs)]
    rows = rows.sort_values(["node", "tokens"]).rename(columns={"node": "run"}).reset_index(drop=True)
    of_run = nodes.loc[rows["run"]].reset_index(drop=True)
    parents = nodes.loc[of_run["parent"]].reset_index(drop=True).add_prefix("parent.")
    dense = nodes.loc[of_run["model"]].reset_index(drop=True).add_prefix("dense.")
    found = rows[["run", "tokens", "loss", "dense_loss"]]
    return found.join(of_run).join(parents).join(dense)
