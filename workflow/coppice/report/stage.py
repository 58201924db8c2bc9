"""`coppice report`: a study as one page, `index.html`, which needs no other file, with its figures as SVG."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from coppice.decisions.stage import overview
from coppice.files import atomic_write
from coppice.formatting.plotting import svg
from coppice.records.fit import FitRecord
from coppice.records.layout import ResultsLayout
from coppice.report.assembly import assemble
from coppice.report.data import as_json, page_data
from coppice.report.figures import curves_figure, frontier_figure, layers_figure
from coppice.report.law_lines import Line, law_lines
from coppice.report.sections import lead, sections_of
from coppice.results.reading import read_table
from coppice.results.schemas import SCHEMAS
from coppice.study.loading import load_study
from coppice.study.schema import Study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--study", required=True, type=Path, help="the study's YAML file")
    parser.add_argument("--results", required=True, type=Path, help="folder of the study's results, with its tables")
    parser.add_argument("--output", required=True, type=Path, help="folder of the page")


def run(arguments: argparse.Namespace) -> None:
    write_report(load_study(arguments.study), arguments.results, arguments.output)


def write_report(study: Study, results: Path, output: Path) -> None:
    """Writes the figures and, last, index.html. Raises UserError when the tables are missing."""
    layout = ResultsLayout(results)
    tables = {name: read_table(layout.tables, name).to_pylist() for name in SCHEMAS if name != "items"}
    fits = {name: FitRecord.read(path) for name, path in layout.fits.items()}
    runs = {row["node"] for row in tables["curves"]}
    lines = {name: law_lines(fit, layout.law(name), runs) for name, fit in fits.items()}
    data = page_data(study, layout, tables, fits, lines)
    figures = {
        "frontier": frontier_figure(tables["nodes"], tables["metrics"], tables["comparisons"]),
        "curves": curves_figure(tables["nodes"], tables["curves"], _line_of_each_run(lines, fits)),
        "layers": layers_figure(data["layers"]),
    }
    texts = {name: svg(figure, name) for name, figure in figures.items()}
    sections = sections_of(study, tables, fits, overview(layout.root, tables))
    page = assemble(study.study, lead(study, tables), as_json(data), texts, sections)
    for name, text in {**{f"{name}.svg": text for name, text in texts.items()}, "index.html": page}.items():
        with atomic_write(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _line_of_each_run(lines: Mapping[str, Mapping[str, Line]], fits: Mapping[str, FitRecord]) -> dict[str, Line]:
    """One line a run: of the laws that were fitted to it, preferably one that passes its tests."""

    def passes(name: str) -> bool:
        verdict = fits[name].passes
        return verdict is not None and verdict.ok

    order = sorted(lines, key=passes)
    return {run: line for name in order for run, line in lines[name].items()}
