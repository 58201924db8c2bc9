"""Time and peak memory of each stage of a finished run, and the share of it that is start-up.

    python benchmarks/stages.py [config.yaml] [--stages compress tokenize ...]

Reads Snakemake's benchmark files of the study (the demo when no config is given): jobs, median and total seconds, peak
resident memory. Then, for each stage, the job with the median time runs again into a temporary folder, and a job that
imports the modules that were loaded at its end and does nothing: `start-up` is the second's processor seconds over the
first's, both of this run. `heavy packages` are those of a fixed list that the job had loaded. The stages `study` and
`summary` have no benchmark files and are measured by their second run alone.

Run it in the folder that holds `results`. Tracking is run again against an empty MLflow database.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from shlex import quote
from statistics import median_low

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "workflow"))

STAGES = ["root", "tokenize", "calibrate", "compress", "recover", "evaluate"]
STAGES += ["tables", "fit", "report", "track", "study", "summary"]
LIGHT = ("tokenize", "tables", "study", "summary")  # no model is loaded: one second at most
HEAVY = ["torch", "transformers", "accelerate", "peft", "lm_eval", "datasets", "mlflow"]
HEAVY += ["pandas", "pyarrow", "scipy", "sklearn", "matplotlib"]

RUN = """
import json, sys
from coppice.cli import main
modules, *words = sys.argv[1:]
code = main(words)
json.dump(list(sys.modules), open(modules, "w"))
sys.exit(code)
"""
IMPORT = """
import contextlib, importlib, json, sys
for name in json.load(open(sys.argv[1])):
    with contextlib.suppress(Exception):  # some modules make others, which cannot be imported by name
        importlib.import_module(name)
"""


def commands(config: list[str]) -> dict[str, dict[str, str]]:
    """Stage -> job (the path of its log) -> its command, as Snakemake would run it."""
    words = ["--snakefile", str(ROOT / "Snakefile"), "--forceall", "--dry-run", "--printshellcmds"]
    chosen = ["--configfile", *config] if config else []
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *words, *chosen], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    found: dict[str, dict[str, str]] = {}
    for command, stage, log in re.findall(
        r"(python -m coppice (\w+) .*?) 2?> results/[^/]+/logs/(\S+)\.log", done.stdout + done.stderr
    ):
        found.setdefault(stage, {})[log] = command
    return found


def read_benchmarks(results: Path, logs: list[str]) -> dict[str, dict[str, float]]:
    """Job -> what Snakemake measured: seconds (s), resident megabytes (max_rss) and others."""
    paths = {log: results / "benchmarks" / f"{log}.jsonl" for log in logs}
    return {log: json.loads(path.read_text().splitlines()[0]) for log, path in paths.items() if path.exists()}


def elsewhere(command: str, folder: Path) -> str:
    """The command with what it writes in `folder`; modules.json in it names the modules loaded at the end."""
    python = f"{quote(sys.executable)} -c {quote(RUN)} {quote(str(folder / 'modules.json'))}"
    command = command.replace("python -m coppice", python, 1)
    command = re.sub(r"--uri \S+", f"--uri sqlite:///{folder}/mlflow.db", command)
    return re.sub(r"--(output|state) (\$\(dirname \S+\)\S*|\S+)", rf"--\1 {folder}/\1", command)


def job_seconds(command: str) -> tuple[float, float]:
    """Clock and processor seconds of a shell command; the least of up to three runs, of one when it is long."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow")}
    runs: list[tuple[float, float]] = []
    while len(runs) < 3 and sum(clock for clock, _ in runs) < 5:
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        # Snakemake printed it as a line for the shell, with $(dirname ...) in it; it is run as the rule would run it.
        done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=False)
        clock, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise SystemExit(f"{command}\nfailed: {done.stderr}")
        runs.append((clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    return min(clock for clock, _ in runs), min(processor for _, processor in runs)


def measure(command: str) -> tuple[float, float, float, list[str]]:
    """Clock and processor seconds of a job, processor seconds of its imports, and the heavy packages among them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clock, processor = job_seconds(elsewhere(command, folder))
        modules = folder / "modules.json"
        _, imports = job_seconds(f"{quote(sys.executable)} -c {quote(IMPORT)} {quote(str(modules))}")
        loaded = set(json.loads(modules.read_text()))
    return clock, processor, imports, [name for name in HEAVY if name in loaded]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", help="the study (default: the demo's)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="those to measure")
    arguments = parser.parse_args()
    from coppice.study.loading import load_study

    results = Path("results") / load_study(Path((arguments.config or [ROOT / "config" / "config.yaml"])[0])).study
    found = commands(arguments.config) | {"summary": {"summary": f"python -m coppice summary --results {results}"}}
    print("| stage | jobs | median | total | peak memory | again (processor) | start-up | heavy packages |")
    print("|---|---|---|---|---|---|---|---|")
    slow = []
    for stage in arguments.stages:
        jobs = found.get(stage, {})
        measured = read_benchmarks(results, list(jobs))
        summary, job = "|  |  |  |  ", next(iter(jobs))
        if measured:
            seconds = {name: record["s"] for name, record in measured.items()}
            middle = median_low(seconds.values())
            job = next(name for name in seconds if seconds[name] == middle)
            peak = max(record["max_rss"] for record in measured.values())
            summary = f"| {len(measured)} | {middle:.1f} s | {sum(seconds.values()):.0f} s | {peak:.0f} MB "
        clock, processor, imports, heavy = measure(jobs[job])
        again = f"{clock:.1f} s ({processor:.1f} s)"
        print(f"| {stage} {summary}| {again} | {imports / processor:.0%} | {', '.join(heavy)} |", flush=True)
        if stage in LIGHT and clock > 1:
            slow.append(f"{stage} {again}")
    print(f"\nJobs that load no model and took more than 1 s by the clock: {', '.join(slow) or 'none'}.")


if __name__ == "__main__":
    main()
