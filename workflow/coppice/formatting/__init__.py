"""Numbers, lines and tables as people read them in a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WIDTH = 120
_FIRST = 42  # columns of a table's first column at most
_CELL = 22  # columns of a table's other columns at most: a value with its interval, and a mark after it
# Under a table of what `with_interval` gives.
INTERVALS = "+- is half a 95% interval; one whose halves differ is given by its ends, in brackets."


def number(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, without an exponent where it is readable so; blank for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        text = f"{value:#.{digits}g}"
        return f"{value:.0f}" if "e" in text else text.removesuffix(".")
    return f"{value:.{digits - 1}e}"


def with_interval(value: float, ends: tuple[float, float] | None, digits: int = 3) -> str:
    """A value with its interval: `0.700 +- 0.054` where both halves are much alike, else `1.00 [0.987, 1.00]`.

    Much alike: the shorter half, which is not shown, is at least three quarters of the longer. Ends that are too long
    for a cell of a table (numbers with exponents) give way to the longer half. ends: None without an interval.
    """
    if ends is None:
        return number(value, digits)
    below, above = value - ends[0], ends[1] - value
    around = f"{number(value, digits)} +- {number(max(below, above), 2)}"
    between = f"{number(value, digits)} [{number(ends[0], digits)}, {number(ends[1], digits)}]"
    return around if min(below, above) >= 0.75 * max(below, above) or len(between) > _CELL - 2 else between


def human_count(tokens: float | None) -> str:
    """A count in thousands, millions or billions: 1.4M."""
    if tokens is None:
        return "unbounded"
    for scale, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= scale:
            return f"{tokens / scale:.3g}{letter}"
    return f"{tokens:.3g}"


def duration(seconds: float) -> str:
    """Seconds to two digits, as s, min, h or days."""
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * length:
            return f"{number(seconds / length, 2)} {unit}"
    return f"{seconds:.0f} s"


def join_first(names: list[str], most: int = 6) -> str:
    """The first names, and the number of the others."""
    return join_words(names) if len(names) <= most else f"{', '.join(names[:most])} and {len(names) - most} more"


def join_words(names: tuple[str, ...] | list[str]) -> str:
    """Names joined by commas, the last by `and`."""
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def shorten(text: str, length: int) -> str:
    """The text, cut to so many characters."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def format_table(table: list[list[str]]) -> list[str]:
    """Rows as text: the first column to the left, the others to the right; too wide a column is cut.

    The first gives way where the others leave it less of the width.
    """
    table = [[row[0], *(shorten(cell, _CELL) for cell in row[1:])] for row in table]
    others = sum(2 + max(map(len, column)) for column in list(zip(*table, strict=True))[1:])
    first = max(_CELL, min(_FIRST, WIDTH - others))
    table = [[shorten(row[0], first), *row[1:]] for row in table]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]


def wrap_lines(text: str, indent: str = "") -> list[str]:
    """The text as lines within the width; all but the first are set in."""
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)


def reproduce_command(results: Path, node: str) -> str:
    """The command that recomputes a node with its settings; `results`: folder of the study's results."""
    # The workflow writes to results/<study>, wherever the folder lies.
    manifest = f"results/{results.resolve().name}/models/{node}/manifest.json"
    return f"snakemake --cores all --configfile {results / 'study.yaml'} --force {manifest}"


def target_of(fit: Mapping[str, Any]) -> tuple[str, str]:
    """What a fitted law predicts, and its unit; "value" without a unit for a law that is not a single formula."""
    target = fit.get("target")
    return ("value", "") if target is None else (target.replace("_", " "), fit["units"][target]["unit"])
