"""Limits on a node: stored bytes, recovery tokens on its path, decoding latency on a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coppice.errors import UserError, did_you_mean
from coppice.formatting import human_count, join_words, number
from coppice.results.schemas import Row

LATENCY = "decode_latency"
_ROOFLINE = "(roofline)"


@dataclass(frozen=True)
class Limit:
    """An upper bound on a number of each node; `values` has no entry, or None, where it is not known.

    text: the bound in words; format: a value with its unit.
    """

    text: str
    most: float
    values: dict[str, float | None]
    format: Callable[[float], str] = number

    def admits(self, node: str) -> bool:
        value = self.values.get(node)
        return value is not None and value <= self.most


def read_limits(
    nodes: Sequence[Row],
    costs: Sequence[Row],
    max_bytes: float | None = None,
    max_latency: float | None = None,
    max_recovery_tokens: float | None = None,
    device: str | None = None,
    cost: str | None = None,
) -> tuple[list[Limit], list[str]]:
    """The requested limits, and sentences on what they rest on."""
    limits: list[Limit] = []
    notes: list[str] = []
    if max_bytes is not None:
        sizes = {row["node"]: row["stored_bytes"] for row in nodes}
        limits.append(Limit(f"at most {_bytes(max_bytes)}", max_bytes, sizes, _bytes))
    if max_recovery_tokens is not None:
        trained = {row["node"]: row["path_recovery_tokens"] for row in nodes}
        text = f"at most {_recovery_tokens(max_recovery_tokens)} on the path"
        limits.append(Limit(text, max_recovery_tokens, trained, _recovery_tokens))
    if max_latency is not None:
        where, rows = choose_latencies(costs, device, cost)
        text = f"a {LATENCY} of at most {max_latency:g} s/token on {where}"
        limits.append(Limit(text, max_latency, {node: row["value"] for node, row in rows.items()}, _latency))
        simulated = sorted(node for node, row in rows.items() if row["simulated"])
        if where.endswith(_ROOFLINE):
            notes.append(f"The latencies on {where} are predictions, not measurements.")
        elif simulated:
            notes.append(f"Their latency is that of a simulation: {join_words(simulated)}.")
    return limits, notes


def _bytes(value: float) -> str:
    return f"{value:,.0f} stored bytes"


def _recovery_tokens(value: float) -> str:
    return f"{human_count(value)} recovery tokens"


def _latency(value: float) -> str:
    return f"{number(value, 4)} s/token"


def choose_latencies(costs: Sequence[Row], device: str | None, cost: str | None) -> tuple[str, dict[str, Row]]:
    """A device, and the rows of the decoding latency on it, by node. Raises UserError where the choice is unclear.

    Without a device named it is the one that was measured on; predictions by a roofline are used when named.
    """
    rows = [
        row
        for row in costs
        if row["metric"] == LATENCY
        and row["value"] is not None
        and math.isfinite(row["value"])
        and cost in (None, row["evaluation"])
    ]
    devices = sorted({row["device"] for row in rows})
    if not devices:
        of_cost = "" if cost is None else f" by {cost!r}"
        raise UserError(f"--max-latency: no {LATENCY} was measured{of_cost}; add a cost evaluation to the study.")
    if device is not None and device not in devices:
        raise UserError(f"--device {device}: no {LATENCY} is known on it.{did_you_mean(device, devices)}")
    fitting = [name for name in devices if (name == device if device else not name.endswith(_ROOFLINE))]
    if len(fitting) != 1:
        raise UserError(
            f"--max-latency: choose by --device where it holds; latencies are known on: {'; '.join(devices)}."
        )
    rows = [row for row in rows if row["device"] == fitting[0]]
    evaluations = sorted({row["evaluation"] for row in rows})
    if len(evaluations) > 1:
        raise UserError(
            f"--max-latency: several evaluations measured {LATENCY} ({join_words(evaluations)}); choose by --cost."
        )
    return fitting[0], {row["node"]: row for row in rows}
