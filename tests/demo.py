"""The demo cut small: every part of it runs to its end in seconds, for tests that need a study that really ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

DEMO = Path(__file__).resolve().parents[1] / "config" / "config.yaml"

STEPS = ("magnitude-50", "width-25", "width-50", "svd-80", "gptq-3", "eora-4", "full")
BUDGETS = [2_000, 4_000, 8_000]  # tokens


def cut_demo() -> dict[str, Any]:
    """The study of config/config.yaml, as a YAML reader gives it, with fewer nodes and less of each text.

    What stays as it is: the name, the three shipped models, the text, the options of every method, the kinds of
    calibrations and evaluations, and the law, which needs two pruning rates and three sizes to identify its parameters.
    What is cut, since a job that loads a model takes seconds however small the model is:

    - steps to one of each family, with the chain gptq-3/eora-4, and recipes to those whose steps are left;
    - recoveries to 8,000 tokens, with three budgets for the law, and to few windows of held-out text;
    - windows and questions to as many as give every number a value;
    - qualities to the dense models, the recovered ones of one width, and the others; cost to one node;
    - the law's bootstrap, which repeats the fit.
    """
    study = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    study["budgets"] = BUDGETS
    study["steps"] = {name: step for name, step in study["steps"].items() if name in STEPS}
    study["steps"]["full"] |= {"tokens": BUDGETS[-1], "validation_windows": 16}
    study["recipes"] = [recipe for recipe in map(_cut_recipe, study["recipes"]) if recipe]
    study["calibrations"]["lives"]["windows"] = 16
    quality = study["evaluations"]["quality"]
    quality["perplexity"]["biographies"]["windows"] = 32
    quality |= {"limit": 16, "nodes": [*study["models"], "medium/[!w]*", "*/width-50/full"]}
    study["evaluations"]["cost"] |= {"prompt": 16, "generate": 4, "repeats": 2, "nodes": ["large/width-50/full"]}
    study["laws"]["p2"] |= {"bootstrap": 20, "starts": 8}
    return study


def _cut_recipe(recipe: dict[str, Any]) -> dict[str, Any] | None:
    """A recipe with those of its products' steps that are left; None where a part of it has none left."""
    if "steps" in recipe:
        return recipe if set(recipe["steps"]) <= set(STEPS) else None
    parts = [[step for step in part if step is None or step in STEPS] for part in recipe["product"]]
    return {**recipe, "product": parts} if all(parts) else None
