"""The scores of single items, packed for a page that compares any two nodes by itself."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from coppice.decisions.recipe import scores_of
from coppice.formatting import join_words, number
from coppice.results.comparisons import Scores

MOST_BYTES = 4_000_000  # of all packed scores on a page

Pair = tuple[str, str]


def item_scores(items: pa.Table, pairs: list[Pair], most: int = MOST_BYTES) -> tuple[dict[str, dict[str, Any]], str]:
    """Of each pair (evaluation, metric) the scores of every node's items, by `<evaluation>/<metric>`; and a sentence on
    the pairs that were left out, where all together would be larger than `most` bytes.

    items: the table of that name. Pairs come in their order, as long as there is room.
    """
    found: dict[str, dict[str, Any]] = {}
    left_out, spent = [], 0
    for evaluation, metric in pairs:
        scores = scores_of(items, evaluation, metric)
        if not scores:
            continue
        name, size = f"{evaluation}/{metric}", _packed_size(scores)
        if spent + size > most:
            left_out.append(name)
        else:
            found[name] = packed(scores, metric)
            spent += size
    if not left_out:
        return found, ""
    return found, (
        f"The scores of single items are left out for {join_words(left_out)}, since a page holds "
        f"{number(most / 1e6)} MB of them; `tables/items.parquet` has all."
    )


def packed(scores: Mapping[str, Scores], metric: str) -> dict[str, Any]:
    """The scores of each node as base64 of little-endian float32 [count], in one order of items for all nodes.

    Nodes that were measured on other items, as with another tokenizer, have NaN at each other's items. `weights` are
    what the mean of a score is weighted by (the tokens of a document), where items weigh differently.
    """
    groups = {of_node.items: of_node.weights for of_node in scores.values()}
    starts = dict(zip(groups, np.cumsum([0, *map(len, groups.values())]), strict=False))
    weights = np.concatenate(list(groups.values()))
    nodes = {}
    for node, of_node in scores.items():
        row, start = np.full(len(weights), np.nan), starts[of_node.items]
        row[start : start + len(of_node.values)] = of_node.values / of_node.weights
        nodes[node] = _base64(row)
    documents = metric.startswith("perplexity_")
    return {
        "count": len(weights),
        "what": "nats per token of a document" if documents else "right (1) or wrong (0)",
        "unit": "nats/token" if documents else "accuracy",
        "nodes": nodes,
        **({} if np.all(weights == weights[0]) else {"weights": _base64(weights)}),
    }


def _packed_size(scores: Mapping[str, Scores]) -> int:
    count = sum(map(len, {of_node.items: of_node.weights for of_node in scores.values()}.values()))
    return len(scores) * count * 4 * 4 // 3


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")
