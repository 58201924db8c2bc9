"""`coppice salvage`: gathers, reports and tracks what a run with failures achieved.

The tables are dated 1970, so that the next run recomputes them. Where nothing but tracking failed, tables and report
are whole and stay as they are. A run that was interrupted has not failed: whoever stops it does not wait for a report.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from coppice import storage
from coppice.errors import UserError
from coppice.files import json_object, write_json
from coppice.records.layout import ResultsLayout
from coppice.report.stage import write_report
from coppice.results.collection import write_tables
from coppice.study.loading import load_study, merge_files, write_effective
from coppice.study.schema import Study
from coppice.tracking import track

INTERRUPTED = "Terminating processes on user request"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `coppice salvage`."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="the study, in YAML; later files add keys")
    parser.add_argument("--config", default={}, type=json_object, metavar="JSON", help="keys that win over the files'")
    parser.add_argument("--results", required=True, type=Path, help="folder of the study's results")
    parser.add_argument("--uri", help="MLflow tracking URI (default: the study's)")
    parser.add_argument("--fetch", action="store_true", help="fetch the small results from the store first")
    parser.add_argument("--logs", nargs="*", type=Path, default=[], help="logs of Snakemake, which name what failed")


def run(arguments: argparse.Namespace) -> None:
    """`coppice salvage`."""
    if not worth_salvaging(arguments.logs):
        return
    if arguments.fetch:
        storage.fetch_results(storage.store_address(), arguments.results)
    salvage(load_study(merge_files(arguments.files, arguments.config)), arguments.results, arguments.uri)


def worth_salvaging(logs: Iterable[Path]) -> bool:
    """Whether a run failed in more than its tracking, by what Snakemake logged."""
    try:
        text = "".join(log.read_text(encoding="utf-8") for log in logs)
    except OSError as error:
        raise UserError(f"The log {error.filename} cannot be read: {error.strerror}.") from error
    failed = set(re.findall(r"Error in rule (\w+)", text))
    return INTERRUPTED not in text and failed != {"track"}


def salvage(study: Study, results: Path, uri: str | None) -> None:
    """Writes the effective study, partial tables and the report, and tracks them.

    A report that cannot be written is one sentence on stderr: the sentence that counts is that of the job that failed.
    """
    layout = ResultsLayout(results)
    write_effective(study, layout.study)
    write_tables(study, results, layout.tables, partial=True)
    try:
        write_report(study, results, layout.report)
        print(f"{layout.page} shows what was achieved, and what failed.", file=sys.stderr)
    except (UserError, OSError) as error:
        print(f"No report of this run was written: {error}", file=sys.stderr)
    write_json(layout.tracking, track(study, results, uri))
