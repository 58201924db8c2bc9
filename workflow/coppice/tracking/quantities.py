"""Numbers of a run: one flat name for each, the same in every run, that ends in its unit where it has one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from coppice.models.replacements import form_of
from coppice.records.compression import linear_entries, read_compression
from coppice.results.schemas import Row

Metrics = list[tuple[str, float, int]]  # (name, value, step)

# Unit of the tables -> what a metric's name ends in, and how many of that unit are one of the tables'. Losses are in
# nats per token everywhere, and ratios and scores have no unit.
_UNITS = {
    "s": ("_ms", 1e3),
    "s/token": ("_ms_per_token", 1e3),
    "tokens/s": ("_tokens_per_s", 1.0),
    "bytes": ("_mb", 1e-6),
    "bits/person": ("_bits_per_person", 1.0),
}


def key(name: str) -> str:
    """A name in the letters that MLflow allows."""
    return re.sub(r"[^\w\-. /]", "_", name)[:250]


def sizes(row: Row, ranks: list[int]) -> Metrics:
    """One name for each size, whatever the method: how small, how sparse, how coarse, of which rank."""
    values = {
        "stored_mb": row["stored_bytes"] / 1e6,
        "parameters_m": row["parameters"] / 1e6,
        "nonzero_parameters_m": row["nonzero_parameters"] / 1e6,
        "sparsity": 1 - row["nonzero_parameters"] / row["parameters"],
        "rank_mean": sum(ranks) / len(ranks) if ranks else None,
        "step_seconds": row["wall_seconds"],
        "step_peak_memory_mb": None if row["peak_memory_bytes"] is None else row["peak_memory_bytes"] / 1e6,
    }
    same = "bits_per_weight bits_per_linear_weight rho rho_blocks rho_nonzero recovered_share path_recovery_tokens"
    values |= {name: row[name] for name in same.split()}
    return [(name, float(value), 0) for name, value in values.items() if value is not None]


def ranks_of(folder: Path) -> list[int]:
    """Ranks of the linears that were decomposed."""
    entries = linear_entries(read_compression(folder)).values()
    return [rank for entry in entries if (rank := form_of(entry).decomposition_rank(entry)) is not None]


def measurements(parts: Mapping[str, list[Row]], repeated: frozenset[str]) -> Metrics:
    """Metrics and costs by name, with standard errors as <name>_stderr and spreads as <name>_spread."""
    found = []
    for row in parts["metrics"] + parts["costs"]:
        unit, scale = _UNITS.get(row["unit"], ("", 1.0))
        name = row["metric"]
        if unit:
            name = re.sub(r"_(latency|throughput|bytes)$", "", name) + unit
        if row["metric"] in repeated:
            name = f"{row['evaluation']}.{name}"
        values = {"": row["value"], "_stderr": row.get("stderr"), "_spread": row.get("spread")}
        found += [(f"{name}{suffix}", scale * value, 0) for suffix, value in values.items() if value is not None]
    return found


def curve(rows: list[Row]) -> Metrics:
    """Losses of a recovery, with tokens as the step."""
    return [(f"{row['split']}_loss", row["loss"], row["tokens"]) for row in rows if row["loss"] is not None]
