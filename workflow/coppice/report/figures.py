"""The static figures: size against quality, recovery curves, errors by block, a parameter's profile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from coppice.formatting import human_count, number
from coppice.formatting.plotting import COLORS, GREY, style
from coppice.records.fit import Parameter
from coppice.report.law_lines import Line
from coppice.report.layer_records import LayerTable
from coppice.report.view import perplexities
from coppice.results.reading import pareto_front
from coppice.results.schemas import Row
from coppice.uncertainty import interval

_WIDTH = 9.6  # inches
_MOST_NODES = 60  # rows of the figure of layers
_WIDE = 0.42  # inches: a cell of this width has space for its number

# Where a name may be placed at its point: points (1/72 inch) to the right and up, and its alignment.
_PLACES = ((5, 5, "left"), (-5, -13, "right"), (6, -3, "left"), (-6, -3, "right"), (0, -15, "center"))
_LETTER, _LINE = 5.4, 11  # width and height of text, points


def frontier_figure(rows: list[Row], metrics: list[Row], comparisons: list[Row]) -> Figure:
    """Stored megabytes against perplexity, one panel a protocol, both axes logarithmic, with 95% intervals.

    Dashed: the Pareto front. Filled points were recovered on their path. Thin lines join nodes of a dense model that
    are neighbours in perplexity and not significantly different.
    """
    by_node = {row["node"]: row for row in rows}
    panels = {
        pair: [
            row
            for row in metrics
            if (row["evaluation"], row["metric"]) == pair and row["node"] in by_node and _is_finite(row["value"])
        ]
        for pair in perplexities(metrics)
    }
    panels = {pair: measured for pair, measured in panels.items() if measured}
    if not panels:
        return _message("No perplexity was measured.")
    with style():
        figure, axes = _panels(len(panels), 4.6, right=0.97)
        for own, (pair, measured) in zip(axes, panels.items(), strict=True):
            _draw_frontier(own, measured, by_node)
            _join_alike(own, measured, by_node, comparisons)
            evaluation, metric = pair
            own.set_title(f"Size and quality: {metric.replace('_', ' ', 1)} ({evaluation})")
    return figure


def _draw_frontier(axes: Axes, measured: list[Row], by_node: dict[str, Row]) -> None:
    sizes = np.array([by_node[row["node"]]["stored_bytes"] / 1e6 for row in measured])
    values = np.array([row["value"] for row in measured])
    ends = np.array([interval(row) or (row["value"], row["value"]) for row in measured]).T
    owners = np.array([by_node[row["node"]]["model"] for row in measured])
    recovered = np.array([bool(by_node[row["node"]]["path_recovery_tokens"]) for row in measured])
    axes.set(xscale="log", yscale="log", xlabel="stored size, MB", ylabel="perplexity")
    models = sorted({row["model"] for row in by_node.values()})
    for model, color in zip(models, _colors(len(models)), strict=True):
        own = owners == model
        lengths = np.abs(ends[:, own] - values[own])
        axes.errorbar(sizes[own], values[own], lengths, fmt="none", ecolor=color, elinewidth=1, alpha=0.5)
        for filled in (True, False):
            marked = own & (recovered == filled)
            face = color if filled else "white"
            axes.plot(sizes[marked], values[marked], "o", color=color, markerfacecolor=face, gid=_gid(model, filled))
        axes.plot([], [], "o", color=color, label=model)
    # Very wide intervals are cut, lest they flatten the points.
    low, high = max(ends[0].min(), values.min() / 2), min(ends[1].max(), values.max() * 2)
    axes.set_xlim(*_margin(sizes.min(), sizes.max()))
    axes.set_ylim(*_margin(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        _set_log_ticks(axis, lambda value: f"{value:g}")
    front = pareto_front(list(zip(sizes.tolist(), values.tolist(), strict=True)))
    across = [sizes[front[0]], *sizes[front], axes.get_xlim()[1]]
    up = [axes.get_ylim()[1], *values[front], values[front[-1]]]
    axes.plot(across, up, "--", color=GREY, drawstyle="steps-post", linewidth=1.2, zorder=1, label="Pareto front")
    names = {index: _short_name(by_node[measured[index]["node"]]) for index in front}
    _name_points(axes, names, np.column_stack([sizes, values]))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(models) + 1)


def _join_alike(axes: Axes, measured: list[Row], by_node: dict[str, Row], comparisons: list[Row]) -> None:
    """Thin lines between neighbours in perplexity that do not differ significantly."""
    evaluation, metric = measured[0]["evaluation"], measured[0]["metric"]
    spots = {row["node"]: (by_node[row["node"]]["stored_bytes"] / 1e6, row["value"]) for row in measured}
    for row in comparisons:
        kind = (row["evaluation"], f"perplexity_{row['task']}", row["measure"], row["relation"])
        pair = (row["node"], row["other"])
        if kind == (evaluation, metric, "loss", "next") and not row["distinguishable"] and spots.keys() >= set(pair):
            axes.plot(
                *zip(*(spots[node] for node in pair), strict=True), color=GREY, linewidth=0.7, gid=" = ".join(pair)
            )


def curves_figure(rows: list[Row], curves: list[Row], lines: dict[str, Line]) -> Figure:
    """Validation loss against recovery tokens, one panel a dense model; grey: the dense loss.

    lines: of each run the fitted law, dashed among the points that it was fitted to and dotted beyond, with its 95%
    band over the refits.
    """
    model_of = {row["node"]: row["model"] for row in rows}
    panels: dict[str, dict[str, list[Row]]] = {}
    for row in sorted(curves, key=lambda row: (model_of[row["node"]], row["node"], row["tokens"])):
        if row["split"] == "validation" and row["tokens"] > 0 and row["loss"] is not None:
            panels.setdefault(model_of[row["node"]], {}).setdefault(row["node"], []).append(row)
    if not panels:
        return _message("No recovery was run.")
    with style():
        figure, axes = _panels(len(panels), 3.8, right=0.7)
        for own, (model, runs) in zip(axes, panels.items(), strict=True):
            _draw_curves(own, model, runs, lines)
    return figure


def _draw_curves(axes: Axes, model: str, runs: dict[str, list[Row]], lines: dict[str, Line]) -> None:
    axes.set(xscale="log", xlabel="recovery tokens", ylabel="validation loss, nats/token", title=f"Recovery of {model}")
    dense = sorted({row["dense_loss"] for rows in runs.values() for row in rows} - {None})
    for loss in dense:
        axes.axhline(loss, color=GREY, label="dense")
    losses = dense + [row["loss"] for rows in runs.values() for row in rows]
    for (node, rows), color in zip(runs.items(), _colors(len(runs)), strict=True):
        tokens, loss = np.array([row["tokens"] for row in rows]), np.array([row["loss"] for row in rows])
        budget = np.array([bool(row["budget"]) for row in rows])
        axes.plot(tokens, loss, color=color, label=_shorten(node.removeprefix(f"{model}/"), 36))
        axes.plot(tokens[budget], loss[budget], "o", color=color, markersize=6)
        axes.plot(tokens[~budget], loss[~budget], "o", color=color, markersize=3)
        if node in lines:
            _draw_law(axes, lines[node], color)
            losses += lines[node].loss.tolist()
    _set_log_ticks(axes.xaxis, human_count)
    # A very wide band is cut, lest it flatten the curves.
    low, high = min(losses), max(losses)
    margin = 0.06 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))


def _draw_law(axes: Axes, line: Line, color: str) -> None:
    last = line.tokens.tolist().index(line.fitted_to)
    axes.plot(line.tokens[: last + 1], line.loss[: last + 1], "--", color=color)
    axes.plot(line.tokens[last:], line.loss[last:], ":", color=color)
    if line.low is not None and line.high is not None:
        axes.fill_between(line.tokens, line.low, line.high, color=color, alpha=0.12, linewidth=0)


def layers_figure(layers: Mapping[str, LayerTable]) -> Figure:
    """The relative squared error that each node's last step left in every block of the decoder, as a heat map.

    layers: of each node its modules and their columns. A cell is the mean over a block's linears of the error of their
    outputs, or of their weights where the step used no inputs. Nodes whose last step compressed no linears have no row.
    """
    rows = {node: errors for node, entry in layers.items() if (errors := _block_errors(entry))}
    if not rows:
        return _message("No step compressed linears.")
    visible = dict(sorted(rows.items(), key=lambda pair: pair[0].split("/"))[:_MOST_NODES])
    blocks = sorted({block for errors in visible.values() for block in errors})
    cells = np.array([[errors.get(block, math.nan) for block in blocks] for errors in visible.values()])
    positive = cells[cells > 0]
    norm = LogNorm(positive.min(), positive.max()) if positive.size and positive.min() < positive.max() else None
    with style():
        figure = Figure(figsize=(_WIDTH, 1.3 + 0.25 * len(visible)))
        height = figure.get_figheight()
        axes = figure.add_axes((0.36, 0.55 / height, 0.61, 1 - 1.2 / height))
        axes.imshow(np.where(cells > 0, cells, np.nan) if norm else cells, cmap="Blues", norm=norm, aspect="auto")
        axes.grid(visible=False)
        axes.set(title="Error by block of the decoder", xlabel="block")
        axes.set_yticks(range(len(visible)), [_row_name(node, layers[node]) for node in visible])
        every = math.ceil(len(blocks) / 24)
        axes.set_xticks(range(0, len(blocks), every), [str(block) for block in blocks[::every]])
        if 0.61 * _WIDTH / len(blocks) > _WIDE:
            for (row, column), error in np.ndenumerate(cells):
                if not math.isnan(error):
                    dark = norm is not None and error > 0 and norm(error) > 0.6
                    color = "white" if dark else "black"
                    axes.text(column, row, number(error, 2), ha="center", va="center", fontsize=8, color=color)
        if len(rows) > len(visible):
            axes.set_xlabel(f"block ({len(rows) - len(visible)} more nodes are in the page)")
    return figure


def _row_name(node: str, entry: LayerTable) -> str:
    return _shorten(node, 40) + ("" if "error" in entry["columns"] else " (weights)")


def _block_errors(entry: LayerTable) -> dict[int, float]:
    """Of each block the mean error of its linears; empty where the node's step recorded none."""
    title = next((title for title in ("error", "weight error") if title in entry["columns"]), None)
    if title is None:
        return {}
    blocks: dict[int, list[float]] = {}
    for module, error in zip(entry["modules"], entry["columns"][title], strict=True):
        if error is not None:
            blocks.setdefault(int(module.split(".")[1]), []).append(error)
    return {block: sum(errors) / len(errors) for block, errors in blocks.items()}


def profile_figure(name: str, profile: Mapping[str, Sequence[float | None]], parameter: Parameter) -> Figure:
    """The best objective at each value of a parameter, its fitted value (line) and its 95% interval (shaded)."""
    with style():
        figure = Figure(figsize=(4.7, 2.6), layout="constrained")
        axes = figure.add_subplot(title=f"Profile of {name}", xlabel=name, ylabel="objective")
        values, objective = (np.array(profile[name], float) for name in ("values", "objective"))
        axes.plot(values, objective, color=COLORS[0])
        limits = axes.get_xlim()
        if parameter.low is not None and parameter.high is not None:
            axes.axvspan(parameter.low, parameter.high, color=COLORS[0], alpha=0.1, linewidth=0)
        if parameter.value is not None:
            axes.axvline(parameter.value, color=GREY)
        axes.set_xlim(limits)
    return figure


# Parts of a figure


def _panels(count: int, height: float, right: float) -> tuple[Figure, list[Axes]]:
    """A figure with panels below each other, each of `height` inches."""
    figure = Figure(figsize=(_WIDTH, count * height))
    grid = {"left": 0.08, "right": right, "top": 1 - 0.45 / (count * height), "bottom": 0.6 / (count * height)}
    axes = figure.subplots(count, 1, squeeze=False, gridspec_kw=grid | {"hspace": 1.1 / (height - 1.1)})
    return figure, list(axes[:, 0])


def _set_log_ticks(axis: Axis, text: Callable[[float], str]) -> None:
    """Ticks of a logarithmic axis: fewer a decade where it spans more."""
    low, high = axis.get_view_interval()
    leads = (1, 1.5, 2, 3, 4, 5, 7) if high < 20 * low else (1, 2, 5) if high < 1e4 * low else (1,)
    axis.set_major_locator(LogLocator(subs=leads))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_formatter(NullFormatter())


def _message(text: str) -> Figure:
    figure = Figure(figsize=(_WIDTH, 1.2))
    figure.text(0.5, 0.5, text, ha="center", va="center", color=GREY, fontsize=12)
    return figure


def _name_points(axes: Axes, names: dict[int, str], points: np.ndarray) -> None:
    """Writes the names of some points (x, y) [n, 2], by their places, where they cover neither a name nor a point."""
    spots = axes.transData.transform(points) * 72 / axes.figure.dpi
    frame = Bbox(axes.bbox.get_points() * 72 / axes.figure.dpi)
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in spots]
    for place, name in names.items():
        point, (x, y) = points[place], spots[place]
        width = _LETTER * len(name)
        for right, up, alignment in _PLACES:
            left = x + right - {"left": 0, "right": width, "center": width / 2}[alignment]
            box = Bbox.from_bounds(left, y + up - 2, width, _LINE)
            if frame.x0 < box.x0 and box.x1 < frame.x1 and not any(box.overlaps(other) for other in taken):
                offset = (right, up)
                axes.annotate(name, point, xytext=offset, textcoords="offset points", ha=alignment, fontsize=9)
                taken.append(box)
                break


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _colors(count: int) -> Iterable[str]:
    return (COLORS[place % len(COLORS)] for place in range(count))


def _gid(model: str, filled: bool) -> str:
    return f"{model}, {'recovered' if filled else 'not recovered'}"


def _margin(low: float, high: float) -> tuple[float, float]:
    """The ends of a logarithmic axis with a margin."""
    factor = max((high / low) ** 0.06, 1.05)
    return low / factor, high * factor


def _short_name(node: Row) -> str:
    return node["recipe"] or f"{node['model']} (dense)"


def _shorten(text: str, length: int) -> str:
    """The text without its middle if it is longer."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half - (length - 3) % 2 :]}"
