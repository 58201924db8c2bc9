"""Metrics and pairs of nodes from the tables, as the page, the figures and the terminal show it."""

from __future__ import annotations

from coppice.formatting import with_interval
from coppice.results.schemas import Row
from coppice.uncertainty import interval


def names_of(metrics: list[Row], prefix: str = "", suffix: str = "") -> list[tuple[str, str]]:
    """The pairs (evaluation, metric) whose metric begins and ends so, in order."""
    pairs = {(row["evaluation"], row["metric"]) for row in metrics}
    return sorted(pair for pair in pairs if pair[1].startswith(prefix) and pair[1].endswith(suffix))


def perplexities(metrics: list[Row]) -> list[tuple[str, str]]:
    """The pairs (evaluation, metric) that are perplexities, one a protocol."""
    return names_of(metrics, prefix="perplexity_")


def scores(metrics: list[Row]) -> list[tuple[str, str]]:
    """The pairs (evaluation, metric) that are accuracies of benchmark tasks."""
    return names_of(metrics, suffix="_acc")


def format_metric(row: Row | None, digits: int = 3) -> str:
    """A metric with its 95% interval; blank if it was not measured."""
    return "" if row is None or row["value"] is None else with_interval(row["value"], interval(row), digits)


def indistinct_from_next(comparisons: list[Row]) -> set[tuple[str, str, str]]:
    """(node, evaluation, metric) where a node does not differ significantly from the next better one of its model."""
    metric = {"accuracy": "{}_acc", "loss": "perplexity_{}"}
    return {
        (row["node"], row["evaluation"], metric[row["measure"]].format(row["task"]))
        for row in comparisons
        if row["relation"] == "next" and row["measure"] in metric and not row["distinguishable"]
    }


def comparisons_note(comparisons: list[Row]) -> str:
    """The legend of the mark ~ at the values of `indistinct_from_next`, with the number of pairs compared."""
    families = {(row["evaluation"], row["task"], row["measure"]): row["family"] for row in comparisons}
    return (
        "~: not significantly different from the next better node of its dense model, by a paired bootstrap of the "
        f"items at 5%. {sum(families.values())} pairs compared, Holm-adjusted within each of {len(families)} measures."
    )
