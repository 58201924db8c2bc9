"""A study as one page: `index.html`, which needs no other file, with its two figures beside it as SVG."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any

from coppice.decisions import Answer, overview
from coppice.files import atomic_write, read_json
from coppice.study import Study, load_study
from coppice.summary import (
    comparisons_note,
    interval,
    measured,
    perplexities,
    scores,
    undistinguished,
)
from coppice.tables import SCHEMAS, Row, front, read_table
from coppice.tree import nodes
from coppice.wording import counted, held_out_sentence, number

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b6b6b")
WIDTH = 960
_LETTER = 6.3  # width of a letter of a label, px

Scale = Callable[[float], float]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e21; background: #fff; max-width: 1080px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem }
h2 { font-size: 1.2rem; margin-top: 2.4rem; border-bottom: 1px solid #ddd }
h3 { font-size: 1rem; margin-bottom: .3rem }
.lead, .note { color: #555 } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: .5rem 0 }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap }
th { color: #555; font-weight: 600; border-bottom: 1px solid #999 }
td.text, th.text { text-align: left } td.long { white-space: normal; text-align: left; min-width: 20rem }
tr.best td:first-child { font-weight: 600 } code { font-size: 12px; overflow-wrap: anywhere }
svg { max-width: 100%; height: auto }
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--study", required=True, type=Path, help="the study's YAML file")
    parser.add_argument("--results", required=True, type=Path, help="folder of the study's results, with its tables")
    parser.add_argument("--output", required=True, type=Path, help="folder of the page")


def run(arguments: argparse.Namespace) -> None:
    write_report(load_study(arguments.study), arguments.results, arguments.output)


def write_report(study: Study, results: Path, output: Path) -> None:
    """Writes frontier.svg, curves.svg and index.html, last. Raises UserError when the tables are missing."""
    results, output = Path(results), Path(output)
    tables = {name: read_table(results / "tables", name).to_pylist() for name in SCHEMAS if name != "items"}
    laws = {path.parent.name: path.parent for path in sorted(results.glob("laws/*/fit.json"))}
    fits = {name: read_json(folder / "fit.json") for name, folder in laws.items()}
    frontier = frontier_figure(tables["nodes"], tables["metrics"])
    curves = curves_figure(tables["nodes"], tables["curves"], _fitted(laws, fits))
    page = _page(study, tables, fits, overview(results, tables), frontier, curves)
    for name, text in (("frontier.svg", frontier), ("curves.svg", curves), ("index.html", page)):
        with atomic_write(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


# Figures


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


def _fitted(laws: dict[str, Path], fits: dict[str, dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """The law's loss along each run: (tokens, nats per token), for laws of recovery runs that could be fitted."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, folder in laws.items():
        parameters = {key: entry["value"] for key, entry in fits[name]["parameters"].items()}
        if None not in parameters.values() and (folder / "points.parquet").exists():
            found |= _predicted(fits[name], parameters, folder / "points.parquet")
    return found


def _predicted(fit: dict[str, Any], parameters: dict[str, float], path: Path) -> dict[str, list[tuple[float, float]]]:
    import numpy as np
    import pyarrow.parquet as pq

    from coppice import laws

    law = laws.load(fit["law"])
    table = pq.read_table(path)
    if law.form is None or not {"run", "tokens", "dense_loss"} <= set(table.column_names):
        return {}
    found = {}
    columns = {name: np.asarray(table[name].to_pylist()) for name in table.column_names}
    scales = {name: entry["scale"] or 1.0 for name, entry in fit["units"].items()}
    for run_name in np.unique(columns["run"]):
        rows = np.flatnonzero(columns["run"] == run_name)
        tokens = np.geomspace(columns["tokens"][rows].min(), columns["tokens"][rows].max(), 60)
        points = {name: np.repeat(column[rows[:1]], len(tokens)) for name, column in columns.items()} | {
            "tokens": tokens
        }
        scaled = {name: column / scales[name] if name in scales else column for name, column in points.items()}
        loss = law.form.predict(parameters, scaled)
        found[str(run_name)] = [(float(at), float(value)) for at, value in zip(tokens, loss, strict=True)]
    return found


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


def _svg(body: list[str], height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui, DejaVu Sans, sans-serif" fill="#1c1e21">'
        '<rect width="100%" height="100%" fill="#fff"/>' + "\n".join(body) + "</svg>\n"
    )


# The page


def _page(
    study: Study,
    tables: dict[str, list[Row]],
    fits: dict[str, dict[str, Any]],
    answers: list[Answer],
    frontier: str,
    curves: str,
) -> str:
    rows, metrics = tables["nodes"], tables["metrics"]
    sections = [
        ("Size and quality", frontier + _note(
            "Bold: nodes that no other beats in both size and perplexity, which the dashed line joins. Filled points "
            "were recovered on their path. Bars are 95% intervals. Point at a node to read its name."
        )),
        ("Nodes", _nodes_table(rows, metrics, tables["comparisons"])),
        ("Recovery", curves + _note(
            "Large points lie on the study's ladder of budgets; grey lines are the dense models' losses."
        )),
        *((f"Law: {name}", _law(fit)) for name, fit in fits.items()),
        ("Decisions", _decisions(answers)),
        ("Costs", _costs_table(tables["costs"])),
        ("Roofline", _roofline_table(tables["costs"])),
        ("Failures", _failures_table(tables["failures"])),
        ("Provenance", _provenance(study, rows)),
    ]  # fmt: skip
    body = "\n".join(f"<h2>{escape(title)}</h2>\n{content}" for title, content in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(study.study)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>'
        f"<h1>Study {escape(study.study)}</h1>\n<p class=lead>{escape(_lead(study, tables))}</p>\n"
        f"{body}\n</body></html>\n"
    )


def _lead(study: Study, tables: dict[str, list[Row]]) -> str:
    """How much of the study there is."""
    planned, made = len(nodes(study)), len(tables["nodes"])
    failed = len({row["node"] for row in tables["failures"] if row["node"]})
    models = ", ".join(study.models)
    sentence = f"{made} of {planned} nodes made from {models}; {len(tables['metrics'])} measurements"
    if failed:
        sentence += f"; {failed} nodes failed, and what comes after them was not made"
    return f"{sentence}."


def _note(text: str) -> str:
    return f"<p class=note>{escape(text)}</p>"


def _table(titles: list[str], rows: Iterable[list[str]], texts: int = 1, best: frozenset[int] = frozenset()) -> str:
    """An HTML table; the first `texts` columns are text, the others numbers."""

    def cells(row: list[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=text' if place < texts else ''}>{escape(cell)}</{tag}>" for place, cell in enumerate(row)
        )

    body = "\n".join(
        f"<tr{' class=best' if place in best else ''}>{cells(row, 'td')}</tr>" for place, row in enumerate(rows)
    )
    return f"<div class=wide><table><thead><tr>{cells(titles, 'th')}</tr></thead>\n<tbody>{body}</tbody></table></div>"


def _nodes_table(rows: list[Row], metrics: list[Row], comparisons: list[Row]) -> str:
    pairs = perplexities(metrics) + scores(metrics)
    cells = {(row["node"], row["evaluation"], row["metric"]): row for row in metrics}
    alike = undistinguished(comparisons)
    several = len({evaluation for evaluation, _ in pairs}) > 1
    titles = ["node", "state", "MB", "bits/weight", "removed"]
    titles += [f"{evaluation}: {metric}" if several else metric for evaluation, metric in pairs]
    titles += ["recovery tokens", "recovered", "minutes"]
    table = []
    for row in sorted(rows, key=lambda row: row["node"].split("/")):
        share = "" if row["recovered_share"] is None else f"{row['recovered_share']:.0%}"
        table.append(
            [
                "\u2003" * row["depth"] + row["node"].rpartition("/")[2],
                ", ".join(row["marks"]) or ("dense" if row["depth"] == 0 else ""),
                number(row["stored_bytes"] / 1e6),
                f"{row['bits_per_weight']:.2f}",
                f"{row['rho']:.1%}",
                *(
                    measured(cells.get((row["node"], *pair))).replace("+-", "\u00b1")
                    + (" ~" if (row["node"], *pair) in alike else "")
                    for pair in pairs
                ),
                "" if row["recovery_tokens"] is None else counted(row["recovery_tokens"]),
                share,
                "" if row["wall_seconds"] is None else f"{row['wall_seconds'] / 60:.1f}",
            ]
        )
    marks = f" {comparisons_note(comparisons)}" if alike else ""
    note = _note(
        "removed: part of all parameters that is gone; zeros of a mask stay stored. recovered: share of the "
        "validation loss that compression cost and recovery won back. \u00b1 is half a 95% interval." + marks
    )
    return _table(titles, table, texts=2) + note


def _law(fit: dict[str, Any]) -> str:
    source = fit["source"]
    identifier = f"arXiv {source['arxiv']}" if "arxiv" in source else ""
    parts = [f"<p><code>{escape(source['equation'])}</code><br>{escape(source['title'])}, {escape(identifier)}</p>"]
    units = [
        f"{name} in {entry['scale']:g} {entry['unit']}"
        for name, entry in fit["units"].items()
        if entry["scale"] and entry["scale"] != 1
    ]
    quality = [f"{name} {number(value)}" for name, value in fit["metrics"].items() if value is not None]
    facts = [f"{fit['points']} points of {fit['runs']} runs", *quality, *units]
    parts.append(_note("; ".join(facts) + "."))
    rows = [
        [
            name,
            number(entry["value"], 4),
            number(entry["low"]),
            number(entry["high"]),
            "yes" if entry["identified"] else "no",
        ]
        for name, entry in fit["parameters"].items()
    ]
    parts.append(_table(["parameter", "value", "95% low", "95% high", "identified"], rows))
    forms = list(next(iter(fit["held_out"].values()), {}))
    tests = [
        [test.replace("_", " "), form.replace("_", " "), held_out_sentence(errors[form])]
        for test, errors in fit["held_out"].items()
        for form in forms
    ]
    if tests:
        parts += ["<h3>Held-out error</h3>", _table(["test", "law", "error"], tests, texts=3)]
    if fit["notes"]:
        parts += ["<h3>What the fit cannot say</h3>", _list(fit["notes"])]
    return "\n".join(parts)


def _decisions(answers: list[Answer]) -> str:
    """What the laws and the measurements advise, each with what it rests on."""
    parts = []
    for answer in answers:
        parts += [f"<h3>{escape(answer['title'])}</h3>", _list(answer["sentences"]) if answer["sentences"] else ""]
        if "table" in answer:
            titles, *rows = answer["table"]
            parts.append(_table(titles, rows))
    return "\n".join(parts) or _note("No law was fitted, and no perplexity was measured.")


def _list(sentences: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _costs_table(costs: list[Row]) -> str:
    """What running each node takes; what its files weigh stands in the table of nodes."""
    shown = [row for row in costs if row["evaluation"]]
    if not shown:
        return _note("No costs were measured.")
    columns = sorted({(row["device"] or "", row["metric"], row["unit"], row["simulated"]) for row in shown})
    cells = {(row["node"], row["device"] or "", row["metric"]): row for row in shown}
    titles = ["node"] + [
        f"{metric}, {unit} ({device}{', simulated' if simulated else ''})"
        for device, metric, unit, simulated in columns
    ]

    def cell(node: str, device: str, metric: str) -> str:
        row = cells.get((node, device, metric))
        if row is None or row["value"] is None:
            return ""
        return number(row["value"]) + ("" if row["spread"] is None else f" \u00b1 {number(row['spread'], 2)}")

    ordered = sorted({row["node"] for row in shown}, key=lambda name: name.split("/"))
    return _table(titles, [[node, *(cell(node, device, metric) for device, metric, *_ in columns)] for node in ordered])


def _roofline_table(costs: list[Row]) -> str:
    """Milliseconds that a token takes: as measured, and at least on each device of the roofline."""
    shown = [row for row in costs if row["metric"] == "decode_latency"]
    predicted = [row for row in shown if row["evaluation"] is None]
    if not predicted:
        return _note("No times were predicted.")
    columns = sorted({(row["evaluation"] is None, row["evaluation"] or "", row["device"]) for row in shown})
    cells = {(row["node"], row["evaluation"] or "", row["device"]): 1000 * row["value"] for row in shown}
    titles = ["node"] + [
        f"{evaluation}: {device}" if evaluation else device.removesuffix(" (roofline)")
        for _, evaluation, device in columns
    ]
    ordered = sorted({row["node"] for row in shown}, key=lambda name: name.split("/"))
    table = [[node, *(number(cells.get((node, *column[1:]))) for column in columns)] for node in ordered]
    devices: dict[str, set[str]] = {}
    for row in predicted:
        devices.setdefault(json.loads(row["details"])["source"], set()).add(row["device"].removesuffix(" (roofline)"))
    sources = "; ".join(f"{', '.join(sorted(names))}: {source}" for source, names in sorted(devices.items()))
    return _table(titles, table) + _note(
        "Milliseconds a token after the prompt. Columns of an evaluation are measured; others are lower bounds from "
        "what a node stores and a device's bandwidth and peak. They suppose kernels for the stored format: where "
        f"integers are packed, this software computes in floats. {sources}."
    )


def _failures_table(failures: list[Row]) -> str:
    if not failures:
        return _note("None.")
    rows = [[row["node"] or "", row["stage"], row["error"], row["log"]] for row in failures]
    return _table(["node", "stage", "error", "log"], rows, texts=4)


def _provenance(study: Study, rows: list[Row]) -> str:
    sources = [
        [row["model"], row["source_kind"] or "", row["source"] or "", row["source_revision"] or ""]
        for row in rows
        if row["depth"] == 0
    ]
    versions: dict[str, set[str]] = {}
    for row in rows:
        for name, version in json.loads(row["versions"]).items():
            versions.setdefault(name, set()).add(version)
    made = [[name, ", ".join(sorted(found))] for name, found in sorted(versions.items())]
    identities = [
        [
            row["node"],
            str(row["seed"]),
            row["fingerprint"],
            row["calibration"] or "",
            (row["calibration_fingerprint"] or "")[:12],
        ]
        for row in rows
    ]
    return "\n".join(
        [
            f"<p>Seed of the study: {study.seed}.</p>",
            _table(["model", "kind", "source", "revision"], sources, texts=4),
            _table(["software", "version"], made, texts=2),
            "<details><summary>Fingerprints of all nodes</summary>",
            _table(["node", "seed", "weights", "calibration", "its tokens"], identities, texts=5),
            "</details>",
        ]
    )
