"""docs/methods.md: one row a method, then the options of each."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import yaml
from pydantic import BaseModel

from coppice.documentation.markdown import NOTICE, escape_cell, table
from coppice.documentation.packaged import packaged_methods
from coppice.methods.options import Allocation, LayerOptions, MethodOptions, RecoverOptions, TargetOptions
from coppice.methods.registry import Method

PATH = Path("docs/methods.md")
# What studies measured, and the findings.
MEASURED = Path("docs/measured")
# Options that several methods have, by the heading of their section.
SHARED: dict[str, type[BaseModel]] = {
    "Options of every method that works layer by layer": LayerOptions,
    "Options of every method with a target": TargetOptions,
    "Allocations of a target": Allocation,
    "Options of every method that recovers": RecoverOptions,
}


def render(root: Path) -> str:
    """The page, with what is in the folder MEASURED of the repository `root`."""
    lines = ["# Methods", "", NOTICE, ""]
    lines += [
        "A step is a method with options. What a method cannot work on is refused when the study is loaded. Its reach",
        "is how much of the model it must see at once: a method that reaches a linear or a block needs no more than",
        "that in memory. `coppice methods --json` prints the same for programs.",
        "",
        "| method | family | source | equation | statistics | reach | adds traits | refuses traits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ordered = packaged_methods()
    lines += [method_row(method) for method in ordered]
    lines += ["", *measured_section(root)]
    for heading, options in SHARED.items():
        hidden = LayerOptions.model_fields if options is TargetOptions else ()
        lines += ["", f"## {heading}", "", *table(options, hidden)]
    findings = yaml.safe_load((root / MEASURED / "findings.yaml").read_text(encoding="utf-8")) or {}
    for method in ordered:
        lines += ["", f"## {method.name}", "", first_paragraph(method)]
        lines += ["", f"**Reported:** {method.source.claim}"] if method.source.claim else []
        lines += ["", f"**Measured here:** {findings[method.name].strip()}"] if method.name in findings else []
        own = table(method.options, hidden=shared_options(method.options))
        lines += ["", *own] if len(own) > 2 else ["", "It has no options of its own."]
    return "\n".join(lines) + "\n"


def measured_section(root: Path) -> list[str]:
    """What the study of all methods measured, as a section of docs/methods.md."""
    rows = json.loads((root / MEASURED / "methods.json").read_text(encoding="utf-8"))
    lines = [
        "## Measured",
        "",
        "`config/examples/methods.yaml` on stories260K, a real Llama of 0.26M parameters stored in float32, calibrated",
        "on 128 windows of text of the kind that it was trained on: perplexity on held-out text of that kind (\u00b1",
        "half a 95 % interval) and on WikiText-2, accuracy on minimal pairs of BLiMP (mean of six sets of 100, chance",
        "0.5), true bytes of the weight files, stored bits for each weight that the dense model has in its decoder's",
        "linears, and seconds of compression on 2 CPU cores that other work shared. A zero that is stored costs what",
        "any number costs. So small a model has little redundancy: what it says of orders holds for it alone.",
        "",
        "| node | MB | bits a linear weight | perplexity stories | WikiText-2 | BLiMP | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["node"],
            f"{row['stored_bytes'] / 1e6:.3f}",
            f"{row['bits_per_linear_weight']:.2f}",
            f"{row['perplexity_stories']:.3f} \u00b1 {row['stories_half_interval']:.3f}",
            f"{row['perplexity_wikitext2']:.1f}",
            f"{row['grammar']:.3f} \u00b1 {row['grammar_half_interval']:.3f}",
            f"{row['seconds']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def method_row(method: Method) -> str:
    """The row of a method in docs/methods.md."""
    source = method.source
    cells = [
        f"[{method.name}](#{method.name})",
        method.family,
        f"{source.title} ({source.identifier})",
        source.equation,
        ", ".join(sorted(method.needs())) or "none",
        method.resources.reach,
        ", ".join(sorted(method.adds_traits)) or "none",
        ", ".join(sorted(method.incompatible_with)) or "none",
    ]
    return f"| {' | '.join(map(escape_cell, cells))} |"


def first_paragraph(method: Method) -> str:
    """The beginning of the method's docstring, in one line."""
    return " ".join((import_module(method.options.__module__).__doc__ or "").strip().split("\n\n")[0].split())


def shared_options(options: type[MethodOptions]) -> set[str]:
    """The options that a method shares with the others of its kind."""
    bases = [base for base in (TargetOptions, LayerOptions, RecoverOptions) if issubclass(options, base)]
    return {name for base in bases for name in base.model_fields}
