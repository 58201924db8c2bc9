"""A plan as people read it in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from coppice.formatting import duration, format_table, human_count, join_first, join_words, number, wrap_lines
from coppice.planning.times import EFFICIENCY

GIGABYTE = 1e9
# What the jobs of a stage make, where the plan names what changed.
MADE = {"root": "node", "compress": "node", "recover": "node", "evaluate": "evaluation", "tokenize": "token set"}


def lines(made: Mapping[str, Any]) -> list[str]:
    """The plan as text of at most 120 columns."""
    nodes, total = made["nodes"], made["total"]
    done = sum(node["done"] for node in nodes)
    text = [
        f"Study {made['study']}: {many(len(nodes), 'node')}, {many(made['evaluations']['total'], 'evaluation')}, "
        f"{many(made['laws']['total'], 'law')}; {total['left']} of {total['jobs']} jobs are left",
        *changed_lines(made),
        "",
        *tree_lines(nodes),
        "",
        *wrap_lines(
            f"Done: {done} of {len(nodes)} nodes, {made['evaluations']['done']} of {made['evaluations']['total']} "
            f"evaluations, {made['laws']['done']} of {made['laws']['total']} laws, by the files that exist in "
            f"{made['results']} and the options, seeds, texts and calibrations that they name. Code, dates and the "
            "files of models and texts are not looked at. Snakemake itself decides by content: `snakemake -n`."
        ),
    ]
    if total["left"]:
        text += ["", *stage_lines(made), "", *elapsed_lines(made), *notes(made)]
        for sentence in made["problems"] or ["What is known fits." if total["unknown"] else "Everything fits."]:
            text += ["", *wrap_lines(sentence)]
    return [line.rstrip() for line in text]


def changed_lines(made: Mapping[str, Any]) -> list[str]:
    """What says that it was made of another study, by kind."""
    changed = made["changed"]
    if not changed:
        return []
    names: dict[str, list[str]] = {}
    for row in changed:
        if row["stage"] in MADE:
            names.setdefault(MADE[row["stage"]], []).append(row["name"])
    if not names:
        return wrap_lines(f"{changed[0]['why']} Tables, laws, page and tracking are made again.")
    kinds = [f"{many(len(found), kind)} ({join_first(found)})" for kind, found in names.items()]
    return wrap_lines(f"Changed since they were made: {join_words(kinds)}. What follows from them is made again too.")


def many(count: int, noun: str) -> str:
    """A count of things."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def tree_lines(nodes: list[Mapping[str, Any]]) -> list[str]:
    """The tree, with what is done and how large each node is."""
    table = [["node", "", "MB", "parameters", "evaluations"]]
    sign = {"measured": "", "estimated": "~", "at most": "<", "unknown": ""}
    for node in sorted(nodes, key=lambda row: row["node"].split("/")):
        depth = node["node"].count("/")
        # What is estimated is no more certain than two digits.
        digits = 3 if node["size"] == "measured" else 2
        size = "?" if node["stored_bytes"] is None else sign[node["size"]] + number(node["stored_bytes"] / 1e6, digits)
        parameters = "?" if node["parameters"] is None else sign[node["size"]] + human_count(node["parameters"])
        asked = f"{node['evaluations_done']}/{node['evaluations']}" if node["evaluations"] else ""
        name = "  " * depth + node["node"].rpartition("/")[2]
        table.append([name, state(node), size, parameters, asked])
    return format_table(table)


def state(node: Mapping[str, Any]) -> str:
    return "done" if node["done"] else "changed" if node["changed"] else "left"


def stage_lines(made: Mapping[str, Any]) -> list[str]:
    """What is left, by stage and in total."""
    on_gpu = made["total"]["gpu_hours"][1] > 0
    table = [["stage", "left", "time", "memory of a job", *(["GPU hours"] if on_gpu else []), "disk", "time is"]]
    for row in made["stages"]:
        if not row["left"]:
            continue
        memory = between(row["memory_bytes"], gigabytes) if row["memory_bytes"] else "?"
        hours = [between(row["gpu_hours"], hours_of) if row["gpu_hours"][1] else ""] if on_gpu else []
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
    total = made["total"]
    hours = [between(total["gpu_hours"], hours_of)] if on_gpu else []
    left = f"{total['left']}/{total['jobs']}"
    table.append(["all", left, known_sum(total), "", *hours, gigabytes(total["disk_bytes"]), ""])
    return format_table(table)


def known_sum(row: Mapping[str, Any]) -> str:
    """The time of a row's jobs, and whether there is more to it."""
    if row["unknown"] == row["left"]:
        return "?"
    return between(row["seconds"], duration) + (" + ?" if row["unknown"] else "")


def elapsed_lines(made: Mapping[str, Any]) -> list[str]:
    elapsed, machine = made["total"]["elapsed_seconds"], made["machine"]
    if elapsed is None:
        return []
    gpus = f" on {many(machine['gpus'], 'GPU')}" if machine["gpus"] else ""
    return wrap_lines(f"With {many(machine['cores'], 'job')} at once{gpus}: {between(elapsed, duration)} in all.")


def notes(made: Mapping[str, Any]) -> list[str]:
    """How the numbers were got."""
    machine = made["machine"]
    rows = [row for row in made["stages"] if row["left"]]
    counts = ", ".join(f"{row['stage']} {row['benchmarks']}" for row in rows if row["benchmarks"])
    text = []
    if counts:
        text += wrap_lines(f"measured: from this study's benchmarks ({counts}), scaled by parameters and tokens.")
    if any(row["from"] == "predicted" for row in rows):
        where = (
            f"{EFFICIENCY:.0%} of the roofline of {machine['device']}"
            if machine["device"]
            else "what one thread of a CPU did of the demo (name a GPU with --device)"
        )
        text += wrap_lines(f"predicted: by operations at {where}, within a factor of two; memory by shapes.")
    if any(node["size"] in ("estimated", "at most") for node in made["nodes"]):
        text += wrap_lines("~ estimated from the step's options; < at most: as large as its parent.")
    if made["unknown"]:
        text += wrap_lines(
            "? unknown, and in no sum, as long as nothing of the model is on this machine. This suffices:"
        )
        # Commands are there to be copied.
        text += [
            f"  hf download {source['hub']} config.json --revision {source['revision']}" for source in made["unknown"]
        ]
    return text


def between(ends: Iterable[float], said: Callable[[float], str]) -> str:
    """Two ends as words; one where they read the same."""
    low, high = map(said, ends)
    return low if low == high else f"{low} to {high}"


def gigabytes(count: float) -> str:
    return f"{number(count / GIGABYTE, 2)} GB" if count >= 0.1 * GIGABYTE else f"{number(count / 1e6, 2)} MB"


def hours_of(hours: float) -> str:
    return number(hours, 2)
