"""The figures of a study's page, as SVG text: size against quality, recovery curves, layers, a parameter's profile."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from coppice.formatting import human_count, number
from coppice.report.summary import measured, perplexities
from coppice.results.reading import pareto_front
from coppice.results.schemas import Row
from coppice.uncertainty import interval

if TYPE_CHECKING:
    from coppice.report.law_lines import Line

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b6b6b")
WIDTH = 960
_LETTER = 6.3  # width of a letter of a label, px
_MOST_NODES = 60  # rows of the figure of layers
_WIDE = 40  # px of a cell that has room for its number

Scale = Callable[[float], float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


def frontier_figure(rows: list[Row], metrics: list[Row], comparisons: list[Row]) -> str:
    """Stored megabytes against perplexity, one panel a protocol, both axes logarithmic, with 95% intervals.

    The dashed line bounds what no node beats: nodes on it are the best at their size. Filled points were recovered on
    their path. Thin lines join nodes of a dense model that are neighbours in perplexity and not told apart.
    """
    height, body = 460, []
    pairs = perplexities(metrics)
    by_node = {row["node"]: row for row in rows}
    for place, pair in enumerate(pairs):
        shown = [row for row in metrics if (row["evaluation"], row["metric"]) == pair and row["node"] in by_node]
        alike = [
            (row["node"], row["other"])
            for row in comparisons
            if (row["evaluation"], f"perplexity_{row['task']}", row["measure"], row["relation"])
            == (*pair, "loss", "next")
            and not row["distinguishable"]
        ]
        body += _frontier_panel(pair, shown, by_node, alike, place * height, height)
    if not pairs:
        body = [_message("No perplexity was measured.", 80)]
    return _svg(body, max(len(pairs) * height, 120))


def _frontier_panel(
    pair: tuple[str, str],
    shown: list[Row],
    by_node: dict[str, Row],
    alike: list[tuple[str, str]],
    top: int,
    height: int,
) -> list[str]:
    shown = [row for row in shown if row["value"] is not None and math.isfinite(row["value"])]
    if not shown:
        return [_message(f"{pair[1]} was not measured.", top + 80)]
    models = sorted({row["model"] for row in by_node.values()})
    color = {model: COLORS[place % len(COLORS)] for place, model in enumerate(models)}
    sizes = [by_node[row["node"]]["stored_bytes"] / 1e6 for row in shown]
    ends = [interval(row) or (row["value"], row["value"]) for row in shown]
    values = [row["value"] for row in shown]
    # An interval that is wide beyond measure would press all points into a line.
    low, high = max(min(low for low, _ in ends), min(values) / 2), min(max(high for _, high in ends), max(values) * 2)
    box = (70, top + 50, WIDTH - 30, top + height - 55)
    x, x_ticks = _axis(min(sizes), max(sizes), box[0], box[2])
    y, y_ticks = _axis(low, high, box[3], box[1])
    title = f"Size and quality: {pair[1].replace('_', ' ', 1)} ({pair[0]})"
    body = _frame(box, title, "stored size, MB", "perplexity", (x, x_ticks), (y, y_ticks))
    body += _legend([(model, color[model]) for model in models if len(models) > 1], box)
    key = "dashed: the best at each size; filled: recovered; thin lines join neighbours that are not told apart"
    body.append(f'<text x="{box[2]}" y="{box[3] + 38}" font-size="11" fill="#555" text-anchor="end">{key}</text>')
    best = pareto_front(list(zip(sizes, values, strict=True)))
    body.append(_staircase([(x(sizes[index]), y(values[index])) for index in best], box))
    taken: list[Box] = []
    points = [(x(size), y(value)) for size, value in zip(sizes, values, strict=True)]
    place = {row["node"]: point for row, point in zip(shown, points, strict=True)}
    body += [
        f'<path d="M{place[a][0]:.1f} {place[a][1]:.1f}L{place[b][0]:.1f} {place[b][1]:.1f}" stroke="#555" '
        f'stroke-width=".8"><title>{escape(a)} and {escape(b)} are not told apart</title></path>'
        for a, b in alike
        if a in place and b in place
    ]
    for (across, down), row, (below, above) in zip(points, shown, ends, strict=True):
        node = by_node[row["node"]]
        bottom, upper = (min(max(y(end), box[1]), box[3]) if end > 0 else box[3] for end in (below, above))
        fill = color[node["model"]] if node["path_recovery_tokens"] else "#fff"
        tip = f"{row['node']}: {number(node['stored_bytes'] / 1e6)} MB, perplexity {measured(row)}"
        body.append(
            f'<g stroke="{color[node["model"]]}"><title>{escape(tip)}</title>'
            f'<line x1="{across:.1f}" x2="{across:.1f}" y1="{bottom:.1f}" y2="{upper:.1f}" stroke-opacity=".45"/>'
            f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4.5" fill="{fill}" stroke-width="1.6"/></g>'
        )
        taken.append((across - 6, down - 6, across + 6, down + 6))
    order = best + [index for index in range(len(shown)) if index not in best]
    for index in order:
        node = by_node[shown[index]["node"]]
        body += _label(node["recipe"] or f"{node['model']} (dense)", points[index], taken, box, bold=index in best)
    return body


def _label(
    text: str,
    point: tuple[float, float],
    taken: list[Box],
    box: Box,
    bold: bool,
) -> list[str]:
    """A label beside a point where it hides nothing; none where there is no room (a point's tip tells its name)."""
    width, (across, down) = len(text) * _LETTER * (1.12 if bold else 1), point
    for dx, dy, anchor in (
        (9, 4, 0), (-9, 4, -1), (0, -10, -0.5), (0, 19, -0.5), (8, -8, 0), (8, 16, 0), (-8, -8, -1), (-8, 16, -1),
    ):  # fmt: skip
        left, base = across + dx + anchor * width, down + dy
        area = (left, base - 10, left + width, base + 3)
        inside = box[0] < area[0] and area[2] < box[2] + 20 and box[1] < area[1] and area[3] < box[3]
        if inside and not any(
            area[0] < x1 and x0 < area[2] and area[1] < y1 and y0 < area[3] for x0, y0, x1, y1 in taken
        ):
            taken.append(area)
            weight = ' font-weight="600"' if bold else ""
            halo = ' stroke="#fff" stroke-width="3" paint-order="stroke"'
            return [f'<text x="{left:.1f}" y="{base:.1f}" font-size="11"{weight}{halo}>{escape(text)}</text>']
    return []


def _staircase(points: list[tuple[float, float]], box: Box) -> str:
    """The boundary of what the points reach: at each size the best up to there."""
    steps = [(points[0][0], box[1])]
    for across, down in points:
        steps += [(across, steps[-1][1]), (across, down)]
    steps.append((box[2], steps[-1][1]))
    path = " ".join(f"{across:.1f},{down:.1f}" for across, down in steps)
    return f'<polyline points="{path}" fill="none" stroke="#999" stroke-width="1.5" stroke-dasharray="5 3"/>'


def curves_figure(rows: list[Row], curves: list[Row], lines: dict[str, Line]) -> str:
    """Validation loss against recovery tokens, one panel a dense model; grey: the dense loss.

    lines: of each run the fitted law, dashed among the points that it was fitted to, dotted beyond; shaded: the 95%
    band over its refits.
    """
    runs: dict[str, list[Row]] = {}
    for row in curves:
        if row["split"] == "validation" and row["tokens"] > 0 and row["loss"] is not None:
            runs.setdefault(row["node"], []).append(row)
    model_of = {row["node"]: row["model"] for row in rows}
    models = sorted({model_of[node] for node in runs})
    height, body = 380, []
    for place, model in enumerate(models):
        chosen = {node: points for node, points in sorted(runs.items()) if model_of[node] == model}
        body += _curves_panel(model, chosen, lines, place * height, height)
    if not models:
        body = [_message("No recovery was run.", 80)]
    return _svg(body, max(len(models) * height, 120))


def _curves_panel(model: str, runs: dict[str, list[Row]], lines: dict[str, Line], top: int, height: int) -> list[str]:
    box = (70, top + 40, WIDTH - 250, top + height - 55)
    points = [row for rows in runs.values() for row in rows]
    drawn = {node: lines[node] for node in runs if node in lines}
    dense = sorted({row["dense_loss"] for row in points if row["dense_loss"] is not None})
    losses = [row["loss"] for row in points] + dense + [loss for line in drawn.values() for loss in line.loss.tolist()]
    tokens = [row["tokens"] for row in points] + [float(line.tokens[-1]) for line in drawn.values()]
    x, x_ticks = _axis(min(tokens), max(tokens), box[0], box[2])
    y, y_ticks = _axis(min(losses), max(losses), box[3], box[1], logarithmic=False)
    axes = ((x, x_ticks), (y, y_ticks))
    body = _frame(
        box, f"Recovery of {model}", "recovery tokens", "validation loss, nats/token", *axes, label=human_count
    )
    ends = []
    for loss in dense:
        body.append(
            f'<line x1="{box[0]}" x2="{box[2]}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" stroke="#999" '
            'stroke-width="1.5"/>'
        )
        ends.append((y(loss), "dense", "#777"))
    for place, (node, rows) in enumerate(runs.items()):
        color = COLORS[place % len(COLORS)]
        rows = sorted(rows, key=lambda row: row["tokens"])
        end = rows[-1]["loss"]
        if node in drawn:
            body += _law_line(drawn[node], color, box, x, y)
            end = drawn[node].loss[-1]
        body.append(_line([(x(row["tokens"]), y(row["loss"])) for row in rows], color))
        for row in rows:
            tip = f"{node}: {number(row['loss'], 4)} nats/token after {human_count(row['tokens'])} tokens"
            radius = 4 if row["budget"] else 2
            body.append(
                f'<circle cx="{x(row["tokens"]):.1f}" cy="{y(row["loss"]):.1f}" r="{radius}" fill="{color}">'
                f"<title>{escape(tip)}</title></circle>"
            )
        ends.append((y(end), node.removeprefix(f"{model}/"), color))
    body += _end_labels(ends, box)
    if drawn:
        body.append(
            f'<text x="{box[2]}" y="{box[1] - 10}" font-size="11" fill="#555" text-anchor="end">'
            "dashed: fitted law; dotted: beyond the points that it was fitted to; shaded: its 95% band</text>"
        )
    return body


def _law_line(line: Line, color: str, box: Box, x: Scale, y: Scale) -> list[str]:
    """The band of a law along one run, its line among the points fitted, and its line beyond them."""
    across = [x(tokens) for tokens in line.tokens.tolist()]
    parts = []
    if line.low is not None:
        # A band that is wide beyond measure is cut at the frame.
        low, high = ([min(max(y(loss), box[1]), box[3]) for loss in ends.tolist()] for ends in (line.low, line.high))
        corners = [*zip(across, low, strict=True), *reversed([*zip(across, high, strict=True)])]
        path = " ".join(f"{right:.1f},{down:.1f}" for right, down in corners)
        parts.append(f'<polygon points="{path}" fill="{color}" fill-opacity=".12"/>')
    points = list(zip(across, (y(loss) for loss in line.loss.tolist()), strict=True))
    last = line.tokens.tolist().index(line.fitted_to)
    parts.append(_line(points[: last + 1], color, ' stroke-dasharray="5 3"'))
    parts.append(_line(points[last:], color, ' stroke-dasharray="1 4"'))
    return parts


def _end_labels(ends: list[tuple[float, str, str]], box: Box) -> list[str]:
    """Names at the ends of lines, moved apart where they would overlap."""
    body, last = [], -math.inf
    for down, text, color in sorted(ends):
        place = max(down, last + 14)
        last = place
        shown = _shortened(text, 36)
        body.append(
            f'<line x1="{box[2]}" y1="{down:.1f}" x2="{box[2] + 10}" y2="{place:.1f}" stroke="{color}" '
            'stroke-opacity=".5"/>'
            f'<text x="{box[2] + 14}" y="{place + 4:.1f}" font-size="11" fill="{color}">{escape(shown)}'
            f"<title>{escape(text)}</title></text>"
        )
    return body


def layers_figure(layers: dict[str, dict[str, Any]]) -> str:
    """The relative squared error that each node's step left in every block of the decoder, as a heat map.

    layers: of each node its modules and their columns. A cell is the mean over a block's linears of the error of their
    outputs, or of their weights where the step saw no inputs. Nodes whose last step compressed no linears have no row.
    """
    rows = {node: found for node, entry in layers.items() if (found := _block_errors(entry))}
    if not rows:
        return _svg([_message("No step compressed linears.", 80)], 120)
    shown = dict(sorted(rows.items(), key=lambda pair: pair[0].split("/"))[:_MOST_NODES])
    values = [error for found in shown.values() for error, _ in found.values() if error > 0]
    low, high = (math.log(min(values)), math.log(max(values))) if values else (0.0, 0.0)
    blocks = sorted({block for found in shown.values() for block in found})
    left, top, size = 330, 70, 22
    width = min(90.0, (WIDTH - 30 - left) / len(blocks))
    body = [
        '<text x="20" y="24" font-size="14" font-weight="600">Error by block of the decoder</text>',
        f'<text x="{left}" y="44" font-size="12">block</text>',
    ]
    every = math.ceil(20 / width)
    body += [
        f'<text x="{left + (place + 0.5) * width:.1f}" y="{top - 8}" font-size="11" text-anchor="middle">{block}</text>'
        for place, block in enumerate(blocks)
        if place % every == 0
    ]
    for line, (node, found) in enumerate(shown.items()):
        down = top + line * size
        of_weights = " (weights)" if any(what == "weights" for _, what in found.values()) else ""
        body.append(
            f'<text x="{left - 10}" y="{down + 15}" font-size="11" text-anchor="end">'
            f"{escape(_shortened(node, 40))}{of_weights}<title>{escape(node)}</title></text>"
        )
        for place, block in enumerate(blocks):
            if block in found:
                body.append(_cell(node, block, *found[block], (left + place * width, down, width, size), (low, high)))
    bottom = top + len(shown) * size
    more = f" {len(rows) - len(shown)} more nodes are in the page." if len(rows) > len(shown) else ""
    note = (
        "Mean relative squared error of the outputs of a block's linears, or of their weights where it says so; darker "
        f"is more, by its logarithm.{more}"
    )
    body.append(f'<text x="20" y="{bottom + 24}" font-size="11" fill="#555">{note}</text>')
    return _svg(body, bottom + 40)


def _block_errors(entry: dict[str, Any]) -> dict[int, tuple[float, str]]:
    """Of each block the mean error of its linears, and of what it is one; none where the node's step left none."""
    title = next((title for title in ("error", "weight error") if title in entry["columns"]), None)
    if title is None:
        return {}
    blocks: dict[int, list[float]] = {}
    for module, error in zip(entry["modules"], entry["columns"][title], strict=True):
        if error is not None:
            blocks.setdefault(int(module.split(".")[1]), []).append(error)
    what = "outputs" if title == "error" else "weights"
    return {block: (sum(errors) / len(errors), what) for block, errors in blocks.items()}


def _cell(node: str, block: int, error: float, what: str, area: Box, logs: tuple[float, float]) -> str:
    """A rectangle (left, top, width, height) whose shade tells the error between exp(logs[0]) and exp(logs[1])."""
    left, top, width, height = area
    low, high = logs
    share = (math.log(error) - low) / (high - low) if error > 0 and high > low else 0.0
    # From nearly white to the palette's blue.
    shade = ",".join(f"{light + (dark - light) * share:.0f}" for light, dark in ((236, 0), (244, 114), (250, 178)))
    tip = f"{node}, block {block}: error of the {what} {number(error)}"
    text = ""
    if width >= _WIDE:
        color = "#fff" if share > 0.6 else "#1c1e21"
        text = (
            f'<text x="{left + width / 2:.1f}" y="{top + 15:.1f}" font-size="10.5" text-anchor="middle" '
            f'fill="{color}">{number(error, 2)}</text>'
        )
    return (
        f'<g><title>{escape(tip)}</title><rect x="{left:.1f}" y="{top:.1f}" width="{width - 1:.1f}" '
        f'height="{height - 1:.1f}" fill="rgb({shade})"/>{text}</g>'
    )


def profile_figure(name: str, profile: dict[str, list[float]], parameter: dict[str, Any]) -> str:
    """The best objective at each value of a parameter, its fitted value (line) and its 95% interval (shaded)."""
    width, height = 470, 260
    box = (80, 40, width - 20, height - 50)
    values, objective = profile["values"], profile["objective"]
    x, x_ticks = _axis(min(values), max(values), box[0], box[2], logarithmic=False)
    y, y_ticks = _axis(min(objective), max(objective), box[3], box[1], logarithmic=False)
    body = _frame(box, f"Profile of {name}", name, "objective", (x, x_ticks[::2]), (y, y_ticks))
    if parameter["low"] is not None:
        left, right = (min(max(x(parameter[end]), box[0]), box[2]) for end in ("low", "high"))
        body.append(
            f'<rect x="{left:.1f}" y="{box[1]}" width="{right - left:.1f}" height="{box[3] - box[1]}" '
            f'fill="{COLORS[0]}" fill-opacity=".1"/>'
        )
    at = x(parameter["value"])
    body.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{box[1]}" y2="{box[3]}" stroke="#999"/>')
    body.append(_line([(x(value), y(best)) for value, best in zip(values, objective, strict=True)], COLORS[0]))
    return _svg(body, height, width)


# Parts of a figure


def _axis(low: float, high: float, start: float, end: float, logarithmic: bool = True) -> tuple[Scale, list[float]]:
    """A scale from values to pixels, with a margin at both ends, and the values to mark."""
    transform = math.log10 if logarithmic else float
    first, last = transform(low), transform(high)
    margin = 0.06 * (last - first) or (0.1 if logarithmic else max(0.05 * abs(last), 0.05))
    first, last = first - margin, last + margin
    ticks = _logarithmic_ticks(first, last) if logarithmic else _linear_ticks(first, last)
    return lambda value: start + (transform(value) - first) / (last - first) * (end - start), ticks


def _logarithmic_ticks(first: float, last: float) -> list[float]:
    """Round numbers between 10^first and 10^last, at most nine."""
    for mantissas in (
        (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
        (1, 1.5, 2, 3, 5, 7),
        (1, 2, 5),
        (1, 3),
        (1,),
    ):
        exponents = range(math.floor(first), math.ceil(last) + 1)
        found = [m * 10.0**exponent for exponent in exponents for m in mantissas]
        found = [tick for tick in found if first <= math.log10(tick) <= last]
        if len(found) <= 9:
            return found
    step = math.ceil(len(found) / 9)
    return found[::step]


def _linear_ticks(first: float, last: float) -> list[float]:
    rough = (last - first) / 6
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= rough)
    return [step * place for place in range(math.ceil(first / step), math.floor(last / step) + 1)]


def _frame(
    box: Box,
    title: str,
    x_title: str,
    y_title: str,
    x_axis: tuple[Scale, list[float]],
    y_axis: tuple[Scale, list[float]],
    label: Callable[[float], str] = lambda value: f"{value:g}",
) -> list[str]:
    """Title, axes with their ticks, and a grid."""
    left, top, right, bottom = box
    body = [f'<text x="{left}" y="{top - 22}" font-size="14" font-weight="600">{escape(title)}</text>']
    for tick in x_axis[1]:
        at = x_axis[0](tick)
        body.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{bottom}" stroke="#eee"/>')
        body.append(
            f'<text x="{at:.1f}" y="{bottom + 17}" font-size="11" text-anchor="middle">{escape(label(tick))}</text>'
        )
    for tick in y_axis[1]:
        at = y_axis[0](tick)
        body.append(f'<line x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#eee"/>')
        body.append(f'<text x="{left - 7}" y="{at + 4:.1f}" font-size="11" text-anchor="end">{tick:.6g}</text>')
    body.append(f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#777"/>')
    middle = (top + bottom) / 2
    body.append(
        f'<text x="{(left + right) / 2}" y="{bottom + 38}" font-size="12" text-anchor="middle">{escape(x_title)}</text>'
    )
    body.append(
        f'<text x="18" y="{middle}" font-size="12" text-anchor="middle" transform="rotate(-90 18 {middle})">'
        f"{escape(y_title)}</text>"
    )
    return body


def _legend(entries: list[tuple[str, str]], box: Box) -> list[str]:
    body, right = [], box[2]
    for text, color in reversed(entries):
        right -= len(text) * 7.2 + 30
        body.append(
            f'<circle cx="{right:.1f}" cy="{box[1] - 16}" r="4.5" fill="{color}"/>'
            f'<text x="{right + 9:.1f}" y="{box[1] - 12}" font-size="12">{escape(text)}</text>'
        )
    return body


def _shortened(text: str, length: int) -> str:
    """The text with its middle left out, where it is longer."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half - (length - 3) % 2 :]}"


def _line(points: list[tuple[float, float]], color: str, extra: str = "") -> str:
    path = " ".join(f"{across:.1f},{down:.1f}" for across, down in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"{extra}/>'


def _message(text: str, down: int) -> str:
    return f'<text x="{WIDTH / 2}" y="{down}" font-size="14" fill="#777" text-anchor="middle">{escape(text)}</text>'


def _svg(body: list[str], height: int, width: int = WIDTH) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui, DejaVu Sans, sans-serif" fill="#1c1e21">'
        '<rect width="100%" height="100%" fill="#fff"/>' + "\n".join(body) + "</svg>\n"
    )
