"""`coppice recommend`: the answers to the questions on the command line, or to all questions."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from coppice.decisions import Answer
from coppice.decisions.budget import expected_loss, tokens_to_buy
from coppice.decisions.fitted import (
    follows_recoveries,
    held_out_sentences,
    read_fit,
    read_law_of_recoveries,
    read_reports,
    refusal,
)
from coppice.decisions.limits import read_limits
from coppice.decisions.next_run import next_runs
from coppice.decisions.recipe import (
    best_at_each_size,
    best_within,
    choose_metric,
    compare,
    lower_is_better,
)
from coppice.errors import UserError
from coppice.formatting import format_table, wrap_lines
from coppice.records.fit import FitRecord
from coppice.records.layout import ResultsLayout
from coppice.results.reading import read_table
from coppice.results.schemas import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--results", required=True, type=Path, help="folder of the study's results")
    add("--law", help="the fitted law of recoveries to use, where several were fitted")
    add("--node", help="a pruned node, or a recovery of it: the tokens to buy for it, or its loss after --tokens")
    add("--gain", type=_positive, help="nats/token that one more doubling of the tokens must gain (default: the law's)")
    add("--tokens", type=_positive, help="recovery tokens, such as 1e9, at which a loss is predicted")
    add("--metric", help="the best node by this metric, within the limits below")
    add("--evaluation", help="the evaluation that measured it, where several did")
    add(
        "--prefer",
        choices=["lower", "higher"],
        help="the better direction of the metric, where its name leaves it open",
    )
    add("--max-bytes", type=_positive, help="limit of the stored bytes")
    add("--max-latency", type=_positive, help="limit of the decoding latency, s/token")
    add("--max-recovery-tokens", type=_positive, help="limit of the recovery tokens on a node's path")
    add("--device", help="device of the latency; one that ends in '(roofline)' is a prediction")
    add("--cost", help="the cost evaluation that measured the latency, where several did")
    add("--next", action="store_true", help="the runs that would shrink the uncertainty of a predicted loss most")
    add("--top", type=int, default=5, help="how many next runs to list (default: 5)")
    add("--json", action="store_true", help="print JSON")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero; write one such as 300000, 3e5 or 0.02")
    return value


def run(arguments: argparse.Namespace) -> None:
    answers = answer_questions(arguments)
    if arguments.json:
        print(json.dumps(answers, indent=1, allow_nan=False))
        return
    print("\n\n".join("\n".join(answer_lines(answer)) for answer in answers))


def answer_questions(arguments: argparse.Namespace) -> list[Answer]:
    """The answers to the questions on the command line, or to all where it has none."""
    results = Path(arguments.results)
    if arguments.top < 1:
        raise UserError(f"--top {arguments.top} is not a number of runs; pass 1 or more.")
    if arguments.node is None and (arguments.tokens is not None or arguments.gain is not None):
        raise UserError("--tokens and --gain are about one node; name it by --node.")
    if arguments.max_latency is None and (arguments.device is not None or arguments.cost is not None):
        raise UserError("--device and --cost choose the measurement for --max-latency; add it.")
    folder = ResultsLayout(results).tables
    tables = {name: read_table(folder, name).to_pylist() for name in ("nodes", "metrics", "costs")}
    answers = []
    if arguments.node is not None or arguments.next:
        fitted = read_law_of_recoveries(results, arguments.law)
        if arguments.gain is not None or (arguments.tokens is None and not arguments.next):
            answers.append(tokens_to_buy(fitted, tables["nodes"], arguments.node, arguments.gain))
        if arguments.tokens is not None:
            answers.append(expected_loss(fitted, tables["nodes"], arguments.node, arguments.tokens))
        if arguments.next:
            answers.append(next_runs(fitted, tables["nodes"], arguments.node, arguments.tokens, arguments.top))
    bounds = (arguments.max_bytes, arguments.max_latency, arguments.max_recovery_tokens)
    if arguments.metric is not None or any(bound is not None for bound in bounds):
        answers.append(_answer_best(arguments, results, tables))
    return answers or overview(results, tables) or [_answer_nothing(results, tables["metrics"])]


def _answer_best(arguments: argparse.Namespace, results: Path, tables: dict[str, list[Row]]) -> Answer:
    pair = choose_metric(tables["metrics"], arguments.metric, arguments.evaluation)
    unit = next(row["unit"] for row in tables["metrics"] if (row["evaluation"], row["metric"]) == pair)
    lower = lower_is_better(pair[1], unit, arguments.prefer)
    bounds, notes = read_limits(
        tables["nodes"],
        tables["costs"],
        arguments.max_bytes,
        arguments.max_latency,
        arguments.max_recovery_tokens,
        arguments.device,
        arguments.cost,
    )
    compared = compare(
        tables["nodes"], tables["metrics"], read_table(ResultsLayout(results).tables, "items"), pair, lower
    )
    answer = best_within(compared, bounds)
    return answer | {"sentences": answer["sentences"] + notes}


def _answer_nothing(results: Path, metrics: Sequence[Row]) -> Answer:
    """The answer where no law was fitted and no node has a perplexity."""
    names = sorted({row["metric"] for row in metrics})
    measured = f" Choose one of the metrics measured by --metric: {', '.join(names)}." if names else ""
    sentence = (
        f"No law was fitted in {results}/laws, and no node has a finite perplexity; add `laws`, or an evaluation that "
        f"measures perplexity, to the study, and run it.{measured}"
    )
    return {"title": "Nothing to recommend", "sentences": [sentence]}


def overview(results: Path, tables: Mapping[str, Sequence[Row]], top: int = 3) -> list[Answer]:
    """What every law recommends, the best node at each size by each perplexity, and the next runs.

    tables: rows of `nodes` and `metrics`; the table of items is read here. Raises UserError where it is missing.
    """
    results = Path(results)
    reports = read_reports(results)
    answers = [advice(name, report) for name, report in reports.items()]
    pairs = sorted({(row["evaluation"], row["metric"]) for row in tables["metrics"]})
    perplexities = [pair for pair in pairs if pair[1].startswith("perplexity_")]
    if perplexities:
        items = read_table(ResultsLayout(results).tables, "items")
        compared = (compare(tables["nodes"], tables["metrics"], items, pair, True) for pair in perplexities)
        answers += [best_at_each_size(each) for each in compared if each.rows]
    for name, report in reports.items():
        if refusal(name, report) is None and follows_recoveries(report):
            answers.append(next_runs(read_fit(results, name, report), tables["nodes"], top=top))
    return answers


def advice(name: str, report: FitRecord) -> Answer:
    """What a law recommends, with its held-out error, or why it recommends nothing."""
    title, reason = f"Law {name}", refusal(name, report)
    if reason is not None:
        return {"title": title, "law": name, "refused": True, "recommendation": [], "sentences": [reason]}
    recommended = [str(entry["sentence"]) for entry in report.recommendation] or [
        f"Law {name} has nothing to recommend."
    ]
    return {
        "title": title,
        "law": name,
        "refused": False,
        "recommendation": report.recommendation,
        "sentences": [*recommended, held_out_sentences(name, report)],
    }


def answer_lines(answer: Answer) -> list[str]:
    """An answer as text of at most 120 columns."""
    lines = [answer["title"]]
    for sentence in answer["sentences"]:
        lines += wrap_lines(sentence, "  ")
    return lines + [f"  {line}".rstrip() for line in (format_table(answer["table"]) if "table" in answer else [])]
