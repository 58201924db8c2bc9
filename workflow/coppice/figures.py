"""The figures of a study's page, as SVG text: size against quality, recovery curves, and a parameter's profile."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from typing import Any

from coppice.summary import interval, measured, perplexities
from coppice.tables import Row, front
from coppice.wording import counted, number

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b6b6b")
WIDTH = 960
_LETTER = 6.3  # width of a letter of a label, px

Scale = Callable[[float], float]


def frontier_figure(rows: list[Row], metrics: list[Row]) -> str:
    """Stored megabytes against perplexity, one panel a protocol, both axes logarithmic, with 95% intervals.

    The line bounds what no node beats: nodes on it are the best at their size. Filled points were recovered on their
    path.
    """
    height, body = 460, []
    pairs = perplexities(metrics)
    by_node = {row["node"]: row for row in rows}
    for place, pair in enumerate(pairs):
        shown = [row for row in metrics if (row["evaluation"], row["metric"]) == pair and row["node"] in by_node]
        body += _frontier_panel(pair, shown, by_node, place * height, height)
    if not pairs:
        body = [_message("No perplexity was measured.", 80)]
    return _svg(body, max(len(pairs) * height, 120))


def _frontier_panel(
    pair: tuple[str, str], shown: list[Row], by_node: dict[str, Row], top: int, height: int
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
    best = front(list(zip(sizes, values, strict=True)))
    body.append(_staircase([(x(sizes[index]), y(values[index])) for index in best], box))
    taken: list[tuple[float, float, float, float]] = []
    points = [(x(size), y(value)) for size, value in zip(sizes, values, strict=True)]
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
    taken: list[tuple[float, float, float, float]],
    box: tuple[float, float, float, float],
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


def _staircase(points: list[tuple[float, float]], box: tuple[float, float, float, float]) -> str:
    """The boundary of what the points reach: at each size the best up to there."""
    steps = [(points[0][0], box[1])]
    for across, down in points:
        steps += [(across, steps[-1][1]), (across, down)]
    steps.append((box[2], steps[-1][1]))
    path = " ".join(f"{across:.1f},{down:.1f}" for across, down in steps)
    return f'<polyline points="{path}" fill="none" stroke="#999" stroke-width="1.5" stroke-dasharray="5 3"/>'


def curves_figure(rows: list[Row], curves: list[Row], fitted: dict[str, list[tuple[float, float]]]) -> str:
    """Validation loss against recovery tokens, one panel a dense model; dashed: the law; grey: the dense loss."""
    runs: dict[str, list[Row]] = {}
    for row in curves:
        if row["split"] == "validation" and row["tokens"] > 0 and row["loss"] is not None:
            runs.setdefault(row["node"], []).append(row)
    model_of = {row["node"]: row["model"] for row in rows}
    models = sorted({model_of[node] for node in runs})
    height, body = 380, []
    for place, model in enumerate(models):
        chosen = {node: points for node, points in sorted(runs.items()) if model_of[node] == model}
        body += _curves_panel(model, chosen, fitted, place * height, height)
    if not models:
        body = [_message("No recovery was run.", 80)]
    return _svg(body, max(len(models) * height, 120))


def _curves_panel(
    model: str, runs: dict[str, list[Row]], fitted: dict[str, list[tuple[float, float]]], top: int, height: int
) -> list[str]:
    box = (70, top + 40, WIDTH - 250, top + height - 55)
    points = [row for rows in runs.values() for row in rows]
    dense = sorted({row["dense_loss"] for row in points if row["dense_loss"] is not None})
    predicted = [loss for node in runs for _, loss in fitted.get(node, [])]
    losses = [row["loss"] for row in points] + dense + predicted
    x, x_ticks = _axis(min(row["tokens"] for row in points), max(row["tokens"] for row in points), box[0], box[2])
    y, y_ticks = _axis(min(losses), max(losses), box[3], box[1], logarithmic=False)
    axes = ((x, x_ticks), (y, y_ticks))
    body = _frame(box, f"Recovery of {model}", "recovery tokens", "validation loss, nats/token", *axes, label=counted)
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
        body.append(_line([(x(row["tokens"]), y(row["loss"])) for row in rows], color))
        for row in rows:
            tip = f"{node}: {number(row['loss'], 4)} nats/token after {counted(row['tokens'])} tokens"
            radius = 4 if row["budget"] else 2
            body.append(
                f'<circle cx="{x(row["tokens"]):.1f}" cy="{y(row["loss"]):.1f}" r="{radius}" fill="{color}">'
                f"<title>{escape(tip)}</title></circle>"
            )
        if node in fitted:
            body.append(
                _line([(x(tokens), y(loss)) for tokens, loss in fitted[node]], color, ' stroke-dasharray="3 4"')
            )
        ends.append((y(rows[-1]["loss"]), node.removeprefix(f"{model}/"), color))
    body += _end_labels(ends, box)
    if any(node in fitted for node in runs):
        body.append(
            f'<text x="{box[2]}" y="{box[1] - 10}" font-size="11" fill="#555" text-anchor="end">'
            "dashed: fitted law</text>"
        )
    return body


def _end_labels(ends: list[tuple[float, str, str]], box: tuple[float, float, float, float]) -> list[str]:
    """Names at the ends of lines, moved apart where they would overlap."""
    body, last = [], -math.inf
    for down, text, color in sorted(ends):
        place = max(down, last + 14)
        last = place
        shown = text if len(text) <= 36 else f"{text[:16]}...{text[-17:]}"
        body.append(
            f'<line x1="{box[2]}" y1="{down:.1f}" x2="{box[2] + 10}" y2="{place:.1f}" stroke="{color}" '
            'stroke-opacity=".5"/>'
            f'<text x="{box[2] + 14}" y="{place + 4:.1f}" font-size="11" fill="{color}">{escape(shown)}'
            f"<title>{escape(text)}</title></text>"
        )
    return body


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
    box: tuple[float, float, float, float],
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


def _legend(entries: list[tuple[str, str]], box: tuple[float, float, float, float]) -> list[str]:
    body, right = [], box[2]
    for text, color in reversed(entries):
        right -= len(text) * 7.2 + 30
        body.append(
            f'<circle cx="{right:.1f}" cy="{box[1] - 16}" r="4.5" fill="{color}"/>'
            f'<text x="{right + 9:.1f}" y="{box[1] - 12}" font-size="12">{escape(text)}</text>'
        )
    return body


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
