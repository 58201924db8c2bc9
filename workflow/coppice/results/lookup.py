"""Nodes of a study's results by their names, or by a part that only one of them has."""

from __future__ import annotations

from pathlib import Path

from coppice.errors import UserError, did_you_mean
from coppice.formatting import join_first, join_words
from coppice.records.layout import ResultsLayout
from coppice.results.failures import FailedJob, failed_jobs, final_error


def known_nodes(complete: list[str], missing: list[FailedJob]) -> list[str]:
    """The nodes that have a checkpoint, or the log of a job without output."""
    return sorted({*complete, *(node for node, _, _ in missing)})


def complete_node(results: Path, pattern: str) -> str:
    """The node that matches (see `match_node`). Raises UserError where it has no checkpoint, with what failed."""
    layout = ResultsLayout(results)
    complete, missing = layout.nodes, list(failed_jobs(layout))
    name = match_node(pattern.strip("/"), known_nodes(complete, missing))
    if name in complete:
        return name
    failed = [f"{stage} ({final_error(log)}), by {log}" for node, stage, log in missing if node == name]
    raise UserError(f"The node {name!r} has no checkpoint: {join_words(failed)}. Fix that and run the study again.")


def match_node(pattern: str, known: list[str]) -> str:
    """The node of that name, or else the only one whose name ends in the pattern, or else begins with it.

    Raises UserError with the candidates.
    """
    if not known:
        raise UserError("No node exists yet; run the study, or give another folder with --results.")
    if pattern in known:
        return pattern
    for candidates in (
        [name for name in known if name.endswith(f"/{pattern}")],
        [name for name in known if name.startswith(pattern)],
    ):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise UserError(f"{pattern!r} matches {join_first(candidates)}; give more of the name.")
    close = did_you_mean(pattern, known)
    hint = close if "Did you mean" in close else f" Known: {join_first(known)}."
    raise UserError(f"There is no node {pattern!r}.{hint}")
