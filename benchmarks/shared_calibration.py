"""What a tenth step from one parent costs against the first: tokens and statistics are shared, so it only compresses.

    python benchmarks/shared_calibration.py [--model medium] [--steps 10]

Each job is a process of its own, as under Snakemake, with the demo's calibration set. The first step is tokenize,
calibrate and compress; every later one is compress with another sparsity. Processor seconds are told beside those of
the clock, because other work on the machine disturbs them less.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PACKAGE = Path(__file__).parents[1] / "workflow"
TEXT = {"builtin": "biographies", "people": 1200}


def job(*words: object) -> np.ndarray:
    """Seconds (clock, processor) of `coppice WORDS`."""
    before, started = os.times(), time.perf_counter()
    command = [sys.executable, "-m", "coppice", *map(str, words)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(PACKAGE)}, check=False)
    after, clock = os.times(), time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"`coppice {words[0]}` failed; its error stands above.")
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return np.array([clock, processor])


def cell(seconds: np.ndarray) -> str:
    return f"{seconds[0]:.1f} s ({seconds[1]:.1f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="medium", help="shipped model: small, medium or large")
    parser.add_argument("--steps", type=int, default=10, help="steps from the one parent")
    arguments = parser.parse_args()
    print("Clock (processor).\n\n| step | tokenize | calibrate | compress | together |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root, tokens, statistics = folder / "root", folder / "tokens", folder / "statistics"
        source = json.dumps({"shipped": f"bio-{arguments.model}"})
        job("root", "--node", "root", "--source", source, "--output", root)

        def compress(number: int) -> np.ndarray:
            options = {"sparsity": 0.3 + 0.4 * number / arguments.steps}
            step = json.dumps({"name": "wanda", "method": "wanda", "options": options})
            words = ["--node", f"root/{number}", "--parent", root, "--statistics", statistics, "--step", step]
            return job("compress", *words, "--threads", 1, "--output", folder / str(number))

        text = ["--text", json.dumps(TEXT), "--role", "calibration", "--windows", 64, "--length", 128]
        tokenized = job("tokenize", "--tokenizer", root, *text, "--output", tokens)
        gathering = ["--model", root, "--tokens", tokens, "--kind", "moments", "--threads", 1]
        calibrated = job("calibrate", *gathering, "--output", statistics)
        first = compress(1)
        whole = tokenized + calibrated + first
        print(f"| 1 | {cell(tokenized)} | {cell(calibrated)} | {cell(first)} | {cell(whole)} |", flush=True)
        for number in range(2, arguments.steps + 1):
            later = compress(number)
            print(f"| {number} |  |  | {cell(later)} | {cell(later)} |", flush=True)
    ratio = later / whole
    print(f"\nStep {arguments.steps} over step 1: {ratio[0]:.2f} by the clock, {ratio[1]:.2f} by the processor.")


if __name__ == "__main__":
    main()
