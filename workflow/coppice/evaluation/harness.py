"""Benchmark tasks, by lm-evaluation-harness (Gao et al., zenodo 10.5281/zenodo.10256836) 0.4.

A task is one of the harness's own (its data come from the Hugging Face hub), one of a folder of YAML files, or the
built-in `biographies`. Of n choices with log-likelihoods l_i = ln p(choice_i | context) and c_i characters,

    acc      = share of items where argmax_i l_i is the right choice,
    acc_norm = share of items where argmax_i l_i / c_i is,

with the standard error of a mean and the interval of a share (`intervals`). The choices' log-likelihoods are kept, so
that two nodes are compared item by item, and the steps from the model's probabilities to an accuracy are measured too,
because each loses some of what compression changes smoothly (Schaeffer et al., arXiv 2406.04391; `choice_scores`).
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partialmethod
from itertools import groupby
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from coppice.data import biographies
from coppice.errors import UserError
from coppice.evaluation import intervals
from coppice.evaluation.batching import sequences_at_once
from coppice.records.base import Json
from coppice.records.metrics import Item
from coppice.uncertainty import mean_stderr

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from numpy.typing import ArrayLike
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

BUILTIN = "biographies"
QUESTIONS = 1000  # about the built-in world when no limit is set
BATCH = 32  # sequences at once: fixed, as sums of floats depend on it
RESAMPLES = 1000  # for the standard errors that have no closed form
UNITS = {"acc": "accuracy", "acc_norm": "accuracy", "acc_bytes": "accuracy", "exact_match": "accuracy"}
CONTINUOUS = {"log_probability": "nats", "choice_probability": "probability", "brier": "squared error"}


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[str],
    *,
    shots: int | None = 0,
    limit: int | None = None,
    task_path: Path | None = None,
    world: biographies.World | None = None,
    seed: int = 0,
) -> tuple[list[Json], list[Item]]:
    """`tasks` on `model` with `shots` solved examples before each item (None: each task's own number).

    `limit` takes the first items of each task; `task_path` is a folder of local tasks; `world` is what `biographies`
    asks about. Returns rows of metrics and of items (one a choice; see `item_rows`).

    Raises UserError for unknown tasks, data that cannot be reached, and `biographies` without a world.
    """
    # Bootstraps would start a process for each core of the machine.
    os.environ["DISABLE_MULTIPROC"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval import evaluator

    with tempfile.TemporaryDirectory(prefix="coppice-tasks-") as folder:
        if BUILTIN in tasks:
            if world is None:
                raise UserError(f"The task {BUILTIN!r} needs to know its world; give the evaluation a `world`.")
            write_biographies(Path(folder), world, limit or QUESTIONS, seed)
        manager = task_manager(tasks, [folder, *([str(task_path)] if task_path else [])])
        with hub_errors(tasks), quiet():
            loaded = manager.load(list(tasks))
            for task in loaded["tasks"].values():
                set_shots(task, shots, seed)
            results = evaluator.evaluate(
                harness_model(model, tokenizer), loaded, limit=limit, bootstrap_iters=RESAMPLES, log_samples=True
            )
    items = item_rows(results["samples"], loaded["tasks"])
    return metric_rows(results) + continuous_rows(items, results), items


def set_shots(task: Any, shots: int | None, seed: int) -> None:
    """Gives a task its number of solved examples; a task that has none by its own definition keeps none."""
    own = task.get_config("num_fewshot")
    task.set_config(key="num_fewshot", value=(own or 0) if shots is None or own == 0 else shots)
    task.set_fewshot_seed(seed=seed)


def harness_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The harness's wrapper of a model in memory, which changes nothing of the model."""
    from lm_eval.models.huggingface import HFLM

    # The wrapper ties the head to the embeddings, whatever is there; what the model has is right.
    model.tie_weights = lambda *arguments, **options: None
    try:
        return HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=sequences_at_once(model, BATCH),
            max_length=model.config.max_position_embeddings,
        )
    finally:
        del model.tie_weights


def task_manager(tasks: Sequence[str], folders: list[str]) -> TaskManager:
    """Knows the local tasks; and the harness's thousands, which take seconds to list, where a name is not local."""
    from lm_eval.tasks import TaskManager

    local = TaskManager(include_path=folders, include_defaults=False)
    if set(tasks) <= set(local.all_tasks):
        return local
    manager = TaskManager(include_path=folders)
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=1)
            suggestion = f"did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists the harness's own."
            raise UserError(f"{task!r} is not a task; {suggestion}")
    return manager


@contextlib.contextmanager
def hub_errors(tasks: Sequence[str]) -> Iterator[None]:
    """Turns what the hub's clients raise where data cannot be reached into one sentence."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except (OSError, DatasetsError, HfHubHTTPError, HFValidationError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"The data of the tasks {', '.join(tasks)} could not be read ({reason}); without a network, use local "
            "tasks (`task_path`), or fetch the data once on a machine that has one."
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Few lines of progress: logs are read by people. Bars move twice a minute; the data sets' library shows none."""
    import datasets
    from tqdm import tqdm

    bars_enabled, original_init = datasets.is_progress_bar_enabled(), tqdm.__init__
    datasets.disable_progress_bars()
    tqdm.__init__ = partialmethod(original_init, mininterval=30)
    try:
        yield
    finally:
        tqdm.__init__ = original_init
        if bars_enabled:
            datasets.enable_progress_bars()


def write_task(folder: Path, name: str, items: Iterable[Mapping[str, Any]], delimiter: str = " ") -> None:
    """Writes a local multiple-choice task: `<name>.yaml` and its data.

    An item is {"context": text, "choices": [texts], "answer": index}; `delimiter` joins context and choice.
    """
    folder = Path(folder).resolve()
    data = folder / f"{name}.jsonl"
    with open(data, "w", encoding="utf-8") as file:
        for item in items:
            row = {"context": item["context"], "choices": list(item["choices"]), "answer": item["answer"]}
            file.write(json.dumps(row) + "\n")
    task = {
        "task": name,
        "dataset_path": "json",
        # The cache is next to the data, so that removing the folder removes it too.
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": delimiter,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def write_biographies(folder: Path, world: biographies.World, count: int, seed: int = 0) -> None:
    """Writes the built-in task: `count` questions about the people of `world`, or as many as it has facts."""
    facts = world.people * len(biographies.ATTRIBUTES)
    write_task(folder, BUILTIN, biographies.questions(world, min(count, facts), seed))


def metric_rows(results: Mapping[str, Any]) -> list[Json]:
    """Every metric of every task and group that the harness returned; with its interval where it is a mean of items."""
    rows: list[Json] = []
    for task, values in results["results"].items():
        entries = _entries(task, results)
        over_items: list[tuple[Json, np.ndarray]] = []
        counts = results["n-samples"].get(task, {})
        details = _details(task, results)
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{filtered}")
            name = f"{task}_{metric}" if filtered == "none" else f"{task}_{metric}_{filtered}"
            row: Json = {
                "metric": name,
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, int | float) else None,
                "n": counts.get("effective", values.get("sample_len")),
                "unit": UNITS.get(metric, metric),
                **details,
            }
            rows.append(row)
            scores = [entry[metric] for entry in entries if entry["filter"] == filtered and metric in entry]
            if _is_mean(value, scores):
                over_items.append((row, np.array(scores, float)))
        _add_intervals(over_items)
    return rows


def _entries(task: str, results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The samples of a task; of a group, those of all tasks below it."""
    below = results["group_subtasks"].get(task, ())
    return results["samples"].get(task, []) + [entry for child in below for entry in _entries(child, results)]


def _is_mean(value: float, scores: list[Any]) -> bool:
    """Whether a metric is the mean of its items' scores; a perplexity is not, nor a group that weighs its tasks."""
    if not scores or not all(isinstance(score, Real | np.bool_) for score in scores):
        return False
    return math.isclose(value, math.fsum(scores) / len(scores), rel_tol=1e-9, abs_tol=1e-12)


def _add_intervals(measured: list[tuple[Json, np.ndarray]]) -> None:
    """Gives each row of metrics the interval of the mean of its items' scores, which come with it."""
    by_count: dict[int, list[tuple[Json, np.ndarray]]] = {}
    for row, scores in measured:
        if np.isin(scores, (0, 1)).all():
            row |= intervals.of_proportion(scores)
        else:
            by_count.setdefault(len(scores), []).append((row, scores))
    for pairs in by_count.values():
        ends = intervals.of_means(np.column_stack([scores for _, scores in pairs]))
        for (row, _), end in zip(pairs, ends, strict=True):
            row |= end


def _details(task: str, results: Mapping[str, Any]) -> Json:
    return {"task": task, "shots": results["n-shot"].get(task), "version": results["versions"].get(task)}


def continuous_rows(items: list[Item], results: Mapping[str, Any]) -> list[Json]:
    """Means over the items of each multiple-choice task of what is continuous in `choice_scores`.

    Items without exactly one right choice are left out.
    """
    metrics: list[Json] = []
    for task, rows in groupby(items, key=lambda row: row["task"]):
        scores = []
        for _, choices in groupby(rows, key=lambda row: row["item"]):
            log_likelihoods, lengths, answers = zip(
                *((row["log_likelihood"], row["length"], row["answer"]) for row in choices), strict=True
            )
            if len(answers) > 1 and answers.count(True) == 1:
                scores.append(choice_scores(log_likelihoods, lengths, answers.index(True)))
        columns = np.array([[score[metric] for metric in CONTINUOUS] for score in scores]).reshape(-1, len(CONTINUOUS))
        columns_with_ends = zip(CONTINUOUS.items(), columns.T, intervals.of_means(columns), strict=True)
        for (metric, unit), values, ends in columns_with_ends if scores else ():
            metrics.append(
                {
                    "metric": f"{task}_{metric}",
                    "value": float(values.mean()),
                    "stderr": mean_stderr(values) if len(values) > 1 else None,
                    **ends,
                    "n": len(values),
                    "unit": unit,
                    **_details(task, results),
                }
            )
    return metrics


def choice_scores(log_likelihoods: ArrayLike, lengths: ArrayLike, answer: ArrayLike) -> dict[str, np.ndarray]:
    """From log-likelihoods to accuracy: items [...] of k choices, with log-likelihoods and lengths [..., k].

    With p^V(i) = exp(l_i) and p^C(i) = p^V(i) / sum_j p^V(j),

        log_probability    = ln p^V(answer)                    (nats)
        incorrect          = ln sum_{i != answer} p^V(i)       (nats)
        choice_probability = p^C(answer)
        brier              = sum_i (1[i = answer] - p^C(i))^2  (between 0 and 2)
        acc                = 1[argmax_i l_i = answer]
        acc_norm           = 1[argmax_i l_i / length_i = answer]

    Source: Schaeffer et al., Why Has Predicting Downstream Capabilities of Frontier AI Models with Scale Remained
    Elusive? (arXiv 2406.04391).
    """
    values, index = np.asarray(log_likelihoods, float), np.asarray(answer)
    is_right = np.arange(values.shape[-1]) == index[..., None]
    right_scores = np.take_along_axis(values, index[..., None], axis=-1)[..., 0]
    incorrect = np.logaddexp.reduce(np.where(is_right, -np.inf, values), axis=-1)
    total = np.logaddexp(right_scores, incorrect)
    probabilities = np.exp(values - total[..., None])
    return {
        "log_probability": right_scores,
        "incorrect": incorrect,
        "choice_probability": np.exp(right_scores - total),
        "brier": ((is_right - probabilities) ** 2).sum(axis=-1),
        "acc": values.argmax(axis=-1) == index,
        "acc_norm": (values / np.asarray(lengths)).argmax(axis=-1) == index,
    }


def item_rows(samples: Mapping[str, list[Mapping[str, Any]]], tasks: Mapping[str, Any]) -> list[Item]:
    """One row a choice of each item: its log-likelihood (nats), its length (characters, as acc_norm divides by),
    whether the item was answered rightly (the same in all rows of an item), and whether the choice is the right one.

    Items that are answered by free generation have no log-likelihood and no rows.
    """
    rows: list[Item] = []
    for task, entries in samples.items():
        for entry in entries:
            first = [responses[0] for responses in entry["resps"]]
            scores = [response[0] if isinstance(response, list | tuple) else response for response in first]
            if not all(isinstance(score, int | float) for score in scores):
                continue
            texts = [arguments[-1] for arguments in entry["arguments"]]
            if "acc_mutual_info" in entry:
                texts = texts[: len(texts) // 2]  # the other half are the same choices without their context
            graded = entry.get("acc", entry.get("exact_match"))
            correct = bool(graded) if graded in (0, 1) else None
            right = set() if correct is None else right_choices(tasks[task], entry, texts)
            rows += [
                {
                    "task": task,
                    "item": str(entry["doc_id"]),
                    "choice": choice,
                    "log_likelihood": float(score),
                    "length": len(text.lstrip()),
                    "correct": correct,
                    "answer": None if correct is None else choice in right,
                }
                for choice, (text, score) in enumerate(zip(texts, scores, strict=False))
            ]
    return rows


def right_choices(task: Any, entry: Mapping[str, Any], texts: list[str]) -> set[int]:
    """Indices of the right choices of a sample; `texts` are the choices as they were scored.

    The harness names them by index or by text; where the choices are contexts, in the text's place.
    """
    target = task.doc_to_text(entry["doc"]) if getattr(task, "multiple_input", 0) else entry["target"]
    stripped = [text.strip() for text in texts]
    indices = set()
    for answer in target if isinstance(target, list) else [target]:
        if isinstance(answer, int):
            indices.add(answer)
        elif isinstance(answer, str) and answer.strip() in stripped:
            indices.add(stripped.index(answer.strip()))
    return indices
