"""Benchmark tasks with a choice of answers: which of them a law is about, and the accuracy of guessing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from coppice.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

ITEMS = ("evaluation", "task", "item", "choice")


def chance_accuracy(items: pd.DataFrame, evaluation: str, task: str) -> float:
    """The mean over the items of a task of 1 / choices; 0 of items without a choice of answers.

    Raises UserError where the table has no items of the task.
    """
    rows = items[(items["evaluation"] == evaluation) & (items["task"] == task)]
    if rows.empty:
        raise UserError(
            f"The tables hold no items of {task!r}, so its accuracy of guessing is not known: give it as the law's "
            "option `chance`."
        )
    choices = rows.groupby("item")["choice"].nunique()
    return float(np.where(choices > 1, 1 / choices, 0).mean())


def choose_task(metrics: pd.DataFrame, evaluation: str | None, task: str | None) -> tuple[str, str]:
    """The evaluation and the task that have both an accuracy and a log probability of the right answers.

    Raises UserError where the options leave none, or several.
    """
    known = set(zip(metrics["evaluation"], metrics["metric"], strict=True))
    ending = "_log_probability"
    tasks = sorted(
        (measured_by, metric.removesuffix(ending))
        for measured_by, metric in known
        if metric.endswith(ending)
        and (measured_by, f"{metric.removesuffix(ending)}_acc") in known
        and evaluation in (None, measured_by)
        and task in (None, metric.removesuffix(ending))
    )
    if len(tasks) == 1:
        return tasks[0]
    if not tasks:
        raise UserError(
            f"The tables hold no accuracy with a log probability of the right answers of {task or 'a task'}; name a "
            "multiple-choice task that was evaluated as the law's option `task`."
        )
    raise UserError(
        f"The tables hold several tasks that the law could be about ({', '.join(': '.join(pair) for pair in tasks)}); "
        "name one by the law's options `task` and `evaluation`."
    )
