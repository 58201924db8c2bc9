"""How long Snakemake takes to understand a study: to parse the Snakefile, and to plan 1,000 and 5,000 nodes.

    python benchmarks/parse.py [--nodes 1000 5000]

The studies are generated: a node is pruned, trained and quantized, and has two evaluations. Nothing runs. Parsing is
what `--list-rules` takes beyond Snakemake's own start (`--version`). Processor seconds are told beside those of the
clock, because other work on the machine disturbs them less.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

SNAKEFILE = Path(__file__).parents[1] / "Snakefile"
BRANCHES = 10  # steps to choose from at the second and third place of a recipe


def study(nodes: int) -> dict:
    """A study of about `nodes` nodes: each first step is a prefix of 1 + 10 + 10 * 10 nodes."""
    first = max(1, nodes // (1 + BRANCHES + BRANCHES**2))
    pruned = {f"prune-{i}": {"method": "wanda", "sparsity": round(0.9 * (i + 1) / first, 4)} for i in range(first)}
    texts = {"text": "biographies", "validation": "biographies", "length": 64}
    trained = {f"full-{i}": {"method": "full", **texts, "tokens": 1000 * (i + 1)} for i in range(BRANCHES)}
    quantized = {
        f"rtn-{i}": {"method": "rtn", "bits": 2 + i % 7, "group_size": 2 ** (4 + i // 7)} for i in range(BRANCHES)
    }
    return {
        "study": "parse",
        "models": {"tiny": {"path": "tiny"}},
        "texts": {"biographies": {"builtin": "biographies"}},
        "calibrations": {"default": {"text": "biographies", "windows": 4, "length": 64}},
        "steps": {**pruned, **trained, **quantized},
        "recipes": [{"product": [list(pruned), list(trained), list(quantized)]}],
        "evaluations": {
            "quality": {"kind": "quality", "perplexity": {"own": {"text": "biographies", "length": 64, "windows": 4}}},
            "cost": {"kind": "cost"},
        },
    }


def timed(directory: Path, *words: str) -> tuple[np.ndarray, str]:
    """Seconds (clock, processor) of a Snakemake command, and what it printed."""
    before, started = os.times(), time.perf_counter()
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE), "--directory", str(directory), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after, clock = os.times(), time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return np.array([clock, processor]), done.stdout + done.stderr


def cell(seconds: np.ndarray) -> str:
    return f"{seconds[0]:.1f} s ({seconds[1]:.1f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 5000])
    print("Clock (processor).\n\n| nodes | jobs | start of Snakemake | parse the Snakefile | dry run |")
    print("|---|---|---|---|---|")
    for nodes in parser.parse_args().nodes:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            (directory / "tiny").mkdir()
            (directory / "tiny" / "config.json").write_text(json.dumps({"model_type": "llama"}))
            file = directory / "study.yaml"
            file.write_text(yaml.safe_dump(study(nodes)))
            start, _ = timed(directory, "--version")
            parse, _ = timed(directory, "--configfile", str(file), "--list-rules", "--quiet", "all")
            dry, printed = timed(directory, "--configfile", str(file), "--dry-run", "--quiet", "rules")
            jobs = re.search(r"^total\s+(\d+)", printed, re.MULTILINE)[1]
            print(f"| {nodes:,} | {int(jobs):,} | {cell(start)} | {cell(parse - start)} | {cell(dry)} |", flush=True)


if __name__ == "__main__":
    main()
