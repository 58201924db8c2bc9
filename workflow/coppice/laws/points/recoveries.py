"""Losses along recovery runs, for laws that follow a recovery."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from coppice.laws.contracts import Tables
from coppice.laws.options import LawOptions
from coppice.laws.points.quality import list_steps, matches

if TYPE_CHECKING:
    import pandas as pd

CURVES = ("node", "tokens", "split", "loss", "dense_loss")


class RecoveryOptions(LawOptions):
    """Options of a law of recovery runs."""

    method: str = Field(default="full", description="The recovery method whose runs are the points.")
    nodes: list[str] | None = Field(
        default=None, description="Patterns of the recovery nodes, such as small/*; null: all of them."
    )


def join_recoveries(tables: Tables, options: RecoveryOptions) -> pd.DataFrame:
    """One row a validation loss of a run after its first tokens (at D = 0 laws of D diverge), by run and tokens.

    A run is a node of family "recover" and the options' method, whose name matches one of their glob patterns `nodes`
    (None: all), and whose parent was not recovered before, since D counts from the pruned model. Columns: run, tokens,
    loss and dense_loss (nats per token); those of the table `nodes` that were read, for the run; and the same of its
    parent as `parent.<column>` and of its dense model as `dense.<column>`.
    """
    nodes = tables["nodes"].set_index("node", drop=False)
    runs = [
        str(node)
        for node, row in nodes.iterrows()
        if row["family"] == "recover"
        and row["method"] == options.method
        and matches(str(node), options.nodes)
        and "recover" not in set(nodes.loc[list_steps(nodes, row["parent"]), "family"])
    ]
    rows = validation_losses(tables["curves"], runs)
    of_run = nodes.loc[rows["run"]].reset_index(drop=True)
    parents = nodes.loc[of_run["parent"]].reset_index(drop=True).add_prefix("parent.")
    dense = nodes.loc[of_run["model"]].reset_index(drop=True).add_prefix("dense.")
    return rows[["run", "tokens", "loss", "dense_loss"]].join(of_run).join(parents).join(dense)


def validation_losses(curves: pd.DataFrame, runs: list[str]) -> pd.DataFrame:
    """The validation losses of the runs after their first tokens, as rows of the table `curves` by run and tokens."""
    rows = curves[(curves["split"] == "validation") & (curves["tokens"] > 0) & curves["node"].isin(runs)]
    return rows.sort_values(["node", "tokens"]).rename(columns={"node": "run"}).reset_index(drop=True)
