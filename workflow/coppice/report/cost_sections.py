"""The page's sections of measured costs and roofline bounds, as HTML."""

from __future__ import annotations

import json

from coppice.formatting import number
from coppice.report import markup
from coppice.results.schemas import Row

_SPREAD = "\u00b1 is half the interquartile range of the repeats, not half a 95% interval."


def costs_table(costs: list[Row]) -> str:
    """Measured costs of each node; sizes are in the table of nodes."""
    measured = [row for row in costs if row["evaluation"]]
    if not measured:
        return ""
    columns = sorted({(row["device"] or "", row["metric"], row["unit"], row["simulated"]) for row in measured})
    cells = {(row["node"], row["device"] or "", row["metric"]): row for row in measured}
    titles = ["node"] + [
        f"{metric}, {unit} ({device}{', simulated' if simulated else ''})"
        for device, metric, unit, simulated in columns
    ]

    def cell(node: str, device: str, metric: str) -> str:
        row = cells.get((node, device, metric))
        if row is None or row["value"] is None:
            return ""
        return number(row["value"]) + ("" if row["spread"] is None else f" \u00b1 {number(row['spread'] / 2, 2)}")

    ordered = markup.by_path(row["node"] for row in measured)
    table = [[node, *(cell(node, device, metric) for device, metric, *_ in columns)] for node in ordered]
    repeated = any(row["spread"] is not None for row in measured)
    return markup.foldable(titles, table) + (markup.note(_SPREAD) if repeated else "")


def roofline_table(costs: list[Row]) -> str:
    """Milliseconds per token: measured, and the lower bound on each device of the roofline."""
    measured = [row for row in costs if row["metric"] == "decode_latency"]
    predicted = [row for row in measured if row["evaluation"] is None]
    if not predicted:
        return ""
    columns = sorted({(row["evaluation"] is None, row["evaluation"] or "", row["device"]) for row in measured})
    cells = {(row["node"], row["evaluation"] or "", row["device"]): 1000 * row["value"] for row in measured}
    titles = ["node"] + [
        f"{evaluation}: {device}" if evaluation else device.removesuffix(" (roofline)")
        for _, evaluation, device in columns
    ]
    ordered = markup.by_path(row["node"] for row in measured)
    table = [[node, *(number(cells.get((node, *column[1:]))) for column in columns)] for node in ordered]
    devices: dict[str, set[str]] = {}
    for row in predicted:
        devices.setdefault(json.loads(row["details"])["source"], set()).add(row["device"].removesuffix(" (roofline)"))
    sources = "; ".join(f"{', '.join(sorted(names))}: {source}" for source, names in sorted(devices.items()))
    return markup.foldable(titles, table) + markup.note(
        "Milliseconds per token after the prompt. Columns of an evaluation are measured. The others are lower bounds "
        "from a node's stored bytes and a device's bandwidth and peak throughput. They assume kernels for the stored "
        f"format; where integers are packed, this software computes in floating point. {sources}."
    )
