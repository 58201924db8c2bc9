"""The figure of a fit: each run's points and fitted curve along the law's axis."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coppice.laws.contracts import Law
from coppice.laws.engine.points import Points, select

_MOST_NAMES = 24  # more names than fit next to the figure say nothing


def spread_along_axis(law: Law, points: Points, steps: int = 60) -> Points:
    """Values of the law's axis evenly spaced by their logarithm over each run's range, with the run's other columns."""
    axis = law.axis[0]
    pieces = []
    for run in np.unique(points["run"]):
        rows = np.flatnonzero(points["run"] == run)
        piece = select(points, np.repeat(rows[:1], steps))
        low, high = points[axis][rows].min(), points[axis][rows].max()
        spaced = np.geomspace(low, high, steps) if low > 0 else np.linspace(low, high, steps)
        pieces.append(piece | {axis: spaced})
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in points}


def draw(law: Law, law_name: str, points: Points, curves: Points, path: Path) -> None:
    """Draws each run's points (dots) and fitted curve (line) along the law's axis, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    axis, label = law.axis
    with mpl.rc_context({"svg.hashsalt": law_name, "svg.fonttype": "none", "font.size": 11}):
        figure = Figure(figsize=(8, 5))
        axes = figure.add_subplot(xlabel=label, ylabel=f"{law.target.replace('_', ' ')} ({law.units[law.target]})")
        axes.set_title(f"Law {law_name}: measured (dots) and fitted (lines)")
        runs = np.unique(points["run"])
        colors = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(runs)))
        for run, color in zip(runs, colors, strict=True):
            measured, fitted = select(points, points["run"] == run), select(curves, curves["run"] == run)
            axes.plot(measured[axis], measured[law.target], "o", color=color, markersize=5, label=run)
            axes.plot(fitted[axis], fitted[law.target], "-", color=color, linewidth=1.5)
        if len(runs):
            if np.min(points[axis]) > 0 and np.max(points[axis]) > 3 * np.min(points[axis]):
                axes.set_xscale("log")
            axes.grid(alpha=0.3)
            if len(runs) <= _MOST_NAMES:
                axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, frameon=False)
        else:
            axes.text(0.5, 0.5, "no points", ha="center", va="center", transform=axes.transAxes, fontsize=16)
        figure.savefig(path, format="svg", metadata={"Date": None}, bbox_inches="tight")
