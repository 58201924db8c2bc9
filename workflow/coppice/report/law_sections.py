"""The page's sections of laws and of what they recommend, as HTML."""

from __future__ import annotations

from html import escape

from pydantic import JsonValue

from coppice.decisions import Answer
from coppice.formatting import number
from coppice.formatting.plotting import svg
from coppice.records.base import Json
from coppice.records.fit import FitRecord, HeldOut, Parameter
from coppice.report import markup
from coppice.report.figures import profile_figure

_MOST = 40  # rows of a law's own table; the rest are counted
_RANKED = (
    "excess: by how much the error exceeds that of the best form, with its interval over resamples of the runs that "
    "both share. best in: the share of these resamples in which the form has the lowest error."
)


def law_section(fit: FitRecord) -> str:
    source, parameters = fit.source, fit.parameters
    identifier = f"arXiv {source['arxiv']}" if "arxiv" in source else ""
    parts = [f"<p><code>{escape(source['equation'])}</code><br>{escape(source['title'])}, {escape(identifier)}</p>"]
    parts.append(markup.note(f"{'; '.join(_facts(fit))}."))
    if sentence := verdict(fit):
        parts.append(f"<p>{escape(sentence)}</p>")
    if parameters:
        parts.append(_parameters_table(parameters))
    for name, profile in fit.profiles.items():
        figure = svg(profile_figure(name, profile, parameters[name]), f"{fit.law} {name}")
        parts.append(markup.image(figure, f"Profile of the objective over {name}"))
    for test, errors in fit.held_out.items():
        parts += [f"<h4>Held out: {escape(test.replace('_', ' '))}</h4>", _held_out(fit, test, errors)]
    if any(len(ranks) > 1 for ranks in fit.ranking.values()):
        parts.append(markup.note(_RANKED))
    parts += _details(fit.details)
    if fit.notes:
        parts += ["<h4>Notes</h4>", markup.bullet_list(fit.notes)]
    return "\n".join(parts)


def _facts(fit: FitRecord) -> list[str]:
    """The points, the objective, the goodness of fit and the units."""
    facts = [f"{fit.points} points of {fit.runs} runs"]
    if fit.objective is not None:
        options = fit.options
        kind = "least squares" if options["huber"] is None else f"Huber's loss (delta {options['huber']:g})"
        facts.append(f"{kind} of {options['residuals']} residuals, objective {number(fit.objective)}")
    _, unit = fit.target_and_unit
    for name, value in fit.metrics.items():
        if value is not None:
            facts.append(f"{name} {number(value)}{f' {unit}' if name == 'rmse' and unit else ''}")
    return facts + [
        f"{name} in {entry.scale:g} {entry.unit}"
        for name, entry in fit.units.items()
        if entry.scale and entry.scale != 1
    ]


def verdict(fit: FitRecord) -> str:
    """Whether the law passes its own tests, or why not; empty for fits of earlier versions, which lack the field."""
    if fit.passes is None:
        return ""
    if fit.passes.ok:
        return "The law passes its own tests."
    return f"The law fails its own test, so nothing is recommended from it. {' '.join(fit.passes.reasons)}"


def _parameters_table(parameters: dict[str, Parameter]) -> str:
    rows = [
        [
            name,
            number(entry.value, 4),
            *map(number, (entry.stderr, entry.low, entry.high)),
            "yes" if entry.identified else "no",
        ]
        # At a bound of the search the interval of the refits reflects the bound, not the points.
        if not entry.at_bound
        else [name, number(entry.value, 4), "", "", "", "at its bound"]
        for name, entry in parameters.items()
    ]
    return markup.table(["parameter", "value", "standard error", "95% low", "high", "identified"], rows)


def _held_out(fit: FitRecord, test: str, errors: dict[str, HeldOut]) -> str:
    """The law and its rivals by their error in one test, from the best; the reason where the test is impossible."""
    ranks = {entry.form: entry for entry in fit.ranking.get(test, [])}
    target, unit = fit.target_and_unit
    titles = ["form", f"rmse{f', {unit}' if unit else ''}", "95% low", "high", f"of the {target}"]
    if len(ranks) > 1:
        titles += ["excess", "95% low", "high", "best in"]
    rows = []
    measured = {form: error for form, error in errors.items() if error.reason is None}
    for form, error in sorted(measured.items(), key=lambda pair: pair[1].rmse or 0.0):
        row = [_form(form, fit), *map(number, (error.rmse, error.low, error.high)), f"{error.relative:.2%}"]
        if len(ranks) > 1:
            rank = ranks[form]
            row += [*map(number, (rank.behind, rank.low, rank.high)), _share(rank.first)]
        rows.append(row)
    own = errors.get(fit.law)
    if own is not None and own.naive is not None:
        rows.append(["the mean of the points fitted", number(own.naive), *[""] * (len(titles) - 2)])
    reasons: dict[str, list[str]] = {}
    for form, error in errors.items():
        if error.reason is not None:
            reasons.setdefault(error.reason, []).append(_form(form, fit))
    parts = [markup.table(titles, rows)] if rows else []
    parts += [
        markup.note(reason if len(forms) == len(errors) else f"{', '.join(forms)}: {reason}")
        for reason, forms in reasons.items()
    ]
    return "\n".join(parts)


def _form(name: str, fit: FitRecord) -> str:
    return f"{name} (this law)" if name == fit.law else name.replace("_", " ")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _details(details: Json) -> list[str]:
    """A law's own details: numbers, and lists or mappings of entries, as tables; anything else is left out."""
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


def _is_number(value: JsonValue) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers_table(numbers: Json) -> str:
    return markup.foldable(["", "value"], [[name.replace("_", " "), _cell(value)] for name, value in numbers.items()])


def _entries(value: JsonValue) -> list[Json]:
    """The rows of a list of dicts, or of a dict of dicts by its keys, with nested dicts flattened; none for anything
    else."""
    if isinstance(value, dict):
        entries = [{"": key, **entry} for key, entry in value.items() if isinstance(entry, dict)]
    elif isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict)]
    else:
        return []
    return [_flatten(entry) for entry in entries] if len(entries) == len(value) else []


def _flatten(entry: Json) -> Json:
    flat: Json = {}
    for name, value in entry.items():
        if isinstance(value, dict):
            flat |= {f"{name} {inner}": each for inner, each in value.items() if not isinstance(each, dict | list)}
        elif not isinstance(value, list):
            flat[name] = value
    return flat


def _entries_table(entries: list[Json]) -> str:
    """A column for each name that has a value anywhere, and the first rows; the rest are counted."""
    names = list(dict.fromkeys(name for entry in entries for name, value in entry.items() if value is not None))
    texts = frozenset(
        place for place, name in enumerate(names) if any(isinstance(entry.get(name), str) for entry in entries)
    )
    rows = [[_cell(entry.get(name)) for name in names] for entry in entries[:_MOST]]
    left = markup.note(f"{len(entries) - _MOST} more are in fit.json.") if len(entries) > _MOST else ""
    return markup.foldable([name.replace("_", " ") for name in names], rows, texts) + left


def _cell(value: JsonValue) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, float) else "" if value is None else str(value)


def decisions(answers: list[Answer]) -> str:
    """The recommendations of laws and measurements, each with its evidence."""
    parts = []
    for answer in answers:
        parts += [f"<h4>{escape(answer['title'])}</h4>", markup.bullet_list(answer["sentences"])]
        if "table" in answer:
            titles, *rows = answer["table"]
            parts.append(markup.table(titles, rows))
    return "\n".join(parts)
