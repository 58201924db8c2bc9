"""A plan as people read it in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from coppice.formatting import duration, format_table, human_count, join_first, join_words, number, wrap_lines
from coppice.planning.contents import NodeRow, Plan, StageRow, Total
from coppice.planning.times import EFFICIENCY

GIGABYTE = 1e9
# The noun for an output of a stage, where the plan names what changed.
NOUNS = {"root": "node", "compress": "node", "recover": "node", "evaluate": "evaluation", "tokenize": "token set"}


def lines(plan: Plan) -> list[str]:
    """The plan as text of at most 120 columns."""
    nodes, total = plan["nodes"], plan["total"]
    done = sum(node["done"] for node in nodes)
    text = [
        f"Study {plan['study']}: {format_count(len(nodes), 'node')}, "
        f"{format_count(plan['evaluations']['total'], 'evaluation')}, "
        f"{format_count(plan['laws']['total'], 'law')}; {total['left']} of {total['jobs']} jobs are left",
        *changed_lines(plan),
        "",
        *tree_lines(nodes),
        "",
        *wrap_lines(
            f"Done: {done} of {len(nodes)} nodes, {plan['evaluations']['done']} of {plan['evaluations']['total']} "
            f"evaluations, {plan['laws']['done']} of {plan['laws']['total']} laws, by the files that exist in "
            f"{plan['results']} and the options, seeds, texts and calibrations that they name. Code, dates and the "
            "files of models and texts are not compared. Snakemake itself decides by content: `snakemake -n`."
        ),
    ]
    if total["left"]:
        text += ["", *stage_lines(plan), "", *elapsed_lines(plan), *notes(plan)]
        for sentence in plan["problems"] or ["What is known fits." if total["unknown"] else "Everything fits."]:
            text += ["", *wrap_lines(sentence)]
    return [line.rstrip() for line in text]


def changed_lines(plan: Plan) -> list[str]:
    """The outputs that another study made, by kind."""
    changed = plan["changed"]
    if not changed:
        return []
    names: dict[str, list[str]] = {}
    for row in changed:
        if row["stage"] in NOUNS:
            names.setdefault(NOUNS[row["stage"]], []).append(row["name"])
    if not names:
        return wrap_lines(f"{changed[0]['why']} Tables, laws, page and tracking are recomputed.")
    kinds = [f"{format_count(len(group), kind)} ({join_first(group)})" for kind, group in names.items()]
    return wrap_lines(
        f"Changed since they were computed: {join_words(kinds)}. What follows from them is recomputed too."
    )


def format_count(count: int, noun: str) -> str:
    """A count of things."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def tree_lines(nodes: list[NodeRow]) -> list[str]:
    """The tree, with what is done and how large each node is."""
    table = [["node", "", "MB", "parameters", "evaluations"]]
    sign = {"measured": "", "estimated": "~", "at most": "<", "unknown": ""}
    for node in sorted(nodes, key=lambda row: row["node"].split("/")):
        depth = node["node"].count("/")
        # What is estimated is no more certain than two digits.
        digits = 3 if node["size"] == "measured" else 2
        size = "?" if node["stored_bytes"] is None else sign[node["size"]] + number(node["stored_bytes"] / 1e6, digits)
        parameters = "?" if node["parameters"] is None else sign[node["size"]] + human_count(node["parameters"])
        evaluations = f"{node['evaluations_done']}/{node['evaluations']}" if node["evaluations"] else ""
        name = "  " * depth + node["node"].rpartition("/")[2]
        table.append([name, state(node), size, parameters, evaluations])
    return format_table(table)


def state(node: NodeRow) -> str:
    return "done" if node["done"] else "changed" if node["changed"] else "left"


def stage_lines(plan: Plan) -> list[str]:
    """What is left, by stage and in total."""
    on_gpu = plan["total"]["gpu_hours"][1] > 0
    table = [["stage", "left", "time", "memory of a job", *(["GPU hours"] if on_gpu else []), "disk", "time is"]]
    for row in plan["stages"]:
        if not row["left"]:
            continue
        memory = format_range(row["memory_bytes"], gigabytes) if row["memory_bytes"] else "?"
        hours = [format_range(row["gpu_hours"], hours_of) if row["gpu_hours"][1] else ""] if on_gpu else []
        table.append(
            [
                row["stage"],
                f"{row['left']}/{row['jobs']}",
                known_sum(row),
                memory,
                *hours,
                gigabytes(row["disk_bytes"]) if row["disk_bytes"] else "",
                row["from"],
            ]
        )
    total = plan["total"]
    hours = [format_range(total["gpu_hours"], hours_of)] if on_gpu else []
    left = f"{total['left']}/{total['jobs']}"
    table.append(["all", left, known_sum(total), "", *hours, gigabytes(total["disk_bytes"]), ""])
    return format_table(table)


def known_sum(row: StageRow | Total) -> str:
    """The time of a row's jobs, with a `+ ?` where some of them are unknown."""
    if row["unknown"] == row["left"]:
        return "?"
    return format_range(row["seconds"], duration) + (" + ?" if row["unknown"] else "")


def elapsed_lines(plan: Plan) -> list[str]:
    elapsed, machine = plan["total"]["elapsed_seconds"], plan["machine"]
    if elapsed is None:
        return []
    gpus = f" on {format_count(machine['gpus'], 'GPU')}" if machine["gpus"] else ""
    return wrap_lines(
        f"With {format_count(machine['cores'], 'job')} at once{gpus}: {format_range(elapsed, duration)} in all."
    )


def notes(plan: Plan) -> list[str]:
    """How the numbers were computed."""
    machine = plan["machine"]
    rows = [row for row in plan["stages"] if row["left"]]
    counts = ", ".join(f"{row['stage']} {row['benchmarks']}" for row in rows if row["benchmarks"])
    text = []
    if counts:
        text += wrap_lines(f"measured: from this study's benchmarks ({counts}), scaled by parameters and tokens.")
    if any(row["from"] == "predicted" for row in rows):
        where = (
            f"{EFFICIENCY:.0%} of the roofline of {machine['device']}"
            if machine["device"]
            else "one CPU thread's measured speed on the demo (name a GPU with --device)"
        )
        text += wrap_lines(f"predicted: by operations at {where}, within a factor of two; memory by shapes.")
    if any(node["size"] in ("estimated", "at most") for node in plan["nodes"]):
        text += wrap_lines("~ estimated from the step's options; < at most: as large as its parent.")
    if plan["unknown"]:
        text += wrap_lines(
            "? unknown, and left out of all sums, because nothing of the model is on this machine. This suffices:"
        )
        # Commands are not wrap_lines, so that they can be copied.
        text += [
            f"  hf download {source['hub']} config.json --revision {source['revision']}" for source in plan["unknown"]
        ]
    return text


def format_range(ends: Iterable[float], format_end: Callable[[float], str]) -> str:
    """Two ends as text; one where they read the same."""
    low, high = map(format_end, ends)
    return low if low == high else f"{low} to {high}"


def gigabytes(count: float) -> str:
    return f"{number(count / GIGABYTE, 2)} GB" if count >= 0.1 * GIGABYTE else f"{number(count / 1e6, 2)} MB"


def hours_of(hours: float) -> str:
    return number(hours, 2)
