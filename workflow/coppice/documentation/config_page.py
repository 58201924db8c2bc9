"""config/README.md: every key of a study with its type, default and meaning."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from coppice.documentation.markdown import NOTICE, table
from coppice.study.schema import (
    MODEL_TYPES,
    BuiltinText,
    Calibration,
    Connectivity,
    Cost,
    FileText,
    HubModel,
    HubText,
    Intrinsic,
    Law,
    LocalModel,
    Protocol,
    Quality,
    Recipe,
    Roofline,
    ShippedModel,
    Step,
    Study,
    Tracking,
)

PATH = Path("config/README.md")

# Heading, introduction and types of each part of the study, in the order of config/README.md.
PARTS: tuple[tuple[str, str, tuple[type[BaseModel], ...]], ...] = (
    ("Keys at the top", "", (Study,)),
    (
        "models",
        f"Dense models by name, each from one of three sources. Supported architectures: {', '.join(MODEL_TYPES)}.",
        (ShippedModel, LocalModel, HubModel),
    ),
    (
        "texts",
        "Texts by name, each from one of three sources. A source appears once in a study; what is calibrated, trained "
        "and measured on are disjoint parts of it.",
        (BuiltinText, FileText, HubText),
    ),
    ("calibrations", "Calibrations by name.", (Calibration,)),
    (
        "steps",
        "Steps by name: a method and its options. The options of each method are in "
        "[docs/methods.md](../docs/methods.md).",
        (Step,),
    ),
    (
        "recipes",
        "A list. Each entry is an ordered list of names of steps, or a mapping. Recipes that begin alike share nodes. "
        "A node that is trained with another seed than the study's bears it: `small/full-1m@1`.",
        (Recipe,),
    ),
    (
        "evaluations",
        "Evaluations by name, of three kinds.",
        (Quality, Protocol, Intrinsic, Cost, Connectivity),
    ),
    (
        "laws",
        "Laws by name: a law and its options. What each law is, and its options, are in "
        "[docs/laws.md](../docs/laws.md).",
        (Law,),
    ),
    ("roofline", "", (Roofline,)),
    ("tracking", "", (Tracking,)),
)


def render(root: Path) -> str:
    """The page. root: the repository, of which it needs nothing."""
    lines = [
        "# The study",
        "",
        NOTICE,
        "",
        "A study is one YAML file. `config/config.yaml` is the one that runs when none is named; another replaces it:",
        "",
        "```sh",
        "snakemake --configfile my-study.yaml",
        "snakemake --configfile my-study.yaml --config seed=1   # changes single keys",
        "coppice study my-study.yaml                            # checks it and prints its tree",
        "```",
        "",
        "Relative paths are relative to the working directory. Names are letters, digits, `-` and `_`; models, steps,",
        "calibrations and evaluations share one space of names. Unknown keys are errors. Threads, memory and GPUs are",
        "not part of a study: they are in `profiles/`. For completion in an editor, begin a study with",
        "`# yaml-language-server: $schema=<path to>/config/schema.json`.",
    ]
    for heading, introduction, types in PARTS:
        lines += ["", f"## {heading}"]
        lines += ["", introduction] if introduction else []
        for section in types:
            summary = (section.__doc__ or "").strip()
            lines += ["", f"**{summary}**" if len(types) > 1 else summary, ""]
            lines += table(section, hidden={"options"} if section in (Step, Law) else ())
    return "\n".join(lines) + "\n"
