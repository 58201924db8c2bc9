"""The page's tables: every number of the study as HTML, section by section."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from html import escape
from typing import Any

from coppice.decisions import Answer
from coppice.formatting import human_count, number, target_of
from coppice.report.figures import profile_figure
from coppice.report.summary import comparisons_note, measured, names_of, perplexities, scores, undistinguished
from coppice.results.schemas import Row
from coppice.study.schema import Study
from coppice.study.tree import nodes

_LONG = 20  # rows: a longer table is folded
_MOST = 40  # rows of a law's own table; the rest are counted

# How rightly a task is answered, from the continuous to the counted: end of the metric's name -> title.
_LADDER = {
    "acc": "accuracy",
    "choice_probability": "choice probability",
    "brier": "Brier score",
    "log_probability": "log probability, nats",
}
_INTRINSIC = {
    "matrix_entropy": "matrix entropy",
    "effective_rank": "effective rank",
    "diff_effective_rank": "difference of effective ranks",
    "matrix_nuclear_norm": "matrix nuclear norm",
}
_CONNECTIVITY = {
    "mode_connectivity": "mode connectivity",
    "barrier_loss": "barrier, nats/token",
    "cka": "CKA",
}
_RANKED = (
    "behind: by how much the error is above the best one's, with the interval over resamples of the runs that both "
    "share. first in: the share of these in which the form has the lowest error."
)

_SPREAD = "\u00b1 is half the interquartile range of the repeats, not half a 95% interval."
_ALONE = (
    "The interval and p are of the pair alone; p, adjusted is raised by Holm's method for all pairs of the measure, "
    "and by it nodes are told apart. So an interval without 0 may stand beside nodes that are not told apart."
)


def sections_of(
    study: Study, tables: dict[str, list[Row]], fits: dict[str, dict[str, Any]], answers: list[Answer]
) -> str:
    """The sections that the study has rows for, each folded under its heading, as HTML.

    tables: rows by table; fits: what each law's fit.json holds; answers: what the laws and the tables advise.
    """
    rows, metrics, comparisons = tables["nodes"], tables["metrics"], tables["comparisons"]
    sections = [
        ("Nodes", _nodes_table(rows, metrics, comparisons)),
        ("From probabilities to accuracy", _ladder_tables(metrics)),
        ("Hidden states", _intrinsic_tables(rows, metrics)),
        ("Connectivity", _connectivity_table(metrics)),
        ("Comparisons", _comparisons(comparisons)),
        ("Signals", _signals_table(tables["signals"])),
        *((f"Law: {name}", _law(fit)) for name, fit in fits.items()),
        ("Decisions", _decisions(answers)),
        ("Costs", _costs_table(tables["costs"])),
        ("Roofline", _roofline_table(tables["costs"])),
        ("Failures", _failures_table(tables["failures"])),
        ("Provenance", _provenance(study, rows)),
    ]
    return "\n".join(_section(title, content) for title, content in sections if content)


def _section(title: str, content: str) -> str:
    name = re.sub(r"\W+", "-", title.lower())
    summary = f"<summary><h3>{escape(title)}</h3></summary>"
    return f'<details class="section" id="section-{name}">{summary}\n{content}\n</details>'


def lead(study: Study, tables: dict[str, list[Row]]) -> str:
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


def _table(titles: list[str], rows: Iterable[list[str]], texts: int | frozenset[int] = 1) -> str:
    """An HTML table; the first `texts` columns, or those at the places `texts`, are text, the others numbers."""
    left = frozenset(range(texts)) if isinstance(texts, int) else texts

    def cells(row: list[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=text' if place in left else ''}>{marked(escape(cell), tag)}</{tag}>"
            for place, cell in enumerate(row)
        )

    def marked(text: str, tag: str) -> str:
        """The text; a title may break behind its underscores, lest metrics' names make a table wide."""
        return text.replace("_", "_<wbr>") if tag == "th" else text

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{cells(titles, 'th')}</tr></thead>\n<tbody>{body}</tbody></table></div>"


def _foldable(titles: list[str], rows: list[list[str]], texts: int | frozenset[int] = 1) -> str:
    """The table, folded where it is long."""
    table = _table(titles, rows, texts)
    return _folded(f"{len(rows)} rows", table) if len(rows) > _LONG else table


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _by_path(names: Iterable[str]) -> list[str]:
    """Each node once, in the order of the tree."""
    return sorted(set(names), key=lambda name: name.split("/"))


def _measured(row: Row | None) -> str:
    return measured(row).replace("+-", "\u00b1")


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
                ", ".join(row["traits"]) or ("dense" if row["depth"] == 0 else ""),
                number(row["stored_bytes"] / 1e6),
                f"{row['bits_per_weight']:.2f}",
                f"{row['rho']:.1%}",
                *(
                    _measured(cells.get((row["node"], *pair))) + (" ~" if (row["node"], *pair) in alike else "")
                    for pair in pairs
                ),
                "" if row["recovery_tokens"] is None else human_count(row["recovery_tokens"]),
                share,
                "" if row["wall_seconds"] is None else f"{row['wall_seconds'] / 60:.1f}",
            ]
        )
    marks = f" {comparisons_note(comparisons)}" if alike else ""
    note = _note(
        "removed: part of all parameters that is gone; zeros of a mask stay stored. recovered: share of the "
        "validation loss that compression cost and recovery won back. \u00b1 is half a 95% interval; "
        "a lopsided one has its ends in brackets." + marks
    )
    return _table(titles, table, texts=2) + note


def _ladder_tables(metrics: list[Row]) -> str:
    """Of each task with continuous scores: how rightly every node answers, by each rung from probability to choice."""
    end = "_choice_probability"
    parts = []
    for evaluation, metric in names_of(metrics, suffix=end):
        task = metric.removesuffix(end)
        wanted = {f"{task}_{rung}": title for rung, title in _LADDER.items()}
        parts += [f"<h4>{escape(f'{task} ({evaluation})')}</h4>", _metrics_table(metrics, evaluation, wanted)]
    if not parts:
        return ""
    return "\n".join(parts) + _note(
        "choice probability: of the right answer among those offered. Brier score: squared error of these "
        "probabilities, between 0 and 2. log probability: of the right answer among all texts."
    )


def _metrics_table(metrics: list[Row], evaluation: str, wanted: dict[str, str]) -> str:
    """Nodes by those metrics of one evaluation, side by side; `wanted`: metric -> title."""
    cells = {(row["node"], row["metric"]): row for row in metrics if row["evaluation"] == evaluation}
    found = {metric: title for metric, title in wanted.items() if any(name == metric for _, name in cells)}
    rows = [
        [node, *(_measured(cells.get((node, metric))) for metric in found)]
        for node in _by_path(node for node, metric in cells if metric in found)
    ]
    return _foldable(["node", *found.values()], rows)


def _intrinsic_tables(rows: list[Row], metrics: list[Row]) -> str:
    """Of each protocol: what the last hidden states say beside the perplexity, with the change from the dense root."""
    parts, model = [], {row["node"]: row["model"] for row in rows}
    for evaluation, entropy in names_of(metrics, prefix="matrix_entropy_"):
        protocol = entropy.removeprefix("matrix_entropy_")
        cells = {(row["node"], row["metric"]): row for row in metrics if row["evaluation"] == evaluation}
        titles = {f"{name}_{protocol}": title for name, title in _INTRINSIC.items()}
        table = [
            [
                node,
                _measured(cells.get((node, f"perplexity_{protocol}"))),
                *(_with_change(cells.get((node, name)), cells.get((model.get(node), name))) for name in titles),
            ]
            for node in _by_path(node for node, metric in cells if metric == entropy)
        ]
        titles_shown = ["node", "perplexity", *titles.values()]
        parts += [f"<h4>{escape(f'{protocol} ({evaluation})')}</h4>", _foldable(titles_shown, table)]
    if not parts:
        return ""
    return "\n".join(parts) + _note(
        "In brackets the change from the dense model. A model that collapses fills less of its space too: a low value "
        "is no good sign by itself, and is to be read beside the perplexity."
    )


def _with_change(row: Row | None, dense: Row | None) -> str:
    if row is None or row["value"] is None:
        return ""
    if dense is None or dense["value"] is None or dense["node"] == row["node"]:
        return number(row["value"])
    return f"{number(row['value'])} ({_signed(row['value'] - dense['value'])})"


def _signed(value: float, digits: int = 2) -> str:
    return f"{'+' if value > 0 else ''}{number(value, digits)}"


def _connectivity_table(metrics: list[Row]) -> str:
    """The regime of each node and its twin of another seed."""
    cells = {(row["node"], row["evaluation"], row["metric"]): row for row in metrics}
    table = []
    for evaluation, connectivity in names_of(metrics, prefix="mode_connectivity_"):
        protocol = connectivity.removeprefix("mode_connectivity_")
        for node in _by_path(node for node, *pair in cells if pair == [evaluation, connectivity]):
            details = json.loads(cells[node, evaluation, connectivity]["details"])
            values = [
                number(row["value"]) if (row := cells.get((node, evaluation, f"{name}_{protocol}"))) else ""
                for name in _CONNECTIVITY
            ]
            regime = f"{details['regime']}: {details['regime_meaning']}"
            table.append([node, protocol, regime, *values])
    if not table:
        return ""
    return _foldable(["node", "text", "regime", *_CONNECTIVITY.values()], table, texts=3) + _note(
        "Each node with its twin, which differs by the seed alone, on the line between their weights. Below 0, mode "
        "connectivity tells of a barrier; CKA is the likeness of their outputs."
    )


def _comparisons(comparisons: list[Row]) -> str:
    """How many pairs of nodes are told apart on each measure, which neighbours are not, and which answers flipped."""
    if not comparisons:
        return ""
    parts = [_measures_table(comparisons)]
    alike = [row for row in comparisons if row["relation"] == "next" and not row["distinguishable"]]
    if alike:
        titles = [
            *("evaluation", "task", "measure", "node", "next better node", "difference"),
            *("95% low, of this pair alone", "high, of this pair alone", "p, of this pair alone", "p, adjusted"),
        ]
        rows = [
            [
                *(row[name] for name in ("evaluation", "task", "measure", "node", "other")),
                _signed(row["difference"], 3),
                *(number(row[name]) for name in ("low", "high", "p_value", "p_adjusted")),
            ]
            for row in alike
        ]
        table = _table(titles, rows, texts=5) + _note(_ALONE)
        pairs = "1 pair" if len(alike) == 1 else f"{len(alike)} pairs"
        parts.append(_folded(f"{pairs} of neighbours in rank that are not told apart", table))
    parts.append(_flips_table(comparisons))
    return "\n".join(parts)


def _measures_table(comparisons: list[Row]) -> str:
    measures: dict[tuple[str, str, str], dict[frozenset[str], bool]] = {}
    for row in comparisons:
        pairs = measures.setdefault((row["evaluation"], row["task"], row["measure"]), {})
        pairs[frozenset((row["node"], row["other"]))] = row["distinguishable"]
    rows = [[*measure, str(len(pairs)), str(sum(pairs.values()))] for measure, pairs in sorted(measures.items())]
    return _table(["evaluation", "task", "measure", "pairs compared", "told apart"], rows, texts=3) + _note(
        "Each node with its dense model, its parent and the next better node of its dense model, by a paired bootstrap "
        "of the items. Told apart: p < 0.05 after Holm's adjustment for all pairs of the measure and, where both were "
        "made with several seeds, a difference beyond what the seeds change."
    )


def _flips_table(comparisons: list[Row]) -> str:
    """The answers that compression turned, of each node against its dense model."""
    rows = [
        [
            row["node"],
            f"{row['task']} ({row['evaluation']})",
            str(row["right_to_wrong"]),
            str(row["wrong_to_right"]),
            f"{row['flip_rate']:.1%}",
            number(row["mcnemar_p"], 2),
        ]
        for row in sorted(comparisons, key=lambda row: row["node"].split("/"))
        if row["relation"] == "dense" and row["measure"] == "accuracy"
    ]
    if not rows:
        return ""
    titles = ["node", "task", "right \u2192 wrong", "wrong \u2192 right", "flipped", "McNemar's p"]
    return "<h4>Answers that flipped against the dense model</h4>" + _foldable(titles, rows, texts=2)


def _signals_table(signals: list[Row]) -> str:
    """What the seed of recovery changes, and how steadily recovery lowers the loss."""
    if not signals:
        return ""
    rows = [
        [
            row["group"],
            f"{row['metric']} ({row['evaluation']})" if row["evaluation"] else row["metric"],
            str(row["seeds"]),
            *(number(row[name]) for name in ("mean", "std", "low", "high", "snr", "item_stderr")),
            row["unit"],
        ]
        for row in signals
    ]
    titles = ["nodes", "metric", "seeds", "mean", "deviation", "95% low", "high", "SNR", "error over items", "unit"]
    return _foldable(titles, rows, texts=2) + _note(
        "deviation: standard deviation over seeds of recovery, with its interval. SNR: mean by deviation. "
        "validation_loss_monotonicity: 1 where the loss only falls with the tokens (Kendall's tau)."
    )


# Laws


def _law(fit: dict[str, Any]) -> str:
    source, parameters = fit["source"], fit["parameters"]
    identifier = f"arXiv {source['arxiv']}" if "arxiv" in source else ""
    parts = [f"<p><code>{escape(source['equation'])}</code><br>{escape(source['title'])}, {escape(identifier)}</p>"]
    parts.append(_note(f"{'; '.join(_facts(fit))}."))
    if sentence := verdict(fit):
        parts.append(f"<p>{escape(sentence)}</p>")
    if parameters:
        parts.append(_parameters_table(parameters))
    parts += [profile_figure(name, profile, parameters[name]) for name, profile in fit.get("profiles", {}).items()]
    for test, errors in fit["held_out"].items():
        parts += [f"<h4>Held out: {escape(test.replace('_', ' '))}</h4>", _held_out(fit, test, errors)]
    if any(len(ranks) > 1 for ranks in fit["ranking"].values()):
        parts.append(_note(_RANKED))
    parts += _details(fit.get("details", {}))
    if fit["notes"]:
        parts += ["<h4>Notes</h4>", _list(fit["notes"])]
    return "\n".join(parts)


def _facts(fit: dict[str, Any]) -> list[str]:
    """What was fitted, how, how well, and in which units."""
    facts = [f"{fit['points']} points of {fit['runs']} runs"]
    if fit.get("objective") is not None:
        options = fit["options"]
        kind = "least squares" if options["huber"] is None else f"Huber's loss (delta {options['huber']:g})"
        facts.append(f"{kind} of {options['residuals']} residuals, objective {number(fit['objective'])}")
    _, unit = target_of(fit)
    for name, value in fit["metrics"].items():
        if value is not None:
            facts.append(f"{name} {number(value)}{f' {unit}' if name == 'rmse' and unit else ''}")
    return facts + [
        f"{name} in {entry['scale']:g} {entry['unit']}"
        for name, entry in fit["units"].items()
        if entry["scale"] and entry["scale"] != 1
    ]


def verdict(fit: dict[str, Any]) -> str:
    """Whether the law passes its own tests, or why it does not; nothing for a fit that does not say."""
    if "passes" not in fit:
        return ""
    if fit["passes"]["ok"]:
        return "The law passes its own tests."
    return f"The law fails its own test, so nothing is recommended from it. {' '.join(fit['passes']['reasons'])}"


def _parameters_table(parameters: dict[str, dict[str, Any]]) -> str:
    rows = [
        [
            name,
            number(entry["value"], 4),
            *(number(entry.get(key)) for key in ("stderr", "low", "high")),
            "yes" if entry["identified"] else "no",
        ]
        # At a bound of the search the refits tell the bound, and not how far the points let the parameter go.
        if not entry.get("at_bound")
        else [name, number(entry["value"], 4), "", "", "", "at its bound"]
        for name, entry in parameters.items()
    ]
    return _table(["parameter", "value", "standard error", "95% low", "high", "identified"], rows)


def _held_out(fit: dict[str, Any], test: str, errors: dict[str, dict[str, Any]]) -> str:
    """The law and its rivals by their error in one test, from the best; sentences where it could not be made."""
    ranks = {entry["form"]: entry for entry in fit["ranking"].get(test, [])}
    target, unit = target_of(fit)
    titles = ["form", f"rmse{f', {unit}' if unit else ''}", "95% low", "high", f"of the {target}"]
    if len(ranks) > 1:
        titles += ["behind", "95% low", "high", "first in"]
    rows = []
    made = {form: error for form, error in errors.items() if "reason" not in error}
    for form, error in sorted(made.items(), key=lambda pair: pair[1]["rmse"]):
        row = [_form(form, fit), *(number(error[key]) for key in ("rmse", "low", "high")), f"{error['relative']:.2%}"]
        if len(ranks) > 1:
            rank = ranks[form]
            row += [*(number(rank[key]) for key in ("behind", "low", "high")), _share(rank["first"])]
        rows.append(row)
    naive = errors.get(fit["law"], {}).get("naive")
    if naive is not None:
        rows.append(["the mean of the points fitted", number(naive), *[""] * (len(titles) - 2)])
    reasons: dict[str, list[str]] = {}
    for form, error in errors.items():
        if "reason" in error:
            reasons.setdefault(error["reason"], []).append(_form(form, fit))
    parts = [_table(titles, rows)] if rows else []
    parts += [
        _note(reason if len(forms) == len(errors) else f"{', '.join(forms)}: {reason}")
        for reason, forms in reasons.items()
    ]
    return "\n".join(parts)


def _form(name: str, fit: dict[str, Any]) -> str:
    return f"{name} (this law)" if name == fit["law"] else name.replace("_", " ")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _details(details: dict[str, Any]) -> list[str]:
    """What a law tells of itself: numbers, and lists or mappings of entries as tables; nothing else."""
    parts = []
    numbers = {name: value for name, value in details.items() if _is_number(value)}
    if numbers:
        parts.append(_numbers_table(numbers))
    for name, value in details.items():
        title = f"<h4>{escape(name.replace('_', ' ').capitalize())}</h4>"
        if isinstance(value, dict) and value and all(map(_is_number, value.values())):
            parts += [title, _numbers_table(value)]
        elif entries := _entries(value):
            parts += [title, _entries_table(entries)]
    return parts


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers_table(numbers: dict[str, Any]) -> str:
    return _foldable(["", "value"], [[name.replace("_", " "), _cell(value)] for name, value in numbers.items()])


def _entries(value: Any) -> list[dict[str, Any]]:
    """The rows of a list of dicts, or of a dict of dicts by its keys, what lies in dicts within them at its own name;
    none for anything else."""
    if isinstance(value, dict):
        within = all(isinstance(entry, dict) for entry in value.values())
        value = [{"": key, **entry} for key, entry in value.items()] if within else []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return []
    return [_flat(entry) for entry in value]


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in entry.items():
        if isinstance(value, dict):
            flat |= {f"{name} {inner}": each for inner, each in value.items() if not isinstance(each, dict | list)}
        elif not isinstance(value, list):
            flat[name] = value
    return flat


def _entries_table(entries: list[dict[str, Any]]) -> str:
    """A column for each name that has a value anywhere; the first rows, the rest counted."""
    names = list(dict.fromkeys(name for entry in entries for name, value in entry.items() if value is not None))
    texts = frozenset(
        place for place, name in enumerate(names) if any(isinstance(entry.get(name), str) for entry in entries)
    )
    rows = [[_cell(entry.get(name)) for name in names] for entry in entries[:_MOST]]
    left = _note(f"{len(entries) - _MOST} more are in fit.json.") if len(entries) > _MOST else ""
    return _foldable([name.replace("_", " ") for name in names], rows, texts) + left


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, float) else "" if value is None else str(value)


# Advice and costs


def _decisions(answers: list[Answer]) -> str:
    """What the laws and the measurements advise, each with what it rests on."""
    parts = []
    for answer in answers:
        parts += [f"<h4>{escape(answer['title'])}</h4>", _list(answer["sentences"]) if answer["sentences"] else ""]
        if "table" in answer:
            titles, *rows = answer["table"]
            parts.append(_table(titles, rows))
    return "\n".join(parts)


def _list(sentences: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _costs_table(costs: list[Row]) -> str:
    """What running each node takes; what its files weigh stands in the table of nodes."""
    shown = [row for row in costs if row["evaluation"]]
    if not shown:
        return ""
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
        return number(row["value"]) + ("" if row["spread"] is None else f" \u00b1 {number(row['spread'] / 2, 2)}")

    ordered = _by_path(row["node"] for row in shown)
    table = [[node, *(cell(node, device, metric) for device, metric, *_ in columns)] for node in ordered]
    repeated = any(row["spread"] is not None for row in shown)
    return _foldable(titles, table) + (_note(_SPREAD) if repeated else "")


def _roofline_table(costs: list[Row]) -> str:
    """Milliseconds that a token takes: as measured, and at least on each device of the roofline."""
    shown = [row for row in costs if row["metric"] == "decode_latency"]
    predicted = [row for row in shown if row["evaluation"] is None]
    if not predicted:
        return ""
    columns = sorted({(row["evaluation"] is None, row["evaluation"] or "", row["device"]) for row in shown})
    cells = {(row["node"], row["evaluation"] or "", row["device"]): 1000 * row["value"] for row in shown}
    titles = ["node"] + [
        f"{evaluation}: {device}" if evaluation else device.removesuffix(" (roofline)")
        for _, evaluation, device in columns
    ]
    ordered = _by_path(row["node"] for row in shown)
    table = [[node, *(number(cells.get((node, *column[1:]))) for column in columns)] for node in ordered]
    devices: dict[str, set[str]] = {}
    for row in predicted:
        devices.setdefault(json.loads(row["details"])["source"], set()).add(row["device"].removesuffix(" (roofline)"))
    sources = "; ".join(f"{', '.join(sorted(names))}: {source}" for source, names in sorted(devices.items()))
    return _foldable(titles, table) + _note(
        "Milliseconds a token after the prompt. Columns of an evaluation are measured; others are lower bounds from "
        "what a node stores and a device's bandwidth and peak. They suppose kernels for the stored format: where "
        f"integers are packed, this software computes in floats. {sources}."
    )


def _failures_table(failures: list[Row]) -> str:
    if not failures:
        return ""
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
