"""The page as one HTML file: template, styles, scripts and the plotting library are written into it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template

from coppice.report import markup

_PARTS = Path(__file__).with_name("page")
_STYLES = ("page", "parts", "media")
# In the order in which they use each other.
_SCRIPTS = (
    "study", "words", "elements", "state", "charts", "frontier", "recovery", "node", "layers", "pair", "reproduce",
    "start",
)  # fmt: skip

# Under each figure where the page runs no script.
_CAPTIONS = {
    "frontier": "Dashed: the Pareto front; its nodes are named. Filled points were recovered on their path. Bars are "
    "95% intervals. Thin lines join neighbours in perplexity that are not significantly different.",
    "curves": "Large points are the study's token budgets; grey lines are the dense models' losses. A law's line is "
    "dashed among the points that it was fitted to and dotted beyond; shaded: its 95% band.",
    "layers": "The mean relative squared error of each block's linears after the last step of each node: of their "
    "outputs, or of their weights where the row is marked so.",
}


def assemble(title: str, sentence: str, data: str, figures: Mapping[str, str], sections: str) -> str:
    """The page. title, sentence: plain text; data: of the script, as JSON; figures: SVG by name; sections: HTML."""
    from plotly.offline import get_plotlyjs

    return Template(_read("page.html")).substitute(
        title=escape(title),
        lead=escape(sentence),
        style="\n".join(_read(f"{name}.css") for name in _STYLES),
        figures="\n".join(_figure(svg, name) for name, svg in figures.items()),
        sections=sections,
        data=data,
        plotly=get_plotlyjs(),
        script='(() => {\n"use strict";\n' + "\n".join(_read(f"{name}.js") for name in _SCRIPTS) + "})();",
    )


def _figure(svg: str, name: str) -> str:
    image = markup.image(svg, f"Figure: {name}")
    return f"<figure>{image}<figcaption>{escape(_CAPTIONS[name])}</figcaption></figure>"


def _read(name: str) -> str:
    return (_PARTS / name).read_text(encoding="utf-8")
