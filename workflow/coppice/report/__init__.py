"""A study as one page: `index.html`, which needs no other file, with its figures beside it as SVG."""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from coppice.decisions.stage import overview
from coppice.files import atomic_write
from coppice.records.fit import FitRecord
from coppice.records.layout import ResultsLayout
from coppice.report.data import as_json, page_data
from coppice.report.figures import curves_figure, frontier_figure, layers_figure
from coppice.report.law_lines import Line, law_lines
from coppice.report.sections import lead, sections_of
from coppice.results.reading import read_table
from coppice.results.schemas import SCHEMAS
from coppice.study.loading import load_study
from coppice.study.schema import Study

HERE = Path(__file__).parent  # of the page's template, style and scripts

# The parts of the page's script, page.<name>.js, as they follow one another.
SCRIPTS = (
    "study", "words", "elements", "state", "charts", "frontier", "marks", "recovery", "node", "layers", "statistics",
    "pair", "reproduce", "start",
)  # fmt: skip

# What is told under each figure where the page runs no script.
CAPTIONS = {
    "frontier": "Bold: nodes that no other beats in both size and perplexity, which the dashed line joins. Filled "
    "points were recovered on their path. Bars are 95% intervals. Thin lines join nodes that are neighbours in "
    "perplexity and not told apart. Point at a node to read its name.",
    "curves": "Large points lie on the study's ladder of budgets; grey lines are the dense models' losses. A law's "
    "line is dashed among the points that it was fitted to and dotted beyond; shaded: its 95% band.",
    "layers": "What the last step of each node changed: the relative squared error of the linears of each block.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--study", required=True, type=Path, help="the study's YAML file")
    parser.add_argument("--results", required=True, type=Path, help="folder of the study's results, with its tables")
    parser.add_argument("--output", required=True, type=Path, help="folder of the page")


def run(arguments: argparse.Namespace) -> None:
    write_report(load_study(arguments.study), arguments.results, arguments.output)


def write_report(study: Study, results: Path, output: Path) -> None:
    """Writes the figures and index.html, last. Raises UserError when the tables are missing."""
    results, output = Path(results), Path(output)
    layout = ResultsLayout(results)
    tables = {name: read_table(layout.tables, name).to_pylist() for name in SCHEMAS if name != "items"}
    folders = {name: path.parent for name, path in layout.fits.items()}
    fits = {name: FitRecord.read(path).to_json() for name, path in layout.fits.items()}
    runs = {row["node"] for row in tables["curves"]}
    lines = {name: law_lines(fits[name], folder, runs) for name, folder in folders.items()}
    data = page_data(study, results, tables, fits, lines)
    figures = {
        "frontier": frontier_figure(tables["nodes"], tables["metrics"], tables["comparisons"]),
        "curves": curves_figure(tables["nodes"], tables["curves"], _chosen(lines, fits)),
        "layers": layers_figure(data["layers"]),
    }
    sections = sections_of(study, tables, fits, overview(results, tables))
    page = assemble(study.study, lead(study, tables), as_json(data), figures, sections)
    for name, text in [*((f"{name}.svg", figure) for name, figure in figures.items()), ("index.html", page)]:
        with atomic_write(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _chosen(lines: dict[str, dict[str, Line]], fits: dict[str, dict[str, Any]]) -> dict[str, Line]:
    """One line a run: of the laws that were fitted to it, one that passes its tests before others."""
    order = sorted(lines, key=lambda name: bool(fits[name].get("passes", {}).get("ok")))
    return {run: line for name in order for run, line in lines[name].items()}


def assemble(title: str, sentence: str, data: str, figures: dict[str, str], sections: str) -> str:
    """The page as one file: template, style, scripts and plotting library are written into it.

    title, sentence: plain text; data: what the script draws, as JSON; figures: SVG by name; sections: tables as HTML.
    """
    from plotly.offline import get_plotlyjs

    style, template = ((HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "html"))
    script = "\n".join((HERE / f"page.{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    return Template(template).substitute(
        title=escape(title),
        lead=escape(sentence),
        style=style,
        figures="\n".join(
            f"<figure>{figure}<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>"
            for name, figure in figures.items()
        ),
        sections=sections,
        data=data,
        plotly=get_plotlyjs(),
        script=f'(() => {{\n"use strict";\n{script}}})();',
    )
