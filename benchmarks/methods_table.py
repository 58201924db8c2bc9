"""Writes docs/measured/methods.json: what the study config/examples/methods.yaml measured, one row a node.

snakemake --cores 2 --configfile config/examples/methods.yaml
python benchmarks/methods_table.py results/methods
python -m coppice.documentation                # puts the rows into docs/methods.md
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pandas as pd

from coppice.files import read_json, write_json

ROOT = Path(__file__).parents[1]


def measured(results: Path) -> list[dict[str, Any]]:
    """A row for every node: sizes from its manifest, qualities from the tables, grammar as the mean over the sets."""
    tables = {name: pd.read_parquet(results / "tables" / f"{name}.parquet") for name in ("nodes", "metrics")}
    metrics = {node: rows.set_index("metric") for node, rows in tables["metrics"].groupby("node")}
    return [row(results, node, metrics[node]) for node in tables["nodes"].node if node in metrics]


def row(results: Path, node: str, metrics: pd.DataFrame) -> dict[str, Any]:
    manifest = read_json(results / "models" / node / "manifest.json")
    grammar = metrics[metrics.index.str.endswith("_acc")]
    step = manifest["step"]
    return {
        "node": node.partition("/")[2] or "dense",
        "method": step and step["method"],
        "stored_bytes": manifest["stored_bytes"],
        "bits_per_linear_weight": round(manifest["bits_per_linear_weight"], 3),
        "nonzero": manifest["parameters"]["nonzero"],
        "perplexity_stories": round(metrics.value["perplexity_stories"], 3),
        "stories_half_interval": round(1.96 * metrics.stderr["perplexity_stories"], 3),
        "perplexity_wikitext2": round(metrics.value["perplexity_wikitext2"], 1),
        "grammar": round(grammar.value.mean(), 3),
        "grammar_half_interval": round(1.96 * math.sqrt((grammar.stderr**2).sum()) / len(grammar), 3),
        "seconds": round(manifest["wall_seconds"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the study's folder under results/")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "measured" / "methods.json")
    arguments = parser.parse_args()
    write_json(arguments.output, measured(arguments.results))


if __name__ == "__main__":
    main()
