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
near chance and c + d near the ceiling. A score at the foot or the top of the sigmoid says little of N^. Each density
therefore has an interval, from the score's standard error alone: its ends are the densities at S +- 1.96 standard
errors.
The options `residuals` and `huber` are about the loss law; the score is fitted by least squares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from coppice.errors import UserError
from coppice.formatting import join_words
from coppice.laws.contracts import Law, LawReport, Tables
from coppice.laws.density.family import PARAMETERS_OF_A_STEP, Family, fit_family
from coppice.laws.density.nodes import node_densities, recommend_nodes, summarize
from coppice.laws.engine.forms import Reduction
from coppice.laws.engine.held_out import FOLD_STARTS, HeldOutError, leave_one_out, summarize_errors
from coppice.laws.engine.inference import bootstrap, report_parameters
from coppice.laws.engine.metrics import metrics
from coppice.laws.engine.points import Points, count, select
from coppice.laws.options import LawOptions, Residuals
from coppice.laws.points.multiple_choice import ITEMS, chance_accuracy, choose_task
from coppice.laws.points.quality import METRICS, join_quality

if TYPE_CHECKING:
    import pandas as pd


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


# Points


def points(tables: Tables, options: Options) -> Points:
    """One row a node that was measured on the task: what its density is made of.

    reference: 1 of a dense model and of one trained from scratch, 0 of the others; tokens: D, 1 for all where none is
    given; answer_loss: -ln p of the right answer, nats per item; stderr: of the score, 0 where it is missing; chance:
    the score of guessing. Raises UserError where the task, chance or the tokens of a dense model are unknown.
    """
    evaluation, task = choose_task(tables["metrics"], options.evaluation, options.task)
    nodes = join_quality(tables, evaluation, f"{task}_acc", options.nodes)
    answers = join_quality(tables, evaluation, f"{task}_log_probability", options.nodes)
    nodes = nodes.merge(answers[["node", "value"]], on="node", suffixes=("", "_of_answers")).sort_values("node")
    chance = options.chance if options.chance is not None else chance_accuracy(tables["items"], evaluation, task)
    if options.ceiling is not None and options.ceiling <= chance:
        raise UserError(
            f"The law's option `ceiling` is {options.ceiling:g}, but guessing scores {chance:g}; give a larger one."
        )
    scratch = (nodes["method"] == "scratch").to_numpy()
    return {
        "run": nodes["node"].to_numpy(dtype=str),
        "parent": nodes["parent"].fillna("").to_numpy(dtype=str),
        "model": nodes["model"].to_numpy(dtype=str),
        "reference": (nodes["parent"].isna().to_numpy() | scratch).astype(float),
        "parameters": nodes["parameters"].to_numpy(dtype=float),
        "stored_bits": nodes["stored_bits"].to_numpy(dtype=float),
        "tokens": _tokens(nodes, scratch, options.pretraining_tokens),
        "answer_loss": -nodes["value_of_answers"].to_numpy(dtype=float),
        "score": nodes["value"].to_numpy(dtype=float),
        "stderr": nodes["stderr"].fillna(0.0).to_numpy(dtype=float),
        "chance": np.full(len(nodes), float(chance)),
    }


def _tokens(nodes: pd.DataFrame, scratch: np.ndarray, pretraining: dict[str, float]) -> np.ndarray:
    """D of each node: that of its dense model, or of its own training from scratch; 1 for all where none is given."""
    if not pretraining:
        return np.ones(len(nodes))
    missing = sorted(set(nodes["model"]) - set(pretraining))
    if missing:
        raise UserError(
            f"The law's option `pretraining_tokens` does not name {join_words(missing)}; give the tokens of every "
            "dense model, or of none."
        )
    own = nodes["model"].map(pretraining).to_numpy(dtype=float)
    return np.where(scratch, nodes["recovery_tokens"].to_numpy(dtype=float), own)


# The report


def report(points: Points, options: Options) -> LawReport:
    """Both fits, their held-out error, and the density of every node, as fit.json has them."""
    references = select(points, points["reference"] == 1)
    if count(references) < 2:
        return _report_without_family(points, count(references))
    family, notes = _fit(references, options, options.starts)
    if family.unidentified:
        missing = join_words(family.unidentified)
        without = f"No density is reported, since the reference models do not identify {missing}."
        notes.append(without)
        reason, tested = f"The reference models do not identify {missing}.", HeldOutError(reason=without)
    else:
        reason, tested = None, _held_out(references, options)
    notes += [
        f"The search for the {name} law ended before the gradient vanished, so its values are not an optimum."
        for name, fit in family.fits.items()
        if not fit.converged
    ]
    tokens = options.reference_tokens or float(references["tokens"].max())
    nodes = node_densities(points, family.parameters, tokens, reason)
    samples = {name: bootstrap(fit, options.bootstrap, options.seed)[0] for name, fit in family.fits.items()}
    goodness = {
        name: metrics(references, fit.predict(references), fit.problem.form.target) for name, fit in family.fits.items()
    }
    return {
        "parameters": {
            name: entry
            for step, fit in family.fits.items()
            for name, entry in report_parameters(fit, samples[step]).items()
        },
        "metrics": {f"{step}_{name}": values[name] for step, values in goodness.items() for name in ("r2", "rmse")},
        "held_out": {"leave_one_reference_out": {"density": tested}},
        "ranking": {},
        "recommendation": recommend_nodes(nodes, points["model"]),
        "notes": notes + summarize(nodes, points),
        "points": count(points),
        "runs": count(points),
        "converged": all(fit.converged for fit in family.fits.values()),
        "details": {"reference_tokens": None if "b" in family.loss.fixed else tokens, "nodes": nodes},
        "predicted": family.predict_score(points),
    }


def _report_without_family(points: Points, references: int) -> LawReport:
    """The report where no family can be fitted."""
    number = "is 1 reference model" if references == 1 else f"are {references} reference models"
    sentence = f"There {number}, and a family needs two of different sizes for a density."
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


def _fit(references: Points, options: Options, starts: int) -> tuple[Family, list[str]]:
    """Both laws fitted to the references, and sentences on what they do not identify."""
    score_range, notes = _score_range(references, options)
    family = fit_family(references, options.objective(), score_range, starts, options.seed)
    return family, family.loss.notes + notes


def _score_range(references: Points, options: Options) -> Reduction:
    """c and d where they are fixed, and the sentence that says why."""
    by_options = options.chance is not None or options.ceiling is not None
    if not by_options and count(references) > PARAMETERS_OF_A_STEP:
        return {}, []
    chance = float(references["chance"].mean())
    ceiling = 1.0 if options.ceiling is None else options.ceiling
    reason = (
        "as the law's options say"
        if by_options
        else f"since {count(references)} reference models are too few for the four parameters of the sigmoid"
    )
    return {"c": ceiling - chance, "d": chance}, [
        f"The sigmoid's range is fixed, {reason}: d at chance, {chance:.4g}, and c + d at the ceiling, {ceiling:.4g}."
    ]


def _held_out(references: Points, options: Options) -> HeldOutError:
    """Error of the score S(L(N, D)) of each reference model by both laws fitted to the others, and of their mean."""
    folds = leave_one_out(references, "run", "reference model")
    if isinstance(folds, str):
        return {"reason": folds}
    errors, naive, unidentified = [], [], set()
    for fold in folds:
        fitted_rows, held_out_rows = select(references, ~fold), select(references, fold)
        family, _ = _fit(fitted_rows, options, min(options.starts, FOLD_STARTS))
        errors.append((family.predict_score(held_out_rows) - held_out_rows["score"])[0])
        naive.append((fitted_rows["score"].mean() - held_out_rows["score"])[0])
        unidentified |= set(family.unidentified)
    error = summarize_errors(np.array(errors), references["score"], np.array(naive))
    return error | {"unidentified": sorted(unidentified)}


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
        "items": ITEMS,
    },
    points_are="they are the nodes with an accuracy and a log probability of the right answers on the chosen task.",
    options=Options,
    points=points,
    axis=("parameters", "parameters"),
    report=report,
)
