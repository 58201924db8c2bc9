"""Matplotlib for the static figures: one style, and SVG text that depends on the data alone."""

from __future__ import annotations

from contextlib import AbstractContextManager
from io import StringIO
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b6b6b")
GREY = "#777777"
_STYLE: dict[RcKeyType, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#eeeeee",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
}


def style() -> AbstractContextManager[None]:
    """The context in which a figure is drawn."""
    return mpl.rc_context(_STYLE)


def svg(figure: Figure, salt: str) -> str:
    """The figure as SVG with text as text; `salt`: a name that makes the ids of its elements its own."""
    text = StringIO()
    with mpl.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
