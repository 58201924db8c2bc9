"""Capacity density: how many parameters a reference family would need for a node's score, over those that it has.

Source: Densing Law of LLMs (arXiv 2412.04315). Two steps are fitted to the reference models, which are the dense models
and those trained from scratch:

    L = a N^-alpha + b D^-beta                          the loss law, without an irreducible constant
    S = c / (1 + e^(-gamma (L - l))) + d                the score, gamma < 0

and inverted at one number of tokens D0:

    L^(S) = l - ln(c / (S - d) - 1) / gamma
    N^(S) = ((L^(S) - b D0^-beta) / a)^(-1 / alpha)
    density = N^(S) / N, and by bits N^(S) / (stored bits / 16)

N: parameters; D: tokens of pretraining; L: -ln p of the right answers' texts, nats per item; S: score, a ratio; d is
near chance and c + d near the ceiling. A score at the foot or the top of the sigmoid says little of N^, so that each
density has an interval, from the score's standard error alone: its ends are the densities at S +- 1.96 standard errors.
The options `residuals` and `huber` are about the loss law; the score is fitted by least squares.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from coppice.errors import UserError
from coppice.formatting import join_words, number
from coppice.laws import Law, LawOptions, Residuals
from coppice.laws.fit import (
    Fit,
    Form,
    Objective,
    Parameter,
    Parameters,
    Points,
    bootstrap,
    count,
    fit_form,
    fitted_parameters,
    is_single,
    metrics,
    select,
)
from coppice.laws.held_out import STARTS, leave_one_out, summary
from coppice.laws.quality import METRICS, measured
from coppice.uncertainty import mean_interval

if TYPE_CHECKING:
    import pandas as pd

_PARAMETERS_OF_A_STEP = 4  # each step has four: with no more references than that it is given fewer


class Options(LawOptions):
    """Which benchmark the densities are about, and what is known of the reference models."""

    residuals: Residuals = "logarithmic"
    evaluation: str | None = Field(
        default=None, description="The evaluation that measured; may be left out where one alone has the task."
    )
    task: str | None = Field(
        default=None,
        description="The benchmark task; may be left out where the tables have both accuracy and the log probability "
        "of the right answers for one task alone.",
    )
    nodes: list[str] | None = Field(
        default=None, description="Patterns of the nodes, the reference models among them; null: all of them."
    )
    pretraining_tokens: dict[str, float] = Field(
        default={}, description="Dense model -> tokens that it was pretrained on, of all dense models or of none."
    )
    reference_tokens: float | None = Field(
        default=None, gt=0, description="D0 of the inversion, tokens; null: the most of any reference model."
    )
    chance: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="The score of guessing, d; null: from the number of choices of each item, where it must be known.",
    )
    ceiling: float | None = Field(
        default=None, gt=0, le=1, description="The score of a model without fault, c + d; null: 1 where it is fixed."
    )


def _loss(parameters: Parameters, points: Points) -> np.ndarray:
    """L = a N^-alpha + b D^-beta, nats per item."""
    return (
        parameters["a"] * points["parameters"] ** -parameters["alpha"]
        + parameters["b"] * points["tokens"] ** -parameters["beta"]
    )


def _one_size_or_token_count(points: Points) -> tuple[dict[str, float], list[str]]:
    """The loss law that few references leave: b = 0 without a choice of D, and no alpha without one of N."""
    fixed, notes = {}, []
    if is_single(points["parameters"]):
        fixed["alpha"] = 1.0
        notes.append(
            "The reference models have one size, so alpha is not identified: it is fixed at 1, and no effective size "
            "can be told."
        )
    if is_single(points["tokens"]):
        fixed |= {"b": 0.0, "beta": 1.0}
        notes.append(
            "The reference models have one number of pretraining tokens, or none is given by `pretraining_tokens`, so "
            "the term b D^-beta is left out."
        )
    elif count(points) <= _PARAMETERS_OF_A_STEP:
        fixed |= {"b": 0.0, "beta": 1.0}
        notes.append(
            f"There are {count(points)} reference models, too few for the four parameters of the loss law, so the term "
            "b D^-beta is left out."
        )
    return fixed, notes


def _score(parameters: Parameters, points: Points) -> np.ndarray:
    """S = c / (1 + e^(-gamma (L - l))) + d, with 1 / (1 + e^-x) = (1 + tanh(x / 2)) / 2, which does not overflow."""
    x = parameters["gamma"] * (points["answer_loss"] - parameters["l"])
    return parameters["c"] * (1 + np.tanh(x / 2)) / 2 + parameters["d"]


_COEFFICIENT = Parameter(bounds=(1e-9, 1e15), start=(1, 1e4), logarithmic=True)
_EXPONENT = Parameter(bounds=(1e-3, 3), start=(0.05, 1), logarithmic=True)

LOSS_FORM = Form(
    {"a": _COEFFICIENT, "alpha": _EXPONENT, "b": _COEFFICIENT, "beta": _EXPONENT},
    _loss,
    _one_size_or_token_count,
    target="answer_loss",
    objective=Objective("logarithmic"),
)

SCORE_FORM = Form(
    {
        "c": Parameter(bounds=(1e-3, 1), start=(0.2, 0.9), logarithmic=True),
        "gamma": Parameter(bounds=(-1e4, -1e-6), start=(-20, -0.5)),
        "l": Parameter(bounds=(-1e4, 1e4), start=(0.1, 3)),
        "d": Parameter(bounds=(0, 1), start=(0, 0.5)),
    },
    _score,
    target="score",
)


def score_form(points: Points) -> Form:
    """SCORE_FORM with starts within the losses of the points, whose size is that of the answers' texts."""
    low, high = float(points["answer_loss"].min()), float(points["answer_loss"].max())
    width = max(high - low, 1e-6 * high)
    starts = {"gamma": (-20 / width, -0.5 / width), "l": (low - width / 2, high + width / 2)}
    parameters = {
        name: replace(parameter, start=starts.get(name, parameter.start))
        for name, parameter in SCORE_FORM.parameters.items()
    }
    return replace(SCORE_FORM, parameters=parameters)


def effective_parameters(score: np.ndarray, parameters: Parameters, tokens: float) -> np.ndarray:
    """N^ of each score [n] at D0 = `tokens`; NaN outside d < S < c + d, and where L^ <= b D0^-beta."""
    share = np.asarray(score, float) - parameters["d"]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        odds = parameters["c"] / share - 1
        loss = parameters["l"] - np.log(np.where((share > 0) & (odds > 0), odds, np.nan)) / parameters["gamma"]
        reducible = (loss - parameters["b"] * tokens ** -parameters["beta"]) / parameters["a"]
        return np.where(reducible > 0, reducible, np.nan) ** (-1 / parameters["alpha"])


# Points


def points(tables: dict[str, pd.DataFrame], options: dict[str, Any]) -> Points:
    """One row a node that was measured on the task: what its density is made of.

    reference: 1 of a dense model and of one trained from scratch, 0 of the others; tokens: D, 1 for all where none is
    given; answer_loss: -ln p of the right answer, nats per item; stderr: of the score, 0 where it is missing; chance:
    the score of guessing. Raises UserError where the task, chance or the tokens of a dense model are not told.
    """
    evaluation, task = _choice(tables["metrics"], options)
    chosen = {"evaluation": evaluation, "nodes": options["nodes"]}
    found = measured(tables, chosen | {"metric": f"{task}_acc"})
    answers = measured(tables, chosen | {"metric": f"{task}_log_probability"})
    found = found.merge(answers[["node", "value"]], on="node", suffixes=("", "_of_answers")).sort_values("node")
    chance = options["chance"] if options["chance"] is not None else _chance(tables["items"], evaluation, task)
    if options["ceiling"] is not None and options["ceiling"] <= chance:
        raise UserError(
            f"The law's option `ceiling` is {options['ceiling']:g}, but guessing scores {chance:g}; give a larger one."
        )
    scratch = (found["method"] == "scratch").to_numpy()
    return {
        "run": found["node"].to_numpy(dtype=str),
        "parent": found["parent"].fillna("").to_numpy(dtype=str),
        "model": found["model"].to_numpy(dtype=str),
        "reference": (found["parent"].isna().to_numpy() | scratch).astype(float),
        "parameters": found["parameters"].to_numpy(dtype=float),
        "stored_bits": found["stored_bits"].to_numpy(dtype=float),
        "tokens": _tokens(found, scratch, options["pretraining_tokens"]),
        "answer_loss": -found["value_of_answers"].to_numpy(dtype=float),
        "score": found["value"].to_numpy(dtype=float),
        "stderr": found["stderr"].fillna(0.0).to_numpy(dtype=float),
        "chance": np.full(len(found), float(chance)),
    }


def _choice(metrics: pd.DataFrame, options: dict[str, Any]) -> tuple[str, str]:
    """The evaluation and the task that have both an accuracy and a log probability of the right answers."""
    known = set(zip(metrics["evaluation"], metrics["metric"], strict=True))
    ending = "_log_probability"
    tasks = sorted(
        (evaluation, metric.removesuffix(ending))
        for evaluation, metric in known
        if metric.endswith(ending)
        and (evaluation, f"{metric.removesuffix(ending)}_acc") in known
        and options["evaluation"] in (None, evaluation)
        and options["task"] in (None, metric.removesuffix(ending))
    )
    if len(tasks) == 1:
        return tasks[0]
    if not tasks:
        raise UserError(
            f"The tables hold no accuracy with a log probability of the right answers of {options['task'] or 'a task'};"
            " name a multiple-choice task that was evaluated as the law's option `task`."
        )
    raise UserError(
        f"The tables hold several tasks that the law could be about ({', '.join(': '.join(pair) for pair in tasks)}); "
        "name one by the law's options `task` and `evaluation`."
    )


def _chance(items: pd.DataFrame, evaluation: str, task: str) -> float:
    """The mean over items of 1 / choices; 0 of items without a choice of answers."""
    rows = items[(items["evaluation"] == evaluation) & (items["task"] == task)]
    if rows.empty:
        raise UserError(
            f"The table `items` does not tell how many choices the items of {task!r} have; give the score of guessing "
            "as the law's option `chance`."
        )
    choices = rows[rows["node"] == rows["node"].iloc[0]].groupby("item")["choice"].nunique()
    return float(np.where(choices > 1, 1 / choices, 0).mean())


def _tokens(found: pd.DataFrame, scratch: np.ndarray, pretraining: dict[str, float]) -> np.ndarray:
    """D of each node: that of its dense model, or of its own training from scratch; 1 for all where none is given."""
    if not pretraining:
        return np.ones(len(found))
    missing = sorted(set(found["model"]) - set(pretraining))
    if missing:
        raise UserError(
            f"The law's option `pretraining_tokens` does not name {join_words(missing)}; give the tokens of every "
            "dense model, or of none."
        )
    own = found["model"].map(pretraining).to_numpy(dtype=float)
    return np.where(scratch, found["recovery_tokens"].to_numpy(dtype=float), own)


# The report


def _range(references: Points, options: dict[str, Any]) -> tuple[dict[str, float], list[str]]:
    """c and d where they are fixed, and the sentence that says why."""
    said = options["chance"] is not None or options["ceiling"] is not None
    if not said and count(references) > _PARAMETERS_OF_A_STEP:
        return {}, []
    chance = float(references["chance"].mean())
    ceiling = 1.0 if options["ceiling"] is None else options["ceiling"]
    reason = (
        "as the law's options say"
        if said
        else f"since {count(references)} reference models are too few for the four parameters of the sigmoid"
    )
    return {"c": ceiling - chance, "d": chance}, [
        f"The sigmoid's range is fixed, {reason}: d at chance, {chance:.4g}, and c + d at the ceiling, {ceiling:.4g}."
    ]


def _steps(references: Points, options: dict[str, Any], starts: int) -> tuple[dict[str, tuple[Form, Fit]], list[str]]:
    """Both forms with their fits to the references, and sentences on what they could not tell."""
    loss_form = replace(LOSS_FORM, objective=Objective(options["residuals"], options["huber"]))
    fixed, notes = _range(references, options)
    loss_fit = fit_form(loss_form, references, starts, options["seed"])
    sigmoid = score_form(references)
    score_fit = fit_form(sigmoid, references, starts, options["seed"], fixed)
    return {"loss": (loss_form, loss_fit), "score": (sigmoid, score_fit)}, loss_fit.notes + notes


def _predicted(steps: dict[str, tuple[Form, Fit]], points: Points) -> np.ndarray:
    """S(L(N, D)) [n]: the score of a reference model of each node's size and tokens."""
    (loss_form, loss_fit), (sigmoid, score_fit) = steps["loss"], steps["score"]
    return sigmoid.predict(score_fit.parameters, {"answer_loss": loss_form.predict(loss_fit.parameters, points)})


def _unknown(steps: dict[str, tuple[Form, Fit]]) -> list[str]:
    """Parameters without which no score can be inverted, and that the references do not tell."""
    return [
        name
        for _, fit in steps.values()
        for name in fit.parameters
        if name in fit.unidentified or (name == "alpha" and name in fit.fixed)
    ]


def report(points: Points, options: dict[str, Any]) -> dict[str, Any]:
    """Both fits, their held-out error, and the density of every node, as fit.json says them."""
    references = select(points, points["reference"] == 1)
    if count(references) < 2:
        return _nothing(points, count(references))
    steps, notes = _steps(references, options, options["starts"])
    parameters = {name: value for _, fit in steps.values() for name, value in fit.parameters.items()}
    unknown = _unknown(steps)
    if unknown:
        untold = f"No density is told, since the reference models do not identify {join_words(unknown)}."
        notes.append(untold)
    tested = {"reason": untold} if unknown else _held_out(references, options)
    notes += [
        f"The search for the {name} law ended before the gradient vanished, so its values are not an optimum."
        for name, (_, fit) in steps.items()
        if not fit.converged
    ]
    tokens = options["reference_tokens"] or float(references["tokens"].max())
    reason = f"The reference models do not identify {join_words(unknown)}." if unknown else None
    rows = node_densities(points, parameters, tokens, reason)
    return {
        "parameters": {
            name: entry for step in steps.values() for name, entry in _parameters(*step, references, options).items()
        },
        "metrics": {
            f"{name}_{metric}": metrics(references, form.predict(fit.parameters, references), form.target)[metric]
            for name, (form, fit) in steps.items()
            for metric in ("r2", "rmse")
        },
        "held_out": {"leave_one_reference_out": {"density": tested}},
        "ranking": {},
        "recommendation": _advice(rows, points),
        "notes": notes + _summary(rows, points),
        "points": count(points),
        "runs": count(points),
        "converged": all(fit.converged for _, fit in steps.values()),
        "details": {"reference_tokens": None if "b" in steps["loss"][1].fixed else tokens, "nodes": rows},
        "predicted": _predicted(steps, points),
    }


def _nothing(points: Points, references: int) -> dict[str, Any]:
    """The report where no family can be fitted."""
    number = "is 1 reference model" if references == 1 else f"are {references} reference models"
    sentence = f"There {number}, and a family needs two of different sizes to tell a density by."
    return {
        "parameters": {},
        "metrics": {},
        "held_out": {"leave_one_reference_out": {"density": {"reason": sentence}}},
        "ranking": {},
        "recommendation": [],
        "notes": [sentence],
        "points": count(points),
        "runs": count(points),
        "converged": False,
        "details": {"reference_tokens": None, "nodes": node_densities(points, {}, 1.0, sentence)},
    }


def _parameters(form: Form, fit: Fit, references: Points, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each parameter of a step, with its interval over the reference models drawn again."""
    samples, _ = bootstrap(form, references, fit, options["bootstrap"], options["seed"])
    return fitted_parameters(fit, samples)


def _held_out(references: Points, options: dict[str, Any]) -> dict[str, Any]:
    """Error of the score S(L(N, D)) of each reference model by both steps fitted to the others, and of their mean."""
    folds = leave_one_out(references, "run", "reference model")
    if isinstance(folds, str):
        return {"reason": folds}
    errors, naive, unknown = [], [], set()
    for fold in folds:
        seen, unseen = select(references, ~fold), select(references, fold)
        steps, _ = _steps(seen, options, min(options["starts"], STARTS))
        errors.append((_predicted(steps, unseen) - unseen["score"])[0])
        naive.append((seen["score"].mean() - unseen["score"])[0])
        unknown |= set(_unknown(steps))
    return summary(np.array(errors), references["score"], np.array(naive)) | {"unidentified": sorted(unknown)}


def node_densities(
    points: Points, parameters: dict[str, float], tokens: float, reason: str | None = None
) -> list[dict[str, Any]]:
    """The density of every node at D0 = `tokens`, and beside its parent's; `reason` where none can be told at all.

    density_low is 0 where the interval of the score reaches down to chance; density_high is None, with the reason,
    where it reaches past what a reference model of any size scores. Both are None without a standard error.
    """
    rows = [
        {
            "node": str(points["run"][row]),
            "parent": str(points["parent"][row]) or None,
            "parameters": float(points["parameters"][row]),
            "stored_bits": float(points["stored_bits"][row]),
            "score": float(points["score"][row]),
        }
        for row in range(count(points))
    ]
    for row, stderr in zip(rows, points["stderr"], strict=True):
        row |= _without_density(reason) if reason else _density(row, float(stderr), parameters, tokens)
    found = {row["node"]: row["density"] for row in rows}
    for row in rows:
        beside = found.get(row["parent"])
        # A score just above chance can have a density that a float holds as 0.
        row["relative_to_parent"] = row["density"] / beside if row["density"] is not None and beside else None
    return rows


def _density(row: dict[str, Any], stderr: float, parameters: dict[str, float], tokens: float) -> dict[str, Any]:
    """What the score of a node says of its density."""
    reason = _undefined(row["score"], parameters, tokens)
    if reason:
        return _without_density(reason)
    ends = mean_interval(row["score"], stderr)
    size, low, high = (
        float(each) for each in effective_parameters([row["score"], *ends], parameters, tokens) / row["parameters"]
    )
    known, bounded = stderr > 0, np.isfinite(high)
    return {
        "effective_parameters": size * row["parameters"],
        "density": size,
        # N^ falls to 0 as the score falls to chance.
        "density_low": (low if np.isfinite(low) else 0.0) if known else None,
        "density_high": high if known and bounded else None,
        "density_by_bits": size * row["parameters"] / (row["stored_bits"] / 16),
        "reason": None
        if bounded
        else "The interval of the score reaches past what a reference model of any size scores, so that the density "
        "has no upper end.",
    }


def _without_density(reason: str) -> dict[str, Any]:
    names = ("effective_parameters", "density", "density_low", "density_high", "density_by_bits")
    return dict.fromkeys(names) | {"reason": reason}


def _undefined(score: float, parameters: dict[str, float], tokens: float) -> str | None:
    """Why N^ of a score is undefined; None where it is not."""
    foot, top = parameters["d"], parameters["c"] + parameters["d"]
    if score <= foot:
        return f"The score {score:.4g} is not above {foot:.4g}, where the sigmoid begins: that of guessing."
    if score >= top:
        return f"The score {score:.4g} is not below {top:.4g}, where the sigmoid ends."
    if not np.isfinite(effective_parameters([score], parameters, tokens)[0]):
        return f"The score {score:.4g} is above what a reference model of any size reaches at D0."
    return None


def _advice(rows: list[dict[str, Any]], points: Points) -> list[dict[str, Any]]:
    """For each dense model the node made from it, or itself, that has the largest density by bits."""
    entries = []
    for model in np.unique(points["model"]):
        known = [
            row for row, of in zip(rows, points["model"], strict=True) if of == model and row["density"] is not None
        ]
        if len(known) < 2:
            continue
        best = max(known, key=lambda row: row["density_by_bits"])
        bits = 16 * best["parameters"] / best["stored_bits"]
        low, high = (None if best[end] is None else bits * best[end] for end in ("density_low", "density_high"))
        between = "" if low is None else f" ({number(low)} to {'no upper end' if high is None else number(high)})"
        entries.append(
            {
                "sentence": f"Of the {len(known)} nodes of {model!s} with a density, {best['node']!r} holds the most "
                f"for its bits: density by bits {number(best['density_by_bits'])}{between}.",
                "model": str(model),
                "node": best["node"],
                "density_by_bits": best["density_by_bits"],
                "low": low,
                "high": high,
            }
        )
    return entries


def _summary(rows: list[dict[str, Any]], points: Points) -> list[str]:
    """Sentences on the compressed nodes beside their parents, on undefined densities and missing standard errors."""
    notes = []
    beside = [
        row["relative_to_parent"]
        for row, reference in zip(rows, points["reference"], strict=True)
        if row["relative_to_parent"] is not None and not reference
    ]
    if beside:
        less = sum(relative < 1 for relative in beside)
        notes.append(f"{less} of {len(beside)} compressed nodes are less dense than their parents, by parameters.")
    undefined = sum(row["density"] is None for row in rows)
    if undefined:
        notes.append(f"{undefined} of {len(rows)} nodes have no density; `reason` says why of each.")
    exact = int(np.sum(points["stderr"] == 0))
    if exact:
        notes.append(f"{exact} of {len(rows)} scores have no standard error, so their densities have no interval.")
    return notes


LAW = Law(
    source={
        "title": "Densing Law of LLMs",
        "arxiv": "2412.04315",
        "equation": "L = a N^-alpha + b D^-beta; S = c / (1 + e^(-gamma (L - l))) + d; density = N^(S) / N",
    },
    # The first but the axis is what is drawn.
    units={
        "score": "ratio",
        "parameters": "parameters",
        "stored_bits": "bits",
        "tokens": "tokens",
        "answer_loss": "nats per item",
        "stderr": "ratio",
        "chance": "ratio",
    },
    columns={
        "run": str,
        "parent": str,
        "model": str,
        "reference": float,
        "parameters": float,
        "stored_bits": float,
        "tokens": float,
        "answer_loss": float,
        "score": float,
        "stderr": float,
        "chance": float,
    },
    needs={
        "nodes": ("node", "parent", "model", "method", "parameters", "stored_bits", "recovery_tokens"),
        "metrics": METRICS,
        "items": ("node", "evaluation", "task", "item", "choice"),
    },
    points_are="they are the nodes with an accuracy and a log probability of the right answers on the chosen task.",
    options=Options,
    points=points,
    axis=("parameters", "parameters"),
    report=report,
)
